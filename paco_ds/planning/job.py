"""Files that start a job, from one description: a script for hosts by ssh, a batch script for Slurm, a JobSet for
Kubernetes.

    paco-job JOB.yaml --for hostfile > start.sh      runs deepspeed on the hosts that the description names
    paco-job JOB.yaml --for slurm > job.sh           sbatch job.sh
    paco-job JOB.yaml --for jobset > job.yaml        kubectl apply -f job.yaml

Each starts the same ranks of the same recipe, and goes on after a stop, a lost rank or a hang, never after a mistake,
values that are not finite, or a full disk (docs/reliability.md). docs/cluster.md describes the settings.

example:
  paco-job jobs/imagenet-lt.yaml --for slurm > job.sh
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from paco_ds.command import one_line_on_interrupt, report_user_errors
from paco_ds.config.load import load_recipe
from paco_ds.config.parse import read_yaml
from paco_ds.config.section import Count, Natural, Section
from paco_ds.data.manifest import validation_message
from paco_ds.distributed.hostfile import HOST
from paco_ds.errors import HANG, RESUMABLE, NotFiniteError, StorageError, UserError

LEAVE = 120  # seconds between the warning and the end, for the step under way and a checkpoint
_KILLED = 137
_FOR_GOOD = (UserError.status, NotFiniteError.status, StorageError.status)


def _name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise ValueError("a name has at most 40 lower-case letters, digits and dashes, as Kubernetes wants it")
    return name


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
    directory: str = "."
    slurm: dict[Annotated[str, Field(pattern="^[a-z][a-z-]*$")], Line] = Field(default_factory=dict)
    image: str | None = None
    claim: str | None = None
    mount: str = "/shared"

    @model_validator(mode="after")
    def _check_hosts(self) -> Job:
        if bool(self.hosts) == (self.nodes is not None):
            raise ValueError("give hosts, their names, or nodes, their number")
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


def hostfile_script(job: Job) -> str:
    """A bash script that writes a hostfile and keeps `deepspeed` running on it.

    Raises:
        UserError: the description has no names of hosts.
    """
    if not job.hosts:
        raise UserError("a hostfile needs the hosts' names: hosts: [node1, node2]")
    hosts, environment = f"{job.name}.hosts", f"{job.name}.env"
    lines = [f"{host} slots={job.ranks_per_host}" for host in job.hosts]
    launch = ["deepspeed", "--hostfile", hosts, "--master_port", str(job.port), "--module", "paco_ds.train"]
    return _script(
        [],
        [
            *_here_document(hosts, lines),
            *(_forwarded(environment, job.environment) if job.environment else ()),
            "exec " + _continued(["paco-keep-running", "--restarts", str(job.restarts), "--"], launch, job.training()),
        ],
        job,
    )


def slurm_script(job: Job) -> str:
    """A batch script that starts one rank a task, and is queued again after what a restart mends."""
    options = {
        "job-name": job.name,
        "nodes": job.host_count,
        "ntasks-per-node": job.ranks_per_host,
        "cpus-per-task": job.cores_per_rank,
        **({"gpus-per-node": job.ranks_per_host} if job.gpus else {}),
        "signal": f"USR1@{LEAVE}",
        "requeue": None,
        "open-mode": "append",
    }
    options |= job.slurm | ({"nodelist": ",".join(job.hosts)} if job.hosts else {})
    again = "|".join(map(str, (RESUMABLE, HANG, _KILLED)))
    rank = (
        "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
        f'LOCAL_SIZE={job.ranks_per_host}; exec "$@"'
    )
    return _script(
        [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()],
        [
            *(f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()),
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            "export MASTER_ADDR MASTER_PORT",
            "",
            "status=0",
            "# ranks get the time to say which one was lost",
            "# shellcheck disable=SC2016  # variables of the task, not of this script",
            _continued(["srun", "--kill-on-bad-exit=0", "bash", "-c"], [rank, "rank"], ["paco-train", *job.training()])
            + " || status=$?",
            "",
            'case "$status" in',
            f'    {again}) [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ] && scontrol requeue "$SLURM_JOB_ID" ;;',
            "esac",
            'exit "$status"',
        ],
        job,
        strict="set -uo pipefail",
    )


def jobset(job: Job) -> str:
    """A JobSet of one pod a host, each with DeepSpeed's launcher of its ranks.

    Raises:
        UserError: the description has no image, or no volume.
    """
    if job.image is None or job.claim is None:
        raise UserError("a JobSet needs image, the container with paco_ds, and claim, the volume with shards and runs")
    world = {f"host{number}": list(range(job.ranks_per_host)) for number in range(job.host_count)}
    packed = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    launch = ["python", "-m", "deepspeed.launcher.launch", f"--world_info={packed}"]
    where = ["--node_rank=$(JOB_COMPLETION_INDEX)", f"--master_addr={job.name}-ranks-0-0.{job.name}"]
    cores = str(job.cores_per_rank * job.ranks_per_host)
    limits = {"nvidia.com/gpu": str(job.ranks_per_host)} if job.gpus else {}
    container = {
        "name": "ranks",
        "image": job.image,
        "workingDir": job.directory if job.directory.startswith("/") else job.mount,
        "command": [*launch, *where, f"--master_port={job.port}", "--module", "paco_ds.train"],
        "args": [word.replace("$(", "$$(") for word in job.training()],
        "env": [{"name": name, "value": value} for name, value in job.environment.items()],
        "resources": {"requests": {"cpu": cores}, "limits": limits},
        "volumeMounts": [
            {"name": "shared", "mountPath": job.mount},
            {"name": "memory", "mountPath": "/dev/shm"},  # loader processes hand over images there
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": LEAVE,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    fail = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": sorted(_FOR_GOOD)}}
    one_of_each_host: dict[str, Any] = {
        "completionMode": "Indexed",
        "parallelism": job.host_count,
        "completions": job.host_count,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [fail]},
        "template": {"spec": pod},
    }
    for_good = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return yaml.safe_dump(
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": job.name},
            "spec": {
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "failurePolicy": {"maxRestarts": job.restarts, "rules": [for_good]},
                "replicatedJobs": [{"name": "ranks", "replicas": 1, "template": {"spec": one_of_each_host}}],
            },
        },
        sort_keys=False,
        width=120,
    )


KINDS: dict[str, Callable[[Job], str]] = {"hostfile": hostfile_script, "slurm": slurm_script, "jobset": jobset}


def _script(head: list[str], body: list[str], job: Job, strict: str = "set -euo pipefail") -> str:
    """A bash script in the job's directory."""
    lines = ["#!/bin/bash", *head, strict, f"cd {shlex.quote(job.directory)} || exit {UserError.status}", "", *body]
    return "\n".join(lines) + "\n"


def _forwarded(file: str, environment: Mapping[str, str]) -> list[str]:
    """Commands by which the launcher forwards variables to every rank, from this file in place of .deepspeed_env."""
    return [
        *_here_document(file, [f"{name}={value}" for name, value in environment.items()]),
        f"export DS_ENV_FILE={file}",
    ]


def _here_document(file: str, lines: list[str]) -> list[str]:
    """Commands that write a file; nothing in it is expanded."""
    return [f"cat > {file} <<'END'", *lines, "END"]


def _continued(*parts: list[str]) -> str:
    """A quoted command, each part on a line of its own."""
    return " \\\n    ".join(shlex.join(part) for part in parts)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, metavar="JOB.yaml", help="the description")
    parser.add_argument("--for", dest="kind", required=True, choices=KINDS, help="what starts the job")
    arguments = parser.parse_args(argv)
    with one_line_on_interrupt(), report_user_errors():
        print(KINDS[arguments.kind](read_job(arguments.job)), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
