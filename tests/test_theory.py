"""The paper's closed forms against its own figures and a brute-force minimum."""

import numpy as np
import pytest

from paco_ds import theory


def test_center_probability_of_balanced_imagenet_is_071():
    """Section 3.4: 1000 balanced classes, queue 8192, alpha .05."""
    assert theory.paco_optimum(8192 / 1000, 0.05)[1] == pytest.approx(0.71, abs=0.005)
    exact = theory.expected_positives(1 / 1000, queue_length=8192, micro_batch=32)
    assert theory.paco_optimum(exact, 0.05)[1] == pytest.approx(0.71, abs=0.005)


def test_expected_positives_counts_queue_queries_and_keys():
    """Eq. (9), for arrays too."""
    np.testing.assert_allclose(theory.expected_positives(np.array([0.5, 0.01]), 100, 8), [57.5, 1.15])


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_optimum_spends_all_probability(alpha):
    """K p+ + p_c = 1 (Remark 2), and K p+ = 1 (Remark 1)."""
    p_positive, p_center = theory.paco_optimum(12.0, alpha)
    assert 12 * p_positive + p_center == pytest.approx(1)
    assert p_positive == pytest.approx(alpha * p_center)
    assert 12 * theory.supcon_optimum(12.0) == pytest.approx(1)


@pytest.mark.parametrize("p_sum", [1.0, 0.6])
def test_minima_are_minima(p_sum):
    """No random way to spend p_sum beats Eq. (12) and Eq. (17), and the stated optimum attains them."""
    p = p_sum * np.random.default_rng(0).dirichlet(np.ones(6), size=2000)
    positives, alpha = 5, 0.3

    def paco_loss(p):
        return -np.log(p[..., 0]) - alpha * np.log(p[..., 1:]).sum(-1)

    p_positive, p_center = theory.paco_optimum(positives, alpha)
    best = p_sum * np.array([p_center] + [p_positive] * positives)
    assert paco_loss(best) == pytest.approx(theory.paco_minimum(positives, alpha, p_sum))
    assert paco_loss(p).min() > theory.paco_minimum(positives, alpha, p_sum)
    assert -np.log(np.full(6, p_sum / 6)).sum() == pytest.approx(theory.supcon_minimum(6, p_sum))
    assert -np.log(p).sum(1).min() > theory.supcon_minimum(6, p_sum)


def test_own_center_is_pulled_up_to_its_optimum_only():
    """Eq. (19): the own center's gradient changes sign at 1 / (1 + alpha K*), others are pushed away."""
    optimum = theory.paco_optimum(8.192, 0.05)[1]
    assert theory.center_gradient_scale(optimum, 0.05, 8.192, own=True) == pytest.approx(0)
    assert theory.center_gradient_scale(optimum - 0.01, 0.05, 8.192, own=True) < 0
    assert theory.center_gradient_scale(0.01, 0.05, 8.192, own=False) > 0
