"""metrics.json: the accuracy of a run on a split, with the recipe, data and versions behind it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import paco_ds
from paco_ds.data.manifest import Manifest
from paco_ds.data.storage import Storage
from paco_ds.errors import redacted
from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.evaluation.split import EvaluationSplit
from paco_ds.files import replace_text

CORRECTIONS = ("tau_normalization", "logit_adjustment", "aggregation", "ensemble")
"""Keys of metrics.json that say that it is not of a model as it was trained."""


def now() -> str:
    """The current time as ISO 8601, UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of the packages that affect results."""
    packages = ("torch", "torchvision", "deepspeed", "webdataset")
    own = {"python": platform.python_version(), "paco_ds": paco_ds.__version__}
    return own | {package: version(package) for package in packages}


def about_process() -> dict[str, Any]:
    """What started this process, and on what: command (credentials redacted), commit of the code (None outside a
    checkout), hardware, versions."""
    cuda = torch.cuda.is_available()
    return {
        "command": redacted(shlex.join(sys.argv)),
        "commit": _commit(),
        "hardware": {
            "device": torch.cuda.get_device_name() if cuda else _processor(),
            "devices of this host": torch.cuda.device_count() if cuda else 0,
            "cores of this host": os.cpu_count(),
        },
        "versions": versions(),
        "time": now(),
    }


def _commit() -> str | None:
    """Of a checkout whose top folder holds this package: the repository around an installed wheel is another's."""
    top = Path(paco_ds.__file__).resolve().parents[1]
    if not (top / ".git").exists():
        return None
    command = ["git", "-C", str(top), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    """Its name as the kernel has it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def results_file(run: Path, split: str, test_split: str, trained: Manifest, other: Manifest | None = None) -> Path:
    """Where the results of a split go in a run: metrics.json, metrics-SPLIT.json or, of other shards,
    metrics-FOLDER-SPLIT.json; with 8 digits of the manifest's digest where a file of other images has that name."""
    if other is None and split == test_split:
        return run / "metrics.json"
    file = run / (f"metrics-{_folder_of(other.storage)}-{split}.json" if other else f"metrics-{split}.json")
    images = (other or trained).sha256
    if os.path.lexists(file) and _images_of(file) != (images, split):
        return file.with_name(f"{file.stem}-{images[:8]}.json")
    return file


def _folder_of(storage: Storage) -> str:
    """The name of the folder of shards."""
    if storage.is_local:
        return os.path.basename(os.path.abspath(storage.url)) or "data"
    address = storage.url.partition("?")[0].replace("{name}", "")  # a query may hold a secret
    return address.rstrip("/").rpartition("/")[2] or "data"


def _images_of(file: Path) -> tuple[Any, Any] | None:
    """(digest of the manifest, split) of the images that results are of; None for another file."""
    try:
        results = json.loads(file.read_bytes())
        return (results.get("data") or results)["manifest_sha256"], results["split"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def write_results(
    path: Path,
    accuracy: ShotAccuracy,
    split: EvaluationSplit,
    *,
    run: str,
    seed: int,
    scale: float,
    step: int,
    world_size: int,
    started: str,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write metrics.json atomically; accuracies are fractions.

    Args:
        split, step: the images and the weights that were evaluated.
        run: name of the recipe.
        scale: of the learning rate, see `StepSettings.scale`.
        started: see :func:`now`.
        about: further keys.
    """
    classes = split.manifest.classes
    results = {
        **accuracy.to_json(),
        **(accuracy.detail.to_json(classes) if accuracy.detail else {}),
        **({"mistakes": accuracy.mistakes.to_json(classes)} if accuracy.mistakes else {}),
        "run": run,
        "split": split.name,
        "step": step,
        "seed": seed,
        "class_names": list(classes),
        "class_counts": list(split.class_counts),
        "shots_of_classes": list(split.shots),
        "world_size": world_size,
        "scale": scale,
        "started": started,
        "finished": now(),
        "manifest_sha256": split.manifest.sha256,
        "versions": versions(),
        **(about or {}),
    }
    replace_text(path, json.dumps(results, indent=1) + "\n")
    return results
