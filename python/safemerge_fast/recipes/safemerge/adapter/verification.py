"""Makes a merged adapter again from its report and the adapters it came from, and compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ....checkpoint.adapter import ADAPTER_WEIGHTS
from ....checkpoint.adapter_config import ADAPTER_CONFIG
from ....decision import Decision
from ....documents import parse_json, read_json
from ....errors import PlanError, VerificationError
from ....report.report import Report
from ..job import SafemergeJob
from ..settings import SafemergeSettings
from .contents import AdapterContents
from .experts import StackedWeight

__all__ = ["verify_adapter"]

# Singular vectors depend on the linear algebra library in their last digits, which can move a rounding, and in
# sign. Their products do not, up to this relative error, by what factors are stored in.
_TRUNCATION_TOLERANCES = {"torch.float32": 1e-5, "torch.float16": 1e-3, "torch.bfloat16": 5e-3}


def verify_adapter(directory: Path, report: Report) -> int:
    """Makes the adapter again, as the report says it was decided, and compares it with what is on disk.

    All bytes must be equal, but for modules that were truncated: their products must agree up to rounding.

    Args:
        directory: The output.
        report: Its report. The models must still be where they were; base is not needed.

    Returns:
        The bytes that were compared.

    Raises:
        VerificationError: Something differs, or the file cannot be read.
        PlanError: A model is not the one that was merged.
        CheckpointError: A model cannot be read.
    """
    job = _open_job(report)
    decisions = {tensor.name: Decision(tensor.merged, tensor.reason) for tensor in report.tensors}
    decisions |= {
        module.name: Decision(module.merged, module.reason)
        for tensor in report.tensors
        if tensor.modules is not None
        for module in tensor.module_reports()
    }
    # Tensors that the report does not name are the aligned model's own.
    for row in job.pairing.rows:
        decisions.setdefault(row.name, Decision(False, row.reason))
    contents = job.decided(decisions)
    assert isinstance(contents, AdapterContents)
    made, expected = contents.make()
    path = directory / ADAPTER_WEIGHTS
    # Written by this program, so that no limit but its own size applies.
    found = path.read_bytes()
    if found != expected:
        layout, compares = contents.layout, job.settings.compat is None
        products = [(weight.a, weight.b, None) for weight in layout.weights if weight.row.name in made.errors]
        stacks = [
            (weight.a, weight.b, weight) for weight in layout.stacked if weight.parameter in made.errors
        ]
        _compare(path, found, made.tensors, [*products, *stacks] if compares else [])
    _compare_settings(directory, contents.configuration(made.rank))
    return len(found)


def _open_job(report: Report) -> SafemergeJob:
    """Opens the models that were merged, by the paths they had then, and checks that they are the same."""
    settings = report.configuration
    if not isinstance(settings, SafemergeSettings):
        raise PlanError(f"an adapter is not what the recipe {report.recipe} makes; merge again")
    paths = {role: str(source["path"]) for role, source in report.inputs.items() if role != "base"}
    # The decisions are known, so that base plays no part: the aligned model stands in for it.
    job = SafemergeJob(
        msgspec.structs.replace(
            settings,
            base=paths["aligned"],
            aligned=paths["aligned"],
            finetuned=paths["finetuned"],
            safe=paths.get("safe"),
            scores=None,
            select="threshold",
            force=True,
        )
    )
    for role in paths:
        recorded: Mapping[str, Any] = report.inputs[role]["files"]
        model = job.models[role]
        for file, facts in model.headers.identity().items():
            known = recorded.get(file)
            # A copy of a model is the same model, so that its time may differ.
            if known is None or (known["size"], known["header_digest"]) != (facts.size, facts.header_digest):
                raise PlanError(
                    f"{role}: {file} of {model.path} is not the one that was merged: size or header differ"
                )
    return job


def _compare_settings(directory: Path, expected: bytes) -> None:
    """Raises VerificationError if adapter_config.json is another one: it scales the update."""
    path = directory / ADAPTER_CONFIG
    found = read_json(path, VerificationError)
    for name, value in parse_json(expected, VerificationError, subject=str(path)).items():
        if not isinstance(found, dict) or found.get(name) != value:
            raise VerificationError(f"{path} should set {name} to {value!r}; merge again with --overwrite")


def _compare(
    path: Path,
    found: bytes,
    expected: Mapping[str, Any],
    products: Sequence[tuple[str, str, StackedWeight | None]],
) -> None:
    """Raises VerificationError if tensors differ, other than truncated factors whose products agree."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from .expert_tensors import unstacked
    from .tensors import relative_error

    try:
        tensors = load(found)
    except SafetensorError as error:
        raise VerificationError(
            f"{path} is not a safetensors file: {error}; merge again with --overwrite"
        ) from error
    if missing := sorted(expected.keys() ^ tensors.keys()):
        raise VerificationError(
            f"{path} and its report disagree on {missing[0]}; merge again with --overwrite"
        )
    approximate = {key for a, b, _ in products for key in (a, b)}
    for key, tensor in expected.items():
        same = tensors[key].shape == tensor.shape and tensors[key].dtype == tensor.dtype
        if not same or (key not in approximate and not torch.equal(tensors[key], tensor)):
            raise VerificationError(
                f"tensor {key} of {path} differs from what the report says; merge again with --overwrite"
            )
    for a, b, stack in products:
        pairs = [(tensors[a], tensors[b]), (expected[a], expected[b])]
        factors = [[pair] if stack is None else [*unstacked(stack, *pair)] for pair in pairs]
        difference = max(relative_error(one, other) for one, other in zip(*factors, strict=True))
        if not difference <= _TRUNCATION_TOLERANCES[str(expected[a].dtype)]:
            raise VerificationError(
                f"the product of {b} and its lora_A in {path} differs from what the report says; "
                f"merge again with --overwrite"
            )
    if not products:
        raise VerificationError(
            f"the header of {path} differs from what was written; merge again with --overwrite"
        )
