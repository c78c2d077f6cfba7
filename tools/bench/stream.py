"""Owns the bench of the stream: shards to micro-batches of both views, and the memory that a rank's loading takes.

    python tools/bench/stream.py [--images N] [--workers N] [--micro-batches N] [--repeats N] [--json]

ours    `TrainingStream` of ds_configs/recipes/imagenet_lt_resnet50.yaml: one of four ranks, 32 images a micro-batch
rival   wds.WebDataset(shards, shardshuffle=100).repeat().shuffle(1000).map(...).batched(32) in a torch
        DataLoader with as many workers, on the same shards; `map` opens the image with PIL, as decode("pil") does, and
        makes both published views
bare    rival without ToTensor and Normalize, as if those ran on the device, where ours do
floor   libjpeg-turbo's decoding of the whole images alone, by as many processes

All are run in turn; before each measurement a loader refills what it had made ahead. Memory is the proportional set
size of the rank and its loader processes, after so many steps that every slot has read windows.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import simplejpeg
import torch
import webdataset as wds
from torch.utils.data import DataLoader

# The checkout need not be installed. This folder stays on the path, for the modules that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import MIB, at_least, print_bars, print_table

from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import load_manifest
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import folder_card
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.shard import ShardReader
from paco_ds.data.storage import Storage
from paco_ds.data.stream.batches import TrainingStream
from paco_ds.data.stream.partition import TrainingPlan, held_bytes
from paco_ds.data.stream.read_ahead import TrainingSamples
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.build import build_stream

RECIPE = Path(__file__).resolve().parents[2] / "ds_configs/recipes/imagenet_lt_resnet50.yaml"
LAYOUT = MicroBatchLayout(micro_batch=32, micro_batches=4, rank=0, world_size=4)
DISTINCT = 256  # photographs; repeated, they are read and decoded all the same
BAR = 1.9


def make_shards(folder: Path, images: int) -> None:
    """Shards of about 100 photographs of ten classes each."""
    from views import photographs  # not at the top: loader processes read this file again, and need none of it

    photos = photographs(min(DISTINCT, images))
    for number in range(images):
        path = folder / "images" / f"class{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photos[number % len(photos)].image)
    root = folder / "images"
    build_shards(folder_card(root), root, folder / "shards", BuildOptions(shard_bytes=10 * MIB))


def our_stream(shards: Path, workers: int) -> TrainingStream:
    """The stream of one of four ranks."""
    return build_stream(_recipe(shards, workers), load_manifest(shards), LAYOUT)


def published_loader(shards: Path, workers: int, *, on_device: bool) -> Iterator[Any]:
    """Batches of both published views for ever, by webdataset's own pipeline."""
    from views import published_views

    data = (
        wds.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=100)
        .repeat()
        .shuffle(1000)
        .to_tuple("jpg", "json")
        .map(_Both(published_views(on_device=on_device)))
        .batched(LAYOUT.micro_batch, collation_fn=_as_list if on_device else torch.utils.data.default_collate)
    )
    return iter(DataLoader(data, batch_size=None, num_workers=workers, worker_init_fn=_one_thread))


class _Both:
    def __init__(self, views: Callable[[Any], tuple[Any, Any]]) -> None:
        self.views = views

    def __call__(self, sample: tuple[bytes, bytes]) -> tuple[Any, Any, int]:
        image, about = sample
        return *self.views(image), int(json.loads(about)["label"])


def _as_list(samples: list[Any]) -> list[Any]:
    """Pixels as they are: PIL images cross to the rank as bytes."""
    return samples


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def decode_all(images: list[bytes]) -> int:
    """The floor."""
    return sum(len(simplejpeg.decode_jpeg(image)) for image in images)


def resident_bytes(shards: Path, workers: int) -> int:
    """Proportional set size of a rank that holds nothing but its stream, and of its loader processes."""
    stream = our_stream(shards, workers)
    for _ in range(12):
        next(stream)
    rank = psutil.Process()
    total = sum(process.memory_full_info().pss for process in [rank, *rank.children(recursive=True)])
    stream.close()
    return int(total)


def _recipe(shards: Path, workers: int) -> Recipe:
    return load_recipe(RECIPE, [f"data.shards={shards}", "data.classes=10", f"data.workers={workers}"])


def main() -> int:
    """Entry point; 1 if a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="in the shards")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each")
    parser.add_argument("--micro-batches", type=int, default=12, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each, in turn")
    parser.add_argument("--memory-workers", type=int, nargs="*", default=[0, 4, 8], help="loader processes of a rank")
    parser.add_argument("--memory-of", nargs=2, metavar=("SHARDS", "WORKERS"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="end with a JSON line for each bar")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(resident_bytes(Path(arguments.memory_of[0]), int(arguments.memory_of[1])))
        return 0
    torch.set_num_threads(1)  # the processes of a loader are its threads
    with tempfile.TemporaryDirectory(prefix="paco_ds-stream-") as folder:
        shards = Path(folder) / "shards"
        make_shards(Path(folder), arguments.images)
        bars = throughput(shards, arguments)
        reading(shards)
        memory(shards, arguments.memory_workers)
    print_bars(bars, as_json=arguments.json)
    return 0 if all(bar.holds for bar in bars) else 1


def throughput(shards: Path, arguments: argparse.Namespace) -> list[Any]:
    """Images a second of all."""
    from views import photographs

    workers, count = arguments.workers, arguments.micro_batches
    began = time.perf_counter()
    stream = our_stream(shards, workers)
    first = next(stream)
    first_seconds = time.perf_counter() - began
    assert len(first) == LAYOUT.accumulation
    loaders: dict[str, Iterator[Any]] = {
        "ours": stream,
        "rival": published_loader(shards, workers, on_device=False),
        "bare": published_loader(shards, workers, on_device=True),
    }
    refill = 2 * workers + 1
    images = [sample.image for sample in photographs(LAYOUT.micro_batch)]
    pool = ProcessPoolExecutor(workers)
    seconds: dict[str, list[float]] = {name: [] for name in [*loaders, "floor"]}

    def take(name: str, batches: int) -> None:
        if name == "floor":
            sum(pool.map(decode_all, [images] * batches))
            return
        for _ in itertools.islice(loaders[name], batches):
            pass

    names = list(seconds)
    for number in range(arguments.repeats):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            take(name, refill)
            began = time.perf_counter()
            take(name, count)
            seconds[name].append(time.perf_counter() - began)
    stream.close()
    pool.shutdown()
    rate = {name: count * LAYOUT.micro_batch / statistics.median(values) for name, values in seconds.items()}
    print_table(
        "Shards to both views",
        ["", f"images/s, {workers} loader processes, median of {arguments.repeats} times {count} micro-batches"],
        [[name, f"{value:.0f}"] for name, value in rate.items()],
        f"first micro-batch of ours after {first_seconds:.1f} s, start of the loader processes included",
    )
    ratio = rate["ours"] / rate["rival"]
    return [at_least("stream, images/s", ratio, BAR, ours=rate["ours"], rival=rate["rival"], floor=rate["floor"])]


class FarStorage(Storage):
    """A local directory that answers like an object store: each request after LATENCY, its bytes at RATE."""

    LATENCY, RATE = 0.03, 100e6  # seconds; bytes a second

    def __init__(self, url: str | Path) -> None:
        super().__init__(url)
        self.is_local = False

    def read(self, name: str, expected: int = 0) -> bytes:
        time.sleep(self.LATENCY)
        return (Path(self.url) / name).read_bytes()

    def read_range(self, name: str, start: int, size: int) -> bytes:
        time.sleep(self.LATENCY + size / self.RATE)
        with (Path(self.url) / name).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def size(self, name: str) -> int:
        time.sleep(self.LATENCY)
        return (Path(self.url) / name).stat().st_size


def reading(shards: Path, steps: int = 32) -> None:
    """Stored samples a second of one loader process, nothing decoded: by windows ahead, and a request for each."""
    split = load_manifest(shards).split("train")
    counts = [shard.samples for shard in split.shards]
    plan = TrainingPlan(counts, LAYOUT, seed=1, window=64, start=0, epochs=90)
    slots = list(LAYOUT.slots(0))

    def one_by_one(reader: ShardReader) -> Iterator[object]:
        for window in plan.windows(slots):
            for sample_id in window.ids.T.ravel():
                yield reader.read(int(sample_id))

    rows = []
    for name, storage in (("local", Storage(shards)), ("30 ms away, 100 MB/s a request", FarStorage(shards))):
        for way, samples, count in (
            ("windows ahead", TrainingSamples(plan, ShardReader(storage, split)), steps),
            ("one by one", one_by_one(ShardReader(storage, split)), 2),
        ):
            began = time.perf_counter()
            read = sum(1 for _ in itertools.islice(samples, count * LAYOUT.micro_batch))
            rows.append([f"{name}, {way}", f"{read / (time.perf_counter() - began):.0f}"])
    print_table("Reading alone, one loader process", ["", "samples/s"], rows)


def memory(shards: Path, workers: list[int]) -> None:
    """Memory of a rank by the number of its loader processes."""
    manifest = load_manifest(shards)
    split = manifest.split("train")
    window = _recipe(shards, 0).data.window
    stated = held_bytes(split.bytes / split.samples, LAYOUT, window)

    def in_own_process(number: int) -> int:
        """As a launcher starts a rank; a process of a pool would have a fork server that is not ours."""
        command = [sys.executable, "-W", "ignore", __file__, "--memory-of", str(shards), str(number)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    base = in_own_process(workers[0])
    rows = []
    for number in workers:
        found = base if number == workers[0] else in_own_process(number)
        grown = "-" if number == workers[0] else f"{(found - base) / max(number, 1) / MIB:.0f}"
        rows.append([str(number), f"{found / MIB:.0f}", grown])
    print_table(
        "Memory of a rank",
        ["loader processes", "MiB, theirs included", f"MiB more than with {workers[0]}, of each"],
        rows,
        f"windows of all slots together, whatever the number of processes: at most {stated / MIB:.0f} MiB; the rest "
        "of a process is the interpreter and its libraries, of which it shares what was loaded before it was forked",
    )


if __name__ == "__main__":
    sys.exit(main())
