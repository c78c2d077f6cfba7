"""report.html: a self-contained page about a run, made from the files of its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from statistics import mode
from typing import Any

from paco_ds.config.engine import in_words
from paco_ds.config.parse import brief, one_line, read_json, read_yaml
from paco_ds.data.manifest import SHOTS
from paco_ds.errors import DataError
from paco_ds.evaluation.groups import GROUPS, percent
from paco_ds.files import replace_text
from paco_ds.report.history import History, section
from paco_ds.report.page import render, with_scripts
from paco_ds.report.pictures import Pictures, pictures_of_mistakes
from paco_ds.report.used_settings import used_and_rest

# label by key of metrics.json and of an evaluation in the log
OF_SINGLE_PREDICTIONS = {
    "balanced": "Balanced accuracy, % (mean of the classes' accuracies)",
    "macro_f1": "Macro F1, % (mean of the classes' F1)",
    "calibration_error": "Expected calibration error, % (15 bins of confidence)",
}
OF_CLASSES = ("class_names", "class_counts", "shots_of_classes", "per_class")


@dataclass(frozen=True)
class RunFiles:
    """The content of a run directory.

    Attributes:
        history: what metrics.jsonl tells.
        recipe_text, recipe: recipe.yaml as text, None when missing, and as a tree.
        final: metrics.json, None when missing.
    """

    history: History
    recipe_text: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    final: Mapping[str, Any] | None = None


def write_report(run_dir: Path, history: History | None = None, pictures: bool = True) -> Path:
    """Write RUN/report.html atomically and return its path.

    Needs metrics.jsonl; recipe.yaml and metrics.json are used if they exist, and the page says what is missing.

    Args:
        history: of this run, read before; only what was logged since is read.
        pictures: show misclassified images, read from the shards, unless `evaluation.pictures` is false.

    Raises:
        FileNotFoundError: there is no metrics.jsonl.
        ValueError: a file is damaged; the message names it.
    """
    run = read_run(run_dir, history)
    try:
        shown = pictures and section(run.recipe, "evaluation").get("pictures", True) is True
        of_mistakes = pictures_of_mistakes(run_dir, run.final or {}) if shown else Pictures(missing="left out")
        page = render("run.html.j2", {**_context(run_dir.resolve().name, run), "pictures": of_mistakes})
        page = with_scripts(page, _data(run))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(
            f"{run_dir}: metrics.json, recipe.yaml or an evaluation in metrics.jsonl is not as a run writes it "
            f"({type(error).__name__}: {one_line(error)}); evaluate the run again"
        ) from error
    return replace_text(run_dir / "report.html", page)


def read_run(run_dir: Path, history: History | None = None) -> RunFiles:
    """Read metrics.jsonl, recipe.yaml and metrics.json; raises as `write_report` does."""
    log_path = run_dir / "metrics.jsonl"
    if not log_path.exists():
        raise FileNotFoundError(f"{log_path} is missing: {run_dir} is not the output directory of a run")
    history = (history or History(log_path)).read_on()
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
    return RunFiles(history, recipe_text, recipe or {}, final)


def _context(name: str, run: RunFiles) -> dict[str, Any]:
    history, final = run.history, run.final or {}
    headline, source = _headline(run)
    used, rest = used_and_rest(run.recipe)
    started = history.starts[-1] if history.starts else {}
    return {
        "name": name,
        "groups": GROUPS,
        "headline": headline,
        "source": source,
        "shot_sizes": _shot_sizes(final),
        "facts": _facts(run),
        "classes": len(_classes(final)),
        "single": _single(headline or {}),
        "confusions": final.get("confusions", ()),
        "mistakes": final.get("mistakes") or {"confused": (), "tail": ()},
        "reliability": bool(final.get("reliability")),
        "has_final": run.final is not None,
        "evaluated": bool(history.evaluations),
        "history": history,
        "has": {name: _has(history, name) for name in ("center", "positive", "part")},
        "waited": percent(_wait_share(history)) if history.steps else None,
        "used": used,
        "rest": rest,
        "recipe_text": run.recipe_text,
        "command": started.get("command"),
        "commit": started.get("commit"),
        "hardware": section(started, "hardware"),
        "versions": final.get("versions") or section(started, "versions"),
        "manifest": final.get("manifest_sha256"),
    }


def _single(evaluation: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    return [(label, evaluation[key]) for key, label in OF_SINGLE_PREDICTIONS.items() if key in evaluation]


def _has(history: History, prefix: str) -> bool:
    return any(name.startswith(prefix + "_") and len(curve) for name, curve in history.curves.items())


def _headline(run: RunFiles) -> tuple[Mapping[str, Any] | None, str]:
    if run.final is not None:
        return run.final, f"{run.final.get('split', 'test')} split, final weights"
    if run.history.evaluations:
        last = run.history.evaluations[-1]
        return (
            last,
            f"{last['split']} split after epoch {last['epoch']}; the final evaluation is still missing",
        )
    return None, ""


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    final, recipe, history = run.final or {}, run.recipe, run.history
    facts = []
    for label, name, key in (
        ("Method", "loss", "method"),
        ("Backbone", "model", "backbone"),
        ("Shards", "data", "shards"),
    ):
        if value := section(recipe, name).get(key):
            facts.append((label, str(value)))
    execution = section(final, "execution") or section(history.starts[-1] if history.starts else {}, "execution")
    if execution:
        facts.append(("Execution", f"{in_words(execution)}, ZeRO stage {execution.get('zero_stage')}"))
    if history.steps:
        facts.append(("Training", f"{history.epochs:,} epochs, {history.last:,} steps"))
    # metrics.json has the ranks, start and end of what wrote it, which may be a later evaluation
    if ranks := [start["world_size"] for start in history.starts if "world_size" in start]:
        facts.append(("Ranks", str(ranks[-1])))
    if final.get("scale", 1) != 1:
        facts.append(("Scaled", f"{final['scale']:g} times the recipe's micro-batches a step"))
    if seconds := sum(history.seconds.values()) - history.seconds["wait"]:  # a step's seconds include its waits
        facts.append(("Trained for", str(timedelta(seconds=round(seconds)))))
    if "finished" in final:
        facts.append(("Evaluated", f"{datetime.fromisoformat(final['finished']):%Y-%m-%d %H:%M}"))
    return facts


def _data(run: RunFiles) -> dict[str, Any]:
    """What page.js draws; curves are rows of [x, mean, lowest, highest]."""
    history, final = run.history, run.final or {}
    scale, unit = history.x_scale
    classes = _classes(final)
    return {
        "unit": unit,
        "curves": {name: history.rows(name) for name in history.curves},
        "skips": [step / scale for step in history.skips],
        "accuracy": _watched(history, scale),
        "time": _time(history),
        "reliability": final.get("reliability", []),
        "classes": [[row["name"], row["count"], SHOTS.index(row["shot"]), row["accuracy"]] for row in classes],
    }


def _watched(history: History, scale: float) -> list[dict[str, Any]]:
    """Top-1 over training, of the split that was evaluated most often: the end may evaluate another once."""
    if not history.evaluations:
        return []
    split = mode(line["split"] for line in history.evaluations)
    lines = [line for line in history.evaluations if line["split"] == split]
    return [
        {"x": line["step"] / scale, "group": group, "y": 100 * line[group]}
        for line in lines
        for group in GROUPS
        if line.get(group) is not None
    ]


def _time(history: History) -> list[dict[str, Any]]:
    """Where rank 0's time went, in seconds; older logs do not tell evaluations and checkpoints."""
    seconds = history.seconds
    parts = {
        "training": max(seconds["step"] - seconds["wait"], 0.0),
        "waiting for data": seconds["wait"],
        "evaluation": seconds["evaluation"],
        "checkpoints": seconds["checkpoint"],
    }
    return [{"part": part, "seconds": value} for part, value in parts.items() if value > 0]


def _wait_share(history: History) -> float | None:
    total = history.seconds["step"]
    return history.seconds["wait"] / total if total else None


def _classes(final: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the list of classes, largest first; empty without metrics.json."""
    if not all(key in final for key in OF_CLASSES):
        return []
    rows = zip(*(final[key] for key in OF_CLASSES), strict=True)
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
