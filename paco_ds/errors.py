"""Errors that a user can cause and fix, and the exit statuses of commands; a message names the cause and the remedy."""

from __future__ import annotations

from typing import ClassVar

RESUMABLE = 75
"""Exit status of a run that was told to stop, or lost a rank: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
HANG = 76
"""Exit status of a run that made no progress: the same command goes on."""


class UserError(ValueError):
    """A mistake in the input. Commands print its message without a traceback and end with its `status`."""

    status: ClassVar[int] = 2


class RecipeError(UserError):
    """A setting is unknown, ill-typed or cannot be used with another."""


class CheckpointError(UserError):
    """A checkpoint is damaged, or belongs to another run."""


class DataError(UserError):
    """Shards, a manifest or a source of images are missing, damaged or do not fit the recipe."""


class TrainingError(UserError):
    """A run cannot continue with its settings."""


class NotFiniteError(TrainingError):
    """Weights or losses are not finite: going on with the same settings cannot help (EX_SOFTWARE)."""

    status = 70


class StorageError(UserError):
    """A file cannot be written or read: the disk is full, read-only or broken (EX_IOERR)."""

    status = 74
