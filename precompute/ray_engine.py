"""`--engine ray`: a worker per GPU of the cluster, or per CPU slot where there is none, each the usual run of its part.

Ray starts the workers and starts the dead ones again; the work is divided as it always is, by the plan in the cache.
"""

import os
from typing import Any

from precompute.assignments import Part
from precompute.report import Report, merge
from shared.config import Config
from shared.errors import PrecogError, UsageError
from shared.signals import raise_on_signal

MAX_RESTARTS = 3
POLL_SECONDS = 0.5


class Worker:
    """One process of the cluster."""

    def precompute(self, config: Config, part: Part) -> Report:
        from precompute.run import precompute
        from shared.console import quiet_libraries

        quiet_libraries()
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(part.index), str(part.count)  # the first one speaks for all
        return precompute(config, part)


def precompute_with_ray(config: Config) -> Report:
    """Stage 1 on the cluster of RAY_ADDRESS, or else on one made here; counts are summed over workers.

    Raises as `precompute` does, `UsageError` if Ray is not installed or the cluster does not answer, and `PrecogError`
    for a worker that dies more than `MAX_RESTARTS` times. A signal here ends the workers at once, which costs the
    shards in work.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # On Linux too this keeps all of Ray's servers on the loopback; Ray reads it when it is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray: pip install 'precog[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    workers: list[Any] = []
    try:
        return _run(ray, config, workers)
    finally:
        for worker in workers:
            ray.kill(worker)
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address or "local", include_dashboard=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"RAY_ADDRESS = {address!r}: no Ray cluster answers there ({reason})") from None


def _run(ray: Any, config: Config, workers: list[Any]) -> Report:
    """Start the workers, which are added to `workers`, and wait for them."""
    count, needs = _slots(ray.cluster_resources(), config.precompute.decode_workers)
    # Ray starts again what dies; what `precompute` raises would be the same the second time, and comes here.
    actor = ray.remote(max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS, **needs)(Worker)
    workers += [actor.remote() for _ in range(count)]
    waiting = [worker.precompute.remote(config, Part(index, count)) for index, worker in enumerate(workers)]
    reports: list[Report] = []
    with raise_on_signal(
        "finished shards are stored"
    ):  # Ray has set its own handler, which would end this process with another code
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            reports += [_result(ray, reference) for reference in done]
    return merge(reports)


def _slots(resources: dict[str, float], decode_workers: int) -> tuple[int, dict[str, float]]:
    """How many workers, and what each asks Ray for."""
    gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
    share = min(cpus, 1 + decode_workers)
    if gpus:
        return gpus, {"num_gpus": 1, "num_cpus": min(share, cpus / gpus)}
    return cpus // share, {"num_cpus": share}


def _result(ray: Any, reference: Any) -> Report:
    """What a worker gave back; its error as if it had been raised here."""
    try:
        report: Report = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().partition("\n")[0]
        raise PrecogError(f"a Ray worker died {MAX_RESTARTS + 1} times: {reason}") from None
    return report
