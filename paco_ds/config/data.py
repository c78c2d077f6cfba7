"""The settings of the data that a run reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from paco_ds.config.section import Count, Fraction, Natural, Number, Positive, Section, running

Sampler = Literal["instance_balanced", "class_balanced", "square_root", "progressively_balanced"]


class StorageSettings(Section):
    """Patience with remote storage. Keys and endpoints of a service come from its own environment, never from here."""

    tries: Count = Field(8, description="of each request, with waits that double from half a second to 30 s")
    timeout: Positive = Field(30.0, description="seconds of a try; a second more for each MiB that it moves")
    redirects: bool = Field(False, description="follow a web server's redirects to other hosts, by https")


class CacheSettings(Section):
    """Whole shards of remote storage, kept on a disk of this host and shared by its processes."""

    directory: str = Field(description="folder on a disk of this host")
    bytes: Count = Field(description="the cache never grows beyond this")


class DataSettings(Section):
    """Which shards, and how their samples are laid out and read."""

    shards: str = running(..., description="directory or URL that holds manifest.json")
    classes: Count | None = Field(None, description="number of classes the shards must have")
    train_split: str = Field("train", description="the split that is trained on")
    window: Count = Field(64, description="samples of a batch slot that are permuted, and read, together")
    workers: Natural = running(0, description="loader processes of each rank; 0 loads in the rank itself")
    sampler: Sampler = Field("instance_balanced", description="how often each image occurs in an epoch (Kang 2020)")
    max_bad_share: Fraction = running(0.001, description="share of an epoch's samples that may be unreadable")
    storage: StorageSettings = running(StorageSettings())
    cache: CacheSettings | None = running(None, description="of whole remote shards; null: only ranges are read")
    allow_pipe_urls: bool = running(False, description="let data.shards be a `pipe:` command, which is then run")
    max_pixels: Annotated[int, Number, Field(ge=1, le=178_956_970)] = Field(
        89_478_485, description="an image of more is a bad sample, by its header; PIL warns here, and fails at twice"
    )
