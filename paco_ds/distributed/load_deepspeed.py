"""DeepSpeed, as every module here imports it: without MLflow.

Its autotuner, which is not used here, imports MLflow where that is installed, and with it a web server: three quarters
of the time that importing DeepSpeed takes on every rank. A run that logs to MLflow imports it itself.
"""

from __future__ import annotations

import os
import sys

from paco_ds.distributed.rendezvous import start_timeout

if "DEEPSPEED_TIMEOUT" in os.environ:  # DeepSpeed takes it for a number as it is imported, also an empty one
    os.environ["DEEPSPEED_TIMEOUT"] = f"{start_timeout() / 60:.0f}"

if "mlflow" in sys.modules:
    import deepspeed
else:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # "not installed", to an import
    try:
        import deepspeed
    finally:
        del sys.modules["mlflow"]

from deepspeed.runtime import compiler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

__all__ = [
    "DeepSpeedZeroConfig",
    "compiler",
    "deepspeed",
    "safe_get_full_fp32_param",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_optimizer_state",
    "safe_set_full_optimizer_state",
    "safe_set_local_optimizer_state",
]
