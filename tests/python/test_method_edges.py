"""Every method where formulas divide by nothing: zeros, equal tensors, tensors that point the same or opposite ways.

Every model holds multiples of the same random tensors, so that what a method may give is known: another multiple.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_merge import engine_merge
from method_cases import CASES, MethodCase

from safemerge_fast import _engine

Tensors = dict[str, torch.Tensor]

SHAPES = {"matrix": (33, 17), "vector": (129,), "cube": (3, 5, 8), "one": (1,), "large": (157, 301)}
HOLLOW = {"scalar": (), "no rows": (0, 4), "no columns": (3, 0)}

# What each of three models, and the base, multiply the tensors by.
SCENARIOS: dict[str, tuple[tuple[float, float, float], float]] = {
    "zeros": ((0.0, 0.0, 0.0), 0.0),
    "equal": ((1.0, 1.0, 1.0), 1.0),
    "only the first": ((1.0, 0.0, 0.0), 0.0),
    "only the second": ((0.0, 1.0, 0.0), 0.0),
    "only the third": ((0.0, 0.0, 1.0), 0.0),
    "only the base": ((0.0, 0.0, 0.0), 1.0),
    "same way": ((1.0, 2.0, 3.5), 0.1),
    "opposite ways": ((1.0, -1.0, 1.7), 0.1),
    "uneven ways": ((-0.3, 1.3, -2.9), 0.1),
}


def random_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in {**SHAPES, **HOLLOW}.items()}


TENSORS = random_tensors()


def multiples(model: int | None) -> Tensors:
    """The tensors of a model, or of the base, in every scenario."""
    made = {}
    for scenario, (factors, base) in SCENARIOS.items():
        factor = base if model is None else factors[model]
        made.update({f"{scenario}.{name}": tensor * factor for name, tensor in TENSORS.items()})
    return made


class Merge:
    """What a case makes of all scenarios, which are merged together since each merge waits for the disk."""

    def __init__(self, case: MethodCase, directory: Path) -> None:
        self.case = case
        models = [multiples(number) for number in range(case.count)]
        base = multiples(None) if case.has_base else None
        self.merged = engine_merge(
            directory, case.method, models, base, shared=case.shared, each=case.operands()
        )

    def pairs(self, scenario: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, merged tensor and the tensor that was multiplied."""
        return [(name, self.merged[f"{scenario}.{name}"], tensor) for name, tensor in TENSORS.items()]


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def merge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    return Merge(request.param, tmp_path_factory.mktemp("edges"))


def test_the_cases_are_all_the_methods() -> None:
    assert {case.method for case in CASES} == {method.name for method in _engine.methods()}


def test_every_result_is_finite_and_of_the_same_shape(merge: Merge) -> None:
    for scenario in SCENARIOS:
        for name, merged, tensor in merge.pairs(scenario):
            assert merged.shape == tensor.shape, f"{scenario}, {name}"
            assert merged.isfinite().all(), f"{scenario}, {name}"


def test_zeros_merge_to_zeros(merge: Merge) -> None:
    for name, merged, _ in merge.pairs("zeros"):
        assert not merged.any(), name


def test_equal_models_merge_to_themselves(merge: Merge) -> None:
    for name, merged, tensor in merge.pairs("equal"):
        torch.testing.assert_close(merged, tensor, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_results_are_about_as_large_as_the_models(merge: Merge, scenario: str) -> None:
    factors, base = SCENARIOS[scenario]
    # Updates are divided by DELLA's least probability, 0.2, at the most.
    largest = abs(base) + max(abs(factor - base) for factor in factors) / 0.2
    for name, merged, tensor in merge.pairs(scenario):
        if tensor.numel():
            bound = largest * float(tensor.abs().max())
            if merge.case.shared.get("rescale") == "l1":
                # A sum of magnitudes may be that of few elements.
                bound *= tensor.numel()
            assert float(merged.abs().max()) <= bound * 1.001, name


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_results_lie_on_the_line_of_the_models(merge: Merge, scenario: str) -> None:
    if {"density", "select_topk"} & {*merge.case.each, *merge.case.shared} or merge.case.method == "nearswap":
        return  # element by element
    for name, merged, tensor in merge.pairs(scenario):
        if tensor.numel():
            ratio = merged.double() / tensor.double()
            spread = (ratio.max() - ratio.min()) / ratio.abs().max().clamp_min(0.1)
            assert spread < 1e-5, f"{name}: {ratio.min()} to {ratio.max()}"


@pytest.mark.parametrize("method", ["karcher", "nuslerp", "multislerp", "slerp"])
def test_opposite_models_give_a_point_of_their_line(tmp_path: Path, method: str) -> None:
    # Of opposite directions there is no mean. What comes out must lie between them, whatever their sums' rounding.
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"{size}.{number}": -(1.0 + 0.37 * number) for size in (2, 1000, 300_000) for number in range(6)
    }
    tensors = {name: torch.randn(int(name.split(".")[0]), generator=generator) for name in factors}
    opposite = {name: factors[name] * tensor for name, tensor in tensors.items()}
    if method == "slerp":
        merged = engine_merge(tmp_path, method, [opposite], tensors, shared={"t": 0.5})
    else:
        each = None if method == "karcher" else [{"weight": 0.5}, {"weight": 0.5}]
        merged = engine_merge(tmp_path, method, [tensors, opposite], each=each)
    for name, factor in factors.items():
        ratio = merged[name].double() / tensors[name].double()
        assert ratio.max() - ratio.min() < 1e-5, f"{name}: {ratio.min()} to {ratio.max()}"
        assert ratio.abs().max() <= abs(factor)
