"""Top-1 and top-5 accuracy of Many, Medium, Few and All, from integer counts that are summed over ranks.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from paco_ds.data.manifest import SHOTS
from paco_ds.evaluation.groups import GROUPS, percent
from paco_ds.evaluation.mistakes import Mistakes
from paco_ds.evaluation.predictions import Detail

TOP_K = 5


@dataclass
class ClassCounts:
    """Images of each class, and those classified correctly, so far.

    Attributes:
        correct1_C: int64 [C], images whose class has the largest logit.
        correct5_C: int64 [C], images whose class is among the min(5, C) largest logits.
        total_C: int64 [C], images.
    """

    correct1_C: Tensor
    correct5_C: Tensor
    total_C: Tensor

    @classmethod
    def zeros(cls, classes: int, device: torch.device | str = "cpu") -> ClassCounts:
        """All counts 0."""
        return cls.from_tensor(torch.zeros(3, classes, dtype=torch.int64, device=device))

    @classmethod
    def from_tensor(cls, counts_3C: Tensor) -> ClassCounts:
        """Counts from a tensor of `as_tensor`, usually after an all_reduce(SUM)."""
        if counts_3C.dtype != torch.int64 or counts_3C.dim() != 2 or counts_3C.shape[0] != 3:
            raise ValueError(f"counts must be int64 [3, C], got {counts_3C.dtype} {list(counts_3C.shape)}")
        return cls(*counts_3C.unbind())

    def as_tensor(self) -> Tensor:
        """int64 [3, C]: correct1, correct5, total. One tensor, for one all_reduce."""
        return torch.stack((self.correct1_C, self.correct5_C, self.total_C))

    def add(self, logits_BC: Tensor, labels_B: Tensor, valid_B: Tensor) -> None:
        """Count a batch.

        Equal logits are ranked by class index, so that a constant classifier does not count as correct everywhere. An
        image with a NaN logit counts as wrong.

        Args:
            logits_BC: floating [B, C].
            labels_B: int64 [B].
            valid_B: bool [B], False for padding, whose logits and label are ignored.

        Raises:
            ValueError: C differs from the counts', or a label is outside [0, C).
        """
        classes = len(self.total_C)
        if logits_BC.shape[1] != classes:
            raise ValueError(f"logits have {logits_BC.shape[1]} classes, the counts {classes}")
        logits_BC, labels_B = logits_BC[valid_B], labels_B[valid_B]
        outside = (labels_B < 0) | (labels_B >= classes)
        if outside.any():
            label = int(labels_B[outside][0])
            raise ValueError(f"label {label} is outside 0..{classes - 1}; the split belongs to other classes")
        own_B1 = logits_BC.gather(1, labels_B[:, None])
        earlier_BC = torch.arange(classes, device=labels_B.device) < labels_B[:, None]
        ahead_BC = (logits_BC > own_B1) | ((logits_BC == own_B1) & earlier_BC)
        rank_B = ahead_BC.sum(1).masked_fill(logits_BC.isnan().any(1), classes)
        self.correct1_C.index_add_(0, labels_B, (rank_B < 1).long())
        self.correct5_C.index_add_(0, labels_B, (rank_B < min(TOP_K, classes)).long())
        self.total_C.index_add_(0, labels_B, torch.ones_like(labels_B))


@dataclass(frozen=True)
class ShotAccuracy:
    """Accuracies as fractions; None without images.

    Attributes:
        many, medium, few: mean top-1 accuracy of the shot's classes (classes without images are left out).
        all: top-1 accuracy over images.
        top5: the same four figures for the five largest logits, by name.
        per_class: top-1 accuracy of each class, None for a class without images.
        detail: metrics from single predictions, if they were kept.
        mistakes: misclassified images that are worth a look, if predictions were kept.
        images_by_experts: number of images that used 1, 2, ... experts, with routers.
        left_out: images that could not be read, by name; the figures are of the others.
    """

    many: float | None
    medium: float | None
    few: float | None
    all: float | None
    top5: Mapping[str, float | None]
    per_class: Sequence[float | None]
    detail: Detail | None = None
    mistakes: Mistakes | None = None
    images_by_experts: Sequence[int] | None = None
    left_out: Sequence[str] = ()

    @property
    def experts_used(self) -> float | None:
        """Mean number of experts used per image, with routers."""
        if not self.images_by_experts or not sum(self.images_by_experts):
            return None
        return sum(e * images for e, images in enumerate(self.images_by_experts, 1)) / sum(self.images_by_experts)

    def top1(self) -> dict[str, float | None]:
        """The four top-1 figures by name."""
        return {"many": self.many, "medium": self.medium, "few": self.few, "all": self.all}

    def to_json(self) -> dict[str, Any]:
        """The keys many, medium, few, all, top5 and per_class of metrics.json; with routers experts_used and
        images_by_experts too; left_out where images were."""
        figures: dict[str, Any] = {**self.top1(), "top5": dict(self.top5), "per_class": list(self.per_class)}
        if self.left_out:
            figures["left_out"] = list(self.left_out)
        if self.images_by_experts is None:
            return figures
        return {**figures, "experts_used": self.experts_used, "images_by_experts": list(self.images_by_experts)}

    def one_line(self) -> str:
        """The four top-1 figures in percent, and what else there is to say."""
        shots = [f"{name} -" if value is None else f"{name} {100 * value:.1f}" for name, value in self.top1().items()]
        experts = [] if self.experts_used is None else [f"experts {self.experts_used:.2f}"]
        left_out = [f"{len(self.left_out)} unreadable images left out"] if self.left_out else []
        return "  ".join([*shots, *experts, *left_out])

    def table(self, title: str | None = None) -> Table:
        """Many / Medium / Few / All, top-1 and top-5 in percent, as a rich table."""
        table = Table(title=title, title_justify="left", caption=self._routing(), caption_justify="left")
        table.add_column("accuracy, %")
        for group in GROUPS:
            table.add_column(group.capitalize(), justify="right")
        for name, figures in (("top-1", self.top1()), ("top-5", self.top5)):
            table.add_row(name, *(percent(figures[group]) for group in GROUPS))
        return table

    def _routing(self) -> str | None:
        if self.images_by_experts is None or self.experts_used is None:
            return None
        return f"{self.experts_used:.2f} of {len(self.images_by_experts)} experts an image"


def shot_accuracy(counts: ClassCounts, shots_of_classes: Sequence[str]) -> ShotAccuracy:
    """Many, Medium, Few (means over classes) and All (over images) from counts of the whole split.

    Args:
        counts: after the all_reduce over ranks.
        shots_of_classes: the shot of each class, by its training images.

    Raises:
        ValueError: the numbers of classes differ, or a shot has another name than many, medium, few.
    """
    total = counts.total_C.tolist()
    if len(shots_of_classes) != len(total):
        raise ValueError(f"{len(shots_of_classes)} shots given for {len(total)} classes; use one manifest for both")
    if unknown := set(shots_of_classes) - set(SHOTS):
        raise ValueError(f"unknown shot {sorted(unknown)[0]!r}; the shots are {', '.join(SHOTS)}")

    def figures(correct: list[int]) -> tuple[dict[str, float | None], list[float | None]]:
        per_class = [hit / n if n else None for hit, n in zip(correct, total, strict=True)]
        by_group: dict[str, float | None] = {}
        for shot in SHOTS:
            judged = [a for a, of in zip(per_class, shots_of_classes, strict=True) if of == shot and a is not None]
            by_group[shot] = sum(judged) / len(judged) if judged else None
        by_group["all"] = sum(correct) / sum(total) if sum(total) else None
        return by_group, per_class

    top1, per_class = figures(counts.correct1_C.tolist())
    top5, _ = figures(counts.correct5_C.tolist())
    many, medium, few, overall = (top1[group] for group in GROUPS)
    return ShotAccuracy(many, medium, few, overall, top5=top5, per_class=per_class)
