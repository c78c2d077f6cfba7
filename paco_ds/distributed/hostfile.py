"""The hosts of a hostfile that are left after a fault, and a `deepspeed` command on them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from paco_ds.errors import UserError

HOST = r"[A-Za-z0-9_\[][A-Za-z0-9_.:@\[\]-]*"
"""Names of hosts: `-oProxyCommand=...` would be an option of ssh, which runs it."""


def read_hostfile(hostfile: Path) -> list[tuple[str, int]]:
    """(host, slots) of each line `host slots=N`.

    Raises:
        UserError: it cannot be read, or a host is no name.
    """
    try:
        lines = re.findall(r"^\s*([^\s#]+)\s+slots=(\d{1,6})\b", hostfile.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile {hostfile} cannot be read: {error}") from None
    for host, _ in lines:
        if not re.fullmatch(HOST, host):
            raise UserError(f"hostfile {hostfile}: {host!r} is no name of a host")
    return [(host, int(slots)) for host, slots in lines]


def hosts_left(hostfile: Path, micro_batches: int | None, is_up: Callable[[str], bool]) -> dict[str, int]:
    """Slots of the hosts that answer, in the order of the hostfile, as many as can share a step evenly.

    Args:
        micro_batches: of a step; None before the first start, which takes all.

    Raises:
        UserError: no host answers.
    """
    from paco_ds.distributed.ranks import legal_world_sizes  # torch: only who asks for it waits

    lines = read_hostfile(hostfile)
    found = {host: slots for host, slots in lines if is_up(host)}
    if not found:
        raise UserError(f"no host of {hostfile} answers to ssh: {', '.join(host for host, _ in lines)}")
    free = sum(found.values())
    if micro_batches is not None:
        free = max(size for size in legal_world_sizes(micro_batches) if size <= free)
    taken = {}
    for host, slots in found.items():
        taken[host] = min(slots, free)
        free -= taken[host]
    return {host: slots for host, slots in taken.items() if slots}


def on_hosts(command: Sequence[str], hostfile: Path, ranks: int) -> list[str]:
    """A `deepspeed` command with another hostfile and number of ranks; also one host is reached by ssh."""
    words = [*command]
    for option, value in (("--hostfile", str(hostfile)), ("-H", str(hostfile)), ("--expect-ranks", str(ranks))):
        for place, word in enumerate(words):
            if word == option:
                words[place + 1] = value
            elif word.startswith(f"{option}="):
                words[place] = f"{option}={value}"
    return [words[0], "--force_multi", *words[1:]]


def answers(host: str) -> bool:
    """Whether ssh reaches a host, with the options that pdsh gives it."""
    options = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *os.environ.get("PDSH_SSH_ARGS_APPEND", "").split())
    silent = subprocess.DEVNULL
    return subprocess.run(["ssh", *options, host, "true"], stdin=silent, stdout=silent, stderr=silent).returncode == 0
