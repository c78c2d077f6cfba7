"""The bench of a large job does the work of a real rank. No time is asserted."""

import json
import sys
from pathlib import Path

import torch

# As `python tools/bench/scale.py` has it: benches are scripts that find their shared module beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "bench"))

import scale

from paco_ds.contrast.key_exchange import key_exchange


def test_the_rival_of_the_exchange_gives_the_same():
    """Otherwise their times would not be comparable."""
    job = scale.Job(8)
    exchange = key_exchange(job.groups, job.layout)
    rows, send, receive = job.exchange_in_a_loop()
    assert (rows.tolist(), send, receive) == (exchange.rows.tolist(), exchange.send, exchange.receive)


def test_merged_keys_are_in_lane_order():
    """Keys come in the order of groups, labels in that of slots."""
    job = scale.Job(4)
    keys, labels = job.merge()
    flat = job.packed[:, : scale.MICRO_BATCH * scale.DIM].reshape(-1, scale.DIM)
    for place, slot in enumerate(job.groups.ravel()):
        assert torch.equal(keys[slot], flat[place])
    packed_labels = job.packed[:, scale.MICRO_BATCH * scale.DIM : -1].contiguous().view(torch.int32)
    assert torch.equal(labels, packed_labels.flatten().long())


def test_every_bar_ends_the_output_as_a_line_of_seven_keys(capsys):
    """Read back from the last lines."""
    assert scale.main(["--ranks", "4", "--repeats", "1", "--json"]) == 0
    bars = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert all(list(bar) == ["name", "ours", "rival", "floor", "ratio", "bar", "holds"] for bar in bars)
