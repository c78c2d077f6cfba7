"""The GPU bench: what it counts, what it says where a row cannot be had, and that it runs to its end without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "bench"))

import gpu
import gpu_figures
import gpu_published

ROOT = Path(__file__).parents[1]


def test_kernels_of_several_streams_count_once():
    """The union of intervals, in any order; one inside another adds nothing."""
    assert gpu_figures.covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (7.0, 8.0)]) == 6.0
    assert gpu_figures.covered([]) == 0.0


def out_of_memory():
    raise torch.OutOfMemoryError("2 GiB are missing")


def broken():
    raise ValueError("first\nlast")


def late():
    raise subprocess.TimeoutExpired("views", 3)


@pytest.mark.parametrize(
    ("left", "work", "said", "failed"),
    [
        (3.0, broken, "skipped: 3 s are left, it may take 10", False),
        (60.0, out_of_memory, "skipped: does not fit into the memory of this GPU", False),
        (60.0, late, "skipped: it took longer than was left", False),
        (60.0, gpu._need_cuda, "skipped: needs CUDA", False),
        (60.0, broken, "failed: ValueError: last", True),
    ],
)
def test_a_row_that_cannot_be_had_says_why(left, work, said, failed):
    """Only a failure is one."""
    row = gpu.run("row", 10, left, work)
    assert (row.figures, row.said, row.failed) == (None, said, failed)


def test_bars_hold_our_fastest_row_against_its_encoders_and_the_published_loop():
    """Of each size; rows without figures do not count."""
    rows = [
        gpu.Row("a, m = 2: published", gpu.Figures(100.0)),
        gpu.Row("a, m = 2: ours, bfloat16", gpu.Figures(150.0), 200.0),
        gpu.Row("a, m = 2: ours, compiled", gpu.Figures(300.0), 320.0),
        gpu.Row("a, m = 2: ours, CUDA graphs", said="skipped"),
        gpu.Row("b, m = 2: ours, bfloat16", gpu.Figures(900.0), 900.0),
    ]
    floor, rival = gpu.bars_of(rows)
    assert (floor.name, floor.ratio, floor.holds) == (
        "a, m = 2: images/s of ours, compiled / encoders",
        300 / 320,
        True,
    )
    assert (rival.name, rival.ratio, rival.holds) == ("a, m = 2: images/s of ours, compiled / published", 3.0, True)


def two_published_steps(ranks):
    """(losses, key rows that stay, the pointer, norms of what query and key encoder moved by) of a queue of 8."""
    loop = gpu_published.PublishedLoop("resnet18", 10, 8, ranks.device)
    model, generator = loop.model.module, torch.Generator().manual_seed(0)
    query, key = (torch.randn(4, 3, 32, 32, generator=generator) for _ in range(2))
    queue, weight = model.queue.clone(), model.encoder_q.conv1.weight.detach().clone()
    losses = [loop(query, key, torch.arange(4)) for _ in range(2)]
    stay = int((model.queue == queue).all(1).sum())
    moved = [float((each.conv1.weight - weight).norm()) for each in (model.encoder_q, model.encoder_k)]
    return losses, stay, int(model.queue_ptr), moved


def test_steps_of_the_published_loop_are_taken(pool):
    """SGD moves the query encoder, the key encoder follows by a thousandth, and the queue is filled in turn."""
    ((losses, stay, pointer, (query, key)),) = pool(1).run("tests.test_gpu_bench:two_published_steps")
    assert torch.isfinite(torch.tensor(losses)).all()
    assert (stay, pointer) == (0, 0)
    assert 0 < key < 0.01 * query


def test_it_runs_to_its_end_on_a_cpu():
    """With tiny sizes; every row has figures, words, or the reason why not."""
    command = [sys.executable, "tools/bench/gpu.py", "--dry", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = {line["name"].split(": ")[-1]: line for line in lines if "said" in line}
    assert len(rows) == 14
    for name in (
        "published",
        "ours, float32, read at once",
        "ours, read late",
        "ours, bfloat16",
        "ours, channels_last",
        "streamed, views.device cpu",
        "streamed, views.device accelerator",
    ):
        assert rows[name]["figures"]["images_per_second"] > 0
        assert rows[name]["encoders"] is None or rows[name]["encoders"] > 0
    skipped = {name for name, row in rows.items() if row["said"].startswith("skipped: ")}
    assert skipped >= {"ours, compiled", "ours, CUDA graphs", "tests/gpu", "decode of JPEGs on the device"}
    assert [line["bar"] for line in lines if "bar" in line] == [">= 0.9", ">= 2"]


def test_without_a_gpu_it_names_the_way_to_try_it(capsys, monkeypatch):
    """Before anything is measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device: --dry runs tiny sizes here" in capsys.readouterr().err
