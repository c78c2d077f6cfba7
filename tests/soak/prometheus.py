"""Debian's Prometheus on loopback, with the files of tools/monitoring."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.multinode.hosts import free_port

MONITORING = Path(__file__).resolve().parents[2] / "tools" / "monitoring"


class Prometheus:
    """A server of its own data, which reads the shipped prometheus.yml with two changes: everything each second, and
    another folder than /targets.

    Args:
        folder: for its data and its log.
        targets: `metrics.targets_dir` of the runs that it watches.
    """

    def __init__(self, folder: Path, targets: Path) -> None:
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = dict.fromkeys(config["global"], "1s")
        config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(targets / "*.json")]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        self._log = folder / "prometheus.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, f"--web.listen-address={self.url.removeprefix('http://')}"], stdout=log, stderr=log
            )
        self.wait_until(lambda: "Server is ready" in self._log.read_text(), 60)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression now, each with `metric` and `value`."""
        return self._get("query", query=expression)["result"]

    def firing(self) -> set[tuple[str, str]]:
        """(alert, rank) of every alert that fires now."""
        found = (alert for alert in self._get("alerts")["alerts"] if alert["state"] == "firing")
        return {(alert["labels"]["alertname"], alert["labels"].get("rank", "")) for alert in found}

    def ever_fired(self) -> set[str]:
        """The alerts that have fired within the last hour."""
        return {
            series["metric"]["alertname"] for series in self.query('max_over_time(ALERTS{alertstate="firing"}[1h])')
        }

    def rules(self) -> dict[str, str]:
        """Health of every rule by its name: ok, once it was evaluated without an error."""
        return {rule["name"]: rule["health"] for group in self._get("rules")["groups"] for rule in group["rules"]}

    def wait_until(self, condition: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.2)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return json.loads(response.read())["data"]
