"""Where a run goes on: the checkpoint that `train.resume_from_checkpoint` asks for, the same one on every process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared import console
from shared.atomic_files import sync_folder
from shared.errors import CacheError, PrecogError, UsageError
from shared.fingerprint import Json
from train.checkpoint.files import Checkpoint, commit_of, latest_checkpoint, load_checkpoint, newest_first, step_of
from train.checkpoint.identity import Base, differences, identify_base, identity_of, refuse_another_run
from train.distributed import gather, on_main, together
from train.run import Run

ABANDONED = "abandoned-"
"""In the run folder, with a number: checkpoints that the run left for a branch; who wants one back moves it back."""
BASE = "base"
"""In state.json: hash and marks of the transformer's weights."""
BRANCH = "branch"
"""In state.json: {"from": name, "commit": its hash} of the checkpoint that the user last named to begin at."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run stands before its next step."""

    checkpoint: Checkpoint | None
    """None at the beginning."""
    base: Base
    state: dict[str, Json]
    """What every checkpoint of this run says of it."""


def find_start(run: Run) -> Start:
    """Choose, load, verify and compare on all processes; if one cannot, all raise the same `PrecogError`."""
    folder, request = run.config.train.output_dir, run.config.train.resume_from_checkpoint
    checkpoint = _agreed_checkpoint(folder, request)
    state = {} if checkpoint is None else checkpoint.state
    base = together(lambda: identify_base(run.base, state.get(BASE)))
    identity = together(lambda: identity_of(run, base))
    if checkpoint is not None:
        where = str(checkpoint.path)
        together(lambda: refuse_another_run(state, identity, where))
    step = 0 if checkpoint is None else checkpoint.step
    _refuse_differences(gather({"step": step, "last step": run.num_steps, **identity}))
    branch = branch_of(checkpoint, request)
    if checkpoint is not None and branch is not None and checkpoint.path.name == branch["from"]:
        begun = checkpoint
        on_main(lambda: abandon_newer(folder, begun, report=console.say))
    return Start(checkpoint, base, {"identity": identity, BASE: base.as_json(), BRANCH: branch})


def _agreed_checkpoint(folder: Path, request: str) -> Checkpoint | None:
    """What rank 0 chooses. The others load the checkpoint of that name, whose COMMIT.json seals all of its bytes."""
    found = on_main(lambda: find_checkpoint(folder, request, report=console.say))
    chosen = gather(None if found is None else (found.path.name, found.commit))[0]
    if chosen is None:
        return None
    name, commit = chosen
    return together(lambda: found or _load_chosen(folder, name, commit))


def _load_chosen(folder: Path, name: str, commit: str) -> Checkpoint:
    hint = "rank 0 chose it, and all processes have to see one and the same train.output_dir"
    try:
        checkpoint = load_checkpoint(folder / name)
    except CacheError as error:
        raise CacheError(f"{error}; {hint}") from None
    if checkpoint.commit != commit:
        raise CacheError(f"{checkpoint.path}: another checkpoint than rank 0 has under this name; {hint}")
    return checkpoint


def _refuse_differences(runs: list[dict[str, Json]]) -> None:
    """Raises `CacheError`, the same on every process."""
    for rank, theirs in enumerate(runs):
        found = [f"{name} is {there!r} there, {here!r} on rank 0" for name, there, here in differences(theirs, runs[0])]
        if found:
            raise CacheError(
                f"rank {rank}: another run than that of rank 0 ({', '.join(found)}); "
                "all processes need the same config, cache, base model and checkpoints"
            )


def find_checkpoint(run: Path, request: str, *, report: Report) -> Checkpoint | None:
    """What `train.resume_from_checkpoint` asks for: "latest", a name, or "none"; None starts from the beginning.

    A name begins a branch there, or goes on with the branch that it began before: with the newest intact checkpoint, if
    that is of it. Raises `UsageError` for a name that is not there, and for "none" where there are checkpoints.
    """
    there = [path.name for path in reversed(newest_first(run))]
    if request == "latest":
        return latest_checkpoint(run, report=report)
    if request == "none":
        if there:
            raise UsageError(
                f'train.resume_from_checkpoint = "none", but {run} has {", ".join(there)}: '
                'choose another train.output_dir, move them away, or take "latest" to go on'
            )
        return None
    name = request.rstrip("/")
    if (begun := _begun_at(run, name, report)) is not None:
        return begun
    if name not in there:
        raise UsageError(
            f"train.resume_from_checkpoint = {request!r} is not in {run}: there are {', '.join(there) or 'none'}"
        )
    return load_checkpoint(run / name)


def _begun_at(run: Path, name: str, report: Report) -> Checkpoint | None:
    """The newest intact checkpoint, if it is of a branch that began at `name`, which may have been pruned since."""
    problems: list[str] = []
    try:
        newest = latest_checkpoint(run, report=problems.append)
    except CacheError:
        return None
    branch = None if newest is None else newest.state.get(BRANCH)
    if branch is None or branch["from"] != name or commit_of(run / name) not in (None, branch["commit"]):
        return None
    for problem in problems:
        report(problem)
    return newest


def branch_of(checkpoint: Checkpoint | None, request: str) -> dict[str, str] | None:
    """What a run that goes on from `checkpoint`, as asked, writes as its `BRANCH`."""
    if checkpoint is None:
        return None
    if checkpoint.path.name == request.rstrip("/"):
        return {"from": checkpoint.path.name, "commit": checkpoint.commit}
    branch: dict[str, str] | None = checkpoint.state.get(BRANCH)
    return branch


def abandon_newer(run: Path, checkpoint: Checkpoint, *, report: Report) -> None:
    """Move the checkpoints beyond this one into a new folder `run/abandoned-{number}`, where nothing looks for them.

    Raises `PrecogError` if that cannot be done.
    """
    newer = [path for path in newest_first(run) if step_of(path) > checkpoint.step]
    if not newer:
        return
    folder = run / f"{ABANDONED}{1 + max(map(_number_of, run.glob(f'{ABANDONED}*')), default=0)}"
    try:
        folder.mkdir()
        for path in newer:
            path.rename(folder / path.name)
        sync_folder(folder)
        sync_folder(run)
    except OSError as error:
        raise PrecogError(f"{folder}: {error.filename} cannot be moved there ({error.strerror or error})") from error
    names = ", ".join(path.name for path in reversed(newer))
    report(f"a branch begins at {checkpoint.path.name}: {names} moved to {folder}")


def _number_of(path: Path) -> int:
    number = path.name.removeprefix(ABANDONED)
    return int(number) if number.isascii() and number.isdigit() else 0
