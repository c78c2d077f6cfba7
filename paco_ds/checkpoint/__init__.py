"""Checkpoints: the state from which a run resumes exactly, at any ZeRO stage and legal number of ranks.

A checkpoint is a folder step-NNNNNNNN of safetensors (float32 weights and buffers; states of the optimizer; queue) and
state.json (step, recipe, manifest, digests of the files and of itself). It is written under a temporary name, read
back, and renamed. A damaged checkpoint is detected by its digests, and the previous one is used.
"""

from paco_ds.checkpoint.agreement import same_on_all_ranks
from paco_ds.checkpoint.read import (
    MODEL,
    OPTIMIZER,
    QUEUE,
    Checkpoint,
    chosen_checkpoint,
    hint_after_storage_errors,
    newest_checkpoint,
    open_run,
    read_checkpoint,
    resume_hint,
)
from paco_ds.checkpoint.write import Checkpoints, recover, write_tensors

__all__ = [
    "MODEL",
    "OPTIMIZER",
    "QUEUE",
    "Checkpoint",
    "Checkpoints",
    "chosen_checkpoint",
    "hint_after_storage_errors",
    "newest_checkpoint",
    "open_run",
    "read_checkpoint",
    "recover",
    "resume_hint",
    "same_on_all_ranks",
    "write_tensors",
]
