"""Refuses models that are not what their roles say, and merges that nothing was measured for; --force goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import combinations

from ..checkpoint.adapter import Adapter
from ..checkpoint.identical import same_weights
from ..checkpoint.model import FLOATS, Model
from ..errors import RoleError
from ..report.report import ModuleWarning

__all__ = ["incomplete_model", "refuse_or_warn", "same_models"]

# A fine-tuned model may lack the layers of multi-token prediction, or a tower for images; not most of the model.
_LEAST_SHARE = 0.5


def refuse_or_warn(wrong: Iterable[str], *, force: bool) -> tuple[ModuleWarning, ...]:
    """Raises RoleError for what looks wrong; with force, makes warnings of it that report and card carry.

    Args:
        wrong: What was seen, in sentences.
        force: Whether somebody has seen it before and wants to go on.
    """
    wrong = tuple(wrong)
    if wrong and not force:
        raise RoleError(f"{'; '.join(wrong)}; give the right models, or pass --force to go on anyway")
    return tuple(ModuleWarning(None, sentence) for sentence in wrong)


def same_models(models: Mapping[str, Model], *, force: bool) -> tuple[str, ...]:
    """Names roles that were given one and the same model.

    That safe is aligned is no fault: it is what a merge without a safe model does.

    Args:
        models: The models by role.
        force: Whether somebody wants to go on whatever is found: then no weights are read for it.
    """
    return tuple(
        f"{left} and {right} are the same model ({models[left].path}"
        + (")" if models[left].path == models[right].path else f" and {models[right].path})")
        for left, right in combinations(models, 2)
        if {left, right} != {"aligned", "safe"} and same_weights(models[left], models[right], read=not force)
    )


def incomplete_model(models: Mapping[str, Model], unused: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Says if the fine-tuned model is but a part of the aligned one.

    Args:
        models: The models by role.
        unused: By role, the tensors that have no counterpart in the output.
    """
    finetuned = models["finetuned"]
    if isinstance(finetuned, Adapter):
        return ()
    headers = models["aligned"].headers
    total = sum(tensor.parameters for tensor in headers.tensors if tensor.dtype in FLOATS)
    absent = [headers.tensor(name) for name in unused.get("aligned", ())]
    missing = sum(tensor.parameters for tensor in absent if tensor.dtype in FLOATS)
    share = 1.0 - missing / total if total else 1.0
    if share >= _LEAST_SHARE:
        return ()
    return (
        f"finetuned ({finetuned.path}) has only {math.floor(1000.0 * share) / 10.0:g} % of the aligned model's "
        f"parameters; {len(absent)} of its tensors are missing, {absent[0].name} the first",
    )
