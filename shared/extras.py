"""Optional packages, each needed by one option and imported only then."""

from importlib.util import find_spec

from shared.errors import UsageError


def require_extra(module: str, option: str, extra: str) -> None:
    """Raise `UsageError` if the package `module` of this project's `extra` is not installed."""
    if find_spec(module) is None:
        raise UsageError(f"{option}: package {module} not found; run `pip install -e '.[{extra}]'` in the clone")
