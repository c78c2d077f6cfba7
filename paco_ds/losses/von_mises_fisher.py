"""The normaliser of von Mises-Fisher distributions on the unit sphere, and its gradient.

Up to a constant, minus the log of the normaliser in D dimensions is, with I_v the modified Bessel function::

    g(k) = log I_v(k) - v log k,    v = D / 2 - 1            d g / d k = I_{v+1}(k) / I_v(k)

I_v itself over- and underflows at the sizes met here, and ready-made implementations (scipy's `ive`) underflow for
large v and small k. Its uniform expansion for large orders (Debye; DLMF 10.41.3) is accurate to 1e-10 from order
`ORDER` on, for every k; lower orders follow by the recurrence I_{n-1} = I_{n+1} + 2 n / k I_n, which is stable in
this direction. All in float64: g is a difference of numbers of the size of k.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ORDER = 40
_LEAST = 1e-12  # in place of 0, where g is already its limit

# U_1 to U_5 of DLMF 10.41.10, polynomials in p = (1 + (k / v)^2)^(-1/2): {power: coefficient}
_DEBYE = (
    {1: 3 / 24, 3: -5 / 24},
    {2: 81 / 1152, 4: -462 / 1152, 6: 385 / 1152},
    {3: 30375 / 414720, 5: -369603 / 414720, 7: 765765 / 414720, 9: -425425 / 414720},
    {
        4: 4465125 / 39813120,
        6: -94121676 / 39813120,
        8: 349922430 / 39813120,
        10: -446185740 / 39813120,
        12: 185910725 / 39813120,
    },
    {
        5: 1519035525 / 6688604160,
        7: -49286948607 / 6688604160,
        9: 284499769554 / 6688604160,
        11: -614135872350 / 6688604160,
        13: 566098157625 / 6688604160,
        15: -188699385875 / 6688604160,
    },
)


def log_normaliser(concentration: Tensor, dim: int) -> Tensor:
    """g(k) in float64 for k >= 0 of any shape, differentiable once.

    Raises:
        ValueError: fewer than 2 dimensions, which have no sphere.
    """
    if dim < 2:
        raise ValueError(f"a sphere needs at least 2 dimensions, got {dim}")
    value: Tensor = _LogNormaliser.apply(concentration.double(), dim / 2 - 1)
    return value


class _LogNormaliser(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, concentration: Tensor, order: float) -> Tensor:
        k = concentration.clamp_min(_LEAST)
        steps = max(0, int(ORDER - order) + 1)
        top = order + steps
        log_bessel = _log_bessel_debye(top, k)
        ratio = (_log_bessel_debye(top + 1, k) - log_bessel).exp()
        for step in range(steps):  # ratio is I_{n+1} / I_n at n = top - step
            ratio = 1 / (2 * (top - step) / k + ratio)
            log_bessel = log_bessel - ratio.log()
        ctx.save_for_backward(ratio)
        return log_bessel - order * k.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return grad * ratio, None


def _log_bessel_debye(order: float, k: Tensor) -> Tensor:
    """log I_order(k) for a large order."""
    z = k / order
    root = (1 + z * z).sqrt()
    p = 1 / root
    # root + log(z / (1 + root)), written so that it keeps small z
    exponent = order * (root + z.log() - torch.log1p(root))
    series = torch.ones_like(p)
    for i, polynomial in enumerate(_DEBYE, start=1):
        term = torch.zeros_like(p)
        for power, coefficient in polynomial.items():
            term = term + coefficient * p**power
        series = series + term / order**i
    return exponent - 0.5 * torch.log(2 * torch.pi * order * root) + series.log()
