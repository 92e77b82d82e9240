"""Which device a process takes, alone and among others."""

import pytest
import torch

from shared import launcher
from shared.device import choose_device
from shared.errors import UsageError
from shared.launcher import local_rank


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for variable in ("LOCAL_RANK", "SLURM_LOCALID"):
        for number, gpu in (("", 0), ("0", 0), ("3", 3), ("5", 1)):
            monkeypatch.setenv(variable, number)
            assert choose_device("auto") == torch.device("cuda", gpu)
        monkeypatch.delenv(variable)
    assert choose_device("cuda:3") == torch.device("cuda:3")
    with pytest.raises(UsageError, match="torch sees 4 GPUs"):
        choose_device("cuda:4")


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == torch.device("cpu")


def test_a_word_that_is_no_device_is_refused() -> None:
    with pytest.raises(UsageError, match="one of auto, cpu, cuda"):
        choose_device("graphics card")


def test_an_environment_that_is_no_launchers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, read in (("RANK", launcher.rank), ("SLURM_NTASKS", launcher.world_size), ("LOCAL_RANK", local_rank)):
        for text in ("first", "-1", "1.5", "\u0661"):
            monkeypatch.setenv(variable, text)
            with pytest.raises(UsageError, match=rf"{variable} = .* in the environment: a launcher sets"):
                read()
        monkeypatch.delenv(variable)
    assert (launcher.rank(), launcher.world_size(), local_rank()) == (0, 1, 0)
