"""Errors that a user can cause and fix; the message names the cause and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input. Commands print its message without a traceback."""


class RecipeError(UserError):
    """A setting is unknown, ill-typed or cannot be used with another."""


class CheckpointError(UserError):
    """A checkpoint is damaged, or belongs to another run."""


class DataError(UserError):
    """Shards, a manifest or a source of images are missing, damaged or do not fit the recipe."""


class TrainingError(UserError):
    """A run cannot continue with its settings."""
