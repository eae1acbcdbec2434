"""Configurations in mergekit's format as jobs: what the plan shares, what the report says, what tells jobs apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from configurations import HIDDEN, merged, read, tensors_of, write_llama
from lora import load_checkpoint

from safemerge_fast import CheckpointError, PlanError, run
from safemerge_fast.progress import ProgressEvent
from safemerge_fast.recipes import recipes
from safemerge_fast.recipes.run import carry_out, read_recipe, read_report

Q, UP = "self_attn.q_proj.weight", "mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    return {
        "a": write_llama(path / "a", seed=1, dtype=torch.bfloat16),
        "b": write_llama(path / "b", seed=2, dtype=torch.float16),
    }


def listed(models: dict[str, Path], weight: Any, **document: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": models["a"], "parameters": {"weight": weight}}, {"model": models["b"]}],
        "parameters": {"weight": 0.5, "normalize": False},
        **document,
    }


def source(model: Path, start: int, end: int) -> dict[str, Any]:
    return {"model": model, "layer_range": [start, end]}


@pytest.mark.parametrize(
    ("weight", "operations"),
    [
        (0.25, 1),
        # A filter for one kind of module, of which there are five.
        ([{"filter": "mlp", "value": 0.5}, {"value": 0.25}], 2),
        # Five layers of other weights; what is outside the layers is at the beginning.
        ([0, 1], 5),
        ([{"filter": "q_proj", "value": [0, 1]}, {"value": 0.125}], 6),
    ],
)
def test_tensors_with_the_same_values_share_an_operation(
    models: dict[str, Path], tmp_path: Path, weight: Any, operations: int
) -> None:
    _, report = merged(tmp_path, **listed(models, weight))
    plan = json.loads((Path(report.output) / "safemerge_plan.json").read_text())
    assert len(plan["operations"]) == operations
    assert len({tensor.operation for tensor in report.tensors}) == operations
    # Nothing is written of a tensor that its operation and the first model say.
    assert {len(tensor) for shard in plan["shards"] for tensor in shard["tensors"]} == {2}


def test_a_slice_has_the_dtype_of_its_own_first_model(models: dict[str, Path], tmp_path: Path) -> None:
    """Also where the host has a tensor of the same name, or comes first in the sum."""
    a, b = models["a"], models["b"]
    found, report = merged(
        tmp_path,
        merge_method="task_arithmetic",
        base_model=a,
        slices=[
            {"sources": [source(a, 0, 2), source(b, 0, 2)]},
            {"base_model": b, "sources": [source(a, 2, 5), source(b, 2, 5)]},
        ],
        parameters={"weight": 0.25},
    )
    dtypes = {name: tensor.dtype for name, tensor in load_checkpoint(Path(report.output)).items()}
    mine, theirs = tensors_of(a), tensors_of(b)
    for layer in range(5):
        name = f"model.layers.{layer}.{Q}"
        base, other = (mine, theirs) if layer < 2 else (theirs, mine)
        dtype = torch.bfloat16 if layer < 2 else torch.float16
        assert dtypes[name] == dtype
        expected = (base[name] + 0.25 * (other[name] - base[name])).to(dtype).double()
        spacing = 2.0 * torch.finfo(dtype).eps * expected.abs().clamp_min(1e-3)
        assert bool(((found[name] - expected).abs() <= spacing).all())


def test_the_report_says_why_tensors_are_copied(tmp_path: Path) -> None:
    bias = f"model.layers.0.{Q}".replace("weight", "bias")
    more = {"ids": torch.arange(4), "none": torch.zeros(0, 3)}
    a = write_llama(tmp_path / "a", seed=1, layers=1, more={**more, bias: torch.ones(HIDDEN)})
    b = write_llama(tmp_path / "b", seed=2, layers=1, more=more)
    document = {
        "merge_method": "slerp",
        "base_model": a,
        "models": [{"model": b}],
        "parameters": {"t": 0.5},
    }
    _, report = merged(tmp_path, **document)
    reasons = {tensor.name: (tensor.merged, tensor.copied, tensor.reason) for tensor in report.tensors}
    assert reasons.pop(bias) == (False, True, "copied: missing in b")
    assert reasons.pop("ids") == (False, True, "copied: I64 cannot be merged")
    assert reasons.pop("none") == (False, True, "copied: empty")
    assert set(reasons.values()) == {(True, False, "merged")}
    _, report = merged(tmp_path, merge_method="passthrough", models=[{"model": b}])
    assert {tensor.reason for tensor in report.tensors if tensor.name not in more} == {"copied unchanged"}
    assert (report.merged, report.changed) == (0, 0)


def test_the_report_in_the_output_is_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    _, report = merged(tmp_path, **listed(models, [0, 1]))
    assert read_report(Path(report.output)) == report


def test_what_tells_jobs_apart(models: dict[str, Path], tmp_path: Path) -> None:
    def identity(**document: Any) -> str:
        return recipes()["mergekit"].open(read(tmp_path / "config.yml", **document)).identity()

    first = identity(**listed(models, 0.25))
    assert identity(**listed(models, 0.25)) == first
    assert identity(**listed(models, 0.26)) != first
    assert identity(**listed(models, 0.25, dtype="float32")) != first
    # What the file is called decides nothing.
    settings = read(tmp_path / "config.yml", **listed(models, 0.25))
    job = recipes()["mergekit"].open(msgspec.structs.replace(settings, source="elsewhere.yml"))
    assert job.identity() == first


def test_another_configuration_takes_nothing_of_unfinished_work(
    models: dict[str, Path], tmp_path: Path
) -> None:
    def interrupt(event: ProgressEvent) -> None:
        if event.stage == "merge" and 2 * event.done >= event.total:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    first = listed(models, 1, max_shard_size="2KB")
    with pytest.raises(KeyboardInterrupt):
        carry_out(msgspec.structs.replace(read(tmp_path / "c.yml", out, **first), progress=interrupt))
    second = listed(models, 2, max_shard_size="2KB")
    carry_out(msgspec.structs.replace(read(tmp_path / "c.yml", out, **second), resume=True))
    expected, _ = merged(tmp_path, **second)
    found = tensors_of(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_given_for_the_run_wins(tmp_path: Path) -> None:
    broken = write_llama(tmp_path / "broken", seed=1, layers=1, more={"x.bias": torch.full((2,), torch.nan)})
    config = tmp_path / "config.yml"
    document = {"merge_method": "passthrough", "models": [{"model": str(broken), "parameters": {"scale": 2}}]}
    for named, given, passes in [(True, None, True), (True, False, False), (False, True, True)]:
        config.write_text(json.dumps({**document, "allow_nonfinite": named}))
        assert read_recipe(config, {"output": "o", "allow_nonfinite": given}).allow_nonfinite is passes
        if passes:
            run(config, output=tmp_path / "out", overwrite=True, allow_nonfinite=given)
            continue
        with pytest.raises(CheckpointError, match=r"x\.bias"):
            run(config, output=tmp_path / "out", overwrite=True, allow_nonfinite=given)


def test_numbers_of_layers_that_no_model_has(tmp_path: Path) -> None:
    """They are read from files of any origin, and must cost nothing."""
    digits = "9" * 5000
    more = {f"model.layers.{digits}.weight": torch.ones(1)}
    a = write_llama(
        tmp_path / "a",
        seed=1,
        layers=2,
        more=more,
        edit_config=lambda config: config.update(num_hidden_layers=10**30),
    )
    found, _ = merged(tmp_path, merge_method="passthrough", models=[{"model": a}])
    assert found.keys() > more.keys()
    with pytest.raises(PlanError, match=r"the layers of a .* cannot be told"):
        merged(tmp_path, merge_method="passthrough", slices=[{"sources": [source(a, 0, 2)]}])
