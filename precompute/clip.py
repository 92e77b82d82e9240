"""Records of stage 1 that every module may import: a clip, and the reason for one that is left out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the modules that make these import `Skipped`
    from precompute.sources.rows import Source
    from precompute.video.probe import Probe
    from precompute.video.windows import Window


@dataclass(frozen=True, slots=True)
class Skipped:
    """The reason why a source or clip is left out."""

    reason: str
    """One short line; reports count reasons up to the first colon."""
    permanent: bool = True
    """True for a bad file, False for a failure that a later run may not have."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A window of a source with its captions, named by its key."""

    source: "Source"
    probe: "Probe"
    window: "Window"
    key: str
