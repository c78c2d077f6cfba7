"""The description of a job on several hosts, from which `paco_ds.planning.job` makes what starts it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError, model_validator

from paco_ds.config.load import load_recipe
from paco_ds.config.parse import read_yaml
from paco_ds.config.section import Count, Natural, Section
from paco_ds.data.manifest import validation_message
from paco_ds.distributed.hostfile import HOST
from paco_ds.errors import UserError

LEAVE = 120  # seconds between the warning and the end, for the step under way and a checkpoint


def _name(name: str) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise ValueError(
            "a name has at most 40 lower-case letters, digits and dashes, and begins with a letter, as Kubernetes "
            "wants it"
        )
    return name


def _directory(path: str) -> str:
    if path.startswith("~"):
        raise ValueError(f"{path!r:.60} is quoted where it is used, so ~ is not your home: write the folder out")
    return path


def _options(given: dict[str, str]) -> dict[str, str]:
    # what --expect-ranks would refuse at the start; others may be changed, as gpus-per-node to h100:8
    if twice := [name for name in given if name in ("nodes", "ntasks", "ntasks-per-node")]:
        raise ValueError(
            f"{twice[0]} follows from the description itself (hosts or nodes, and ranks_per_host): leave it out"
        )
    return given


def _host(name: str) -> str:
    if not re.fullmatch(HOST, name):
        raise ValueError(f"{name!r} is no name of a host")
    return name


Line = Annotated[str, Field(pattern=r"^[^\n\r\x00]*$")]


class Job(Section):
    """A job on several hosts. Settings of one kind of cluster are ignored by the others.

    Attributes:
        hosts: their names, the first has rank 0; or `nodes`, how many, where the cluster chooses them.
        ranks_per_host: GPUs of a host, or its ranks on CPU.
        restarts: starts in a row without a new checkpoint, after which it gives up; for a JobSet, restarts in all.
        environment: variables of every rank, such as NCCL_SOCKET_IFNAME.
        directory: where commands run; recipe and output may be relative to it.
        slurm: options of sbatch without their dashes, such as {partition: gpu, time: "24:00:00"}.
        image: of the container; `claim` is the volume with shards and runs, mounted at `mount`.
    """

    name: Annotated[str, AfterValidator(_name)]
    recipe: str
    output: str
    set: tuple[str, ...] = ()
    hosts: tuple[Annotated[str, AfterValidator(_host)], ...] = ()
    nodes: Count | None = None
    ranks_per_host: Count
    gpus: bool = True
    cores_per_rank: Count = 8
    restarts: Natural = 20
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    environment: dict[Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")], Line] = Field(default_factory=dict)
    directory: Annotated[str, AfterValidator(_directory)] = "."
    slurm: Annotated[dict[Annotated[str, Field(pattern="^[a-z][a-z-]*$")], Line], AfterValidator(_options)] = Field(
        default_factory=dict
    )
    image: str | None = None
    claim: str | None = None
    mount: str = "/shared"

    @model_validator(mode="after")
    def _check_hosts(self) -> Job:
        if bool(self.hosts) == (self.nodes is not None):
            raise ValueError("give hosts, their names, or nodes, their number")
        if twice := [host for host in self.hosts if self.hosts.count(host) > 1]:
            raise ValueError(f"hosts has {twice[0]} more than once: a host has all its ranks, see ranks_per_host")
        return self

    @property
    def host_count(self) -> int:
        return self.nodes or len(self.hosts)

    @property
    def ranks(self) -> int:
        """Of all hosts."""
        return self.host_count * self.ranks_per_host

    def training(self) -> list[str]:
        """Arguments of the training, unquoted."""
        settings = [word for setting in self.set for word in ("--set", setting)]
        words = ["--config", self.recipe, "--output", self.output, *settings]
        return [*words, "--expect-ranks", str(self.ranks)]


def read_job(path: Path) -> Job:
    """Read a description, and check that its recipe can run on its ranks.

    Raises:
        UserError: names the file and the key, or the setting of the recipe.
    """
    try:
        job = Job.model_validate(read_yaml(path, UserError))
    except ValidationError as error:
        raise UserError(f"{path}: {validation_message(error)}") from None
    recipe = load_recipe(job.recipe, job.set)
    if recipe.step.micro_batches % job.ranks:
        raise UserError(
            f"{path}: {job.ranks} ranks cannot share step.micro_batches = {recipe.step.micro_batches} evenly: change "
            f"hosts or ranks_per_host, or add step.micro_batches={job.ranks} to set"
        )
    return job
