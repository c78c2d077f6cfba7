"""Two thousand connections on every port of a training job: steps are no slower, a lost rank is still noticed."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from paco_ds.distributed.listener import allow_open_files
from paco_ds.errors import RESUMABLE
from paco_ds.metrics.log import read
from paco_ds.training.outcome import read_outcome
from tests.multinode.training import steps
from tests.soak.launched import Launched

pytestmark = [pytest.mark.soak, pytest.mark.alone, pytest.mark.timeout(900)]
CONNECTIONS = 2000


def listening(process: psutil.Process) -> dict[int, str]:
    """Its ports, with an address at which each is reached."""
    found = {c.laddr.port: c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return {port: ip if ip not in ("::", "0.0.0.0") else "127.0.0.1" for port, ip in found.items()}


def step_seconds(run: Path) -> list[float]:
    return [line["step_seconds"] for line in read(run / "metrics.jsonl") if line["kind"] == "step"]


def test_a_job_takes_no_notice_of_idle_connections(
    tmp_path: Path, striped_shards: Path, record: Callable[[str, str, bool], None]
) -> None:
    """On /metrics, the watchdog's port, torch's store and gloo; half of them send a line of garbage first."""
    allow_open_files()
    job, held = Launched(tmp_path, striped_shards), []
    try:
        job.wait_until(lambda: len(steps(job.run)) > 200)
        ranks = [job.rank(rank) for rank in range(2)]
        ports = {port: ip for rank in ranks for port, ip in listening(rank).items()}
        before = statistics.median(step_seconds(job.run)[100:])
        for port, ip in ports.items():
            for number in range(CONNECTIONS):
                with suppress(OSError):  # sent away at once
                    held.append(socket.create_connection((ip, port), timeout=5))
                    if number % 2:
                        held[-1].sendall(os.urandom(50) + b"\n")
        done = len(steps(job.run))
        job.wait_until(lambda: len(steps(job.run)) > done + 200)
        during = statistics.median(step_seconds(job.run)[done:])
        slower = f"{1000 * before:.1f} ms, with {len(held)} connections on {len(ports)} ports {1000 * during:.1f} ms"
        record("a step beside idle connections", slower, during < 1.25 * before)
        began = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{job.metrics_port}/metrics", timeout=30) as page:
            assert b"paco_step " in page.read()
        scraped = time.monotonic() - began
        record("a scrape beside them", f"{1000 * scraped:.0f} ms", scraped < 1)
        ranks[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        assert job.process.wait(timeout=60) != 0
        outcome = read_outcome(job.run)
        lost = outcome is not None and outcome.status == RESUMABLE
        record("a rank lost beside them ends the job", f"{time.monotonic() - began:.0f} s", lost)
        assert lost, job.said
        assert "rank 1 on host" in job.said
        assert scraped < 1
        assert during < 1.25 * before
    finally:
        job.close()
        for connection in held:
            connection.close()
