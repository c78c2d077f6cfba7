"""The second stage of RIDE (Wang et al. 2021): after each expert, a router chooses the images of the next expert.

With u_e the feature of expert e, of unit length, and z the mean logits of experts 1 to e::

    r_e = w . [ the largest of z, in order ; relu(A_e u_e + a_e) ] + b

where A_e, a_e belong to one router and w, b to all, as published. Expert e + 1 runs on an image where
sigmoid(r_e) > threshold; the answer is the mean logits of the experts that ran. The loss is in
:mod:`paco_ds.losses.routing`.

Shapes: E experts, B images, F feature dimension, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paco_ds.config.model import RoutersSettings
from paco_ds.models.experts import Experts
from paco_ds.models.heads import PerExpert


class Routers(nn.Module):
    """One router after each expert but the last.

    Args:
        experts: 2 at least.
    """

    def __init__(self, experts: int, feature_dim: int, classes: int, settings: RoutersSettings) -> None:
        super().__init__()
        self.top_logits, self.threshold = min(settings.top_logits, classes), settings.threshold
        self.hidden = nn.ModuleList(nn.Linear(feature_dim, settings.hidden) for _ in range(experts - 1))
        self.decide = nn.Linear(self.top_logits + settings.hidden, 1)

    def forward(self, features_EBF: Tensor, logits_EBC: Tensor) -> Tensor:
        """r [E - 1, B], float32, of images on which all experts ran, as in training."""
        total_EBC = logits_EBC.cumsum(0)
        said = [self.after(e, features_EBF[e], total_EBC[e] / (e + 1)) for e in range(len(self.hidden))]
        return torch.stack(said)

    def after(self, e: int, feature_BF: Tensor, mean_logits_BC: Tensor) -> Tensor:
        """r_e [B], float32, after expert `e`, from 0: its feature, and the mean logits up to it."""
        hidden_BH = F.relu(self.hidden[e](F.normalize(feature_BF.float(), dim=1)))
        top_BK = mean_logits_BC.topk(self.top_logits, dim=1).values
        decided: Tensor = self.decide(torch.cat([top_BK, hidden_BH.float()], 1))[:, 0].float()
        return decided

    def go_on(self, e: int, feature_BF: Tensor, mean_logits_BC: Tensor) -> Tensor:
        """bool [B]: which images the next expert sees."""
        return self.after(e, feature_BF, mean_logits_BC).sigmoid() > self.threshold


def ask_in_turn(experts: Experts, centers: PerExpert, routers: Routers, images: Tensor) -> tuple[Tensor, Tensor]:
    """Run on each image the experts that the routers choose, and no others.

    An expert without images runs on an empty batch: every rank runs the same layers, which ZeRO-3 gathers together.

    Args:
        images: normalised, [B, 3, H, W].

    Returns:
        mean logits [B, C], float32, of the experts that ran on each image, and their number, int64 [B].
    """
    common = experts.shared(images)
    asking = torch.arange(len(images), device=images.device)  # the images that the expert at hand sees
    used_B = torch.zeros_like(asking)
    for e, head in enumerate(centers):
        feature_AF = experts.feature(e, common[asking] if e else common)
        logits_AC = head(feature_AF).float()
        if e == 0:
            total_BC = torch.zeros_like(logits_AC)
        total_BC[asking] += logits_AC
        used_B[asking] += 1
        if e + 1 < len(centers):
            asking = asking[routers.go_on(e, feature_AF, total_BC[asking] / (e + 1))]
    return total_BC / used_B[:, None], used_B
