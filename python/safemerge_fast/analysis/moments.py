"""What a sketch keeps of a batch of modules: Gram matrices of products with random columns, and exact norms.

With V and Δ of one module, both (d_out, d_in), K = V Vᵀ, and independent standard normal columns Ω (d_in, k) and
G (d_in, p):

    Y = ΔΩ    X = KY    P = VG    KP = K·P    R = Δᵀ(KP)

Everything that is estimated (interval.py, chance.py) comes from FᵀF of F = [Y, P, X, KP] and from RᵀR. These are
small, so that modules are worked on many at a time: the leading axis of every array is the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Moments"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """The sketches of a batch of N modules, all with as many columns.

    R and KPᵀY must be of one KP, to the last bit of it, and summed in float64: of a steep V the columns of KP are
    nearly parallel, and what they differ by is what the controls know exactly. The other products
    may round as float32 does.

    V and Δ of a module may have been multiplied by any factors, if all its numbers are of the same products: what is
    estimated does not depend on the scale of V, of Δ or of W. A module whose numbers are not finite gets no interval.

    Attributes:
        columns: k, how many columns Ω has.
        tests: p, how many G has; may be 0.
        gram: (N, 2(k+p), 2(k+p)): FᵀF with F = [Y, P, X, KP] in this order; symmetric.
        image: (N, p, p): RᵀR.
        v_squares: (N,): ‖V‖², exact.
        delta_squares: (N,): ‖Δ‖², exact.
        inner: (N,): ⟨V, Δ⟩, exact.
        weight_squares: (N,): ‖W_aligned‖², exact.
        d_out: (N,): rows of V.
        d_in: (N,): columns of V.
    """

    columns: int
    tests: int
    gram: Floats
    image: Floats
    v_squares: Floats
    delta_squares: Floats
    inner: Floats
    weight_squares: Floats
    d_out: NDArray[np.int64]
    d_in: NDArray[np.int64]

    @property
    def y(self) -> slice:
        """Where Y stands in the gram."""
        return slice(0, self.columns)

    @property
    def p(self) -> slice:
        """Where P stands in the gram."""
        return slice(self.columns, self.columns + self.tests)

    @property
    def x(self) -> slice:
        """Where X = KY stands in the gram."""
        return slice(self.columns + self.tests, 2 * self.columns + self.tests)

    @property
    def kp(self) -> slice:
        """Where KP stands in the gram."""
        return slice(2 * self.columns + self.tests, 2 * (self.columns + self.tests))

    def unit(self) -> Moments:
        """The moments of V / ‖V‖ and Δ / ‖Δ‖, whose powers neither over- nor underflow.

        Where a norm is 0 or any number is not finite, all are 0, as of a module without V and Δ.
        """
        with np.errstate(all="ignore"):
            v, delta = np.sqrt(self.v_squares), np.sqrt(self.delta_squares)
            sizes = np.stack([delta, v, v * v * delta, v * v * v], axis=1)  # of Y, P, X and KP
            shrink = 1.0 / sizes
            each = np.repeat(shrink, [self.columns, self.tests, self.columns, self.tests], axis=1)
            gram = self.gram * each[:, :, None]
            gram *= each[:, None, :]
            image = self.image * np.square(shrink[:, 0] * shrink[:, 3])[:, None, None]
            inner = self.inner * shrink[:, 0] * shrink[:, 1]
            weight_squares = self.weight_squares * np.square(shrink[:, 1])
        known = np.isfinite(sizes).all(axis=1) & (sizes > 0.0).all(axis=1)
        # The sums are finite only if all of them are, and no entry is above 1 by much.
        with np.errstate(all="ignore"):
            known &= np.isfinite(gram.sum(axis=(1, 2)) + image.sum(axis=(1, 2)))
        if not known.all():
            gram[~known] = image[~known] = 0.0
        return replace(
            self,
            gram=gram,
            image=image,
            v_squares=np.where(known, 1.0, 0.0),
            delta_squares=np.where(known, 1.0, 0.0),
            inner=np.where(known, inner, 0.0),
            weight_squares=np.where(known, weight_squares, 0.0),
        )
