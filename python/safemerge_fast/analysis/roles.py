"""Whether the models are what their roles say, from the scores alone: no further byte is read.

With right roles the update of fine-tuning has nothing to do with that of alignment, and both are small beside the
weights. What is told apart, over all modules together:

- V = 0 or Δ = 0 in every module: two roles hold the same weights.
- ⟨V, Δ⟩ ≤ -0.7 ‖V‖² and cos(V, Δ) ≤ -0.2: the fine-tuned model lies at base, not at aligned. If the two are swapped,
  Δ is the right one minus this V, and ⟨V, Δ⟩ = -‖V‖². A fine-tune that takes back half of the alignment does not reach
  that, nor does rounding: the error of the aligned weights is in V and in -Δ, which makes up to -0.5 ‖V‖² where V is
  nothing else.
- ‖Δ‖ ≥ ‖W_aligned‖, or ‖V‖: another model. Independent weights of one size are √2 ‖W‖ apart; the largest known updates
  of fine-tuning and of alignment are about 0.3 ‖W‖. An adapter's update says nothing of that kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .score import Score

__all__ = ["MOST_COSINE", "MOST_OVERLAP", "OTHER_MODEL", "RoleFindings", "judge_roles"]

MOST_OVERLAP = -0.7
"""⟨V, Δ⟩ / ‖V‖² from which on down base and aligned may be swapped."""

MOST_COSINE = -0.2
"""cos(V, Δ) that must be there as well: a far larger update overlaps with V by chance."""

OTHER_MODEL = 1.0
"""Share of ‖W_aligned‖ from which on an update is the difference to another model."""


@dataclass(frozen=True, slots=True)
class RoleFindings:
    """What the scores say of the roles.

    Attributes:
        wrong: What looks wrong, in sentences.
        unknown: What could not be looked at, in sentences.
    """

    wrong: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of all modules whose values are finite; Δ against aligned.

    Attributes:
        v: ‖V‖².
        weight: ‖W_aligned‖².
        delta: ‖Δ‖².
        inner: ⟨V, Δ⟩; None where a score does not say it.
    """

    v: float
    weight: float
    delta: float
    inner: float | None


def judge_roles(scores: Mapping[str, Score], *, delta_reference: str, adapter: bool) -> RoleFindings:
    """Judges the roles by all scores of an analysis.

    Args:
        scores: Scores by tensor name.
        delta_reference: What Δ was taken against, "aligned" or "base".
        adapter: Whether the fine-tuned model is an adapter, whose update is added to whatever plays aligned.
    """
    known = [score for score in scores.values() if not score.nonfinite and math.isfinite(score.v_norm)]
    if not known:
        return RoleFindings()
    modules = f"all {len(known)} modules" if len(known) > 1 else "the one module"
    if all(score.v_norm == 0.0 for score in known):
        return RoleFindings(
            (
                f"base and aligned hold the same weights in {modules} (V = 0); "
                f"base is the model before alignment",
            )
        )
    if all(score.delta_norm == 0.0 for score in known):
        return RoleFindings((f"finetuned and {delta_reference} hold the same weights in {modules} (Δ = 0)",))
    sums = _sums(known, delta_reference)
    wrong = _other_models(sums, adapter)
    unknown: tuple[str, ...] = ()
    if wrong:
        # Whatever cos(V, Δ) is then, it says nothing of two roles that are swapped.
        return RoleFindings(wrong)
    if sums.inner is None:
        unknown = (
            "the scores are of an earlier version and do not hold cos(V, Δ), so that base and aligned could be "
            "swapped without a word; analyze writes newer ones",
        )
    elif swapped := _swapped(sums.inner, sums):
        wrong = (swapped,)
    return RoleFindings(wrong, unknown)


def _sums(scores: list[Score], delta_reference: str) -> _Sums:
    v = sum(score.v_norm**2 for score in scores)
    weight = sum(score.weight_norm**2 for score in scores)
    delta = sum(score.delta_norm**2 for score in scores)
    inner: float | None = 0.0
    for score in scores:
        size = score.v_norm * score.delta_norm
        if size == 0.0 or inner is None:
            continue
        inner = None if score.cos_v_delta is None else inner + score.cos_v_delta * size
    if delta_reference == "base" and inner is not None:
        # Δ against base is V more.
        delta = max(delta - 2.0 * inner + v, 0.0)
        inner -= v
    return _Sums(v, weight, delta, inner)


def _other_models(sums: _Sums, adapter: bool) -> tuple[str, ...]:
    limit = OTHER_MODEL**2 * sums.weight
    far = {
        "base": math.sqrt(sums.v / sums.weight) if sums.v >= limit > 0.0 else None,
        "finetuned": math.sqrt(sums.delta / sums.weight)
        if sums.delta >= limit > 0.0 and not adapter
        else None,
    }
    named = [(role, share) for role, share in far.items() if share is not None]
    if not named:
        return ()
    parts = " and ".join(f"‖W_{role} − W_aligned‖ is {share:.2f} times ‖W_aligned‖" for role, share in named)
    what = "aligned is" if len(named) == 2 else f"{named[0][0]} is"
    return (
        f"{what} another model ({parts}; versions of one model stay below 0.3, independent ones give 1.41)",
    )


def _swapped(inner: float, sums: _Sums) -> str | None:
    size = math.sqrt(sums.v * sums.delta)
    if inner > MOST_OVERLAP * sums.v or inner > MOST_COSINE * size or size == 0.0:
        return None
    cosine = max(-1.0, inner / size)
    return (
        f"cos(V, Δ) is {cosine:.2f}, where the right roles give about 0: base and aligned look swapped, or finetuned "
        f"was made from base and not from aligned"
    )
