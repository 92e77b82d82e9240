"""Host memory where pinning is refused: on this build, as on a GPU machine that limits it."""

import logging

import pytest
import torch

from shared.host_memory import host_empty


def test_refused_pin_is_one_line_and_pageable_memory(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU pins memory")
    with caplog.at_level(logging.WARNING, "shared.host_memory"):
        buffers = [host_empty(32, torch.device("cuda")) for _ in range(3)]
    assert all(buffer.shape == (32,) and not buffer.is_pinned() for buffer in buffers)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("host memory cannot be pinned, copies to and from the GPU are slower: ") and "\n" not in line
