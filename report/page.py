"""Rendering of self-contained pages: Jinja2 templates with autoescape, inline styles, charts and scripts."""

import json
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shared.atomic_files import replacing


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write the rendered page, whole or not at all; return its path. The same values give the same bytes."""
    text = _environment().get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as pending:
        pending.write_text(text, encoding="utf-8")
    return path


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["script_json"] = script_json
    found.filters["number"] = number
    found.globals["chart_library"] = chart_library
    return found


def script_json(value: Any) -> Markup:
    """Return JSON that is safe inside a script element: it cannot end the element, whatever names it holds."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def number(value: float | None, form: str = ".4g") -> str:
    """Return the number as text; a missing value is a dash, never a zero."""
    return "-" if value is None else format(value, form)


@cache
def chart_library() -> Markup:
    """Return Vega, Vega-Lite and vega-embed as one script for use without a network.

    vl-convert takes three seconds to bundle them, so the bundle is kept in the user's cache folder.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "precog"
    kept = folder / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError):
        return Markup(kept.read_text("utf-8"))
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as pending:
            pending.write_text(bundle, encoding="utf-8")
    return Markup(bundle)
