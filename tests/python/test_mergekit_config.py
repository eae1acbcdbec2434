"""Configurations in mergekit's format: what a parameter is for a tensor, by gradients, filters and precedence.

What is expected was seen in mergekit 0.1.5, with the same configurations on checkpoints of this shape.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from configurations import assert_close, merged, tensors_of, write_llama
from invoke import run

from safemerge_fast.plan.values import interpolate

Q = "self_attn.q_proj.weight"
UP = "mlp.up_proj.weight"


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "a", seed=1)


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "b", seed=2)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "deep", seed=3, layers=7)


def layer(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


@pytest.mark.parametrize("gradient", [[0.25], [0.0, 1.0], [0.1, 0.9, 0.4], [1, 2, -3, 4, 8, 8, 0]])
def test_gradients_are_piecewise_linear(gradient: list[float]) -> None:
    for t in np.linspace(0, 1, 23):
        expected = (
            np.interp(t, np.linspace(0, 1, len(gradient)), gradient) if len(gradient) > 1 else gradient[0]
        )
        assert interpolate(gradient, float(t)) == pytest.approx(expected, abs=1e-12)


def test_a_gradient_runs_over_the_layers(a: Path, b: Path, tmp_path: Path) -> None:
    found, _ = merged(
        tmp_path,
        merge_method="linear",
        models=[
            {"model": a, "parameters": {"weight": [0.1, 0.9, 0.4]}},
            {"model": b, "parameters": {"weight": 0.3}},
        ],
        parameters={"normalize": False},
    )
    first, second = tensors_of(a), tensors_of(b)
    for index, weight in enumerate([0.1, 0.5, 0.9, 0.65, 0.4]):
        for name in (layer(index, Q), layer(index, "input_layernorm.weight")):
            assert_close(found[name], weight * first[name] + 0.3 * second[name])
    # What is outside the layers is at the beginning, also behind them.
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert_close(found[name], 0.1 * first[name] + 0.3 * second[name])


def test_the_first_filter_that_matches_counts_and_none_falls_outwards(a: Path, tmp_path: Path) -> None:
    found, report = merged(
        tmp_path,
        merge_method="linear",
        models=[
            {
                "model": a,
                "parameters": {
                    "weight": [
                        {"filter": "self_attn", "value": [0, 1]},
                        {"filter": "q_proj", "value": 9},
                        {"filter": "mlp", "value": "25e-2"},
                    ]
                },
            }
        ],
        parameters={"normalize": False, "weight": 0.75},
    )
    original = tensors_of(a)
    for index in range(5):
        assert_close(found[layer(index, Q)], index / 4 * original[layer(index, Q)])
        assert_close(found[layer(index, UP)], 0.25 * original[layer(index, UP)])
        norm = layer(index, "input_layernorm.weight")
        assert_close(found[norm], 0.75 * original[norm])
    assert_close(found["lm_head.weight"], 0.75 * original["lm_head.weight"])
    assert any("weight[1] (filter 'q_proj') decides nothing" in note for note in report.notes)


@pytest.mark.parametrize(
    "weight",
    [
        {"filter": "*", "value": 0.5},
        {"value": 0.5},
        [{"filter": "no such tensor", "value": 3}, {"filter": "*", "value": 0.5}],
        [0.5],
        [0.5, 0.5],
        "5e-1",
    ],
)
def test_ways_to_say_the_same_of_all_tensors(a: Path, tmp_path: Path, weight: object) -> None:
    found, _ = merged(
        tmp_path,
        merge_method="linear",
        models=[{"model": a, "parameters": {"weight": weight}}],
        parameters={"normalize": False},
    )
    for name, tensor in tensors_of(a).items():
        assert_close(found[name], 0.5 * tensor)


def test_precedence_and_slices(a: Path, tmp_path: Path) -> None:
    """Of the source, then of the slice, then of the whole; each with the slice's own layers from 0 to 1."""
    found, report = merged(
        tmp_path,
        merge_method="linear",
        slices=[
            {"sources": [{"model": a, "layer_range": [0, 3], "parameters": {"weight": [0.1, 0.5]}}]},
            {"sources": [{"model": a, "layer_range": [2, 5]}], "parameters": {"weight": [0.6, 0.9]}},
            {"sources": [{"model": a, "layer_range": [1, 2]}]},
        ],
        parameters={"normalize": False, "weight": [0.01, 0.02]},
    )
    original = tensors_of(a)
    weights = [(0, 0.1), (1, 0.3), (2, 0.5), (2, 0.6), (3, 0.75), (4, 0.9), (1, 0.02)]
    for index, (source, weight) in enumerate(weights):
        for name in (Q, UP, "post_attention_layernorm.weight"):
            assert_close(found[layer(index, name)], weight * original[layer(source, name)])
    assert_close(found["model.embed_tokens.weight"], 0.1 * original["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert_close(found[name], 0.01 * original[name])
    assert not any(tensor.startswith("model.layers.7.") for tensor in found)
    assert report.notes == ()


def test_filters_see_the_source_s_own_names(a: Path, deep: Path, tmp_path: Path) -> None:
    """And filters of a parameter that all models share see those of the output."""
    weights = [
        {"filter": "layers.3.", "value": 0.3},
        {"filter": "layers.1.", "value": 0.1},
        {"filter": "layers.0.", "value": 7},
        {"value": 0},
    ]
    sources = [
        {"model": a, "layer_range": [3, 5], "parameters": {"weight": weights}},
        {"model": deep, "layer_range": [1, 3], "parameters": {"weight": weights}},
    ]
    found, _ = merged(
        tmp_path, merge_method="linear", slices=[{"sources": sources}], parameters={"normalize": False}
    )
    mine, theirs = tensors_of(a), tensors_of(deep)
    assert_close(found[layer(0, Q)], 0.3 * mine[layer(3, Q)] + 0.1 * theirs[layer(1, Q)])
    assert not found[layer(1, Q)].any()
    plain = [{name: source[name] for name in ("model", "layer_range")} for source in sources]
    found, _ = merged(
        tmp_path,
        merge_method="nearswap",
        base_model=a,
        slices=[{"sources": plain}],
        # With t = 0 nothing but the base; with a large one nothing of it.
        parameters={"t": [{"filter": "layers.0.", "value": 1e9}, {"value": 0}]},
    )
    assert_close(found[layer(0, Q)], theirs[layer(1, Q)])
    assert_close(found[layer(1, Q)], mine[layer(4, Q)])


def test_a_base_that_is_not_listed_joins_the_models(a: Path, b: Path, tmp_path: Path) -> None:
    mine, theirs = tensors_of(a), tensors_of(b)
    found, _ = merged(
        tmp_path, merge_method="linear", base_model=a, models=[{"model": b}], parameters={"weight": [1, 3]}
    )
    assert_close(found[layer(4, Q)], (mine[layer(4, Q)] + theirs[layer(4, Q)]) / 2)
    for models in ([{"model": b}], [{"model": a}, {"model": b}], [{"model": b}, {"model": a}]):
        found, report = merged(
            tmp_path,
            merge_method="task_arithmetic",
            base_model=a,
            models=models,
            parameters={"weight": [0, 1], "lambda": 0.5},
        )
        expected = mine[layer(1, Q)] + 0.125 * (theirs[layer(1, Q)] - mine[layer(1, Q)])
        assert_close(found[layer(1, Q)], expected)
        operations = {tensor.name: tensor.operation for tensor in report.tensors}
        assert operations[layer(1, Q)] == "task_arithmetic (lambda 0.5): a; 0.25 b"


def test_the_base_of_a_slice(a: Path, b: Path, tmp_path: Path) -> None:
    found, _ = merged(
        tmp_path,
        merge_method="task_arithmetic",
        base_model=b,
        slices=[
            {
                "base_model": a,
                "sources": [{"model": b, "layer_range": [1, 3]}, {"model": a, "layer_range": [0, 2]}],
            },
            {"sources": [{"model": a, "layer_range": [2, 3]}, {"model": b, "layer_range": [4, 5]}]},
        ],
        parameters={"weight": 0.5},
    )
    mine, theirs = tensors_of(a), tensors_of(b)
    assert_close(found[layer(1, Q)], (mine[layer(1, Q)] + theirs[layer(2, Q)]) / 2)
    assert_close(found[layer(2, Q)], (mine[layer(2, Q)] + theirs[layer(4, Q)]) / 2)
    assert f"model.layers.3.{Q}" not in found


def test_passthrough_stacks_layers(a: Path, deep: Path, tmp_path: Path) -> None:
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": [0.2, 0.4]}, {"value": 1}]
    found, report = merged(
        tmp_path,
        merge_method="passthrough",
        slices=[
            {"sources": [{"model": a, "layer_range": [0, 3]}]},
            {"sources": [{"model": deep, "layer_range": [3, 7], "parameters": {"scale": scale}}]},
        ],
    )
    mine, theirs = tensors_of(a), tensors_of(deep)
    assert sum(name.endswith(Q) for name in found) == 7
    assert (found["model.embed_tokens.weight"] == mine["model.embed_tokens.weight"]).all()
    assert (found["lm_head.weight"] == theirs["lm_head.weight"]).all()
    assert (found["model.norm.weight"] == theirs["model.norm.weight"]).all()
    for index in range(3):
        assert (found[layer(index, UP)] == mine[layer(index, UP)]).all()
    for index, factor in enumerate(np.linspace(0.2, 0.4, 4)):
        assert (found[layer(3 + index, Q)] == theirs[layer(3 + index, Q)]).all()
        assert not found[layer(3 + index, "self_attn.o_proj.weight")].any()
        down = layer(3 + index, "mlp.down_proj.weight")
        assert_close(found[down], factor * theirs[down])
    assert report.merged == 8
    assert report.unused["a"][0] == "model.layers.3.self_attn.q_proj.weight"


def test_layers_of_models_with_other_prefixes(a: Path, tmp_path: Path) -> None:
    """A checkpoint of the model without its head calls the same tensors by shorter names."""
    from conftest import write_checkpoint
    from safetensors.torch import load_file

    tensors = load_file(a / "model.safetensors")
    bare = write_checkpoint(
        tmp_path / "bare",
        {name.removeprefix("model."): 3 * tensor for name, tensor in tensors.items()},
        {"num_hidden_layers": 5, "tie_word_embeddings": False},
    )
    found, _ = merged(
        tmp_path,
        merge_method="linear",
        slices=[
            {
                "sources": [
                    {"model": a, "layer_range": [0, 2], "parameters": {"weight": 1}},
                    {"model": bare, "layer_range": [3, 5], "parameters": {"weight": 1}},
                ]
            },
            {"sources": [{"model": bare, "layer_range": [0, 1], "parameters": {"weight": 1}}]},
        ],
    )
    mine = tensors_of(a)
    assert_close(found[layer(1, Q)], (mine[layer(1, Q)] + 3 * mine[layer(4, Q)]) / 2)
    assert_close(found[layer(2, Q)], 3 * mine[layer(0, Q)])
    assert_close(found["model.norm.weight"], 3 * mine["model.norm.weight"])


def test_the_command(a: Path, b: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text(
        f"merge_method: linear\nmodels:\n- model: {a}\n- model: {b}\nparameters: {{weight: 1}}\n"
    )
    result = run("run", config, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("mergekit: 48 of 48 tensors changed, the others copied, in ")
    assert run("run", config, "-o", tmp_path / "out").exit_code == 5
    assert run("run", config, "-o", tmp_path / "out", "--overwrite", "-q").output == ""
    assert run("verify", tmp_path / "out").exit_code == 0
