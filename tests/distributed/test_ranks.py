"""Who computes what, without any process group."""

import subprocess
from pathlib import Path

import pytest
import torch

from paco_ds.distributed.launch import join_job
from paco_ds.distributed.ranks import ByteCounter, MicroBatchLayout, Ranks
from paco_ds.errors import UserError

CHECK = Path(__file__).parents[2] / ".ci" / "prerequisites"


def test_one_process_needs_no_group_and_sends_nothing():
    """Every collective is the identity."""
    counter = ByteCounter()
    ranks = Ranks(0, 1, 0, torch.device("cpu"), on_bytes=counter)
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(ranks.sum(rows.clone()), rows)
    assert torch.equal(ranks.gather(rows), rows[None])
    assert torch.equal(ranks.begin_exchange(rows, [3], [3]).wait(), rows)
    assert ranks.gather_objects("x") == ["x"]
    assert not counter.sent


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_rows_of_all_ranks_come_back_in_lane_order(world_size):
    """Whoever holds which micro-batch."""
    slots = torch.arange(12)
    layouts = [MicroBatchLayout(2, 6, rank, world_size) for rank in range(world_size)]
    held = [torch.cat([slots[la.slots(j).start : la.slots(j).stop] for j in la.own]) for la in layouts]
    assert torch.equal(layouts[0].global_order(torch.stack(held)), slots)
    assert sum(layouts[0].accumulation for _ in layouts) == 6


@pytest.mark.parametrize("given", [{}, {"RANK": "1"}, {"RANK": "0", "MASTER_ADDR": "10.0.0.1"}])
def test_a_world_that_cannot_be_joined_is_refused(monkeypatch, given):
    """Else each rank would train, or count images, alone, and think that it was one of many."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (given | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but .*MASTER_PORT is not set: launch with `deepspeed`"):
        join_job(threads=1)


def test_prerequisites_are_checked_in_words(tmp_path):
    """No compiler, no python3: each is named with the package that brings it."""
    (tmp_path / "uname").write_text("#!/bin/sh\necho Linux x86_64\n")
    (tmp_path / "uname").chmod(0o755)
    run = subprocess.run(["/bin/sh", CHECK, "python3"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 1
    assert "missing: python3, 3.11 or newer (Debian, Ubuntu: apt install python3" in run.stderr
    assert "missing: a C++ compiler, c++" in run.stderr
    assert "missing: make" in run.stderr
    assert "Linux on" not in run.stderr
