"""What ρ would be of a random update, from the moments of a sketch: its mean, and how far it scatters.

If Δ is turned at random, Δ → UΔ with U uniform among the rotations of the d_out rows, the mean of log ρ is about the
logarithm of ρ_null = ‖V‖² / (√d_out ‖K‖), and its variance about 2‖G₀‖²‖D₀‖² / ((d_out - 1)(d_out + 2)), with
G = K/a - ½K²/b, a and b the means of K's and K²'s eigenvalues, D = ΔΔᵀ/‖Δ‖², and ₀ for less the mean of the diagonal.

Both need powers of the eigenvalues of K = V Vᵀ, which are those of N = VᵀV. The test columns give GᵀNG = PᵀP,
GᵀN²G = PᵀKP and GᵀN³G = (KP)ᵀKP. Traces are estimated as low_rank.py does it: N is Nyström's approximation by all test
columns but one, and what that leaves is measured with the one left out (after Epperly, Tropp and Webber, "XTrace",
arXiv 2301.07825).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .moments import Floats, Moments

__all__ = ["Chance", "chance_of", "chance_spread"]

# The most by which the step from one power of a rest's eigenvalues to the next may grow: more is noise.
_STEEPEST = 4.0
_RIDGE = 1e-5  # of a Gram matrix's norm: the noise of float32 products of unit columns


@dataclass(frozen=True, slots=True)
class Chance:
    """What a random update would give, for a batch of modules.

    Attributes:
        rho_null: (N,): the ρ to expect; NaN where there is none.
        deviation: (N,): the standard deviation of log ρ, good to about a third; NaN where there is none.
    """

    rho_null: Floats
    deviation: Floats

    def z(self, log_rho: Floats) -> Floats:
        """How many standard deviations log ρ lies above what chance gives; NaN where there is no answer."""
        with np.errstate(all="ignore"):
            z = (log_rho - np.log(self.rho_null)) / self.deviation
        return np.where(np.isfinite(z), z, np.nan)


def chance_of(moments: Moments) -> Chance:
    """Estimates what chance gives, for a batch of modules.

    Where V or Δ is 0, a number is not finite, or there are no two columns or test columns, the answers are NaN, and
    nothing is raised.
    """
    if min(moments.columns, moments.tests) < 2:
        return Chance(np.full_like(moments.v_squares, np.nan), np.full_like(moments.v_squares, np.nan))
    unit = moments.unit()
    known = unit.v_squares > 0.0
    rows = unit.d_out.astype(np.float64)
    with np.errstate(all="ignore"):
        second, third, captured = _powers(unit)
        # Of trace 1, K has this norm at least, and 1 at most.
        second = np.clip(second, 1.0 / np.minimum(unit.d_out, unit.d_in), 1.0)
        third, fourth = _higher_powers(unit, second, third, captured)
        a, b = 1.0 / rows, second / rows
        g = second / a**2 - third / (a * b) + 0.25 * fourth / b**2 - rows / 4.0
        entries = unit.gram[:, unit.y, unit.y]
        diagonal = np.einsum("nii->ni", entries)
        pairs = unit.columns * (unit.columns - 1)
        d = (np.einsum("nij,nij->n", entries, entries) - np.einsum("ni,ni->n", diagonal, diagonal)) / pairs
        d = np.clip(d, 1.0 / np.minimum(unit.d_out, unit.d_in), 1.0) - 1.0 / rows
        variance = 2.0 * np.maximum(g, 0.0) * np.maximum(d, 0.0) / ((rows - 1.0) * (rows + 2.0))
        return Chance(
            rho_null=np.where(known, 1.0 / np.sqrt(rows * second), np.nan),
            deviation=np.where(known & (rows > 1.0), np.sqrt(variance), np.nan),
        )


def _powers(unit: Moments) -> tuple[Floats, Floats, Floats]:
    """Estimates tr N² and tr N³, and gives the eigenvalues of Nyström's approximation of N by all test columns.

    With A = GᵀNG and O = GᵀN²G of columns of unit length, the approximation that leaves out column i takes the inverse
    of A without row and column i, which is B - bbᵀ/β for B = A⁻¹, b its column i and β its entry (i, i).
    """
    inner, outer = unit.gram[:, unit.p, unit.p], unit.gram[:, unit.p, unit.kp]
    cubic = np.einsum("nii->ni", unit.gram[:, unit.kp, unit.kp])
    sizes = np.einsum("nii->ni", inner)
    shrink = np.where(sizes > 0.0, 1.0 / np.sqrt(sizes), 0.0)
    inner = inner * shrink[:, :, None] * shrink[:, None, :]
    outer = outer * shrink[:, :, None] * shrink[:, None, :]
    outer = 0.5 * (outer + outer.swapaxes(1, 2))
    ridge = _RIDGE * np.sqrt(np.einsum("nij,nij->n", inner, inner))
    values, vectors = np.linalg.eigh(inner)
    values = np.maximum(values, 0.0) + np.where(ridge > 0.0, ridge, 1.0)[:, None]
    inverse = (vectors / values[:, None, :]) @ vectors.swapaxes(1, 2)
    corner = np.einsum("nii->ni", inverse)
    product = inverse @ outer
    square = product @ product
    # bᵀOb, bᵀOBOb and bᵀOBOBOb, each over β.
    chain = outer @ inverse
    chains = []
    for _ in range(3):
        chains.append(np.einsum("nij,nij->nj", inverse, chain) / corner)
        chain = outer @ (inverse @ chain)
    once, twice, thrice = chains
    first = np.einsum("nii->n", product)[:, None] - once
    second = np.einsum("nii->n", square)[:, None] - 2.0 * twice + once**2
    third = np.einsum("nij,nji->n", square, product)[:, None] - 3.0 * thrice + 3.0 * twice * once - once**3
    # (N - the approximation) times the column left out, and N times that, are N and N² times G·seen, less a share.
    seen = np.eye(unit.tests) - inverse / corner[:, None, :]
    reached = outer @ seen
    within = np.einsum("nij,nij->nj", inverse, reached)
    rest_first = 1.0 / corner - ridge[:, None]
    rest_second = np.einsum("nii->ni", outer) - np.einsum("nij,nij->nj", seen, reached)
    rest_third = cubic * shrink**2 - np.einsum("nij,nij->nj", reached, inverse @ reached) + within**2 / corner
    # The trace of the rest is known, so that what the columns show of it says how much they overstate the rest.
    found = (rest_first * sizes).sum(axis=1)
    expected = np.maximum(unit.tests * unit.v_squares - first.sum(axis=1), 0.0)
    share = np.where(found > 0.0, expected / np.where(found > 0.0, found, 1.0), 0.0)
    half = vectors / np.sqrt(values)[:, None, :]
    return (
        (second.sum(axis=1) + (rest_second * sizes).sum(axis=1) * share) / unit.tests,
        (third.sum(axis=1) + (rest_third * sizes).sum(axis=1) * share) / unit.tests,
        np.linalg.eigvalsh(half.swapaxes(1, 2) @ outer @ half),
    )


def _higher_powers(unit: Moments, second: Floats, third: Floats, captured: Floats) -> tuple[Floats, Floats]:
    """Estimates tr N³ and tr N⁴: what the approximation has of them, and of the rest what its lower powers let expect.

    The rest's powers grow by a factor each; a flat rest has always the same, one with a spread a growing one.
    """
    captured = np.maximum(captured, 0.0)
    trace = np.maximum(unit.v_squares - captured.sum(axis=1), 0.0)
    square = np.maximum(second - np.square(captured).sum(axis=1), 0.0)
    level = np.where(trace > 0.0, square / np.where(trace > 0.0, trace, 1.0), 0.0)
    cube = np.maximum(third - (captured**3).sum(axis=1), square * level)
    next_level = np.where(square > 0.0, cube / np.where(square > 0.0, square, 1.0), 0.0)
    next_level = np.minimum(next_level, _STEEPEST * level)
    cube = square * next_level
    last_level = 1.5 * next_level - 0.5 * level
    return (captured**3).sum(axis=1) + cube, (captured**4).sum(axis=1) + cube * last_level


def chance_spread(traces: tuple[float, float, float, float], d_out: int, fourth: float) -> float | None:
    """The standard deviation of log ρ where Δ is rotated at random.

    Under Δ → UΔ with U uniform over all rotations, log ρ has about the variance 2‖G₀‖²‖D₀‖² / ((m-1)(m+2)), with
    m = d_out, G = K/a - K²/(2b) for a = tr K/m and b = tr K²/m, D = ΔΔᵀ/‖Δ‖², and ₀ for a matrix less its trace part.

    Args:
        traces: tr K, tr K², tr K³ and tr K⁴ of K = V Vᵀ.
        d_out: Rows of V.
        fourth: ‖ΔΔᵀ‖² / ‖Δ‖⁴.

    Returns:
        None where there is nothing to rotate.
    """
    first, second, third, last = traces
    m = float(d_out)
    if d_out < 2 or not (first > 0.0 and second > 0.0):
        return None
    a, b = first / m, second / m
    form = second / a**2 - third / (a * b) + last / (4.0 * b**2) - m / 4.0
    variance = 2.0 * max(form, 0.0) * max(fourth - 1.0 / m, 0.0) / ((m - 1.0) * (m + 2.0))
    return math.sqrt(variance)
