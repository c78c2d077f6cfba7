"""A real run on two ranks, watched by Debian's Prometheus with the files of tools/monitoring."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from dashboard import Server, draw

from tests.metrics.test_monitoring import EXPRESSIONS, GPU, ROOT, named
from tests.multinode.training import steps
from tests.soak.launched import Launched
from tests.soak.prometheus import Prometheus

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
EPOCHS = 100
ON_CPU = [expression.replace("$run", "run") for expression in EXPRESSIONS if GPU not in expression]


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """Watches tmp_path/targets."""
    (tmp_path / "targets").mkdir()
    (tmp_path / "prometheus").mkdir()
    server = Prometheus(tmp_path / "prometheus", tmp_path / "targets")
    yield server
    server.close()


@pytest.fixture
def start(tmp_path: Path, striped_shards: Path) -> Iterator[Callable[..., Launched]]:
    """`start(override, ...)`: a run on two ranks that tells Prometheus of itself; ended with the test."""
    jobs: list[Launched] = []

    def started(*overrides: str) -> Launched:
        targets = f"metrics.targets_dir={tmp_path / 'targets'}"
        jobs.append(Launched(tmp_path, striped_shards, targets, *overrides))
        return jobs[-1]

    yield started
    for job in jobs:
        job.close()


def test_a_run_is_seen_from_its_first_steps_and_its_end_raises_no_alert(
    prometheus: Prometheus, start: Callable[..., Launched], record: Callable[[str, str, bool], None]
) -> None:
    """Every expression of the dashboard returns data; every rule is evaluated without an error."""
    job = start(f"schedule.epochs={EPOCHS}", "evaluation.every_epochs=10", "metrics.linger_seconds=3")
    without: set[str] = set(ON_CPU)
    while without and job.process.poll() is None:
        without -= {expression for expression in without if prometheus.query(expression)}
        time.sleep(1)
    record(
        "Prometheus on a run of 2 ranks: expressions of the dashboard that return data",
        f"{len(ON_CPU) - len(without)} of {len(ON_CPU)}",
        not without,
    )
    assert without == set()
    assert job.process.wait(timeout=600) == 0, job.said
    seen = {r["metric"]["rank"]: float(r["value"][1]) for r in prometheus.query("min_over_time(paco_steps_total[1h])")}
    done = len(steps(job.run))
    record(
        f"... steps before the first scrape, of {done}", f"{max(seen.values()):.0f}", max(seen.values()) <= 0.1 * done
    )
    assert seen.keys() == {"0", "1"}
    assert max(seen.values()) <= 0.1 * done
    picture = ROOT / "build" / "screenshots" / "dashboard.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    assert all(GPU in expression for expression in draw(Server(prometheus.url), "run", picture))
    states = prometheus.query('max_over_time(paco_run_state{rank="0"}[1h]) == 1')
    assert {"training", "finished"} <= {series["metric"]["state"] for series in states}
    assert set(prometheus.rules().values()) == {"ok"}
    assert prometheus.rules().keys() == named("alert", "alerts.yml") | named("record", "recording.yml")
    time.sleep(140)  # PacoLostRank waits for two minutes
    fired = prometheus.ever_fired()
    record("... alerts within 140 s of its end", ", ".join(fired) or "none", not fired)
    assert fired == set()
    assert prometheus.query("up") == []


def test_a_killed_rank_raises_an_alert_until_the_run_is_started_again(
    prometheus: Prometheus, start: Callable[..., Launched], record: Callable[[str, str, bool], None]
) -> None:
    """The other rank ends too, and is missed as well."""
    job = start()
    job.wait_until(lambda: len(steps(job.run)) > 30 and len(prometheus.query("up == 1")) == 2)
    job.rank(1).send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert job.process.wait(timeout=300) != 0
    prometheus.wait_until(lambda: ("PacoLostRank", "1") in prometheus.firing(), 300)
    record("a rank is killed: seconds to PacoLostRank, which waits for 120", f"{time.monotonic() - killed:.0f}", True)
    again = start()
    prometheus.wait_until(lambda: len(prometheus.query("up == 1")) == 2 and not prometheus.firing(), 400)
    assert again.process.poll() is None
