"""Progress, metrics.jsonl, /metrics and bad samples of a run on this rank, behind one object."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from rich.table import Table

from paco_ds.config.data import DataSettings
from paco_ds.config.recipe import MetricsSettings
from paco_ds.data.shard import remedy_of
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import DataError, StorageError
from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.files import storage_errors
from paco_ds.metrics.exporter import Exporter
from paco_ds.metrics.log import MetricsLog
from paco_ds.metrics.progress import progress_view
from paco_ds.metrics.sinks import Sinks
from paco_ds.metrics.steps import StepRecord

logger = logging.getLogger(__name__)


class RunLogger:
    """Logs a run. The first rank also writes metrics.jsonl and the list of Prometheus targets.

    Args:
        metrics: served during the run, see `served_metrics`; closed by whoever made it.
        steps_done: steps done before; later lines of the log are removed.
        window: of the log in the checkpoint after them, see `MetricsLog.window`.
    """

    def __init__(
        self,
        settings: MetricsSettings,
        run: Path,
        ranks: Ranks,
        metrics: Exporter,
        *,
        epochs: int,
        total_steps: int,
        steps_done: int,
        window: object = None,
    ) -> None:
        self.sinks = Sinks(settings.sinks, run, ranks.first, steps_done)
        self.log = MetricsLog(
            run / "metrics.jsonl" if ranks.first else None,
            self.sinks.line,
            every=settings.log_every,
            steps_per_epoch=total_steps // epochs,
        )
        self.log.cut_after(steps_done if steps_done else -1, window)
        self.metrics = metrics
        metrics.planned(total_steps)
        self.progress = progress_view(
            ranks.rank,
            total_steps=total_steps,
            first_step=steps_done,
            epochs=epochs,
            every=settings.log_every,
        )

    def step(self, record: StepRecord, samples: int, skipped: str | None) -> None:
        """Log a finished step; this rank processed `samples` images. `skipped` says in words why it changed nothing."""
        self.log.step(record, skipped)
        self.metrics.observe_step(record, samples)
        self.progress.update(record)
        if skipped:
            self.say(f"step {record.step}: skipped, {skipped}")

    def evaluation(self, step: int, epoch: int, split: str, accuracy: ShotAccuracy, seconds: float) -> None:
        """Log an evaluation after `step` steps and `epoch` epochs, and the seconds it took."""
        self.metrics.observe_accuracy(accuracy, split)
        self.log.evaluation(step, epoch, split, accuracy, seconds)

    def changed_setting(self, step: int, key: str, before: object, now: object) -> None:
        """Record that a resumed run goes on after `step` steps with another value of a setting."""
        self.log.changed_setting(step, key, before, now)
        self.say(f"{key} was {before} until step {step}, and is {now} from here on")

    def restart(self, step: int, reason: str) -> None:
        """Log that the run was started again after `step` steps, and how it ended before."""
        self.log.restart(step, reason)
        self.metrics.restarted(self.log.restarts)

    def checkpoint(self, step: int, seconds: float) -> None:
        """Log the seconds for which the checkpoint after `step` steps blocked training."""
        self.log.checkpoint(step, seconds)
        self.metrics.checkpoint_blocked(seconds)

    def checkpoint_saved(self, folder: Path) -> None:
        """Report a checkpoint that is on disk."""
        with storage_errors(folder):
            size = sum(file.stat().st_size for file in folder.iterdir())
            self.metrics.checkpoint_saved(folder.stat().st_mtime, size, shutil.disk_usage(folder).free)

    def say(self, what: str | Table) -> None:
        """Print a line or a table on the first rank."""
        self.progress.message(what)

    def close(self) -> None:
        """Stop the progress display, and close the log."""
        self.progress.close()
        with suppress(StorageError):  # a full disk was told by whatever ended the run
            self.log.end_window()
        self.log.close()
        self.sinks.close()


class BadSamples:
    """Counts the bad samples of an epoch, and ends the run if there are too many.

    Args:
        planned: samples of an epoch.
    """

    def __init__(self, run_logger: RunLogger, data: DataSettings, ranks: Ranks, planned: int) -> None:
        self._logger, self._ranks = run_logger, ranks
        self._share = data.max_bad_share
        self._planned, self._shards = planned, data.shards
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self._count = 0  # of all ranks
        self._names: list[str] = []  # of this rank
        self._reasons: set[str] = set()

    def add(self, mine: Iterable[tuple[str, str, str]], on_all_ranks: int) -> None:
        """Add the (key, shard, reason) of this rank's bad samples in a step, and their number on all ranks.

        Raises:
            DataError: on every rank, with the list of all, once they exceed `data.max_bad_share`.
        """
        for key, shard, reason in mine:
            self._names.append(f"{key} of {shard}: {reason}")
            self._reasons.add(reason)
            self._logger.metrics.observe_bad_sample(reason)
            logger.warning("sample %s was replaced by another of its class", self._names[-1])
        self._count += on_all_ranks
        if self._count <= self._share * self._planned:
            return
        of_ranks = self._ranks.gather_objects((self._names, self._reasons))
        listed = "\n  ".join([name for names, _ in of_ranks for name in names][:50])
        reasons = set[str]().union(*(reasons for _, reasons in of_ranks))
        raise DataError(
            f"{self._count} of {self._planned} samples of this epoch could not be read, more than "
            f"data.max_bad_share = {self._share:g} allows:\n  {listed}\n"
            f"{remedy_of(reasons, self._shards)} Or raise data.max_bad_share"
        )
