"""Join and leave the job's process group, with checks that raise an error instead of a hang.

One code path for one rank without a launcher, for `deepspeed` and for `torchrun`; NCCL on CUDA, gloo on CPU.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from contextlib import suppress

import psutil
import torch
import torch.distributed as dist

from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import UserError


def environment_ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) as a launcher set them; (0, 1, 0) without one.

    Raises:
        UserError: they are no numbers, or no rank of so many.
    """
    rank, world_size, local_rank = (
        environment_int("RANK"),
        environment_int("WORLD_SIZE", 1),
        environment_int("LOCAL_RANK"),
    )
    if rank >= world_size:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world_size} in the environment, but ranks are 0 to WORLD_SIZE - 1: launch "
            f"with `deepspeed`, or unset both to have one rank"
        )
    return rank, world_size, local_rank


def environment_int(name: str, default: int = 0, least: int = 0, most: int = 2**31 - 1) -> int:
    """A variable of the environment that is a whole number; an empty one is not set.

    Raises:
        UserError: it is none, or not from `least` to `most`.
    """
    if not (text := os.environ.get(name, "").strip()):
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and least <= int(text) <= most):
        raise UserError(
            f"{name} is {text!r:.60} in the environment, where a whole number belongs, {least} to {most}: correct or "
            f"unset it"
        )
    return int(text)


def job_port() -> int:
    """MASTER_PORT, where a launcher set it; UserError if it is no port."""
    return environment_int("MASTER_PORT", 0, 1, 65535)


def local_world_size() -> int:
    """Ranks of this job on this host, as a launcher set them (DeepSpeed's name, or torchrun's); all without one."""
    return environment_int("LOCAL_SIZE", environment_int("LOCAL_WORLD_SIZE", environment_int("WORLD_SIZE", 1)))


def join_job(threads: int | None, initialise: Callable[..., object] = dist.init_process_group) -> Ranks:
    """Join the job's process group: NCCL on CUDA, gloo on CPU, by the same code path. A job may have one rank.

    Args:
        threads: CPU threads of this rank; by default the host's cores shared by its ranks.
        initialise: called with the backend's name; DeepSpeed has its own.

    Raises:
        UserError: WORLD_SIZE is above 1 but the address of rank 0 is not set, or a launcher started several
            processes without setting their ranks, or these are no ranks, or gloo would not be reachable, or this
            rank has no GPU where others have.
    """
    rank, world_size, local_rank = environment_ranks()
    if world_size == 1:
        _refuse_unnamed_ranks()
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_rank)})
        initialise = _alone(initialise)
    elif missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: launch with `deepspeed`, or set these "
            f"for every rank"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        _require_gpu(local_rank, torch.cuda.device_count())
        torch.cuda.set_device(local_rank)
    else:
        on_host = local_world_size()
        if on_host < world_size:
            check_gloo_interface()
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // on_host))
    initialise("nccl" if cuda else "gloo")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Ranks(rank, world_size, local_rank, device, dist.group.WORLD)


def _require_gpu(local_rank: int, seen: int) -> None:
    if local_rank >= seen:
        gpus = "1 GPU" if seen == 1 else f"{seen} GPUs"
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this process sees {gpus}, for ranks 0 to {seen - 1} of its host: start "
            f"at most {gpus.split()[0]} there (--ranks, --num_gpus), or let every rank see all GPUs of its host "
            f"(CUDA_VISIBLE_DEVICES; under Slurm --gpus-per-node in place of --gpus-per-task)"
        )


def _alone(initialise: Callable[..., object]) -> Callable[[str], None]:
    """Initialise on this host: one rank meets nobody, and the address of a job may be left over from another one, as in
    a shell in its container. (Under torchrun the agent has the store, at the address it set.)"""

    def initialise_here(backend: str) -> None:
        address = (
            {} if "TORCHELASTIC_RUN_ID" in os.environ else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        )
        before = {name: os.environ[name] for name in address if os.environ.get(name)}
        os.environ.update(address)
        initialise(backend)
        os.environ.update(before)  # by which the address is found that Prometheus reaches

    return initialise_here


def check_gloo_interface() -> None:
    """Check that the address of this host that gloo announces to the other hosts is reachable there.

    Raises:
        UserError: GLOO_SOCKET_IFNAME names no interface of this host, or the address is a loopback address.
    """
    host, names = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME", "")
    interfaces = {
        name: [a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
    }
    usable = [f"{name} ({a[0]})" for name, a in interfaces.items() if a and not _is_loopback(a[0])]
    remedy = (
        f"Name the one that reaches the other hosts by a line GLOO_SOCKET_IFNAME=NAME in .deepspeed_env, in the "
        f"working or home folder of the host you launch from; {host} has {', '.join(usable) or 'none'}"
    )
    if names:
        for name in names.split(","):
            if not interfaces.get(name):
                raise UserError(f"GLOO_SOCKET_IFNAME={names}: no interface {name} with an address on {host}. {remedy}")
        announced = [interfaces[name][0] for name in names.split(",")]
    else:
        announced = [_address_of_host_name(host)]
    if loopback := [address for address in announced if _is_loopback(address)]:
        what = f"GLOO_SOCKET_IFNAME={names}" if names else f"GLOO_SOCKET_IFNAME is not set and the host name {host}"
        raise UserError(
            f"gloo would announce {loopback[0]} to the other hosts, where it is their own address: {what} gives it. "
            f"{remedy}"
        )


def _address_of_host_name(host: str) -> str:
    """The default address of gloo: the first of the host name's addresses that belongs to this host."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    for family, kind, _, _, address in found:
        with suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return str(address[0])
    return "127.0.0.1"


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _refuse_unnamed_ranks() -> None:
    """Raise UserError if a launcher started several processes without ranks: all would write the same run."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if not os.environ.get("WORLD_SIZE") and environment_int(name, 1) > 1:
            raise UserError(
                f"{name} is {os.environ[name]}, but WORLD_SIZE is not set: this launcher starts several processes "
                f"without setting their ranks. Set RANK, LOCAL_RANK, LOCAL_SIZE, WORLD_SIZE, MASTER_ADDR and "
                f"MASTER_PORT for each (docs/cluster.md shows how under Slurm), or WORLD_SIZE=1 to have one rank"
            )


def leave_job() -> None:
    """Leave the process group; without this about one rank in twelve exits with an error."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> str:
    """A currently free port of this host, for MASTER_PORT."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
