"""Items made ahead in a thread while the consumer is busy, and a consumer that hears a signal while it waits."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar

POLL_SECONDS = 0.2
LEAVE_SECONDS = 1.0

Item = TypeVar("Item")


@dataclass(frozen=True)
class _End:
    """No more items, for this reason if it is a fault."""

    error: Exception | None


def ahead(items: Iterable[Item], limit: int, check: Callable[[], None] = lambda: None) -> Generator[Item, None, None]:
    """The items in order, at most `limit` of them waiting; `check` is called before each one and while waiting for it.

    What the items raise comes after the items before it; what `check` raises comes at once. Left early, the thread ends
    at its next item; one that is stuck inside an item is left behind, and does not keep the process alive.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(limit)
    left = threading.Event()

    def put(item: Item | _End) -> bool:
        while not left.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                if not put(item):
                    break
            put(_End(None))
        except Exception as error:  # raised where it can be acted upon
            put(_End(error))
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            check()
            try:
                item = ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return
    finally:
        left.set()
        while not ready.empty():
            ready.get_nowait()
        thread.join(LEAVE_SECONDS)
