"""Files that start a job, from one description: a script for hosts by ssh, a batch script for Slurm, a JobSet and a
PodMonitor for Kubernetes.

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
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from paco_ds.command import one_line_on_interrupt, report_user_errors
from paco_ds.errors import HANG, RESUMABLE, UserError
from paco_ds.planning.job_description import LEAVE, Job, read_job
from paco_ds.planning.jobset import jobset

_KILLED = 137


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
