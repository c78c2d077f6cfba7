"""The queue of past keys: a ring whose contents depend only on the sequence of pushed keys.

Shapes: K queue length, N filled slots, G keys of one push (the global batch), C classes, D dimension.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from paco_ds.errors import CheckpointError

log = logging.getLogger(__name__)

_DIGEST_WORDS = 2**20  # hashed at a time, so that the digest of a long queue needs little memory


@dataclass(frozen=True)
class QueueSnapshot:
    """The queue as seen by one optimizer step, with the class sums that the loss needs.

    The sums are computed from keys and labels once per step and never stored, so they cannot drift. Keys and labels
    share the queue's memory and are valid until its next push.

    Attributes:
        keys_ND: keys of the filled slots, in slot order; [E, N, D] after :meth:`experts`.
        labels_N: their classes, int64.
        class_count_C: n_y, the number of keys of each class, int64.
        present_sum_RD: S_y of the classes with a key, then rows of zeros, the last for all other classes; dtype of the
            keys. R = min(C, N) + 1: with 100,000 classes most have no key in the queue.
        row_C: row of each class in present_sum_RD.
        version: torch's version counter of the keys, to detect a later push; None in inference mode.
    """

    keys_ND: Tensor
    labels_N: Tensor
    class_count_C: Tensor
    present_sum_RD: Tensor
    row_C: Tensor
    version: int | None

    @classmethod
    def of(cls, keys_ND: Tensor, labels_N: Tensor, num_classes: int) -> "QueueSnapshot":
        """Compute the class sums. One thread sums each class in slot order, so that equal queues have bit-equal sums on
        any device and number of threads. No shape depends on the labels, so that the host does not wait for them.

        index_add_ is not deterministic on CUDA; segment_reduce is, and takes four times as long as this (C = 8142,
        N = 8192, D = 128, two cores), which takes about as long as index_add_.

        Args:
            labels_N: each in [0, num_classes); see :meth:`KeyQueue.load_state_dict` for where that is checked.
        """
        sorted_N, by_class_N = labels_N.sort(stable=True)
        start_C1 = torch.searchsorted(sorted_N, torch.arange(num_classes + 1, device=labels_N.device))
        count_C, last = start_C1.diff(), min(num_classes, len(labels_N))
        absent_C = count_C == 0
        row_C = ((~absent_C).cumsum(0) - 1).masked_fill_(absent_C, last)
        if len(keys_ND):
            # start of each class with a key, then empty bags: rows of zeros
            start_C = start_C1[:-1].masked_fill(absent_C, len(labels_N))
            starts_R = labels_N.new_full((last + 1,), len(labels_N)).scatter_(0, row_C, start_C)
            sum_RD = F.embedding_bag(by_class_N, keys_ND, starts_R, mode="sum")
        else:
            sum_RD = keys_ND.new_zeros(1, keys_ND.shape[1])
        version = None if keys_ND.is_inference() else keys_ND._version
        return cls(keys_ND, labels_N, count_C, sum_RD, row_C, version)

    def __len__(self) -> int:
        """Number of keys."""
        return len(self.labels_N)

    def class_sums(self, labels_B: Tensor) -> Tensor:
        """S_y of each label, [B, D], or [E, B, D] with experts; zeros for a class without keys."""
        return self.present_sum_RD[..., self.row_C[labels_B], :]

    @property
    def class_sum_CD(self) -> Tensor:
        """S_y of every class, zeros included."""
        return self.class_sums(torch.arange(len(self.row_C), device=self.row_C.device))

    def experts(self, count: int) -> "QueueSnapshot":
        """View keys of dimension count x D, the experts' keys concatenated, as [E, N, D].

        Raises:
            ValueError: the dimension is not divisible by `count`.
        """
        dim = self.keys_ND.shape[-1]
        if self.keys_ND.ndim != 2 or dim % count:
            raise ValueError(f"a queue of keys {tuple(self.keys_ND.shape)} does not divide among {count} experts")
        keys_END, sum_ERD = (t.unflatten(1, (count, -1)).transpose(0, 1) for t in (self.keys_ND, self.present_sum_RD))
        return replace(self, keys_ND=keys_END, present_sum_RD=sum_ERD)

    def check_current(self) -> None:
        """Raise ValueError if keys were pushed since: keys and class sums would not match."""
        if self.version is not None and self.keys_ND._version != self.version:
            raise ValueError("the queue has changed since this snapshot: take a new one after each push")


class KeyQueue:
    """Ring of the last `length` keys and their labels.

    The n-th pushed key (from 0) lies in slot n mod length, so the queue does not depend on how pushes are divided.
    Unfilled slots are not used. A queue of length 0 stays empty.

    How many were pushed is a number on the device, since it alone knows whether a step was skipped. The host reads it
    until the queue is full, and for checkpoints.

    Args:
        length: K >= 0.
        dim: D >= 1, the dimension of keys.
        device: of keys and labels.

    Raises:
        ValueError: a negative length or a dimension below 1.
    """

    def __init__(self, length: int, dim: int, device: torch.device | str = "cpu") -> None:
        if length < 0 or dim < 1:
            raise ValueError(f"queue.length must be at least 0 and the key dimension 1, got {length} and {dim}")
        self.keys_KD = torch.zeros(length, dim, dtype=torch.float32, device=device)
        self.labels_K = torch.zeros(length, dtype=torch.int64, device=device)
        self.pushed = torch.zeros((), dtype=torch.int64, device=device)
        self._is_full, self._unchecked, self._warned = length == 0, False, False

    @property
    def count(self) -> int:
        """Number of keys pushed so far, read from the device."""
        return int(self.pushed)

    def __len__(self) -> int:
        """Number of filled slots."""
        length = len(self.keys_KD)
        if not self._is_full:
            filled = min(self.count, length)
            self._is_full = filled == length
            return filled
        return length

    @torch.no_grad()
    def push(self, keys_GD: Tensor, labels_G: Tensor, applied: Tensor | None = None) -> None:
        """Replace the oldest keys by a global batch, in order; if G > K only the last K are kept.

        Args:
            keys_GD: float32, any G >= 0.
            labels_G: int64.
            applied: a bool scalar on the device; where it is False nothing changes.

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        length, dim = self.keys_KD.shape
        if keys_GD.shape != (len(labels_G), dim) or labels_G.ndim != 1:
            raise ValueError(
                f"this queue takes keys [G, {dim}] and labels [G], got {tuple(keys_GD.shape)} and "
                f"{tuple(labels_G.shape)}"
            )
        if keys_GD.dtype != torch.float32 or labels_G.dtype != torch.int64:
            raise ValueError(f"keys are float32 and labels int64, got {keys_GD.dtype} and {labels_G.dtype}")
        new = len(labels_G)
        kept = min(new, length)
        if 0 < length < new and not self._warned:
            self._warned = True
            log.warning("queue.length is %d but a step brings %d keys: only its last %d are kept", length, new, length)
        if kept:
            slots = (self.pushed + torch.arange(new - kept, new, device=self.pushed.device)).remainder_(length)
            keys_GD, labels_G = (t[new - kept :].to(self.pushed.device) for t in (keys_GD, labels_G))
            if applied is not None:
                keys_GD = torch.where(applied, keys_GD, self.keys_KD[slots])
                labels_G = torch.where(applied, labels_G, self.labels_K[slots])
            self.keys_KD[slots], self.labels_K[slots] = keys_GD, labels_G
        self.pushed += new if applied is None else new * applied

    def snapshot(self, num_classes: int, newest: tuple[Tensor, Tensor] | None = None) -> QueueSnapshot:
        """The filled slots with their class sums. Without `newest` it shares the queue's memory (a million keys take
        half a gigabyte on every rank): use it before the next push. The backward pass may come after the push.

        Args:
            newest: keys [G, D] and labels [G] of this step, appended to those of the queue.

        Raises:
            ValueError: the queue was loaded and holds a label outside [0, num_classes).
        """
        filled = len(self)
        keys_ND, labels_N = self.keys_KD[:filled], self.labels_K[:filled]
        if self._unchecked and filled:
            self._unchecked = False
            for label in map(int, labels_N.aminmax()):
                if not 0 <= label < num_classes:
                    raise ValueError(
                        f"the queue holds a key of class {label}, but there are {num_classes} classes: "
                        "is it the checkpoint of another data set?"
                    )
        if newest is not None:
            keys_ND, labels_N = torch.cat([keys_ND, newest[0]]), torch.cat([labels_N, newest[1]])
        return QueueSnapshot.of(keys_ND, labels_N, num_classes)

    def digest(self) -> Tensor:
        """Bit-exact checksum of keys, labels and count (see :func:`digest`), to compare queues of ranks."""
        return digest((self.keys_KD, self.labels_K, self.pushed))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of `keys` [K, D] float32 and `labels` [K] int64, and `count`, an int64 scalar."""
        return {
            "keys": self.keys_KD.clone(),
            "labels": self.labels_K.clone(),
            "count": self.pushed.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the contents of another queue of the same length and dimension. The next snapshot checks its labels.

        Raises:
            CheckpointError: tensors missing, unknown, or of another shape or dtype; a negative count.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise CheckpointError(f"a saved queue holds {sorted(own)}, this one {sorted(state)}")
        for name, tensor in own.items():
            saved = state[name]
            if saved.shape != tensor.shape:
                raise CheckpointError(
                    f"saved queue: {name} has shape {tuple(saved.shape)}, this run's {tuple(tensor.shape)} "
                    f"(queue.length, model.projection_dim): resume with the checkpoint's settings "
                    f"(queue.length is {len(self.keys_KD)} now) or start a new run"
                )
            if saved.dtype != tensor.dtype:
                raise CheckpointError(f"saved queue: {name} is {saved.dtype}, expected {tensor.dtype}")
        count = int(state["count"])
        if count < 0:
            raise CheckpointError(f"saved queue: count is {count}, the checkpoint is damaged")
        self.keys_KD.copy_(state["keys"])
        self.labels_K.copy_(state["labels"])
        self.pushed.fill_(count)
        self._is_full, self._unchecked = count >= len(self.keys_KD), True


def short_queue_hint(length: int, global_batch: int) -> str | None:
    """A hint in words if a queue is shorter than four global batches, else None."""
    if length >= 4 * global_batch:
        return None
    return f"queue.length {length} is under four global batches; consider --set queue.length={4 * global_batch}"


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """Bit-exact checksum, an int64 scalar on the tensors' device, in one pass without a host sync.

    Every 32-bit word is multiplied by a distinct odd number, modulo 2^64: a change of a single word is always detected,
    and swapped words are, except for rare coincidences.

    Args:
        tensors: all on one device, of 4 or 8 byte elements.
    """
    start, total = 0, torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        total = total.to(tensor.device)
        for words in tensor.detach().flatten().view(torch.int32).split(_DIGEST_WORDS):
            total += (words * (2 * torch.arange(start, start + len(words), device=words.device) + 1)).sum()
            start += len(words)
    return total
