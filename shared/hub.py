"""Uploads to the hub. The token comes from the environment or the login store, and no message holds it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from shared.atomic_files import TEMPORARY
from shared.errors import PrecogError, UsageError, one_line

REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def upload_folder(
    folder: Path,
    repository: str,
    kind: Literal["model", "dataset"],
    patterns: Sequence[Sequence[str]] = (("*",),),
    *,
    public: bool = False,
) -> str:
    """Upload the files of a folder, those of one group of `patterns` after the other; return the page's address.

    The same call continues after a kill: what the hub has is not sent again. A new repository is private unless
    `public`; an existing one stays as it is. Raises `UsageError` without access, and `PrecogError` for other failures.
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    hub = HfApi()
    with hub_errors(repository):
        page = hub.create_repo(repository, repo_type=kind, private=not public, exist_ok=True)
        for group in patterns:
            hub.upload_folder(
                repo_id=repository,
                repo_type=kind,
                folder_path=folder,
                allow_patterns=list(group),
                ignore_patterns=[f"*{TEMPORARY}*"],
                commit_message="Upload with Precog",
            )
    return str(page)


def check_repository(name: str) -> None:
    """Raise `UsageError` unless `name` is that of a user's or organization's repository."""
    if not REPOSITORY.fullmatch(name):
        raise UsageError(f"{name!r}: not a repository of the hub; write it as user/name")


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Raise any error of the hub as one line without the token."""
    from huggingface_hub import get_token

    try:
        yield
    except Exception as error:  # the hub's client raises what the libraries below it raise
        errors = [each for each in (error, error.__cause__) if isinstance(each, Exception)]
        message = " ".join(map(one_line, errors)).replace(get_token() or "\0", "***")
        if {getattr(getattr(each, "response", None), "status_code", None) for each in errors} & {401, 403, 404}:
            advice = "run `hf auth login` or set HF_TOKEN to a token that may write there"
            raise UsageError(f"{repository}: {message}; {advice}") from None
        raise PrecogError(f"{repository}: {message}; run the same command again to continue") from None
