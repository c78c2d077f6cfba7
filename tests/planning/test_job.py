"""Files that start a job: valid for bash, sbatch and Kubernetes, and the same ranks from each."""

import base64
import json
import re
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from paco_ds.planning.job import main

JOBS = Path(__file__).parents[2] / "ds_configs" / "jobs"
SCHEMAS = {  # each names the package that it comes from
    kind: json.loads((Path(__file__).parent / "schemas" / f"{name}.json").read_text())
    for kind, name in {"JobSet": "jobset", "PodMonitor": "pod_monitor"}.items()
}
SHARDS = "data.shards=/shared/it's here"
JOB = {
    "name": "a-job",
    "recipe": "imagenet_lt_resnet50",
    "output": "runs/my run",
    "set": [SHARDS, "step.micro_batches=16"],
    "hosts": ["node1", "node2"],
    "ranks_per_host": 8,
    "restarts": 3,
    "environment": {"NCCL_SOCKET_IFNAME": "eth0"},
    "directory": "/shared/my work",
    "slurm": {"partition": "gpu"},
    "image": "registry/paco_ds:1",
    "claim": "shared",
}
ARGUMENTS = [
    *("--config", "imagenet_lt_resnet50", "--output", "runs/my run", "--set", SHARDS),
    *("--set", "step.micro_batches=16", "--expect-ranks", "16"),
]


@pytest.fixture
def rendered(tmp_path, capsys):
    """`rendered(kind, key=value, ...)`: the file for a kind of cluster, by the command."""

    def render(kind, **changes):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({**JOB, **changes}))
        assert main([str(path), "--for", kind]) == 0
        return capsys.readouterr().out

    return render


@pytest.mark.parametrize("kind", ["hostfile", "slurm"])
def test_scripts_pass_shellcheck(rendered, kind, tmp_path):
    """With names that a shell would expand or split."""
    (tmp_path / "job.sh").write_text(rendered(kind))
    done = subprocess.run(["shellcheck", tmp_path / "job.sh"], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


def test_a_hostfile_script_keeps_deepspeed_running_on_the_hosts(rendered, tmp_path):
    """What it starts is read from commands that say how they were called."""
    (tmp_path / "work").mkdir()
    called = tmp_path / "paco-keep-running"
    called.write_text('#!/bin/bash\nprintf "%s\\0" "$DS_ENV_FILE" "$@"\n')
    called.chmod(0o755)
    script = rendered("hostfile", directory=str(tmp_path / "work"))
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, capture_output=True, text=True
    )
    assert done.stderr == ""
    environment, *words = done.stdout.split("\0")[:-1]
    launch = ["--restarts", "3", "--", "deepspeed", "--hostfile", "a-job.hosts", "--master_port", "29500"]
    assert words == [*launch, "--module", "paco_ds.train", *ARGUMENTS]
    assert (tmp_path / "work" / environment).read_text() == "NCCL_SOCKET_IFNAME=eth0\n"
    assert (tmp_path / "work" / "a-job.hosts").read_text() == "node1 slots=8\nnode2 slots=8\n"


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (75, 0, True), (76, 2, True), (137, 0, True), (75, 3, False), (2, 0, False), (70, 0, False)],
)
def test_a_batch_script_is_queued_again_after_what_a_restart_mends(rendered, tmp_path, status, restarts, requeued):
    """And not more often than asked; each task has the environment of a rank."""
    commands = {
        "scontrol": '[ "$1" = show ] && echo node1 || echo "$@" >> requeued',
        "srun": 'shift; export SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16; exec "$@"',
        "paco-train": f'printf "%s\\0" "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_SIZE $MASTER_ADDR" "$@"; exit {status}',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_RESTART_COUNT": str(restarts)}
    script = rendered("slurm", directory=str(tmp_path))
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": f"{tmp_path}:/bin:/usr/bin", **variables}, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.split("\0")[:-1] == ["9 1 16 8 node1", *ARGUMENTS]
    assert (tmp_path / "requeued").exists() == requeued


def test_a_batch_script_asks_for_the_ranks_and_for_the_warning(rendered):
    options = re.findall("^#SBATCH --(.*)$", rendered("slurm", hosts=[], nodes=2), re.MULTILINE)
    asked = {"nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "signal=USR1@120", "requeue", "partition=gpu"}
    assert asked <= set(options)
    assert not any(option.startswith("nodelist") for option in options)
    of_type = rendered("slurm", slurm={"gpus-per-node": "h100:8", "signal": "USR1@300"})
    assert {"gpus-per-node=h100:8", "signal=USR1@300"} <= set(re.findall("^#SBATCH --(.*)$", of_type, re.MULTILINE))


def test_a_jobset_starts_a_pod_a_host_and_ends_for_good_after_a_mistake(rendered):
    """Valid for Kubernetes and for the JobSet's own schema."""
    jobset, _ = yaml.safe_load_all(rendered("jobset", gpus=False))
    jsonschema.validate(jobset, SCHEMAS["JobSet"])
    (group,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "ranks"}, "spec": group["template"]["spec"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (2, 2)
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 70, 74]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    (container,) = job["spec"]["template"]["spec"]["containers"]
    options = dict(word.removeprefix("--").split("=", 1) for word in container["command"] if "=" in word)
    world = json.loads(base64.urlsafe_b64decode(options["world_info"]))
    assert list(world.values()) == [list(range(8))] * 2
    assert options["master_addr"] == "a-job-ranks-0-0.a-job"
    assert container["args"] == ARGUMENTS


@pytest.mark.parametrize(("directory", "works_in"), [(".", "/shared"), ("exp/a", "/shared/exp/a"), ("/b", "/b")])
def test_a_jobset_works_in_the_directory_below_its_volume(rendered, directory, works_in):
    jobset, _ = yaml.safe_load_all(rendered("jobset", directory=directory))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["workingDir"] == works_in


def test_a_pod_monitor_scrapes_every_rank_with_its_labels(rendered):
    """By the names of the container's ports; ranks are numbered through the hosts, and a run is
    called by the name of its directory, as in metrics_targets.json."""
    jobset, monitor = yaml.safe_load_all(rendered("jobset", set=[SHARDS, "step.micro_batches=16", "metrics.port=9500"]))
    jsonschema.validate(monitor, SCHEMAS["PodMonitor"])
    assert monitor["spec"]["selector"]["matchLabels"] == {"jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"]}
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    found = {}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        job, run, *ranks = endpoint["relabelings"]
        assert (job["targetLabel"], job["replacement"]) == ("job", "paco_ds")  # as the alerts want it
        assert (run["targetLabel"], run["replacement"]) == ("run", "my run")
        for rule in ranks:
            assert rule["targetLabel"] == "rank"
            found[int(rule["replacement"])] = (int(rule["regex"]), ports[endpoint["port"]])
    assert found == {rank: (rank // 8, 9500 + rank % 8) for rank in range(16)}


def test_a_job_without_metrics_has_no_monitor(rendered):
    (jobset,) = yaml.safe_load_all(rendered("jobset", set=[SHARDS, "step.micro_batches=16", "metrics.serve=false"]))
    assert jobset["kind"] == "JobSet"


def _at(found, path, value):
    """`found` with `value` at a path of keys and places."""
    *way, last = path
    inner = found
    for step in way:
        inner = inner[step]
    inner[last] = value
    return found


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("PodMonitor", ["kind"], "ServiceMonitor"),
        ("PodMonitor", ["status"], {}),
        ("PodMonitor", ["spec", "podMetricsEndpoints"], []),
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0, "interval"], "15"),
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0, "relabelings", 0, "source_labels"], ["a"]),
        ("JobSet", ["apiVersion"], "jobset.x-k8s.io/v1"),
        ("JobSet", ["spec", "failurePolicy", "rules", 0, "action"], "FailJob"),
        ("JobSet", ["spec", "failurePolicy", "backoffLimit"], 3),
        ("JobSet", ["spec", "network", "enableDNSHostnames"], "true"),
        ("JobSet", ["spec", "replicatedJobs", 0, "replicas"], "1"),
    ],
)
def test_an_object_that_is_none_is_refused_by_its_schema(rendered, kind, path, value):
    """The checks above can fail."""
    objects = {found["kind"]: found for found in yaml.safe_load_all(rendered("jobset"))}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_at(objects[kind], path, value), SCHEMAS[kind])


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.jobset.yaml")), ids=lambda path: path.name)
def test_shipped_objects_of_kubernetes_are_those_of_their_schemas(path):
    objects = list(yaml.safe_load_all(path.read_text()))
    assert [found["kind"] for found in objects] == ["JobSet", "PodMonitor"]
    for found in objects:
        jsonschema.validate(found, SCHEMAS[found["kind"]])


@pytest.mark.parametrize("script", sorted(JOBS.glob("*.sh")), ids=lambda script: script.name)
def test_shipped_scripts_pass_shellcheck(script):
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("slurm", {"hots": 2}, "hots"),
        ("slurm", {"name": "A job"}, "lower-case letters"),
        ("jobset", {"name": "2024-run"}, "begins with a letter"),
        ("slurm", {"slurm": {"nodes": "4"}}, "nodes follows from the description itself"),
        ("slurm", {"directory": "~/x"}, "~ is not your home"),
        ("hostfile", {"hosts": ["a", "a"]}, "hosts has a more than once"),
        ("slurm", {"hosts": ["-oProxyCommand=x"]}, "no name of a host"),
        ("slurm", {"hosts": [], "nodes": 3}, "24 ranks cannot share step.micro_batches = 16 evenly"),
        ("slurm", {"recipe": "imagenet"}, "imagenet"),
        ("slurm", {"slurm": {"wrap=x y": "z"}}, "slurm"),
        ("slurm", {"slurm": {"comment": "a\nrm -r b"}}, "slurm"),
        ("slurm", {"environment": {"A B": "1"}}, "environment"),
        ("hostfile", {"environment": {"A": "1\nEND\nrm"}}, "environment"),
        ("hostfile", {"hosts": [], "nodes": 2}, "needs the hosts' names"),
        ("slurm", {"nodes": 2}, "give hosts, their names, or nodes"),
        ("jobset", {"image": None}, "image"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, kind, changes, message):
    """Also what would add a line to a script."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**JOB, **changes}))
    with pytest.raises(SystemExit) as ended:
        main([str(path), "--for", kind])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error")
