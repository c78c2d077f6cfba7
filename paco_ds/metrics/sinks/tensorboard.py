"""Event files of TensorBoard in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Scalars by step; TensorBoard hides those after the step that a run was resumed from."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def open_sink(run: Path, steps_done: int) -> TensorBoard:
    """The sink of a run."""
    return TensorBoard(run / "tensorboard", steps_done)
