"""Errors that a user can cause and fix, and the exit statuses of commands; a message names the cause and the remedy."""

from __future__ import annotations

import re
from typing import ClassVar

RESUMABLE = 75
"""Exit status of a run that was told to stop, or lost a rank or its storage: the same command goes on (EX_TEMPFAIL of
sysexits.h)."""
HANG = 76
"""Exit status of a run that made no progress: the same command goes on."""

_SECRETS = (
    # https://user:password@host, https://token@host; a user or container alone (sftp://user@host) is no secret
    (re.compile(r"\b(https?://|[a-z][a-z0-9+.-]{0,20}://(?=[^\s/?#@]*:))[^\s/?#]*@", re.I), r"\1***@"),
    # ?X-Amz-Signature=..., &sig=..., &token=...
    (
        re.compile(
            r"([?&;](?:[\w.~%-]{0,40}(?:signature|token|credential|secret|passw|access[-_]?key|api[-_]?key|auth)"
            r"[\w.~%-]{0,40}|sig|key|pwd)=)[^\s&;#'\"<>`]*",
            re.I,
        ),
        r"\1***",
    ),
    # options of a pipe: command
    (re.compile(r"(authorization:\s*(?:(?:bearer|basic|token)\s+)?)[^\s'\"]+", re.I), r"\1***"),
    (re.compile(r"(\s(?:-u|--user|--password|--token|--secret)[ =])[^\s'\"]+"), r"\1***"),
)
# what moves a terminal's cursor, colors it or reorders its text, and surrogates, which cannot be encoded
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def redacted(text: str) -> str:
    """The text with `***` for credentials of URLs: user:password@, signatures and tokens of the query."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def printable(text: str) -> str:
    """The text as it may be shown: `redacted`, and escapes such as \\x1b for all control characters but line ends."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), redacted(text))


class UserError(ValueError):
    """A mistake in the input. Commands print its `printable` message without a traceback and end with its `status`."""

    status: ClassVar[int] = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class RecipeError(UserError):
    """A setting is unknown, ill-typed or cannot be used with another."""


class CheckpointError(UserError):
    """A checkpoint is damaged, or belongs to another run."""


class DataError(UserError):
    """Shards, a manifest or a source of images are missing, damaged or do not fit the recipe."""


class UnreachableError(DataError):
    """Remote storage does not answer, or is busy: it may come back."""

    status = RESUMABLE


class TrainingError(UserError):
    """A run cannot continue with its settings."""


class NotFiniteError(TrainingError):
    """Weights or losses are not finite: going on with the same settings cannot help (EX_SOFTWARE)."""

    status = 70


class LostProcessError(TrainingError):
    """A process of the job was killed."""

    status = RESUMABLE


class StorageError(UserError):
    """A file cannot be written or read: the disk is full, read-only or broken (EX_IOERR)."""

    status = 74
