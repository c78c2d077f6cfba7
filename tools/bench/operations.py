"""Owns the count of operations that a block of code asks of the device, and of what the host reads from it in between.

Shared by the bench of launches and the tests: both count on CPU, where the same operations are called.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paco_ds.distributed.ranks import HostCopy

_READ_BY_HOST = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
    "is_nonzero",
    "equal",
    "repeat_interleave",
}
_NO_WORK = {  # views, metadata and numbers of the host: nothing is started on a device
    "scalar_tensor",
    "_record_function_enter_new",
    "_record_function_exit",
    "view",
    "_unsafe_view",
    "expand",
    "t",
    "transpose",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "unbind",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "as_strided",
    "diagonal",
    "reshape",
    "_reshape_alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "unfold",
    "lift_fresh",
    "set_",
    "is_same_size",
}


HOST_COPY = "copy to the host, not waited for"  # its name among the operations


@dataclass
class Counted:
    """What was asked of the device: operations by name, and host reads by place."""

    operations: Counter[str] = field(default_factory=Counter)
    host_reads: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.operations.total()


class Counting(TorchDispatchMode):
    """Counts the operations that run in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _NO_WORK:
            self.counted.operations[name] += 1
        if name in _READ_BY_HOST or (name in ("index", "index_put", "index_put_") and _has_mask(args)):
            self.counted.host_reads[f"{name} in {_place()}"] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _place() -> str:
    """The innermost line of the project, or of DeepSpeed if that is nearer."""
    for frame in reversed(traceback.extract_stack()):
        for root in ("paco_ds", "deepspeed"):
            if f"/{root}/" in frame.filename and "/bench/" not in frame.filename:
                return f"{root}/{frame.filename.rpartition(f'/{root}/')[2]}:{frame.lineno}"
    return "the caller"


@contextmanager
def counting() -> Iterator[Counted]:
    """Count the operations and host reads of the block."""
    kept: dict[str, Callable[..., Any]] = {}
    with Counting() as mode:
        begin_copy = HostCopy.__init__

        def begun(copy: HostCopy, tensor: Tensor) -> None:
            mode.counted.operations[HOST_COPY] += 1
            begin_copy(copy, tensor)

        HostCopy.__init__ = begun  # type: ignore[assignment,method-assign]
        for name in ("tolist", "numpy", "cpu"):
            kept[name] = method = getattr(Tensor, name)

            def seen(tensor: Tensor, *args: Any, name: str = name, method: Any = method, **options: Any) -> Any:
                mode.counted.host_reads[f"{name} in {_place()}"] += 1
                return method(tensor, *args, **options)

            setattr(Tensor, name, seen)
        try:
            yield mode.counted
        finally:
            HostCopy.__init__ = begin_copy  # type: ignore[method-assign]
            for name, method in kept.items():
                setattr(Tensor, name, method)
