"""What shapes, biases and any role's configuration say of a matrix: heads, tables, routers, how it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from dense import rho
from lora import load_checkpoint, write_lora
from test_pairing import model, models, rows

from safemerge_fast import analyze, wise_ft
from safemerge_fast.checkpoint.adapter import open_source
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.errors import PairingError
from safemerge_fast.pairing.rows import pair

L = "model.layers.0"
GPT2 = {
    "h.0.attn.c_attn.weight": (8, 24),
    "h.0.attn.c_attn.bias": (24,),
    "h.0.attn.c_proj.weight": (8, 8),
    "h.0.attn.c_proj.bias": (8,),
    "h.0.mlp.c_proj.weight": (32, 8),
    "h.0.mlp.c_proj.bias": (8,),
}
SQUARE = {"h.0.attn.c_proj.weight": (8, 8)}


def kinds(shapes: Mapping[str, Any], config: dict[str, Any]) -> dict[str, str]:
    return {name: row.reason for name, row in rows({"finetuned": model("finetuned", shapes, config)}).items()}


def test_heads_and_tables_are_known_by_the_rows_of_the_vocabulary() -> None:
    shapes = {
        "transformer.w.weight": (99, 16),
        "head.weight": (99, 16),
        "cls.weight": (99, 16),
        "tower.decoder.weight": (50, 16),
        "pooler.dense.weight": (16, 16),
        "proj_in.weight": (16, 99),
        f"{L}.mlp.up_proj.weight": (99, 16),
    }
    config = {"vocab_size": 99, "decoder": {"vocab_size": 50}, "hidden_size": 16}
    assert kinds(shapes, config) == {
        "transformer.w.weight": "embedding",
        "head.weight": "head",
        "cls.weight": "head",
        "tower.decoder.weight": "head",
        "pooler.dense.weight": "projection",
        "proj_in.weight": "projection",
        f"{L}.mlp.up_proj.weight": "projection",
    }


def test_a_vocabulary_that_grew_is_that_of_the_embedding() -> None:
    shapes = {"model.embed_tokens.weight": (103, 16), "logits.weight": (103, 16)}
    assert kinds(shapes, {"vocab_size": 99})["logits.weight"] == "head"


def test_a_size_of_hidden_states_says_nothing_of_a_vocabulary() -> None:
    shapes = {"projector.linear_1.weight": (64, 32)}
    assert kinds(shapes, {"vocab_size": 64, "hidden_size": 64}) == {"projector.linear_1.weight": "projection"}
    assert kinds(shapes, {"vocab_size": 64, "hidden_size": 32}) == {"projector.linear_1.weight": "head"}


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.relative_attention_bias.weight",
        f"{L}.attn.rel_pos_emb.weight",
        "embeddings.token_type_embeddings_3.weight",
        "embeddings.HashBucketCodepointEmbedder_2.weight",
        "encoder.embed_positions.pe_k.weight",
        "embeddings.xpath_sub_embeddings.4.weight",
        "text_model.segment_emb.weight",
    ],
)
def test_tables_by_their_names(name: str) -> None:
    assert kinds({name: (32, 8)}, {}) == {name: "embedding"}


def test_what_has_a_bias_is_no_table() -> None:
    shapes = {f"{L}.relative_pos_embeddings.weight": (32, 8), f"{L}.relative_pos_embeddings.bias": (32,)}
    assert kinds(shapes, {})[f"{L}.relative_pos_embeddings.weight"] == "projection"


def test_routers_by_the_number_of_experts() -> None:
    gate = f"{L}.block.gate.weight"
    assert kinds({gate: (4, 16)}, {"num_local_experts": 4})[gate] == "router"
    assert kinds({gate: (16, 16)}, {"num_local_experts": 4})[gate] == "projection"
    assert kinds({gate: (16, 16)}, {})[gate] == "projection"
    experts = {f"{L}.moe.experts.{number}.up.weight": (8, 16) for number in range(3)}
    found = kinds({f"{L}.moe.pick.weight": (3, 16), f"{L}.moe.shared.weight": (8, 16), **experts}, {})
    assert (found[f"{L}.moe.pick.weight"], found[f"{L}.moe.shared.weight"]) == ("router", "projection")
    stacked = kinds({f"{L}.moe.gate.weight": (6, 16), f"{L}.moe.experts.up_proj": (4, 16, 8)}, {})
    assert stacked[f"{L}.moe.gate.weight"] == "router"


def test_matrices_that_are_no_linear_modules_weight() -> None:
    shapes = {
        f"{L}.self_attn.in_proj_weight": (48, 16),
        f"{L}.conv.in_proj.weight": (48, 16),
        f"{L}.conv.out_proj.weight": (16, 16),
        f"{L}.conv.conv.weight": (16, 1, 3),
        "transformer.layer.0.rel_attn.q": (16, 4, 4),
    }
    assert list(kinds(shapes, {}).values()) == [*["projection"] * 3, "convolution", "projection"]


def orientations(found: Mapping[str, Any]) -> list[bool]:
    return [row.transposed for name, row in found.items() if name.endswith("weight")]


def test_a_bias_says_how_a_matrix_is_stored_and_its_siblings_follow() -> None:
    assert orientations(rows(models(GPT2))) == [True, True, True]
    linear = {**GPT2, "h.0.attn.c_attn.weight": (24, 8), "h.0.mlp.c_proj.weight": (8, 32)}
    assert orientations(rows(models(linear, {"model_type": "gpt2"}))) == [False, False, False]


def test_hidden_states_say_how_a_matrix_without_a_bias_is_stored() -> None:
    found = rows(models({"h.0.attn.c_attn.weight": (8, 24)}, {"hidden_size": 8}))
    assert orientations(found) == [True]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2"},
        {"model_type": "encoder-decoder", "decoder": {"model_type": "gpt2"}},
        {"model_type": "x", "a": {"b": {"model_type": "openai-gpt"}}},
    ],
)
def test_the_family_may_be_any_roles_or_nested(config: dict[str, Any]) -> None:
    for role in ("base", "aligned", "finetuned"):
        opened = {
            each: model(each, SQUARE, config if each == role else {})
            for each in ("base", "aligned", "finetuned")
        }
        pairing = pair(opened)
        assert (pairing.rows[0].transposed, pairing.notes) == (True, ())


def test_an_orientation_that_nothing_says_is_noted() -> None:
    pairing = pair(models(SQUARE))
    assert not pairing.rows[0].transposed
    (note,) = pairing.notes
    assert note.startswith("1 matrices, such as h.0.attn.c_proj.weight, may be stored as (in, out)")
    assert pair(models(SQUARE, {"model_type": "llama"})).notes == ()


def test_rho_of_a_gpt2_whose_fine_tune_has_no_config(tmp_path: Path) -> None:
    """Against float64, with the matrix turned by hand."""
    generator = torch.Generator().manual_seed(5)
    paths = {}
    for role in ("base", "aligned", "finetuned"):
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in SQUARE.items()}
        config = {"model_type": "gpt2"} if role == "aligned" else None
        paths[role] = write_checkpoint(tmp_path / role, tensors, config)
    scores = analyze(**paths, force=True)
    (name,) = SQUARE
    base, aligned, finetuned = (load_checkpoint(paths[role])[name] for role in paths)
    expected = rho(base.T, aligned.T, finetuned.T)
    assert scores.modules[name].rho == pytest.approx(expected, abs=1e-6)
    assert abs(expected - rho(base, aligned, finetuned)) > 1e-3


MISFITS = [
    (f"{L}.mlp.gate.weight", (4, 8), (4, 9), "router"),
    (f"{L}.attn.relative_attention_bias.weight", (32, 2), (32, 4), "embedding"),
    (f"{L}.conv1d.weight", (8, 1, 4), (8, 1, 3), "convolution"),
]


@pytest.mark.parametrize(("name", "shape", "other", "kind"), MISFITS)
def test_a_mismatch_of_any_matrix_of_a_layer_is_refused(
    name: str, shape: tuple[int, ...], other: tuple[int, ...], kind: str
) -> None:
    good, bad = {name: shape, "model.norm.weight": (8,)}, {name: other, "model.norm.weight": (8,)}
    lacks = {"model.norm.weight": (8,)}
    for role in ("base", "aligned", "safe"):
        with pytest.raises(
            PairingError, match=r"give models of one architecture, or leave .* --exclude"
        ) as error:
            pair(models(good, **{role: bad}))
        assert f"{name} is {shape} in finetuned but {other} in {role}" in str(error.value)
        with pytest.raises(PairingError, match=f"missing in {role}"):
            pair(models(good, **{role: lacks}))
    with pytest.raises(PairingError, match=r"give models of one architecture$"):
        pair(models(good, base=bad), analyse=False)
    row = rows(models(good, base=bad), exclude="layers")[name]
    assert row.reason == f"{kind}, {other} in base"


def test_a_vector_of_another_shape_and_a_table_outside_of_layers_are_kept() -> None:
    good = {f"{L}.norm.weight": (8,), "model.embed_tokens.weight": (9, 8)}
    bad = {f"{L}.norm.weight": (9,), "model.embed_tokens.weight": (10, 8)}
    assert len(pair(models(good, base=bad)).notes) >= 2


def test_an_adapted_router_is_analysed_and_an_adapted_head_is_not(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    shapes = {
        f"{L}.mlp.gate.weight": (4, 16),
        "lm_head.weight": (33, 16),
        f"{L}.mlp.up_proj.weight": (24, 16),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    opened = {
        role: open_model(role, write_checkpoint(tmp_path / role, tensors, {"tie_word_embeddings": False}))
        for role in ("base", "aligned")
    }
    adapter = write_lora(
        tmp_path / "adapter",
        {name.removesuffix(".weight"): shape for name, shape in shapes.items()},
        rank=2,
        seed=0,
    )
    found = rows({**opened, "finetuned": open_source("finetuned", adapter)})
    assert {name: row.analysed for name, row in found.items()} == {
        f"{L}.mlp.gate.weight": True,
        "lm_head.weight": False,
        f"{L}.mlp.up_proj.weight": True,
    }


def test_a_repair_names_no_flag_that_it_does_not_have(tmp_path: Path) -> None:
    paths = {}
    for role, width in (("aligned", 8), ("finetuned", 9)):
        tensors = {f"{L}.mlp.up_proj.weight": torch.ones(4, width), "model.norm.weight": torch.ones(4)}
        paths[role] = write_checkpoint(tmp_path / role, tensors, {})
    with pytest.raises(PairingError) as error:
        wise_ft(**paths, output=tmp_path / "out")
    assert "--exclude" not in str(error.value)
