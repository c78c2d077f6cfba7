"""A training method as a recipe sees it: its settings, what it needs of a run, and where its loss is built.

Settings are read without torch: a method names its loss by module and function, which are imported when it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from paco_ds.config.section import Section

if TYPE_CHECKING:
    from paco_ds.config.model import ModelSettings
    from paco_ds.config.recipe import QueueSettings, Recipe, ScheduleSettings, StepSettings


class Method(Section):
    """Base of the settings of every method; the fields of a subclass are its section `loss.NAME`.

    Class attributes:
        name: value of `loss.method`, and name of the section.
        loss: `module:function`, or the function itself, called as (settings of the method, settings that methods
            share, class counts, class names) to build the loss; see `paco_ds.losses.make_loss`.
        contrastive: queries are contrasted with other views: the run makes a second view of each image, a projection
            and a queue.
        uses_both_views: the loss is of both views of each image, run by one encoder, without contrast.
        trains_centers: False where centers keep their weights: of a first stage, or of experts that routers choose
            from.
        uses_prototypes: centers take part in the contrast through a projection of their own.
        uses_routers: the loss is of routers (RIDE's second stage), the method of `model.trained: routers`.
        uses_queue: the loss needs keys of earlier steps, so `queue.length` is above 0.
        mixes_labels: False where an image needs exactly one label, so that `step.mixup` and `step.cutmix` are refused.
        smooths_labels: whether the loss takes `loss.smoothing`, which is refused where it does not.
        min_experts: 0 for a loss of any model, else the least `model.experts`.
        per_expert: name of the setting that has a number for each expert, or None.
        reweights_after: name of the setting that says after how many epochs the loss changes, or None.
    """

    name: ClassVar[str]
    loss: ClassVar[str | Callable[..., Any]]
    contrastive: ClassVar[bool] = False
    uses_both_views: ClassVar[bool] = False
    trains_centers: ClassVar[bool] = True
    uses_prototypes: ClassVar[bool] = False
    uses_routers: ClassVar[bool] = False
    uses_queue: ClassVar[bool] = False
    mixes_labels: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = False
    min_experts: ClassVar[int] = 0
    per_expert: ClassVar[str | None] = None
    reweights_after: ClassVar[str | None] = None

    @property
    def margin_scale(self) -> float | None:
        """Scale of the cosine centers between which the loss has its margins; None if it has none."""
        return None

    @property
    def change_epoch(self) -> int | None:
        """Epochs after which the loss changes; None for never."""
        return None if self.reweights_after is None else getattr(self, self.reweights_after)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that this method cannot train.

        Raises:
            ValueError: names the settings that do not fit each other, and the remedy.
        """
        self._check_model(recipe.model)
        self._check_run(recipe.step, recipe.queue, recipe.schedule)
        if recipe.loss.smoothing and not self.smooths_labels:
            raise ValueError(
                f"loss.smoothing {recipe.loss.smoothing:g} is not part of loss.method {self.name}; set it to 0"
            )

    def _check_model(self, model: ModelSettings) -> None:
        name = self.name
        if model.trained == "center_scales" and self.contrastive:
            raise ValueError(
                f"model.trained {model.trained} freezes the encoder and its projection, so {name} cannot contrast "
                f"anything: set loss.method to one without contrast, such as cross_entropy or balanced_softmax"
            )
        if model.trained == "centers" and not (self.trains_centers or self.uses_routers):
            raise ValueError(
                f"loss.method {name} trains no centers, and model.trained centers nothing of the backbone: set "
                f"loss.method to another, such as cross_entropy or balanced_softmax"
            )
        if (model.trained == "routers") != self.uses_routers:
            raise ValueError(
                f"model.trained routers and loss.method routing belong together, as the second stage of experts, but "
                f"here are model.trained {model.trained} and loss.method {name}: set both, with model.start_from the "
                f"run of the experts, or neither"
            )
        if self.margin_scale is not None:
            if model.centers != "cosine":
                raise ValueError(
                    f"loss.method {name} has its margins between cosines, which model.centers {model.centers} does "
                    f"not give; set model.centers to cosine{self._without_margins()}"
                )
            if self.margin_scale != model.centers_scale:
                raise ValueError(
                    f"loss.{name}.scale {self.margin_scale:g} and model.centers_scale {model.centers_scale:g} are one "
                    f"number; set them equal"
                )
        if (model.experts or 0) < self.min_experts:
            raise ValueError(
                f"loss.method {name} is a loss of experts and model.experts is {model.experts or 'null'}: set it to "
                f"{self._wanted_experts()}"
            )
        if self.per_expert is not None and (given := len(getattr(self, self.per_expert))) != model.experts:
            raise ValueError(
                f"loss.{name}.{self.per_expert} has {given} numbers for {model.experts} experts; give one each"
            )

    def _check_run(self, step: StepSettings, queue: QueueSettings, schedule: ScheduleSettings) -> None:
        name, epoch = self.name, self.change_epoch
        for mixing, alpha in (("mixup", step.mixup), ("cutmix", step.cutmix)):
            if alpha and not (self.mixes_labels and not self.contrastive):
                raise ValueError(
                    f"step.{mixing} {alpha:g} mixes labels, and loss.method {name} needs one label for each "
                    f"image; set step.{mixing} to 0"
                )
        if self.uses_queue and queue.length == 0:
            raise ValueError(
                f"loss.method {name} estimates its classes from the queue; set queue.length above 0, up to the number "
                f"of training images"
            )
        if epoch is not None and epoch >= schedule.epochs:
            raise ValueError(
                f"loss.{name}.{self.reweights_after} {epoch} is never reached in {schedule.epochs} epochs; "
                f"lower it, or set it to null"
            )

    def _without_margins(self) -> str:
        """How else to make the method fit, for the message."""
        return ""

    def _wanted_experts(self) -> str:
        """Which number of experts to choose, for the message."""
        return "3, say"
