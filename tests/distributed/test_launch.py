"""The environment of a launcher: what one rank takes of it, and what is refused in one line."""

import os

import pytest
import torch.distributed as dist

from paco_ds.distributed.launch import environment_ranks, join_job, local_world_size
from paco_ds.errors import UserError

OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """`environment(NAME=value, ...)`: these alone, of what launchers set."""
    for name in (*OF_A_LAUNCHER, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "TORCHELASTIC_RUN_ID"):
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
