"""The environment of a launcher: what one rank takes of it, and what is refused in one line."""

import importlib
import os

import pytest
import torch
import torch.distributed as dist

from paco_ds.distributed import load_deepspeed
from paco_ds.distributed.launch import environment_ranks, join_job, local_world_size
from paco_ds.distributed.rendezvous import store_of_the_job
from paco_ds.errors import UserError

OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "TORCHELASTIC_RUN_ID", "DEEPSPEED_TIMEOUT")


@pytest.fixture
def environment(monkeypatch):
    """`environment(NAME=value, ...)`: these alone, of what launchers set."""
    for name in (*OF_A_LAUNCHER, *OTHERS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1 in the environment"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, where a whole number belongs"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x'"),
    ],
)
def test_ranks_that_cannot_be_are_one_line(environment, values, said):
    """Where they were waited for without an end, or were a traceback."""
    environment(**values)
    with pytest.raises(UserError, match=said):
        join_job(threads=1, initialise=lambda backend: None)


def test_a_rank_without_a_gpu_of_its_own_is_one_line(environment, monkeypatch):
    """More ranks than GPUs, or each task of Slurm sees its GPU alone."""
    environment(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"LOCAL_RANK is 1, but this process sees 1 GPU, .*--ranks.*--gpus-per-node"):
        join_job(threads=1, initialise=lambda backend: None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc' in the environment, where a whole number belongs, 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"MASTER_PORT": "29500", "DEEPSPEED_TIMEOUT": "long"}, "DEEPSPEED_TIMEOUT is 'long'"),
    ],
)
def test_a_port_or_a_timeout_that_is_no_number_is_one_line(environment, values, said):
    """Before anything is waited for."""
    environment(MASTER_ADDR="localhost", WORLD_SIZE="2", **values)
    with pytest.raises(UserError, match=said):
        store_of_the_job(rank=1, world_size=2)


def test_deepspeed_is_given_a_timeout_that_is_a_number(environment):
    """It reads the variable as it is imported, where an empty one, as a compose file exports it, was a traceback."""
    environment(DEEPSPEED_TIMEOUT="")
    importlib.reload(load_deepspeed)
    assert os.environ["DEEPSPEED_TIMEOUT"] == "10"
    environment(DEEPSPEED_TIMEOUT="long")
    with pytest.raises(UserError, match="DEEPSPEED_TIMEOUT is 'long'"):
        importlib.reload(load_deepspeed)


def test_empty_variables_are_not_set(environment):
    """As a compose file exports them."""
    environment(RANK="", WORLD_SIZE="", LOCAL_RANK="", LOCAL_SIZE="")
    assert (environment_ranks(), local_world_size()) == ((0, 1, 0), 1)


@pytest.mark.parametrize("left", [{}, {"MASTER_ADDR": "job-host-0", "MASTER_PORT": "abc"}, {"MASTER_PORT": ""}])
def test_one_rank_meets_nobody_whatever_address_is_left_over(environment, monkeypatch, left):
    """As in a shell in a container of a job; the address stays, since Prometheus' route is found by it."""
    environment(**left)
    monkeypatch.setattr(dist, "group", type("group", (), {"WORLD": None}))
    met = []
    join_job(threads=1, initialise=lambda backend: met.append((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])))
    assert met[0][0] == "127.0.0.1"
    assert met[0][1].isdecimal()
    assert os.environ["MASTER_ADDR"] == left.get("MASTER_ADDR", "127.0.0.1")
