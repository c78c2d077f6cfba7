"""Mixed images and losses are a function of seed, step and micro-batch."""

import pytest
import torch

from paco_ds.losses.base import LossOutput
from paco_ds.training.mixup import CutMix, Mix, Mixup


def test_a_draw_depends_on_seed_step_and_micro_batch_alone():
    """Asked again it is the same, and every part of the key changes it."""
    first = Mixup(0.4, seed=3).draw(5, 1, 8)
    again = Mixup(0.4, seed=3).draw(5, 1, 8)
    assert first.share == again.share
    assert torch.equal(first.partners, again.partners)
    others = [Mixup(0.4, seed=4).draw(5, 1, 8), Mixup(0.4, 3).draw(6, 1, 8), Mixup(0.4, 3).draw(5, 2, 8)]
    assert all(other.share != first.share for other in others)


def test_shares_are_those_of_the_beta_distribution_and_partners_a_permutation():
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)) over 2000 draws."""
    mixes = [Mixup(0.4, seed=0).draw(step, 0, 8) for step in range(2000)]
    shares = torch.tensor([m.share for m in mixes])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * 1.8), rel=0.05)
    assert all(torch.equal(m.partners.sort().values, torch.arange(8)) for m in mixes)


def test_images_are_mixed_in_float_and_losses_with_the_same_share():
    """lambda x + (1 - lambda) x', and the same of losses and parts; an own center there is none."""
    mix = Mix(0.75, torch.tensor([1, 0]))
    images = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    mixed = mix.images(images)
    assert mixed.dtype == torch.float32
    assert mixed[:, 0, 0, 0].tolist() == [50.0, 150.0]
    own, other = (
        LossOutput(torch.tensor(v), torch.ones(2), torch.ones(2), None, None, {"a": torch.tensor(v)})
        for v in (1.0, 5.0)
    )
    output = mix.outputs(own, other)
    assert float(output.loss) == float(output.parts["a"]) == 2.0
    assert output.center_probability_B is None


def test_cutmix_puts_a_rectangle_of_the_partner_in_place_and_counts_its_pixels():
    """Over 300 draws: pixels are the image's or the partner's, lambda is the share that stays, clipped at the edges."""
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 20, 20)
    shares = []
    for step in range(300):
        mix = CutMix(1.0, seed=0, side=20).draw(step, 0, 4)
        mixed = mix.images(images)
        assert mixed.dtype == torch.uint8
        for own, partner, image in zip(range(4), mix.partners.tolist(), mixed, strict=True):
            assert set(image.unique().tolist()) <= {own, partner}
            if own != partner:
                assert (image == own).float().mean().item() == pytest.approx(mix.share, abs=1e-6)
        shares.append(mix.share)
    assert min(shares) < 0.2 < 0.9 < max(shares)


def test_cutmix_is_a_function_of_seed_step_and_micro_batch():
    """As mixup."""
    first, again = (CutMix(1.0, 3, 20).draw(5, 1, 8) for _ in range(2))
    assert (first.share, first.cut) == (again.share, again.cut)
    assert CutMix(1.0, 3, 20).draw(5, 2, 8).cut != first.cut
