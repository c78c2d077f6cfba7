"""Kubernetes objects of a job: a JobSet of its hosts, and a PodMonitor by which Prometheus finds its ranks."""

from __future__ import annotations

import base64
import json
import posixpath
from pathlib import Path
from typing import Any

import yaml

from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import MetricsSettings
from paco_ds.errors import NotFiniteError, StorageError, UserError
from paco_ds.planning.job_description import LEAVE, Job

_FOR_GOOD = (UserError.status, NotFiniteError.status, StorageError.status)


def jobset(job: Job) -> str:
    """A JobSet of one pod a host, each with DeepSpeed's launcher of its ranks; and a PodMonitor of their metrics.

    Raises:
        UserError: the description has no image, or no volume.
    """
    if job.image is None or job.claim is None:
        raise UserError("a JobSet needs image, the container with paco_ds, and claim, the volume with shards and runs")
    recipe = load_recipe(job.recipe, job.set)
    monitors = [_pod_monitor(job, Path(job.output).name)] if recipe.metrics.serve else []  # `run` as in metrics.targets
    return yaml.safe_dump_all([_jobset(job, recipe.metrics), *monitors], sort_keys=False, width=120)


def _jobset(job: Job, metrics: MetricsSettings) -> dict[str, Any]:
    world = {f"host{number}": list(range(job.ranks_per_host)) for number in range(job.host_count)}
    packed = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    launch = ["python", "-m", "deepspeed.launcher.launch", f"--world_info={packed}"]
    where = ["--node_rank=$(JOB_COMPLETION_INDEX)", f"--master_addr={job.name}-ranks-0-0.{job.name}"]
    cores = str(job.cores_per_rank * job.ranks_per_host)
    limits = {"nvidia.com/gpu": str(job.ranks_per_host)} if job.gpus else {}
    container = {
        "name": "ranks",
        "image": job.image,
        "workingDir": posixpath.normpath(posixpath.join(job.mount, job.directory)),
        "command": [*launch, *where, f"--master_port={job.port}", "--module", "paco_ds.train"],
        "args": [word.replace("$(", "$$(") for word in job.training()],
        "env": [{"name": name, "value": value} for name, value in job.environment.items()],
        "ports": [{"name": _port(rank), "containerPort": metrics.port + rank} for rank in range(job.ranks_per_host)],
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
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": job.restarts, "rules": [for_good]},
            "replicatedJobs": [{"name": "ranks", "replicas": 1, "template": {"spec": one_of_each_host}}],
        },
    }


def _pod_monitor(job: Job, run: str) -> dict[str, Any]:
    """Has Prometheus scrape every rank, with the label `job` of the alerts, and `run` and `rank` as
    RUN/metrics_targets.json gives them."""

    def endpoint(local_rank: int) -> dict[str, Any]:
        ranks = [
            {
                "sourceLabels": ["__meta_kubernetes_pod_label_batch_kubernetes_io_job_completion_index"],
                "regex": str(host),
                "targetLabel": "rank",
                "replacement": str(host * job.ranks_per_host + local_rank),
            }
            for host in range(job.host_count)
        ]
        return {
            "port": _port(local_rank),
            "interval": "15s",
            "relabelings": [
                {"targetLabel": "job", "replacement": "paco_ds"},  # of the alerts, in place of NAMESPACE/NAME
                {"targetLabel": "run", "replacement": run.replace("$", "$$")},
                *ranks,
            ],
        }

    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": job.name},
        "spec": {
            "selector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": job.name}},
            "podMetricsEndpoints": [endpoint(local_rank) for local_rank in range(job.ranks_per_host)],
        },
    }


def _port(local_rank: int) -> str:
    return f"metrics-{local_rank}"
