"""Predicts how much of V = W_aligned - W_base is rounding of the two checkpoints to their dtypes. No torch.

A task vector of 0.3 % of the weights is of the size of bfloat16's rounding: its direction, and with it ρ, is
then mostly noise. The prediction needs nothing but dtypes and norms.
"""

from __future__ import annotations

import math

from .score import Score

__all__ = ["ROUNDING_WARNING", "relative_rounding", "rounding_warning", "v_rounding"]

ROUNDING_WARNING = 0.25
"""Predicted relative error of V from which on a module is warned about."""

# Bits of the significand with the hidden one. F64 counts as F32, because the analysis reads everything as
# float32.
_SIGNIFICAND_BITS = {"BF16": 8, "F16": 11, "F32": 24, "F64": 24}

# The same of quantised formats, by the first word of their names. INT4's error is even, not relative; in the norm of a
# block it is about that of three bits.
_SIGNIFICAND_BITS |= {"FP8": 4, "MXFP8": 4, "INT4": 3, "MXFP4": 2, "NVFP4": 2}


def relative_rounding(dtype: str) -> float:
    """Relative error, in the Frobenius norm, of rounding a matrix to nearest in a dtype.

    Within a binade [1, 2) the error is uniform in half a unit in the last place, 2^-(p-1), so its root mean
    square is 2^-(p-1)/√12. Magnitudes spread evenly over the logarithm have the mean square ∫ x² dx/(x ln 2)
    = 3/(2 ln 2) there, and the quotient is the same in every binade. Subnormal values, which F16 can have,
    are rounded more coarsely.

    Args:
        dtype: "BF16", "F16", "F32" or "F64"; or the first word of a quantised format's name, such as "FP8".

    Returns:
        The error, e.g. 0.0015 for BF16.
    """
    unit: float = 2.0 ** (1 - _SIGNIFICAND_BITS[dtype])
    return unit / math.sqrt(12.0) / math.sqrt(1.5 / math.log(2.0))


def v_rounding(base_dtype: str, aligned_dtype: str, weight_norm: float, v_norm: float) -> float:
    """Predicts ‖error of V‖/‖V‖, taking ‖W_base‖ to be ‖W_aligned‖ and the two roundings to be independent.

    Args:
        base_dtype: Dtype of W_base in its file.
        aligned_dtype: Dtype of W_aligned in its file.
        weight_norm: ‖W_aligned‖.
        v_norm: ‖V‖.

    Returns:
        The predicted relative error; NaN if V is zero.
    """
    if v_norm == 0.0:
        return math.nan
    error = math.hypot(relative_rounding(base_dtype), relative_rounding(aligned_dtype))
    return error * weight_norm / v_norm


def rounding_warning(name: str, score: Score) -> str | None:
    """Says in one sentence that a module's V is near the resolution of its dtype, or returns None.

    Args:
        name: The module's tensor name.
        score: Its score.

    Returns:
        The warning, or None if the predicted error is below ROUNDING_WARNING or the score is undefined.
    """
    if score.undefined is not None or not score.v_rounding >= ROUNDING_WARNING:
        return None
    return (
        f"{name}: ‖V‖ is only {score.v_norm / score.weight_norm:.2%} of ‖W‖, so rounding of the checkpoints "
        f"to their dtypes alone makes a relative error of about {score.v_rounding:.0%} in V "
        f"and ρ is unreliable"
    )
