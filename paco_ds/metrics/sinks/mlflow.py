"""MLflow: in RUN/mlflow, or at the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from paco_ds.metrics.sinks.base import remembered


class MLflow:
    """One run of MLflow, which a resumed run goes on with."""

    def __init__(self, run: Path) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder is all that one run needs
        uri = os.environ.get("MLFLOW_TRACKING_URI", (run / "mlflow").resolve().as_uri())
        self._client = MlflowClient(tracking_uri=uri)
        self._id = remembered(run / "mlflow_run_id", lambda: self._new_run(run.resolve().name))
        self._client.update_run(self._id, status="RUNNING")

    def _new_run(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "paco_ds")
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        made: str = self._client.create_run(number, run_name=name).info.run_id
        return made

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in figures.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def open_sink(run: Path, steps_done: int) -> MLflow:
    """The sink of a run."""
    return MLflow(run)
