"""Where Prometheus finds the ranks of a run: files in file_sd form, and the same list by HTTP from rank 0."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from paco_ds.config.recipe import MetricsSettings
from paco_ds.distributed.heartbeat import Heartbeat
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import UserError
from paco_ds.files import replace_text, storage_errors
from paco_ds.metrics.exporter import Exporter, reachable_host

TARGETS_FILE = "metrics_targets.json"


@contextmanager
def served_metrics(
    settings: MetricsSettings, run: Path, ranks: Ranks, build: Mapping[str, str], heartbeat: Heartbeat
) -> Iterator[Exporter]:
    """Serve /metrics on every rank during the block and list the addresses, before anything slow begins.

    A list of an earlier start is replaced. It is removed at a clean end, also of a run that was asked to stop or was
    refused for its settings; a failed or killed run leaves it, so that its ranks are missed. A run that finished or
    failed serves for `metrics.linger_seconds` more.

    Args:
        run: the run directory; its name is the label `run`.
        build: labels of paco_build_info.
        heartbeat: of this rank, from which its state is read.
    """
    sink = Exporter(ranks.first, lambda: heartbeat.last.phase, ranks.device)
    files: list[Path] = []
    try:
        port = sink.start(settings.port, ranks.local_rank, settings.address) if settings.serve else None
        sink.build_info(build)
        ranks.on_bytes = sink.add_collective_bytes
        host = _bracketed(announced(settings.address)) or reachable_host(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        addresses = ranks.gather_objects(f"{host}:{port}" if port else None)
        if ranks.first:
            text = targets(addresses, run.resolve().name)
            sink.publish_targets(text)
            files = target_files(run, settings.targets_dir)
            for file in files:
                with storage_errors(file):
                    file.parent.mkdir(parents=True, exist_ok=True)
                replace_text(file, text)
        yield sink
        if sink.finished and settings.serve:
            time.sleep(settings.linger_seconds)
        _remove(files)
    except Exception as error:
        if isinstance(error, UserError) and heartbeat.last.phase == "start":  # no step was begun
            _remove(files)
        sink.ended("failed")
        if settings.serve:
            time.sleep(settings.linger_seconds)
        raise
    finally:
        sink.close()


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def target_files(run: Path, folder: str | None) -> list[Path]:
    """The run's own list and, in the folder of all runs, one with a name that no other run directory has."""
    own = run / TARGETS_FILE
    if folder is None:
        return [own]
    where = run.resolve()
    digest = hashlib.sha256(str(where).encode(errors="surrogateescape")).hexdigest()[:8]
    return [own, Path(folder) / f"{where.name}-{digest}.json"]


def targets(addresses: Sequence[str | None], run: str) -> str:
    """The addresses in the JSON of Prometheus' file_sd and http_sd.

    Args:
        addresses: HOST:PORT of each rank in rank order, or None for a rank without a server.
        run: value of the `run` label; each target also carries its `rank`.
    """
    groups = [
        {"targets": [address], "labels": {"run": run, "rank": str(rank)}}
        for rank, address in enumerate(addresses)
        if address is not None
    ]
    return json.dumps(groups, indent=2) + "\n"


def announced(address: str | None) -> str | None:
    """The address in the targets; None for all of them (0.0.0.0 and ::), of which one that is reachable is chosen."""
    with suppress(ValueError):
        if address is not None and ipaddress.ip_address(address).is_unspecified:
            return None
    return address


def _bracketed(address: str | None) -> str | None:
    return f"[{address}]" if address and ":" in address else address
