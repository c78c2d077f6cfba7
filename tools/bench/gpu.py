"""Bench of a training step on one GPU: ours beside the published loop and the bare encoders, and what else needs a GPU.

    python tools/bench/gpu.py [--minutes 8] [--json] [--only WORD ...] [--old CHECKOUT] [--dry]

published  the paper's loop as it ships: float32, NCHW, eager, DistributedDataParallel (gpu_published.py)
ours       the step of paco_ds/train.py on random images in memory, in rows that add one thing each: float32 with
           results read at once, results read late, bfloat16, channels_last, compiled encoders, CUDA graphs
streamed   ours on photographs that loader processes read from shards, views made by them or on the device: where it is
           slower than on random images, the loader processes are the limit
encoders   forward of the key encoder, forward and backward of the query encoder, run as the row says: the floor

It makes its own images and shards, needs no data, and takes at most --minutes: rows are ordered by what they tell, and
one for which there is no time, no memory or no hardware says so. Waits are calls that synchronize with the device.
--dry runs tiny sizes to the end, on a CPU too. Exit status 1 if a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

# The checkout need not be installed. This folder stays on the path, for the modules that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torchvision
from gpu_figures import Figures, measure
from gpu_ours import Size, Way, figures, joined, micro_batch
from gpu_published import PublishedLoop
from gpu_softmax import softmax_errors
from report import Bar, at_least, print_bars, print_table

ROOT = Path(__file__).resolve().parents[2]
EAGER = {"precision": "float32", "tf32": True, "channels_last": False, "compile": False, "digest_every": 0}
FAST = {"precision": "bfloat16", "channels_last": True, "compile": False, "digest_every": 0}
WAYS = {  # each adds one thing to the one before; convolutions in TF32 as in the published loop, torch's default
    "ours, float32, read at once": Way(late=False, engine=EAGER),
    "ours, read late": Way(engine=EAGER),
    "ours, bfloat16": Way(autocast=True, engine=FAST | {"channels_last": False}),
    "ours, channels_last": Way(autocast=True, engine=FAST),
    "ours, compiled": Way(autocast=True, engine=FAST | {"compile": "default"}),
    "ours, CUDA graphs": Way(autocast=True, engine=FAST | {"compile": "reduce-overhead"}),
}
BEST = WAYS["ours, channels_last"]
COMPILED = ("ours, compiled", "ours, CUDA graphs")
OLD = Way(late=False, engine={"channels_last": False, "compile": False, "digest_every": 0})


class Skip(Exception):  # noqa: N818  no error
    """A row that cannot be had here, with the reason."""


@dataclass
class Row:
    """A row of the bench; its fields are the keys of its JSON line.

    Attributes:
        encoders: images/s of the encoders alone, run the same way.
        said: what else there is to say, or why there are no figures.
        failed: whether it ended in an error.
    """

    name: str
    figures: Figures | None = None
    encoders: float | None = None
    said: str = ""
    failed: bool = False

    def cells(self) -> list[str]:
        """For the table."""
        found = self.figures
        if found is None:
            return [self.name, "-", "-", "-", "-", "-", self.said]
        share = "-" if self.encoders is None else f"{found.images_per_second / self.encoders:.2f}"
        busy, waits, peak = (
            "-" if value is None else form.format(value)
            for value, form in ((found.busy, "{:.0%}"), (found.waits, "{:g}"), (found.peak_gib, "{:.1f}"))
        )
        return [self.name, f"{found.images_per_second:.1f}", share, busy, waits, peak, self.said]


Work = Callable[[], Row]


def ours(name: str, size: Size, way: Way) -> Row:
    """Our step, and its encoders."""
    found, bare = figures(size, way)
    return Row(name, found, bare)


def streamed(name: str, size: Size, views_on: str, dry: bool) -> Row:
    """Our step on images from shards."""
    from gpu_streamed import figures  # with photographs, which other rows need not load

    found, said = figures(size, BEST, views_on, dry=dry)
    return Row(name, found, said=said)


def published(name: str, size: Size) -> Row:
    """The paper's loop on this network of torchvision, or on its smallest."""
    device = joined().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    backbone = size.backbone if size.backbone in torchvision.models.__dict__ else "resnet18"
    loop = PublishedLoop(backbone, size.classes, size.queue, device)
    batches = [micro_batch(size, pinned=False) for _ in range(2)]
    views = [[view.float().sub_(127).div_(60) for view in (b.query, b.key) if view is not None] for b in batches]
    placed = [[v.pin_memory() if device.type == "cuda" else v for v in both] for both in views]
    number = 0

    def step() -> None:
        nonlocal number
        query, key = placed[number % 2]
        loop(query, key, batches[number % 2].labels)
        number += 1

    return Row(name, measure(step, size.micro_batch, device, warm_up=size.warm_up, steps=size.steps))


def old(name: str, size: Size, checkout: Path, seconds: float) -> Row:
    """The step of another checkout, as it ships, in a process of its own."""
    row = json.dumps({"size": asdict(size), "way": asdict(OLD)})
    of_this_job = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in of_this_job}
    environment["PYTHONPATH"] = str(checkout)
    script = "gpu_0_8.py" if (checkout / "paco_ds" / "recipe_file.py").exists() else "gpu_ours.py"
    command = [sys.executable, str(Path(__file__).with_name(script)), row]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError(last_line(done.stderr))
    answer = json.loads(done.stdout.splitlines()[-1])
    return Row(name, Figures(**answer["figures"]), answer["encoders"])


def views(dry: bool) -> str:
    """Both views rendered on the device."""
    from views import on_device  # with photographs to render, which other rows need not load

    found = on_device(joined().device, dry=dry)
    return f"{found['images_per_second']:.0f} images/s, {found['host_ms']:.1f} ms of the host a micro-batch"


def decode(dry: bool) -> str:
    """JPEGs decoded on the device, beside a core of the host."""
    from views import decode_cuda

    found = decode_cuda(joined().device, dry=dry)
    if "skipped" in found:
        raise Skip(str(found["skipped"]))
    return f"{found['images_per_second']:.0f} images/s, {found['of_a_core']:.1f} times a core of the host"


def tests(name: str, seconds: float) -> Row:
    """tests/gpu."""
    _need_cuda()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    return Row(name, said=last_line(done.stdout), failed=done.returncode != 0)


def last_line(text: str) -> str:
    """The last line that is not empty, or a word that there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:200]


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        raise Skip("needs CUDA")


def plan(dry: bool, checkout: Path | None, left: Callable[[], float]) -> Iterator[tuple[str, float, Work]]:
    """(name, seconds that it takes on an H200 at most, work) of every row, the most telling first."""
    tiny = Size("cifar_resnet8", 4, pixels=16, classes=10, queue=64, width=4, warm_up=1, steps=1)
    sizes = [tiny] if dry else [Size("resnet50", 32), Size("resnet50", 128)]
    for size in sizes:
        at = f"{size.backbone}, m = {size.micro_batch}: "
        yield at + "published", 15, partial(published, at + "published", size)
        for way in WAYS:
            if way not in COMPILED:
                yield at + way, 12, partial(ours, at + way, size, WAYS[way])
        if checkout is not None:
            seconds = 300 if dry else 60  # a CPU that others use may take minutes to load torch
            yield at + "old checkout", 40, partial(old, at + "old checkout", size, checkout, seconds)
    for size in sizes:
        for views_on in ("cpu", "accelerator"):
            name = f"{size.backbone}, m = {size.micro_batch}: streamed, views.device {views_on}"
            yield name, 30, partial(streamed, name, size, views_on, dry)
    yield "tests/gpu", 60, lambda: tests("tests/gpu", left())
    for size in sizes:
        at = f"{size.backbone}, m = {size.micro_batch}: "
        for way in COMPILED:
            yield at + way, 60, partial(compiled, at + way, size, WAYS[way], dry)
    large = [replace(tiny, experts=3)] if dry else [Size("resnet152", 32), Size("resnext50_32x4d", 32, experts=3)]
    for size in large:
        name = f"{size.backbone}, {'RIDE, 3 experts, ' if size.experts else ''}m = {size.micro_batch}: bfloat16"
        yield name, 15, partial(ours, name, size, BEST)
    yield "views on the device", 20, lambda: Row("views on the device", said=views(dry))
    yield "decode of JPEGs on the device", 20, lambda: Row("decode of JPEGs on the device", said=decode(dry))
    yield "softmax in place", 5, lambda: Row("softmax in place", said=softmax_errors(CLASSES[:2] if dry else CLASSES))


CLASSES = (10, 1000, 8142, 100_001)  # rows that the kernel keeps in registers, in shared memory and in neither


def compiled(name: str, size: Size, way: Way, dry: bool) -> Row:
    """As `ours`; not where only the way to the end is tried."""
    if dry:
        raise Skip("compiling takes a minute: left out of --dry")
    _need_cuda()
    return ours(name, size, way)


def run(name: str, seconds: float, left: float, work: Work) -> Row:
    """A row, or why there is none."""
    if left < seconds:
        return Row(name, said=f"skipped: {max(left, 0):.0f} s are left, it may take {seconds:.0f}")
    try:
        return work()
    except Skip as reason:
        return Row(name, said=f"skipped: {reason}")
    except torch.OutOfMemoryError:
        return Row(name, said="skipped: does not fit into the memory of this GPU")
    except subprocess.TimeoutExpired:
        return Row(name, said="skipped: it took longer than was left")
    except Exception as error:
        return Row(name, said=f"failed: {type(error).__name__}: {last_line(str(error))}", failed=True)
    finally:
        if torch.cuda.is_available():
            torch._dynamo.reset() if "torch._dynamo" in sys.modules else None
            torch.cuda.empty_cache()


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """Of each size: our fastest row beside its encoders, and beside the published loop."""
    bars = []
    rates = {row.name: row for row in rows if row.figures is not None}
    for name, rival in rates.items():
        at, is_published, _ = name.partition(": published")
        mine = [row for other, row in rates.items() if other.startswith(f"{at}: ours")]
        if not is_published or not mine:
            continue
        best = max(mine, key=lambda row: row.figures.images_per_second if row.figures else 0.0)
        assert best.figures is not None
        assert best.encoders is not None
        assert rival.figures is not None
        fast, slow = best.figures.images_per_second, rival.figures.images_per_second
        found = {"ours": fast, "rival": slow, "floor": best.encoders}
        bars.append(
            at_least(f"{at}: images/s of {best.name.split(': ')[1]} / encoders", fast / best.encoders, 0.9, **found)
        )
        bars.append(at_least(f"{at}: images/s of {best.name.split(': ')[1]} / published", fast / slow, 2.0, **found))
    return bars


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; print each row as it is had, the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="no row begins that would not end by then (8)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has one of these")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="also the step of another checkout, as it ships")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to see that it runs to its end")
    parser.add_argument("--json", action="store_true", help="end with one JSON line per row and bar")
    arguments = parser.parse_args(argv)
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device: --dry runs tiny sizes here")
    if arguments.dry:
        joined()
        torch.set_num_threads(1)  # sizes so small that threads would only wait for each other
    ends = time.monotonic() + 60 * arguments.minutes

    def left() -> float:
        return ends - time.monotonic()

    rows: list[Row] = []
    for name, seconds, work in plan(arguments.dry, arguments.old, left):
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        began = time.monotonic()
        rows.append(run(name, seconds, left(), work))
        print(f"[{time.monotonic() - began:5.1f} s] {'  '.join(rows[-1].cells())}", file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print_table(
        f"A step on one {device}",
        ["", "images/s", "of encoders", "busy", "waits a step", "peak GiB", ""],
        [row.cells() for row in rows],
        f"torch {torch.__version__}; one rank, one micro-batch a step; random images from page-locked memory",
    )
    print_bars(bars := bars_of(rows), as_json=False)
    if arguments.json:
        lines = [asdict(row) for row in rows] + [asdict(bar) for bar in bars]
        print("\n".join(map(json.dumps, lines)))
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
