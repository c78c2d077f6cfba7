"""Forward and loss of one micro-batch: the only definition, for training, planning, benches and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from paco_ds.contrast.key_queue import QueueSnapshot
from paco_ds.distributed.ranks import to_device
from paco_ds.losses.base import Anchors, LossOutput
from paco_ds.losses.distillation import Distillation
from paco_ds.models.output import ModelOutput
from paco_ds.models.recogniser import concat_experts
from paco_ds.training.mixup import Mix


@dataclass(frozen=True)
class ForwardResult:
    """A micro-batch after the model's forward.

    Attributes:
        views: the images as the model saw them.
        labels: int64, of every row of the output: [m], or [2 m] where one encoder ran both views.
        output: of the model.
        mix: how the images were mixed, or None.
    """

    views: Sequence[Tensor]
    labels: Tensor
    output: ModelOutput
    mix: Mix | None = None

    @property
    def second_view_rows(self) -> Tensor:
        """Unit rows of the second views [m, D] without gradient: the keys, where one encoder runs both views."""
        assert self.output.queries is not None
        return concat_experts(self.output.queries[..., len(self.views[0]) :, :]).detach()


class Forward:
    """Runs the model on a micro-batch, and the loss on its output.

    Args:
        model: the recogniser, or the DeepSpeed engine around it.
        loss: of the method.
        two_views: the model runs both views (GPaCo, MDCS): 2 m rows are anchors.
        distillation: adds KL to the teacher's logits; for methods that train centers.
    """

    def __init__(
        self,
        model: Callable[..., ModelOutput],
        loss: Callable[[Anchors], LossOutput],
        *,
        two_views: bool = False,
        distillation: Distillation | None = None,
    ) -> None:
        self.model, self.loss = model, loss
        self.two_views, self.distillation = two_views, distillation

    def run_model(self, query: Tensor, key: Tensor | None, labels: Tensor, mix: Mix | None = None) -> ForwardResult:
        """The model's forward.

        Args:
            query, key: uint8 [m, 3, H, W] on the model's device; key is the second view, used with `two_views` alone.
            labels: int64 [m].
            mix: how to mix the images; for methods without contrast.
        """
        if self.two_views:
            assert key is not None
            return ForwardResult([query, key], labels.repeat(2), self.model(query, key))
        images = query if mix is None else mix.images(query)
        return ForwardResult([images], labels, self.model(images), mix)

    def run_loss(
        self, result: ForwardResult, keys: Tensor | None = None, queue: QueueSnapshot | None = None
    ) -> LossOutput:
        """The loss of the micro-batch, scalar, with its diagnostics.

        Args:
            keys: of the micro-batch, [m, D] or [E, m, D].
            queue: snapshot of the queue before this step.
        """
        labels, mix = result.labels, result.mix
        output = self.loss(self._anchors(result, labels, keys, queue))
        if mix is not None:
            partners = labels[to_device(mix.partners, labels.device)]
            output = mix.outputs(output, self.loss(self._anchors(result, partners, keys, queue)))
        if self.distillation is not None:
            output = self.distillation(output, result.output.logits, *result.views)
        return output

    @staticmethod
    def _anchors(result: ForwardResult, labels: Tensor, keys: Tensor | None, queue: QueueSnapshot | None) -> Anchors:
        made = result.output
        return Anchors(labels, made.logits, made.queries, keys, queue, made.prototypes, made.routers)
