"""The settings of how a step is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from paco_ds.config.section import Count, Natural, Positive, Section


def _true_as_default(value: Any) -> Any:
    """`engine.compile: true` of earlier versions is torch's default mode."""
    return "default" if value is True else value


class EngineSettings(Section):
    """How the step is computed. `auto` is decided by the hardware at the start of a run, which says what it chose."""

    deepspeed: str = Field(
        "auto",
        description="DeepSpeed JSON with a ZeRO stage (zero0 to zero3 ship) and no batch sizes; auto: on CUDA stage 0 "
        "where that fits into the memory of a GPU, else 1; on CPU stage 1",
    )
    precision: Literal["auto", "float32", "bfloat16", "published"] = Field(
        "auto",
        description="bfloat16 is autocast, weights and losses stay float32; auto: bfloat16 on CUDA of compute "
        "capability 8 and above, else float32, and a resumed run keeps its own; published: published_precision",
    )
    published_precision: Literal["float32", "float16"] | None = Field(
        None, description="of the published run; float16 is computed as bfloat16 autocast"
    )
    tf32: Literal["auto"] | bool = Field(
        "auto",
        description="convolutions that stay in float32 in TF32 (10 bits of mantissa) on CUDA; matrix products, the "
        "loss among them, never; auto: not where precision is float32",
    )
    gradients: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="what ranks send of their gradients; bfloat16 is half as much, and rounds each to a part in 256",
    )
    threads: Count | None = Field(None, description="CPU threads of a rank; cores / ranks on the host by default")
    max_skipped: Count = Field(50, description="steps in a row that may change nothing, something not being finite")
    max_grad_norm_ratio: Positive | None = Field(
        None, gt=1, description="skip a step whose gradient norm is more than so many times the usual one; null: none"
    )
    digest_every: Natural = Field(100, description="steps between proofs that ranks hold equal queues; 0: never")
    hang_seconds: Positive | None = Field(
        300, description="seconds without progress after which ranks print their stacks and end; null: never"
    )
    channels_last: Literal["auto"] | bool = Field(
        "auto",
        description="keep images and activations as N, H, W, C in memory; auto: on CUDA of compute capability 7 and "
        "above (tensor cores)",
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the inputs of residual blocks for backward and run the blocks again there"
    )
    compile: Annotated[Literal[False, "default", "reduce-overhead"], BeforeValidator(_true_as_default)] = Field(
        False,
        description="compile the encoders (torch.compile) in one of its modes; ZeRO stages 0 to 2. reduce-overhead "
        "records CUDA graphs; on CPU it is default",
    )

    @model_validator(mode="after")
    def _one_decides_what_is_recomputed(self) -> Self:
        if self.compile and self.activation_checkpointing:
            raise ValueError(
                "compile and activation_checkpointing both decide what backward computes again; set one to false"
            )
        return self


def deviation(settings: EngineSettings) -> str | None:
    """How the chosen precision differs from the published one, in words; None where it does not."""
    published = settings.published_precision
    if published is None or published == settings.precision:
        return None
    return f"{settings.precision} where {published} is published"


def described(settings: EngineSettings, stage: int) -> dict[str, Any]:
    """What was chosen for a run: `execution` of metrics.json and of the log."""
    named = ("precision", "published_precision", "tf32", "channels_last", "activation_checkpointing", "compile")
    return {"zero_stage": stage, **{name: getattr(settings, name) for name in named}}


def in_words(execution: Mapping[str, Any]) -> str:
    """What `described` returned, on one line: `bfloat16 autocast, channels_last, compiled (default)`."""
    precision, published = execution.get("precision"), execution.get("published_precision")
    words = ["bfloat16 autocast" if precision == "bfloat16" else str(precision)]
    if published not in (None, precision):
        words[0] += f" where {published} is published"
    words += ["convolutions in TF32"] if execution.get("tf32") and precision == "float32" else []
    words += [name for name in ("channels_last", "activation_checkpointing") if execution.get(name)]
    words += [f"compiled ({execution['compile']})"] if execution.get("compile") else []
    return ", ".join(words)
