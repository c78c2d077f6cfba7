"""report.html: a self-contained page about a run, made from the files of its directory."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import mode
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from paco_ds.config.parse import brief, one_line, read_json, read_yaml
from paco_ds.data.manifest import SHOTS
from paco_ds.errors import DataError, printable
from paco_ds.evaluation.accuracy import GROUPS, percent
from paco_ds.files import replace_text
from paco_ds.metrics import log
from paco_ds.report import charts
from paco_ds.report.charts import Values

STEP_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "images_per_second",
    "data_wait_seconds",
    "step_seconds",
    "queue_fill",
    "bad_samples",
    "skipped",
)

# column by shot: key in a line of the log
BY_SHOT = {
    "own": "center_probability",
    "optimum": "center_probability_optimum",
    "positive": "positive_probability",
    "positive_optimum": "positive_probability_optimum",
}

# label by key of metrics.json
OF_SINGLE_PREDICTIONS = {
    "balanced": "Balanced accuracy, % (mean of the classes' accuracies)",
    "macro_f1": "Macro F1, % (mean of the classes' F1)",
    "calibration_error": "Expected calibration error, % (15 bins of confidence)",
}

DESCRIPTIONS = {
    "loss": "Training loss over time",
    "parts": "Parts of the training loss over time",
    "accuracy": "Accuracy of Many, Medium, Few and All over time",
    "classes": "Accuracy of each class against its number of training images",
    "center": "Probability of the label's center by shot, with its optimum",
    "positive": "Probability of each positive by shot, with its optimum",
    "throughput": "Images per second and share of time spent waiting for data",
    "optimizer": "Learning rate and gradient norm over time",
}


@dataclass(frozen=True)
class RunFiles:
    """The content of a run directory.

    Attributes:
        steps: float64 [steps] for each of STEP_COLUMNS and for each of BY_SHOT and shot (own_many, ...); NaN where
            a line has null or lacks the key.
        parts: parts of the loss, float64 [steps] by name; empty for methods with one part.
        damaged: lines of the log that were passed over.
        evaluations: the evaluation lines, in order.
        recipe: recipe.yaml as text and as a tree, None when missing.
        final: metrics.json, None when missing.
        restarts: the restart lines, in order.
    """

    steps: Mapping[str, Values]
    evaluations: Sequence[Mapping[str, Any]]
    recipe_text: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    final: Mapping[str, Any] | None = None
    parts: Mapping[str, Values] = field(default_factory=dict)
    restarts: Sequence[Mapping[str, Any]] = ()
    damaged: int = 0


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html atomically and return its path.

    Needs metrics.jsonl; recipe.yaml and metrics.json are used if they exist, and the page says what is missing.

    Raises:
        FileNotFoundError: there is no metrics.jsonl.
        ValueError: a file is damaged; the message names it.
    """
    run = read_run(run_dir)
    try:
        page = render("run.html.j2", _context(run_dir.resolve().name, run))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(
            f"{run_dir}: metrics.json, recipe.yaml or an evaluation in metrics.jsonl is not as a run writes it "
            f"({type(error).__name__}: {one_line(error)}); evaluate the run again"
        ) from error
    return replace_text(run_dir / "report.html", page)


def read_run(run_dir: Path) -> RunFiles:
    """Read metrics.jsonl, recipe.yaml and metrics.json; raises as `write_report` does."""
    log_path = run_dir / "metrics.jsonl"
    if not log_path.exists():
        raise FileNotFoundError(f"{log_path} is missing: {run_dir} is not the output directory of a run")
    names = [*STEP_COLUMNS, *(f"{kind}_{shot}" for kind in BY_SHOT for shot in SHOTS)]
    columns = {name: array("d") for name in names}
    parts: dict[str, array[float]] = {}
    evaluations, restarts = [], []
    lines = log.read(log_path)
    for line in lines:
        if line["kind"] == "evaluation":
            evaluations.append(line)
        if line["kind"] == "restart":
            restarts.append(line)
        if line["kind"] != "step":
            continue
        for name in STEP_COLUMNS:
            columns[name].append(_float(line.get(name)))
        for kind, key in BY_SHOT.items():
            for shot in SHOTS:
                columns[f"{kind}_{shot}"].append(_float(_section(line, key).get(shot)))
        of_loss = _section(line, "parts")
        for name in parts.keys() | of_loss.keys():
            if name not in parts:
                parts[name] = array("d", [_float(None)] * (len(columns["step"]) - 1))
            parts[name].append(_float(of_loss.get(name)))
    recipe_path, final_path = run_dir / "recipe.yaml", run_dir / "metrics.json"
    recipe_text: str | None = None
    recipe: Any = {}
    final: Any = None
    if recipe_path.exists():
        recipe = read_yaml(recipe_path, DataError)
        recipe_text = recipe_path.read_text(encoding="utf-8")
    if final_path.exists():
        final = read_json(final_path, DataError, "; evaluate the run again")
    for path, content in ((recipe_path, recipe), (final_path, final)):
        if not isinstance(content, dict | None):
            raise DataError(f"{path} holds {brief(content)}, not the mapping that a run writes")
    return RunFiles(
        {name: np.array(column) for name, column in columns.items()},
        evaluations,
        recipe_text,
        recipe or {},
        final,
        {name: np.array(part) for name, part in parts.items()},
        restarts,
        lines.damaged,
    )


def render(template: str, context: Mapping[str, Any]) -> str:
    """Render a template of this package; all values are escaped, credentials redacted."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = percent
    return printable(environment.get_template(template).render(context))


def inline(figure: charts.Figure, name: str, description: str) -> Markup:
    """A chart for a template: markup that is not escaped, since matplotlib escapes its texts."""
    return Markup(charts.svg(figure, name, description))


def _context(name: str, run: RunFiles) -> dict[str, Any]:
    steps = run.steps
    final = run.final or {}
    headline, source = _headline(run)
    done = len(steps["step"])
    return {
        "name": name,
        "groups": GROUPS,
        "headline": headline,
        "source": source,
        "shot_sizes": _shot_sizes(final),
        "facts": _facts(run),
        "charts": _charts(run),
        "classes": _classes(final),
        "single": [(label, final[key]) for key, label in OF_SINGLE_PREDICTIONS.items() if key in final],
        "confusions": final.get("confusions", ()),
        "has_final": run.final is not None,
        "evaluated": bool(run.evaluations),
        "steps": done,
        "skipped": int(np.nansum(steps["skipped"])),
        "restarts": run.restarts,
        "damaged": run.damaged,
        "bad_samples": int(np.nansum(steps["bad_samples"])),
        "waited": percent(_wait_share(steps)) if done else None,
        "recipe": _sections(run.recipe),
        "recipe_text": run.recipe_text,
        "versions": final.get("versions", {}),
        "manifest": final.get("manifest_sha256"),
    }


def _headline(run: RunFiles) -> tuple[Mapping[str, Any] | None, str]:
    if run.final is not None:
        return run.final, f"{run.final.get('split', 'test')} split, final weights"
    if run.evaluations:
        last = run.evaluations[-1]
        return (
            last,
            f"{last['split']} split after epoch {last['epoch']}; the final evaluation is still missing",
        )
    return None, ""


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    final, recipe = run.final or {}, run.recipe
    facts = []
    for label, section, key in (
        ("Method", "loss", "method"),
        ("Backbone", "model", "backbone"),
        ("Shards", "data", "shards"),
    ):
        if value := _section(recipe, section).get(key):
            facts.append((label, str(value)))
    if len(run.steps["step"]):
        facts.append(("Training", f"{run.steps['epoch'][-1] + 1:,.0f} epochs, {run.steps['step'][-1]:,.0f} steps"))
    if "world_size" in final:
        facts.append(("Ranks", str(final["world_size"])))
    if final.get("scale", 1) != 1:
        facts.append(("Scaled", f"{final['scale']:g} times the recipe's micro-batches a step, and learning rate"))
    times = [datetime.fromisoformat(final[key]) for key in ("started", "finished") if key in final]
    if len(times) == 2:
        facts.append(("Finished", f"{times[1]:%Y-%m-%d %H:%M}"))
        facts.append(("Took", str(times[1] - times[0]).split(".")[0]))
    return facts


def _charts(run: RunFiles) -> dict[str, Markup]:
    steps, final = run.steps, run.final or {}
    made: dict[str, charts.Figure] = {}
    scale, unit = _x_scale(steps)
    x = steps["step"] / scale
    if len(x):
        made["loss"] = charts.loss_chart(x, steps["loss"], steps["skipped"] == 1, unit)
        if run.parts:
            made["parts"] = charts.parts_chart(x, run.parts, unit)
        share = 100 * steps["data_wait_seconds"] / steps["step_seconds"]
        panels = [("images/s", steps["images_per_second"]), ("data wait, %", share)]
        made["throughput"] = charts.two_panel_chart(x, panels, unit)
        panels = [("learning rate", steps["lr"]), ("gradient norm", steps["grad_norm"])]
        made["optimizer"] = charts.two_panel_chart(x, panels, unit)
        for name, kind, aim, top in (
            ("center", "own", "optimum", 1.02),
            ("positive", "positive", "positive_optimum", None),
        ):
            seen, optimum = ({shot: steps[f"{column}_{shot}"] for shot in SHOTS} for column in (kind, aim))
            if any(np.isfinite(values).any() for values in seen.values()):
                made[name] = charts.probability_chart(x, seen, optimum, unit, top=top)
    if run.evaluations:
        split = mode(line["split"] for line in run.evaluations)  # the end of a run also evaluates the test split, once
        lines = [line for line in run.evaluations if line["split"] == split]
        figures = {group: [line.get(group) for line in lines] for group in GROUPS}
        made["accuracy"] = charts.accuracy_chart([line["step"] / scale for line in lines], figures, unit)
    if _classes(final):
        made["classes"] = charts.class_chart(
            final["class_names"], final["class_counts"], final["shots_of_classes"], final["per_class"]
        )
    return {key: inline(figure, key, DESCRIPTIONS[key]) for key, figure in made.items()}


def _x_scale(steps: Mapping[str, Values]) -> tuple[float, str]:
    """Steps per epoch and "epoch" once two epochs have begun, else 1 and "step"; all charts share this axis."""
    epoch = steps["epoch"]
    if len(epoch) and epoch[-1] > epoch[0]:
        first, last = steps["step"][0], steps["step"][np.argmax(epoch == epoch[-1])]
        return float((last - first) / (epoch[-1] - epoch[0])), "epoch"
    return 1.0, "step"


def _wait_share(steps: Mapping[str, Values]) -> float | None:
    total = float(np.nansum(steps["step_seconds"]))
    return float(np.nansum(steps["data_wait_seconds"])) / total if total else None


def _classes(final: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of classes, largest first; empty without metrics.json."""
    keys = ("class_names", "class_counts", "shots_of_classes", "per_class")
    if not all(key in final for key in keys):
        return []
    rows = zip(*(final[key] for key in keys), strict=True)
    named = [dict(zip(("name", "count", "shot", "accuracy"), row, strict=True)) for row in rows]
    return sorted(named, key=lambda row: -row["count"])


def _shot_sizes(final: Mapping[str, Any]) -> dict[str, str]:
    sizes = {}
    rows = _classes(final)
    for shot in SHOTS:
        counts = [row["count"] for row in rows if row["shot"] == shot]
        if counts:
            span = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,}-{max(counts):,}"
            sizes[shot] = f"{len(counts):,} class{'es' * (len(counts) > 1)} of {span} images"
    if rows:
        sizes["all"] = f"{len(rows):,} classes, {sum(row['count'] for row in rows):,} images"
    return sizes


def _sections(recipe: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Cards of the page: one for the settings at the top of the recipe, one for each of its sections."""
    top = {key: value for key, value in recipe.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in recipe.items() if key not in top}
    sections = ({"run": top} if top else {}) | nested
    return [(key, _flat(value)) for key, value in sections.items()]


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A section of the recipe as (key.path, value) rows."""
    if isinstance(tree, Mapping) and tree:
        return [row for key, value in tree.items() for row in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, "-" if tree is None else str(tree))]


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The values under a key; none where it has another kind of value."""
    section = values.get(key)
    return section if isinstance(section, Mapping) else {}


def _float(value: Any) -> float:
    """A figure of the log; NaN for null, and for what is no figure."""
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")
