"""`--engine ray`: one worker per GPU of the cluster, or per CPU slot without GPUs; each runs its part as usual.

Ray starts the workers, and restarts those that die. The work is divided by the assignments in the cache.
"""

import os
from contextlib import ExitStack
from typing import Any

from precompute.assignments import Part
from precompute.report import Report, merge
from shared.config import Config
from shared.console import say
from shared.errors import PrecogError, UsageError
from shared.signals import raise_on_signal

MAX_RESTARTS = 3


class Worker:
    """One process of the cluster."""

    def precompute(self, config: Config, part: Part) -> Report:
        """Run stage 1 on one part."""
        from precompute.run import precompute
        from shared.console import quiet_libraries

        quiet_libraries()
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(part.index), str(part.count)  # only rank 0 prints
        return precompute(config, part)


def precompute_with_ray(config: Config) -> Report:
    """Run stage 1 on the cluster of RAY_ADDRESS, else on a local one; return the merged report.

    Raises as `precompute` does, `UsageError` if Ray is not installed or the cluster does not answer, and `PrecogError`
    if all workers are lost. A signal ends the workers at once; unfinished shards are lost.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Keeps Ray's servers on the loopback, on Linux too; Ray reads it when it is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        advice = "run `make setup EXTRAS=\"ray\"` or `pip install -e '.[ray]'` from the clone"
        raise UsageError(f"--engine ray: Ray is not installed; {advice}") from None
    with ExitStack() as cleanup:
        if not ray.is_initialized():
            _connect(ray, address)
            cleanup.callback(ray.shutdown)
        count, needs = worker_slots(ray.cluster_resources(), config.precompute.decode_workers)
        # Ray restarts a process that dies; an exception of `precompute` would be the same again, and is raised here.
        actor = ray.remote(max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS, **needs)(Worker)
        workers = [actor.remote() for _ in range(count)]
        for worker in workers:
            cleanup.callback(ray.kill, worker)
        cleanup.enter_context(raise_on_signal("finished shards are stored"))  # ray.init has replaced the handlers
        waiting = [worker.precompute.remote(config, Part(index, count)) for index, worker in enumerate(workers)]
        return merge(_reports(ray, waiting))


def _connect(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address or "local", include_dashboard=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"RAY_ADDRESS = {address!r}: no cluster answers ({reason}); start one or unset it") from None


def worker_slots(resources: dict[str, float], decode_workers: int) -> tuple[int, dict[str, float]]:
    """Return the number of workers, and each worker's resource request for Ray."""
    gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
    share = min(cpus, 1 + decode_workers)
    if gpus:
        return gpus, {"num_gpus": 1, "num_cpus": min(share, cpus / gpus)}
    return cpus // share, {"num_cpus": share}


def _reports(ray: Any, waiting: list[Any]) -> list[Report]:
    """Return the workers' reports, or raise a worker's error as if it had happened here.

    Every worker goes on until nothing is missing, so the others make the shards of a worker that is lost with its node.
    """
    reports: list[Report] = []
    lost = ""
    while waiting:
        done, waiting = ray.wait(waiting)
        for reference in done:
            try:
                reports.append(ray.get(reference))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayActorError as error:
                lost = str(error).strip().partition("\n")[0]
                say(f"warning: a Ray worker is lost ({lost[:200]}); the other workers make its shards")
    if not reports:
        raise PrecogError(f"--engine ray: every worker died {MAX_RESTARTS + 1} times ({lost}); check their logs")
    return reports
