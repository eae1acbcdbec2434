"""What a sketch keeps of a batch of modules: Gram matrices of products with random columns, and exact norms.

With V and Δ of one module, both (d_out, d_in), K = V Vᵀ, and independent standard normal columns Ω (d_in, k) and G (d_in, p):

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

    Of each module V and Δ may have been multiplied by any powers, if every number of the module is of the same ones: nothing
    that is estimated depends on the scale of V, of Δ or of W. A module whose numbers are not finite gets no interval.

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
        """The moments of V / ‖V‖ and Δ / ‖Δ‖, so that no power of an entry over- or underflows.

        Where either norm is 0 or anything is not finite, the module's gram and image are NaN: what follows has then to look
        at one thing only.
        """
        with np.errstate(all="ignore"):
            v = np.sqrt(self.v_squares)
            delta = np.sqrt(self.delta_squares)
            # The norms of the factors by which Y, P, X and KP are larger than those of V and Δ of norm 1.
            sizes = np.stack([delta, v, v * v * delta, v * v * v], axis=1)
            known = np.isfinite(sizes).all(axis=1) & (sizes > 0.0).all(axis=1)
            shrink = np.where(known[:, None], 1.0 / sizes, np.nan)
            widths = [self.columns, self.tests, self.columns, self.tests]
            each = np.repeat(shrink, widths, axis=1)
            gram = self.gram * each[:, :, None] * each[:, None, :]
            image = self.image * (shrink[:, 3] * shrink[:, 0])[:, None, None] ** 2
            known &= np.isfinite(gram).all(axis=(1, 2)) & np.isfinite(image).all(axis=(1, 2))
            gram[~known] = np.nan
            image[~known] = np.nan
            return replace(
                self,
                gram=gram,
                image=image,
                v_squares=np.where(known, 1.0, np.nan),
                delta_squares=np.where(known, 1.0, np.nan),
                inner=np.where(known, self.inner * shrink[:, 0] * shrink[:, 1], np.nan),
                weight_squares=np.where(known, self.weight_squares * shrink[:, 1] ** 2, np.nan),
            )
