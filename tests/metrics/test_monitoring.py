"""tools/monitoring: Prometheus takes its files, alerts fire when they should, the dashboard asks for what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.metrics.exporter import Exporter
from tests.metrics.test_exporter import RECORD

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "tools" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "paco_ds.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
GPU = "paco_gpu_memory_bytes"  # shown on GPUs alone

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def named(key: str, file: str) -> set[str]:
    """Names of the rules of a file."""
    groups = yaml.safe_load((MONITORING / "rules" / file).read_text())["groups"]
    return {rule[key] for group in groups for rule in group["rules"]}


def run_promtool(*words: object) -> None:
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_takes_the_configuration_and_its_rules() -> None:
    """Without a warning."""
    run_promtool("check", "config", MONITORING / "prometheus.yml")


@promtool
def test_each_alert_fires_when_it_should_and_not_before() -> None:
    """By promtool on the series of tools/monitoring/tests."""
    tests = MONITORING / "tests" / "alerts.yml"
    run_promtool("test", "rules", tests)
    alerts = named("alert", "alerts.yml")
    tested = re.findall(r"alertname=\"(\w+)\"", tests.read_text())
    assert {name for name in alerts if tested.count(name) < 2} == set()  # fires, and does not


@promtool
def test_every_expression_of_the_dashboard_parses(tmp_path: Path) -> None:
    """As the rules of a file."""
    expressions = [expression.replace("$run", ".*") for expression in EXPRESSIONS]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(expressions)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run_promtool("check", "rules", "--lint=none", tmp_path / "rules.yml")


def worst_case() -> Exporter:
    """Rank 0 with 8 experts, every reason of a bad sample, three splits, all collectives."""
    exporter = Exporter()
    shots = dict.fromkeys(("many", "medium", "few", "all"), 0.5)
    exporter.build_info({"version": "1"})
    exporter.observe_step(
        replace(
            RECORD,
            grad_norm_ratio=1.0,
            parts={f"expert_{number}": 1.0 for number in range(1, 9)} | {"distillation": 1.0},
            center_probability=shots,
            center_probability_optimum=shots,
            positive_probability=shots,
            positive_probability_optimum=shots,
        ),
        samples=32,
    )
    for reason in ("crc_mismatch", "undecodable", "too_many_pixels", "too_many_scans", "unreadable", "truncated"):
        exporter.observe_bad_sample(reason)
    accuracy = ShotAccuracy(0.9, 0.8, 0.7, 0.85, {}, [], images_by_experts=[1] * 8)
    for split in ("val", "test"):
        exporter.observe_accuracy(accuracy, split)
    for op in ("all_gather", "all_reduce", "reduce_scatter", "broadcast", "all_to_all"):
        exporter.add_collective_bytes(op, 1)
    return exporter


def exposition(exporter: Exporter) -> dict[str, int]:
    """Series by name."""
    found: dict[str, int] = {}
    for family in text_string_to_metric_families(generate_latest(exporter.registry).decode()):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + 1
    return found


def test_a_rank_has_at_most_150_series() -> None:
    """With those of a GPU's memory."""
    assert sum(exposition(worst_case()).values()) + 4 <= 150


def test_the_page_lists_every_series_and_no_other() -> None:
    """docs/monitoring.md, GPU memory included."""
    page = (ROOT / "docs" / "monitoring.md").read_text()
    cells = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `paco_"))
    listed = {re.sub(r"\{.*", "", name) for name in re.findall(r"`(paco_[^`]+)`", cells)}
    listed |= {f"{name}_optimum" for name in ("paco_center_probability", "paco_positive_probability")}
    served = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposition(worst_case())} | {GPU}
    assert listed == served


def test_the_dashboard_asks_for_what_is_served_or_recorded() -> None:
    """No panel of a series that nobody writes; four rows; panels do not overlap."""
    served = exposition(worst_case()).keys() | {"up", GPU}
    recorded = named("record", "recording.yml")
    for expression in EXPRESSIONS:
        names = re.findall(r"\b(up|paco_\w+|run\w*:paco_\w+:\w+)\b(?=[{\[])", expression)
        assert names, expression
        assert set(names) <= served | recorded, expression
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == [
        "Job",
        "Nodes",
        "Ranks",
        "Learning",
    ]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def unknown_to_grafana(dashboard: Any) -> list[str]:
    """Keys that Grafana's own model of a dashboard does not keep, and values that it changes."""
    model = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder").JSONEncoder
    pytest.importorskip("grafana_foundation_sdk.cog.plugins").register_default_plugins()
    return list(_lost(dashboard, json.loads(json.dumps(model.Dashboard.from_json(dashboard), cls=encoder)), ""))


def _lost(given: Any, kept: Any, place: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        yield from (f"{place}.{key}" for key in given.keys() - kept.keys())
        for key in given.keys() & kept.keys():
            yield from _lost(given[key], kept[key], f"{place}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{place}[{number}]")
    elif given != kept:
        yield place


def test_grafanas_own_model_has_a_place_for_all_of_the_dashboard() -> None:
    """A key that is mistyped anywhere is named."""
    assert unknown_to_grafana(DASHBOARD) == []
    changed = json.loads(json.dumps(DASHBOARD))
    changed["panels"][1]["targets"][0]["legend"] = changed["panels"][2]["fieldConfig"]["defaults"]["unti"] = "s"
    assert sorted(unknown_to_grafana(changed)) == [
        ".panels[1].targets[0].legend",
        ".panels[2].fieldConfig.defaults.unti",
    ]


def test_files_that_compose_and_provisioning_name_are_there() -> None:
    """Every mounted file and folder; the data source of the panels is the provisioned one."""
    compose = yaml.safe_load((MONITORING / "docker-compose.yml").read_text())
    volumes = [volume for service in compose["services"].values() for volume in service["volumes"]]
    mounted = [volume.split(":")[0] for volume in volumes if volume.startswith("./")]
    assert all((MONITORING / path).exists() for path in mounted)
    (source,) = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]} == {source["uid"]}


def test_rank_0_answers_service_discovery() -> None:
    """Its JSON under /targets, with the type that Prometheus insists on; other ranks have none."""
    first, other = Exporter(), Exporter(first=False)
    try:
        ports = [first.start(0, 0, "127.0.0.1"), other.start(0, 0, "127.0.0.1")]
        first.publish_targets('[{"targets": ["10.0.0.1:1"], "labels": {"run": "r"}}]')
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/targets", timeout=60) as response:
            assert response.headers["Content-Type"] == "application/json"
            assert json.loads(response.read())[0]["labels"] == {"run": "r"}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/targets", timeout=60)
    finally:
        first.close()
        other.close()
