"""The device and rank of a process, alone and under a launcher."""

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


def test_an_environment_that_is_no_launchers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, read in (("RANK", launcher.rank), ("SLURM_NTASKS", launcher.world_size), ("LOCAL_RANK", local_rank)):
        for text in ("-1", "\u0661"):
            monkeypatch.setenv(variable, text)
            with pytest.raises(UsageError, match=rf"{variable} = .* in the environment: a launcher sets"):
                read()
        monkeypatch.delenv(variable)
    assert (launcher.rank(), launcher.world_size(), local_rank()) == (0, 1, 0)


@pytest.mark.parametrize("rank", ["1", "3"])
def test_a_process_that_is_none_of_the_worlds_is_refused(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", rank)
    for read in (launcher.rank, launcher.world_size):
        with pytest.raises(UsageError, match=f"SLURM_NTASKS: rank {rank} of 1 processes, counted from 0; unset both"):
            read()


def test_number_and_count_of_a_launcher_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment, place in (
        ({"RANK": "0"}, (0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 2)),
    ):
        with monkeypatch.context() as context:
            for variable, text in environment.items():
                context.setenv(variable, text)
            assert (launcher.rank(), launcher.world_size()) == place
