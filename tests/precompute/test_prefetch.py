"""Items come in order, early, and a fault comes where it belongs."""

import threading
import time
from collections.abc import Iterator

import pytest

from precompute.prefetch import ahead


def test_items_keep_their_order() -> None:
    assert list(ahead(iter(range(100)), 3)) == list(range(100))


def test_items_are_made_while_the_consumer_is_busy_but_not_without_bound() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    stream = ahead(items(), 2)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # one taken, two waiting, one in hand
    stream.close()


def test_a_fault_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("bad")

    stream = ahead(items(), 4)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="bad"):
        next(stream)


def test_closing_ends_the_thread() -> None:
    stream = ahead(iter(range(1000)), 2)
    next(stream)
    stream.close()
    assert all(thread.name != "ahead" for thread in threading.enumerate())
