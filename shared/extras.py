"""Packages that are optional: asked for by one option each, and imported only then."""

from importlib.util import find_spec

from shared.errors import UsageError


def require_extra(module: str, what: str, extra: str) -> None:
    """Raises `UsageError` naming the extra of this package if `module` is not installed."""
    if find_spec(module) is None:
        raise UsageError(f"{what} needs the package {module}: pip install 'precog[{extra}]'")
