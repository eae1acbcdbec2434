"""Every method where formulas divide by nothing: zeros, equal tensors, tensors that point the same or opposite ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_merge import engine_merge
from method_cases import CASES, MethodCase

from safemerge_fast import _engine

SHAPES = {"matrix": (33, 17), "vector": (129,), "cube": (3, 5, 8), "one": (1,), "large": (257, 301)}
by_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def merge(
    directory: Path, case: MethodCase, models: list[dict[str, torch.Tensor]], base: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return engine_merge(
        directory,
        case.method,
        models[: case.count],
        base if case.has_base else None,
        shared=case.shared,
        each=case.operands(),
    )


def scaled(tensors: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    return {name: tensor * factor for name, tensor in tensors.items()}


def test_the_cases_are_all_the_methods() -> None:
    assert {case.method for case in CASES} == {method["name"] for method in _engine.methods()}


@by_case
def test_zeros_merge_to_zeros(tmp_path: Path, case: MethodCase) -> None:
    zeros = scaled(random_tensors(0), 0.0)
    for name, tensor in merge(tmp_path, case, [zeros] * 3, zeros).items():
        assert not tensor.any(), name


@by_case
def test_equal_models_merge_to_themselves(tmp_path: Path, case: MethodCase) -> None:
    tensors = random_tensors(1)
    for name, tensor in merge(tmp_path, case, [tensors] * 3, tensors).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-6, atol=1e-7, msg=name)


@by_case
def test_the_only_model_that_is_not_zero_gives_a_finite_merge(tmp_path: Path, case: MethodCase) -> None:
    tensors = random_tensors(2)
    zeros = scaled(tensors, 0.0)
    for place in range(case.count):
        models = [tensors if number == place else zeros for number in range(3)]
        for name, tensor in merge(tmp_path, case, models, zeros).items():
            assert tensor.isfinite().all(), name
            # DELLA divides by 0.2, the least probability, at the most.
            assert tensor.abs().max() <= 5.001 * tensors[name].abs().max(), name


@by_case
@pytest.mark.parametrize("factors", [(1.0, 2.0, 3.5), (1.0, -1.0, 1.7), (-0.3, 1.3, -2.9)])
def test_collinear_models_stay_on_their_line(
    tmp_path: Path, case: MethodCase, factors: tuple[float, ...]
) -> None:
    tensors = random_tensors(3)
    # The base lies on the same line.
    merged = merge(tmp_path, case, [scaled(tensors, factor) for factor in factors], scaled(tensors, 0.1))
    for name, tensor in merged.items():
        ratio = tensor.double() / tensors[name].double()
        assert ratio.isfinite().all(), name
        # No mean, and no sum of rescaled task vectors, is much longer than the longest of them.
        assert ratio.abs().max() < 3 * 3.5 / 0.2, name
        if not {"density", "select_topk"} & {*case.each, *case.shared} and case.method != "nearswap":
            spread = (ratio.max() - ratio.min()) / ratio.abs().max().clamp_min(0.1)
            assert spread < 1e-5, f"{name}: {ratio.min()} to {ratio.max()}"


@pytest.mark.parametrize("method", ["karcher", "nuslerp", "multislerp", "slerp"])
@pytest.mark.parametrize("size", [2, 1000, 300_000])
def test_opposite_models_give_a_point_of_their_line(tmp_path: Path, method: str, size: int) -> None:
    # Of opposite directions there is no mean. What comes out must lie between them, whatever their sums' rounding.
    for seed in range(6):
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        opposite = -(1.0 + 0.37 * seed) * tensor
        each = [{"weight": 0.5}, {"weight": 0.5}] if method in ("nuslerp", "multislerp") else None
        if method == "slerp":
            merged = engine_merge(tmp_path, method, [{"x": opposite}], {"x": tensor}, shared={"t": 0.5})["x"]
        else:
            merged = engine_merge(tmp_path, method, [{"x": tensor}, {"x": opposite}], each=each)["x"]
        ratio = merged.double() / tensor.double()
        assert ratio.max() - ratio.min() < 1e-5, f"seed {seed}: {ratio.min()} to {ratio.max()}"
        assert ratio.abs().max() <= 1.0 + 0.37 * seed


@by_case
def test_tensors_without_elements_are_merged(tmp_path: Path, case: MethodCase) -> None:
    empty = {"a": torch.zeros(0, 4), "b": torch.zeros(3, 0), "c": torch.tensor(1.5)}
    merged = merge(tmp_path, case, [empty] * 3, empty)
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in empty.items()}
    assert merged["c"].item() == pytest.approx(1.5)
