"""Check of every node before a job: started by the launcher as the job will be, it reports and ends within a minute.

`paco-preflight --launch HOSTFILE` starts one rank for each slot. The ranks join as in training, which proves ssh,
addresses and ports. Each reports its versions, devices, clock, disk and a sample of the shards; the first prints a
table, and one line for each thing that would stop or slow the job.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table

from paco_ds.command import Screen, report_user_errors, say
from paco_ds.config.data import DataSettings
from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import Manifest, open_data
from paco_ds.data.shard import sha256_stored
from paco_ds.distributed.hostfile import read_hostfile
from paco_ds.distributed.launch import leave_job
from paco_ds.distributed.ranks import Ranks
from paco_ds.distributed.watchdog import RankWatchdog
from paco_ds.errors import DataError, UserError
from paco_ds.evaluation.results import versions
from paco_ds.training import engine

CLOCK = 2.0  # seconds between clocks, beyond which logs of several hosts cannot be read together
FREE = 5 << 30  # bytes: a dozen checkpoints of a ResNet-152
_SENT = 64 << 20  # bytes of the all_reduce that is timed


@dataclass(frozen=True)
class NodeReport:
    """What one rank found.

    Attributes:
        versions: of Python and the packages that affect results.
        device: its name and memory, or "cpu" and the cores.
        clock: seconds since 1970, read right after a barrier.
        free: bytes where the run will be written; None where that cannot be read.
        digests: SHA-256 of the sampled shards, by name.
        problems: what failed here, in words.
    """

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    clock: float
    free: int | None
    digests: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def launch(hostfile: Path, recipe: str, overrides: Sequence[str], output: Path, port: int) -> int:
    """Start the check on every slot of a hostfile; returns its exit status.

    Raises:
        UserError: there is no such hostfile, or no `deepspeed`.
    """
    hosts = {host for host, _ in read_hostfile(hostfile)}
    if not hosts:
        raise UserError(f"hostfile {hostfile} names no host: one line for each, as `node1 slots=8`")
    deepspeed = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if deepspeed is None:
        raise UserError("no command `deepspeed` on PATH: activate the environment that paco_ds is installed in")
    options = [word for override in overrides for word in ("--set", override)]
    words = [deepspeed, "--hostfile", str(hostfile), "--master_port", str(port)]
    if hosts == {"localhost"}:
        words += ["--no_ssh_check", "--master_addr", "127.0.0.1"]  # nothing to reach by ssh
    words += ["--module", __spec__.name]
    return subprocess.run([*words, "--recipe", recipe, "--output", str(output), *options]).returncode


def check_node(ranks: Ranks, data: DataSettings, splits: Sequence[str], output: Path) -> NodeReport:
    """Report of this rank; a collective. Disk and shards are looked at by the first rank of each host."""
    ranks.wait_for_all()
    clock, problems = time.time(), []
    digests: dict[str, str] = {}
    free = None
    if ranks.local_rank == 0:
        try:
            digests, damaged = _sample(open_data(data, splits), splits)
            problems += damaged
        except (UserError, OSError) as error:
            problems.append(str(error))
        try:
            free = shutil.disk_usage(_existing(output)).free
        except OSError as error:
            problems.append(f"{output}: {error.strerror}")
    return NodeReport(
        ranks.rank, socket.gethostname(), versions(), _device(ranks), clock, free, digests, tuple(problems)
    )


def problems_of(reports: Sequence[NodeReport]) -> list[str]:
    """What would stop or slow the job, one line each, by comparing the reports of all ranks."""
    lines = [f"{report.host}: {problem}" for report in reports for problem in report.problems]
    for name in reports[0].versions:
        lines += _odd(name, {(r.host, r.versions[name]) for r in reports}, "install the same version everywhere")
    lines += _odd("device", {(r.host, r.device) for r in reports}, "a step is as slow as the slowest rank")
    for name in sorted({name for r in reports for name in r.digests}):
        found = {(r.host, r.digests[name]) for r in reports if name in r.digests}
        lines += _odd(f"digest of shard {name}", found, "copy the shards again there")
    clocks = {r.host: r.clock for r in reports}
    spread = max(clocks.values()) - min(clocks.values())
    if spread > CLOCK:
        late = min(clocks, key=lambda host: clocks[host])
        lines.append(f"clocks differ by {spread:.1f} s, {late} is last: let all hosts follow one time server (NTP)")
    lines += [
        f"{r.host}: {r.free / 2**30:.1f} GiB are free for checkpoints, fewer than {FREE >> 30}: make room"
        for r in reports
        if r.free is not None and r.free < FREE
    ]
    return lines


def table_of(reports: Sequence[NodeReport], seconds: float | None) -> Table:
    """One row for each host."""
    said = "" if seconds is None else f"; all_reduce of {_SENT >> 20} MiB in {1000 * seconds:.0f} ms"
    table = Table(title=f"{len(reports)} ranks{said}")
    for column in ("host", "ranks", "device", "paco_ds", "torch", "deepspeed", "free", "shards read"):
        table.add_column(column)
    for host in dict.fromkeys(report.host for report in reports):
        of_host = [report for report in reports if report.host == host]
        first = of_host[0]
        free = next((f"{r.free / 2**30:.0f} GiB" for r in of_host if r.free is not None), "-")
        package = (first.versions[name] for name in ("paco_ds", "torch", "deepspeed"))
        table.add_row(host, str(len(of_host)), first.device, *package, free, str(sum(len(r.digests) for r in of_host)))
    return table


def main(argv: list[str] | None = None) -> int:
    """What each rank runs; returns the exit status: 0 if all is well, 1 if a line was printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args(argv)
    with report_user_errors(), RankWatchdog(lambda: "Mend that host, then run the check again"):
        recipe = load_recipe(arguments.recipe, arguments.set)
        ranks = engine.start(recipe.step, recipe.engine.threads)
        evaluated = (recipe.evaluation.split, recipe.evaluation.test_split)
        splits = [recipe.data.train_split, *(split for split in evaluated if split)]
        reports = ranks.gather_objects(check_node(ranks, recipe.data, splits, arguments.output))
        seconds = _time_sum(ranks)
        lines = problems_of(reports)
        if ranks.first:
            Screen().print(table_of(reports, seconds))
            say("\n".join(lines) if lines else "every node is ready")
        ranks.wait_for_all()
        leave_job()
    return 1 if lines else 0


def _sample(manifest: Manifest, splits: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Digests of the first and the last shard of each split, and those that are not the manifest's."""
    digests, damaged = {}, []
    for name in splits:
        shards = manifest.split(name).shards
        for shard in (shards[0], shards[-1]):
            digests[shard.file] = sha256_stored(manifest.storage, shard.file, shard.bytes)
            if digests[shard.file] != shard.sha256:
                damaged.append(f"shard {shard.file} is not what the manifest says: copy it again")
    return digests, damaged


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _device(ranks: Ranks) -> str:
    if ranks.device.type == "cpu":
        return f"cpu, {os.cpu_count()} cores"
    properties = torch.cuda.get_device_properties(ranks.device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _time_sum(ranks: Ranks) -> float | None:
    """Seconds of an all_reduce, and proof that it adds up.

    Raises:
        DataError: it does not.
    """
    if ranks.world_size == 1:
        return None
    vector = torch.full((_SENT // 4,), float(ranks.rank + 1), device=ranks.device)
    began = time.perf_counter()
    ranks.sum(vector)
    wanted = ranks.world_size * (ranks.world_size + 1) / 2
    if not bool((vector == wanted).all()):
        raise DataError(f"an all_reduce gave {float(vector[0])} instead of {wanted}: check the network of these hosts")
    return time.perf_counter() - began


def _odd(what: str, found: set[tuple[str, str]], remedy: str) -> list[str]:
    """One line if hosts differ: those that are not of the most."""
    counts = Counter(value for _, value in found)
    if len(counts) < 2:
        return []
    most = counts.most_common(1)[0][0]
    odd = ", ".join(f"{host}: {value}" for host, value in sorted(found) if value != most)
    return [f"{what} is {most} on most hosts, but {odd}: {remedy}"]


if __name__ == "__main__":
    sys.exit(main())
