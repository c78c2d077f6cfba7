"""Post-hoc logit adjustment: the equation, of one model and of experts, and what it refuses."""

import pytest
import torch
from torch import nn

from paco_ds.errors import DataError
from paco_ds.evaluation.logit_adjustment import LogitAdjusted
from paco_ds.models.output import ModelOutput


class Fixed(nn.Module):
    """Logits that do not depend on the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return ModelOutput(None, self.logits)


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)], ids=["one", "experts"])
@pytest.mark.parametrize("tau", [0.0, 0.7, 2.0])
def test_each_logit_loses_tau_times_its_log_prior(shape, tau):
    """Menon et al., Eq. (9), on the mean of the experts; `choose_tau` is given the same."""
    logits, counts = torch.randn(shape), [60, 30, 10]
    adjusted = LogitAdjusted(Fixed(logits), counts, tau)
    mean = logits if logits.ndim == 2 else logits.mean(0)
    expected = mean - tau * torch.tensor([0.6, 0.3, 0.1]).log()
    torch.testing.assert_close(adjusted(torch.zeros(4, 3, 2, 2)).mean_logits(), expected)
    (only,) = adjusted.logits_of_taus([tau])(torch.zeros(4, 3, 2, 2))
    torch.testing.assert_close(only, expected)


def test_a_class_without_training_images_has_no_prior():
    """One line, naming the option."""
    with pytest.raises(DataError, match="--logit-adjust needs training images of every class"):
        LogitAdjusted(Fixed(torch.zeros(1, 2)), [3, 0], 1.0)
