"""What both passes of a run share."""

from dataclasses import dataclass

from precompute.plan import Part
from precompute.recipes import Encoders
from precompute.report import Report
from shared.config import Config
from shared.files import Storage
from shared.preemption import StopSignal


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of stage 1."""

    config: Config
    storage: Storage
    encoders: Encoders
    part: Part
    stop: StopSignal
    report: Report
