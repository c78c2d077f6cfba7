"""The errors a user can cause and mend: raised where the cause is known, naming the thing and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """Something given to paco_ds is wrong. Commands print it as one message, without a traceback."""


class RecipeError(UserError):
    """A setting is unknown, ill-typed or cannot be used with another."""


class CheckpointError(UserError):
    """A checkpoint is damaged, or belongs to another run."""


class DataError(UserError):
    """Shards, a manifest or a source of images are missing, damaged or do not fit the recipe."""


class TrainingError(UserError):
    """A run cannot go on as it is set."""
