"""Estimates ρ from the moments of a sketch, and says how far off that may be at a stated probability of failure.

ρ = a / √(b c) with a = tr ΔᵀKΔ, b = tr ΔᵀK²Δ and c = ‖Δ‖², exact. For standard normal columns the diagonals of YᵀX and
XᵀX have the means a and b, and the off-diagonal entries have the mean 0. Of three quadratic forms in the same columns
the traces are known exactly, so that what their diagonals miss them by is known, too: ‖y‖², and the two of Nyström's
approximation K_N = E Eᵀ of K, ‖Eᵀy‖² and ‖E Eᵀy‖². Least squares on the off-diagonal entries says how much of that the
two share, and what is left of the entries is their scatter.

The half width is calibrated, not proved: docs/estimator.md says on what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .moments import Floats, Moments
from .quantiles import chi_square_low, student_high

__all__ = ["FEWEST_COLUMNS", "Estimate", "Form", "Scatter", "estimate_rho", "scatter"]

FEWEST_COLUMNS = 32
"""With fewer the half width is not honest."""

_GRAM_NOISE = (
    1e-5  # of the largest eigenvalue: what of a Gram matrix of float32 products of unit columns is noise
)
_SAME_FORM = 1e-8  # of its size: what is left of a control that others explain
_FARTHEST = 0.7  # relative error of a or b from which on its logarithm is not taken to be nearly linear
_ROUNDING = 2e-5  # of float32 products, relative to ρ
_CANCELLATION = 1e-6  # the same, for each time that a norm is smaller than it could be


@dataclass(frozen=True, slots=True)
class Form:
    """The k × k images ΩᵀMΩ of a batch of symmetric M, in the two parts that are used.

    Attributes:
        entries: (N, k, k): the off-diagonal entries; 0 on the diagonal.
        mean: (N,): the mean of the diagonal, less tr M where that is known.
    """

    entries: Floats
    mean: Floats

    @classmethod
    def of(cls, image: Floats, trace: Floats | float = 0.0) -> Form:
        """Splits an image, of which it makes a copy."""
        entries = 0.5 * (image + image.swapaxes(1, 2))
        diagonal = np.einsum("nii->ni", entries)
        mean = diagonal.mean(axis=1) - trace
        diagonal[...] = 0.0
        return cls(entries, mean)

    def plus(self, weight: Floats, other: Form) -> Form:
        """Adds so much of another form."""
        return Form(self.entries + weight[:, None, None] * other.entries, self.mean + weight * other.mean)

    def dot(self, other: Form) -> Floats:
        """The inner products of the off-diagonal entries."""
        products: Floats = np.einsum("nij,nij->n", self.entries, other.entries)
        return products


@dataclass(frozen=True, slots=True)
class Scatter:
    """What is known of the M of a form: how much it scatters, and how much of that one direction may hold.

    Attributes:
        size: (N,): estimates ‖M‖.
        peak: (N,): a cautious estimate of the largest |eigenvalue| of M, as large as the columns showed it.
        columns: k.
    """

    size: Floats
    peak: Floats
    columns: int

    def deviation(self, failure: float) -> Floats:
        """How far the mean of the diagonal may lie from tr M to one side.

        Normal columns deceive in one way above all: all happen to be small along the direction that matters, and then
        that direction was seen to be small, by the same factor. The first term allows for it; the second is Student's,
        with the degrees of freedom of the off-diagonal entries, and of the peak it has half.

        Args:
            failure: The probability that is allowed for it to be farther off.
        """
        k = self.columns
        low = k / chi_square_low(k, failure) - 1.0
        high = student_high(k * k / 2.0, failure) * math.sqrt(2.0 / k)
        rest = np.sqrt(np.maximum(np.square(self.size) - 0.5 * np.square(self.peak), 0.0))
        return np.hypot(self.peak * low, rest * high)


def scatter(entries: Floats, fitted: int = 0) -> Scatter:
    """Estimates ‖M‖ and M's largest |eigenvalue| from the off-diagonal entries of its form.

    Products of the entries along closed walks over different columns have the means tr M² and tr M⁴, whose roots bound
    the largest eigenvalue. tr M⁴ is given one standard deviation of its noise where M is flat. If M has one eigenvalue
    λ, the entries are λ wᵢwⱼ, and for a w of a given length and any direction, the mean of a product of m different wᵢ²
    is smaller than the m-th power of their mean, by Π k/(k + 2i), i < m. The roots are made up for that.

    Args:
        entries: Form.entries of ΩᵀMΩ.
        fitted: How many controls were taken out of it.
    """
    s = entries
    k = s.shape[1]
    pairs = k * (k - 1) / 2.0
    squares = s * s
    second = np.einsum("nij->n", squares) / (2.0 * pairs)
    power = s @ s
    returns = np.einsum("nii->ni", power)
    # All closed walks of four steps, less those that come back to a column.
    walks = np.einsum("nij,nij->n", power, power)
    walks += np.einsum("nij,nij->n", squares, squares) - 2.0 * np.einsum("ni,ni->n", returns, returns)
    fourth = walks / (2.0 * pairs * (k - 2) * (k - 3))
    uneven = [math.prod(1.0 + 2.0 * i / k for i in range(m)) for m in (2, 4)]
    peak = np.minimum(
        np.sqrt(uneven[0] * second),
        np.sqrt(np.sqrt(uneven[1] * (np.maximum(fourth, 0.0) + 3.0 * np.square(second / k)))),
    )
    # The entries that the controls' coefficients have used up; and the mean of 1/χ² instead of that of χ².
    loss = math.sqrt(pairs / (pairs - fitted) * pairs / (pairs - 3.0))
    return Scatter(loss * np.sqrt(second), loss * peak, k)


@dataclass(frozen=True, slots=True)
class Estimate:
    """ρ of a batch of modules, estimated.

    Attributes:
        log_rho: (N,): log ρ; NaN where there is no estimate.
        ratio: Scatter of what log ρ was computed from.
        a: Scatter of a, relative to it.
        b: Scatter of b, relative to it.
        rounding: (N,): what float32 products may add to log ρ.
    """

    log_rho: Floats
    ratio: Scatter
    a: Scatter
    b: Scatter
    rounding: Floats

    def half_width(self, failure: float) -> Floats:
        """How far log ρ may lie from the estimate to either side; infinite where there is no interval.

        log ρ is linear in a and b but for the remainders of the logarithms, of which that of a moves it down only and
        that of b up only. So on one side the whole has half of the failures, and the remainder's a or b a quarter in
        each direction.

        Args:
            failure: The probability that is allowed for one side.
        """
        with np.errstate(all="ignore"):
            whole = self.ratio.deviation(failure / 2.0)
            a, b = self.a.deviation(failure / 4.0), self.b.deviation(failure / 4.0)
            remainder = np.maximum(_curvature(a), 0.5 * _curvature(b))
            width = whole + remainder + self.rounding
            known = np.isfinite(self.log_rho) & (a < _FARTHEST) & (b < _FARTHEST) & np.isfinite(width)
        return np.where(known, width, np.inf)


def _curvature(x: Floats) -> Floats:
    """The most that log(1 + y) lies below y, for |y| up to x."""
    return -np.log1p(-x) - x


def estimate_rho(moments: Moments) -> Estimate:
    """Estimates ρ of a batch of modules.

    Where V or Δ is 0, a number is not finite, or there are fewer columns than FEWEST_COLUMNS, there is no interval, and
    nothing is raised.
    """
    unit = moments.unit()
    gram = unit.gram
    with np.errstate(all="ignore"):
        targets = [Form.of(gram[:, unit.y, unit.x]), Form.of(gram[:, unit.x, unit.x])]
        controls = [Form.of(gram[:, unit.y, unit.y], unit.delta_squares)]
        if unit.tests:
            controls += _nystrom(unit)
        rest_a, rest_b = _without(targets, controls)
        a, b = rest_a.mean, rest_b.mean
        positive = (a > 0.0) & (b > 0.0)
        per_a, per_b = np.where(positive, 1.0 / a, 0.0), np.where(positive, 1.0 / b, 0.0)
        relative_a = per_a[:, None, None] * rest_a.entries
        relative_b = per_b[:, None, None] * rest_b.entries
        enough = positive & (unit.columns >= FEWEST_COLUMNS)
        # ‖V‖‖Y‖/‖VᵀY‖ and ‖V‖‖VᵀY‖/‖VVᵀY‖: how much smaller the products are than their factors allow.
        y, z, x = (
            np.sqrt(np.maximum(form.mean, 0.0)) for form in (Form.of(gram[:, unit.y, unit.y]), *targets)
        )
        log_rho: Floats = np.where(enough, np.log(a) - 0.5 * np.log(b), np.nan)
        return Estimate(
            log_rho=log_rho,
            ratio=scatter(relative_a - 0.5 * relative_b, len(controls)),
            a=scatter(relative_a, len(controls)),
            b=scatter(relative_b, len(controls)),
            rounding=_ROUNDING + _CANCELLATION * (y / z + z / x),
        )


def _nystrom(unit: Moments) -> list[Form]:
    """The controls that come of K_N = E Eᵀ, the approximation of K by its test columns: E Eᵀ = KP·(PᵀKP)⁺·(KP)ᵀ."""
    gram = unit.gram
    lengths = np.sqrt(np.einsum("nii->ni", gram[:, unit.p, unit.p]))
    shrink = np.where(lengths > 0.0, 1.0 / lengths, 0.0)
    inner = gram[:, unit.p, unit.kp] * shrink[:, :, None] * shrink[:, None, :]
    values, vectors = np.linalg.eigh(0.5 * (inner + inner.swapaxes(1, 2)))
    kept = values > _GRAM_NOISE * np.maximum(values[:, -1:], np.finfo(np.float64).tiny)
    e_of_kp = (
        shrink[:, :, None]
        * vectors
        * np.where(kept, 1.0 / np.sqrt(np.where(kept, values, 1.0)), 0.0)[:, None, :]
    )
    from_kp = e_of_kp.swapaxes(1, 2)
    samples = from_kp @ gram[:, unit.kp, unit.y]  # EᵀY
    outer = from_kp @ gram[:, unit.kp, unit.kp] @ e_of_kp  # EᵀE
    image = from_kp @ unit.image @ e_of_kp  # EᵀΔ ΔᵀE
    turned = samples.swapaxes(1, 2)
    return [
        Form.of(turned @ samples, np.einsum("nii->n", image)),
        Form.of(turned @ (outer @ samples), np.einsum("nij,nij->n", outer, image)),
    ]


def _without(targets: Sequence[Form], controls: Sequence[Form]) -> list[Form]:
    """Takes out of the targets what least squares on the off-diagonal entries finds of the controls in them.

    The controls are made orthogonal one after the other, each twice: normal equations would square their condition, and
    two of them are nearly the same where one direction holds most of K.
    """
    basis: list[Form] = []
    for control in controls:
        whole = np.sqrt(control.dot(control))
        rest = control
        for _ in range(2):
            for other in basis:
                rest = rest.plus(-rest.dot(other), other)
        size = np.sqrt(rest.dot(rest))
        shrink = np.where(size > _SAME_FORM * whole, 1.0 / np.where(size > 0.0, size, 1.0), 0.0)
        basis.append(Form(shrink[:, None, None] * rest.entries, shrink * rest.mean))
    remaining = []
    for target in targets:
        rest = target
        for other in basis:
            rest = rest.plus(-rest.dot(other), other)
        remaining.append(rest)
    return remaining
