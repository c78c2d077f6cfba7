"""Two hosts on one machine: network namespaces on a bridge, each with its own name, interface, sshd and key.

A job is launched on the first of them exactly as a user does it; ssh, pdsh and the launcher are the real ones.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

BIN = Path(sys.executable).parent
TOOLS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
}
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def why_not() -> str | None:
    """Why hosts cannot be made on this machine, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [package for tool, package in TOOLS.items() if shutil.which(tool, path=SBIN) is None]:
        return f"not installed: {', '.join(missing)}"
    name = f"paco-{secrets.token_hex(3)}"
    attempts = (["netns", "add", name], ["link", "add", f"p{name[-6:]}", "type", "bridge"])
    try:
        for attempt in attempts:
            made = subprocess.run(["ip", *attempt], capture_output=True, text=True)
            if made.returncode:
                return f"`ip {' '.join(attempt[:-2])} ...` is not allowed here: {made.stderr.strip()}"
    finally:
        for undo in (["netns", "del", name], ["link", "del", f"p{name[-6:]}"]):
            subprocess.run(["ip", *undo], capture_output=True)
    return None


# once the input ends: every process of hosts 1 and 2, their namespaces and interfaces, and the bridge
_CLEAN = """
cat >/dev/null
for number in 1 2; do
    for try in 1 2 3 4 5; do
        left=$(ip netns pids "paco-$1-$number" 2>/dev/null) && [ "$left" ] && kill -KILL $left 2>/dev/null && sleep 0.1
    done
    ip netns del "paco-$1-$number" 2>/dev/null
    ip link del "p$1$number" 2>/dev/null
done
ip link del "$2" 2>/dev/null
"""


class Host:
    """A network namespace with a name of its own."""

    def __init__(self, number: int, tag: str, bridge: str) -> None:
        self.name, self.address = f"node{number}", f"10.77.0.{number}"
        self.namespace, self.outside = f"paco-{tag}-{number}", f"p{tag}{number}"
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self.outside, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _ip("link", "set", self.outside, "master", bridge, "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for interface in ("eth0", "lo"):
            _ip("-n", self.namespace, "link", "set", interface, "up")

    def inside(self, *command: object) -> list[str]:
        """The words that run a command on this host."""
        words = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c"]
        return [*words, f'hostname {self.name} && exec "$@"', "sh", *(str(word) for word in command)]

    def processes(self) -> list[int]:
        """Ids of all processes on this host."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def ranks(self, script: str) -> list[int]:
        """Ids of the processes here that run a script as a rank (not the launcher, not its loader processes)."""
        found = []
        for pid in self.processes():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found += [pid] if any(word.endswith(script.encode()) for word in words[1:3]) else []  # python -u SCRIPT
        return found

    def cut_off(self) -> None:
        """Pull the network cable."""
        _ip("link", "set", self.outside, "down")

    def plug_in(self) -> None:
        """Put the network cable back."""
        _ip("link", "set", self.outside, "up")


class TwoHosts:
    """node1 and node2, with what a user prepares once: keys, a hostfile, .deepspeed_env.

    Args:
        folder: seen by both hosts, as a shared file system; jobs are launched from here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, tag = folder, secrets.token_hex(3)
        bridge = f"p{tag}"
        self.hosts: list[Host] = []
        self._daemons: list[subprocess.Popen[bytes]] = []
        # in a session of its own, it cleans up even if this process is killed: then its input ends
        self._cleaner = subprocess.Popen(
            ["sh", "-c", _CLEAN, "sh", tag, bridge], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
            for number in (1, 2):
                self.hosts.append(Host(number, tag, bridge))
            self._serve_ssh()
        except BaseException:
            self.close()
            raise
        self.set_slots(1)
        self.set_environment(GLOO_SOCKET_IFNAME="eth0")

    def set_slots(self, count: int) -> None:
        """Write the hostfile: as many ranks on each host."""
        (self.folder / "hosts").write_text("".join(f"{host.address} slots={count}\n" for host in self.hosts))

    def set_environment(self, **variables: str) -> None:
        """Write .deepspeed_env, which the launcher sends to all hosts."""
        every = {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        every |= {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ} | variables
        (self.folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in every.items()))

    def launch(self, *arguments: object) -> Job:
        """`deepspeed ARGUMENTS`, typed on the first host."""
        environment = {**os.environ, "PATH": f"{self.folder / 'bin'}:{BIN}:{os.environ['PATH']}"}
        return Job(self.hosts[0].inside("deepspeed", *arguments), self.folder, environment)

    def fetch(self, addresses: Sequence[str]) -> dict[str, str]:
        """What http://ADDRESS/metrics answers on the network of the hosts."""
        program = (
            "import json, sys, urllib.request as u\n"
            "print(json.dumps({a: u.urlopen(f'http://{a}/metrics', timeout=10).read().decode() for a in sys.argv[1:]}))"
        )
        answer = subprocess.run(self.hosts[0].inside(sys.executable, "-c", program, *addresses), capture_output=True)
        assert answer.returncode == 0, answer.stderr.decode()
        fetched: dict[str, str] = json.loads(answer.stdout)
        return fetched

    def scrape(self, run: Path) -> dict[str, dict[str, float]]:
        """{target: {metric without labels: value}} of every target that Prometheus is told of."""
        listed = json.loads((run / "metrics_targets.json").read_text())
        return {
            target: {
                sample.name: sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if not sample.labels
            }
            for target, text in self.fetch([target for each in listed for target in each["targets"]]).items()
        }

    def _serve_ssh(self) -> None:
        folder = self.folder
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("key", *(host.name for host in self.hosts)):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        options = {
            "PidFile": "none",
            "AuthorizedKeysFile": folder / "key.pub",
            "StrictModes": "no",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
        }
        settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        for host in self.hosts:
            daemon = [shutil.which("sshd", path=SBIN), "-D", "-f", "/dev/null", "-h", folder / host.name]
            listen = ["-o", f"ListenAddress={host.address}:22"]
            self._daemons.append(subprocess.Popen(host.inside(*daemon, *listen, *settings)))
        # stands for ~/.ssh/config, which ssh looks for in the home folder of the account
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder / 'key'}\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
            f"UserKnownHostsFile /dev/null\nLogLevel ERROR\nServerAliveInterval 10\nServerAliveCountMax 3\n"
        )
        (folder / "bin").mkdir()
        ssh = folder / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"\n')
        ssh.chmod(0o755)
        for host in self.hosts:
            self._wait_for_ssh(host)

    def _wait_for_ssh(self, host: Host) -> None:
        deadline = time.monotonic() + 300
        command = self.hosts[0].inside(self.folder / "bin" / "ssh", host.address, "hostname")
        while (answer := subprocess.run(command, capture_output=True, text=True)).stdout != f"{host.name}\n":
            assert time.monotonic() < deadline, f"no ssh to {host.name}: {answer.stderr}"
            time.sleep(0.1)

    def close(self) -> None:
        """End all processes of the hosts, and the hosts."""
        self._cleaner.communicate()
        for daemon in self._daemons:
            daemon.wait(timeout=300)


class Job:
    """A launched command and what it has said so far."""

    def __init__(self, words: Sequence[object], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._log = Path(tempfile.mkstemp(prefix="job-", suffix=".log", dir=folder)[1])
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Return once it is true; fail if the job ends before, or the time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the job ended too early:\n{self.said}"
            assert time.monotonic() < deadline, f"not within {seconds} seconds:\n{self.said}"
            time.sleep(0.02)

    def wait(self, seconds: float) -> int:
        """Its exit status; fail if it still runs when the time is over."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job still runs {seconds} seconds later:\n{self.said}") from None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
