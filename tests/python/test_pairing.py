"""Counterparts by name, and what is analysed: on models that are headers only, and on files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from safemerge_fast.checkpoint.model import Model, open_model
from safemerge_fast.errors import PairingError
from safemerge_fast.pairing.rows import Row, match_names, pair

Shapes = Mapping[str, Sequence[int]]


class Headers:
    """Headers of a checkpoint that does not exist."""

    def __init__(self, tensors: Mapping[str, SimpleNamespace]) -> None:
        self.files = ["model.safetensors"]
        self.names = list(tensors)
        self.tensors = list(tensors.values())
        self.tensor = tensors.__getitem__

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return len(self.names)


def model(role: str, shapes: Shapes, config: dict[str, Any] | None = None, dtype: str = "BF16") -> Model:
    """A model of which only the headers exist; a name may be given as "name dtype"."""
    tensors = {}
    for key, shape in shapes.items():
        name, _, own = key.partition(" ")
        tensors[name] = SimpleNamespace(
            name=name,
            dtype=own or dtype,
            shape=tuple(shape),
            file="model.safetensors",
            nbytes=1,
            encoding=None,
        )
    return Model(role, role, Path(role), Headers(tensors), config or {})  # type: ignore[arg-type]


def models(shapes: Shapes, config: dict[str, Any] | None = None, **others: Shapes) -> dict[str, Model]:
    """base, aligned and finetuned with the same headers, but for the roles given."""
    return {
        role: model(role, others.get(role, shapes), config)
        for role in {"base": 0, "aligned": 0, "finetuned": 0, **others}
    }


def rows(*args: Any, **kwargs: Any) -> dict[str, Row]:
    return {row.name: row for row in pair(*args, **kwargs).rows}


LLAMA = {
    "model.embed_tokens.weight": (321, 72),
    "model.layers.0.self_attn.q_proj.weight": (72, 72),
    "model.layers.0.mlp.gate_proj.weight": (200, 72),
    "model.layers.0.input_layernorm.weight": (72,),
    "model.norm.weight F32": (72,),
    "lm_head.weight": (321, 72),
}


def test_rows_of_a_real_quartet(quartet: dict[str, Path]) -> None:
    opened = {role: open_model(role, path) for role, path in quartet.items()}
    pairing = pair(opened)
    headers = opened["finetuned"].headers
    assert [row.name for row in pairing.rows] == [
        tensor.name for file in headers.files for tensor in headers.tensors if tensor.file == file
    ]
    by_name = {row.name: row for row in pairing.rows}
    assert sum(row.analysed for row in pairing.rows) == 3 * 7
    down = by_name["model.layers.1.mlp.down_proj.weight"]
    assert (down.dtype, down.shape, down.module_type, down.layer) == (
        "BF16",
        (72, 200),
        "down_proj",
        "model.layers.1",
    )
    assert down.names == dict.fromkeys(("finetuned", "base", "aligned", "safe"), down.name)
    assert not down.transposed
    assert by_name["model.position_ids"].reason == "not a float tensor (I64)"
    assert by_name["model.norm.weight"].module_type == "norm"
    assert pairing.unused == {"base": (), "aligned": (), "safe": ()}
    assert pairing.notes == ()


def test_rows_follow_the_files_and_the_offsets(tmp_path: Path) -> None:
    """Offset order, whatever the order of names."""
    names = [
        f"model.layers.{layer}.mlp.{leaf}.weight" for layer, leaf in ((1, "z"), (0, "b"), (0, "a"), (2, "m"))
    ]
    tensors = {name: torch.ones(3, 3) for name in names}
    opened = {}
    for role in ("base", "aligned", "finetuned"):
        order = names if role == "finetuned" else sorted(names)
        path = write_checkpoint(tmp_path / role, {name: tensors[name] for name in order}, shards=2)
        opened[role] = open_model(role, path)
    assert [row.name for row in pair(opened).rows] == names


# Name, shape, reason, module type, layer.
L, MTP = "model.layers.3", "multi-token prediction (MTP)"
KINDS = [
    (L + ".self_attn.q_proj.weight", (8, 8), "projection", "q_proj", L),
    (L + ".mlp.experts.12.gate_proj.weight", (8, 8), "projection", "experts.gate_proj", L),
    (L + ".mlp.shared_expert.up_proj.weight", (8, 8), "projection", "shared_expert.up_proj", L),
    (L + ".block_sparse_moe.experts.0.w2.weight", (8, 8), "projection", "experts.w2", L),
    ("transformer.h.11.attn.c_attn.weight", (8, 24), "projection", "c_attn", "transformer.h.11"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", (8, 8), "projection", "q", "encoder.block.0"),
    (L + ".mlp.gate.weight", (8, 8), "router", "router", L),
    (L + ".block_sparse_moe.gate.weight", (8, 8), "router", "router", L),
    (L + ".mlp.router.weight", (8, 8), "router", "router", L),
    (L + ".mlp.shared_expert_gate.weight", (1, 8), "router", "router", L),
    (L + ".self_attn.q_norm.weight", (8,), "norm", "norm", L),
    ("transformer.ln_f.weight", (8,), "norm", "norm", None),
    (L + ".self_attn.q_proj.bias", (8,), "bias", "bias", L),
    ("model.embed_tokens.weight", (8, 8), "embedding", "embed_tokens", None),
    ("transformer.wpe.weight", (8, 8), "embedding", "wpe", None),
    ("bert.embeddings.word_embeddings.weight", (8, 8), "embedding", "word_embeddings", None),
    ("shared.weight", (8, 8), "embedding", "shared", None),
    ("lm_head.weight", (8, 8), "head", "lm_head", None),
    ("embed_out.weight", (8, 8), "head", "embed_out", None),
    ("score.weight", (2, 8), "head", "score", None),
    ("backbone.layers.0.mixer.conv1d.weight", (8, 1, 4), "convolution", "conv1d", "backbone.layers.0"),
    (L + ".feed_forward.experts.gate_up_proj", (4, 8, 16), "fused experts", "experts.gate_up_proj", L),
    ("model.layers.30.self_attn.q_proj.weight", (8, 8), MTP, "q_proj", "model.layers.30"),
    ("mtp.layers.0.self_attn.q_proj.weight", (8, 8), MTP, "q_proj", "mtp.layers.0"),
    ("vision_tower.layers.40.self_attn.q_proj.weight", (8, 8), "projection", "q_proj", "vision_tower.layers.40"),
    (L + ".mixer.A_log", (8, 8), "not a weight matrix", "A_log", L),
    (L + ".mixer.dt", (8,), "1-D tensor", "dt", L),
    (L + ".mlp.up_proj.weight", (0, 8), "empty tensor", "up_proj", L),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "reason", "module_type", "layer"), KINDS)
def test_what_is_analysed(
    name: str, shape: tuple[int, ...], reason: str, module_type: str, layer: str | None
) -> None:
    row = rows(models({name: shape}, {"num_hidden_layers": 30}))[name]
    assert (row.reason, row.module_type, row.layer) == (reason, module_type, layer)
    assert row.analysed == (reason == "projection")


def test_layers_are_counted_by_the_text_configuration_too() -> None:
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    assert not rows(models({name: (4, 4)}, {"text_config": {"num_hidden_layers": 2}}))[name].analysed
    assert rows(models({name: (4, 4)}, {"text_config": {"num_hidden_layers": 3}}))[name].analysed


def test_conv1d_of_gpt2_is_transposed_and_linear_of_the_same_name_is_not() -> None:
    shapes = {"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.other.weight": (8, 8)}
    gpt2 = rows(models(shapes, {"model_type": "gpt2"}))
    assert gpt2["h.0.attn.c_attn.weight"].transposed
    assert not gpt2["h.0.mlp.other.weight"].transposed
    assert not rows(models(shapes, {"model_type": "gpt_bigcode"}))["h.0.attn.c_attn.weight"].transposed


def test_include_and_exclude() -> None:
    include = rows(models(LLAMA), include="embed_tokens|norm")
    assert include["model.embed_tokens.weight"].analysed
    assert include["model.embed_tokens.weight"].module_type == "embed_tokens"
    assert include["model.layers.0.self_attn.q_proj.weight"].analysed  # as by default
    assert not include["model.norm.weight"].analysed  # 1-D
    exclude = rows(models(LLAMA), include="q_proj|lm_head", exclude="q_proj")
    assert not exclude["model.layers.0.self_attn.q_proj.weight"].analysed
    assert exclude["model.layers.0.self_attn.q_proj.weight"].reason == "excluded"
    assert exclude["lm_head.weight"].analysed
    notes = pair(models(LLAMA), include="nothing_here", exclude="nor_here").notes
    assert [note.split(" ")[:2] for note in notes] == [
        ["--include", "nothing_here"],
        ["--exclude", "nor_here"],
    ]
    (note,) = pair(models(LLAMA), include="norm").notes
    assert note.startswith(
        "--include matches 2 tensors that are not 2-D float, such as model.layers.0.input_"
    )


@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_refuses_a_malformed_pattern(flag: str) -> None:
    with pytest.raises(PairingError, match=rf"--{flag}: '\(' is not a regular expression"):
        pair(models(LLAMA), **{flag: "("})


def test_refuses_a_projection_that_is_missing_or_of_another_shape() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    missing = {key: shape for key, shape in LLAMA.items() if key != name}
    with pytest.raises(
        PairingError, match=rf"{name} is \(72, 72\) in finetuned but missing in aligned.*--exclude"
    ):
        pair(models(LLAMA, aligned=missing))
    wide = {**LLAMA, name: (72, 80)}
    with pytest.raises(PairingError, match=r"but \(72, 80\) in base and missing in safe"):
        pair(models(LLAMA, base=wide, safe=missing))
    integer = {**missing, f"{name} I8": (72, 72)}
    with pytest.raises(PairingError, match="but I8 in base"):
        pair(models(LLAMA, base=integer))
    with pytest.raises(PairingError, match=r"\(and 1 more tensors do not fit\)"):
        pair(models(LLAMA, base={"model.norm.weight": (72,)}))
    row = rows(models(LLAMA, aligned=missing), exclude="q_proj")[name]
    assert not row.analysed
    assert row.names == {"finetuned": name, "base": name}
    assert row.reason == "excluded, missing in aligned"


def test_another_vocabulary_is_noted_and_kept() -> None:
    grown = {**LLAMA, "model.embed_tokens.weight": (322, 72), "lm_head.weight": (322, 72)}
    pairing = pair(models(LLAMA, base=grown))
    row = next(row for row in pairing.rows if row.name == "model.embed_tokens.weight")
    assert row.names == {"finetuned": row.name, "aligned": row.name}
    assert row.reason == "embedding, (322, 72) in base"
    assert pairing.notes[0] == (
        "model.embed_tokens.weight is (321, 72) in finetuned but (322, 72) in base; the fine-tuned tensor is kept"
    )
    assert set(pairing.unused["base"]) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_tied_head_is_the_embedding() -> None:
    tied = {name: shape for name, shape in LLAMA.items() if name != "lm_head.weight"}
    config = {"tie_word_embeddings": True}
    pairing = pair(models(LLAMA, config, base=tied))
    head = pairing.rows[-1]
    assert head.names == {
        "finetuned": "lm_head.weight",
        "base": "model.embed_tokens.weight",
        "aligned": "lm_head.weight",
    }
    assert pairing.notes == (
        "lm_head.weight is not stored in base, which ties it to model.embed_tokens.weight; that is taken for it",
    )
    untied = pair(models(LLAMA, {"tie_word_embeddings": False}, base=tied)).rows[-1]
    assert untied.reason == "head, missing in base"
    inverse = pair(models(tied, config, base=LLAMA))
    assert inverse.unused == {"base": ("lm_head.weight",), "aligned": ()}
    assert any("lm_head.weight" in note for note in inverse.notes)


def test_tied_head_of_one_role_on_files(tmp_path: Path, make_quartet: Callable[..., dict[str, Path]]) -> None:
    quartet = make_quartet(tmp_path, shards=1, layers=1, stores_head=("finetuned",))
    pairing = pair({role: open_model(role, path) for role, path in quartet.items()})
    head = next(row for row in pairing.rows if row.name == "lm_head.weight")
    assert {head.names[role] for role in ("base", "aligned", "safe")} == {"model.embed_tokens.weight"}


def test_other_prefixes_are_matched_and_noted() -> None:
    bare = {key.removeprefix("model."): shape for key, shape in LLAMA.items()}
    pairing = pair(models(LLAMA, base=bare))
    by_name = {row.name: row for row in pairing.rows}
    assert by_name["model.layers.0.mlp.gate_proj.weight"].names["base"] == "layers.0.mlp.gate_proj.weight"
    assert by_name["model.norm.weight"].names["base"] == "norm.weight"
    assert by_name["lm_head.weight"].names["base"] == "lm_head.weight"
    assert pairing.unused["base"] == ()
    assert pairing.notes[0].startswith(
        "5 tensors have other names in base, such as embed_tokens.weight for model."
    )


def test_a_layer_that_is_missing_is_not_its_neighbour() -> None:
    mine = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    theirs = [f"layers.{layer}.mlp.up_proj.weight" for layer in (0, 2, 3)]
    assert match_names(mine, theirs) == {mine[0]: theirs[0], mine[2]: theirs[1]}


def test_towers_with_equal_tails_are_told_apart_or_left() -> None:
    text = [f"model.language_model.layers.{layer}.q.weight" for layer in range(2)]
    vision = [f"model.vision_tower.layers.{layer}.q.weight" for layer in range(2)]
    other_text = [f"language_model.model.layers.{layer}.q.weight" for layer in range(2)]
    other_vision = [f"vision_tower.layers.{layer}.q.weight" for layer in range(2)]
    expected = dict(zip(text + vision, other_text + other_vision, strict=True))
    assert match_names(text + vision, other_text + other_vision) == expected
    ambiguous = [f"a.tower.layers.{layer}.q.weight" for layer in range(2)]
    assert match_names(text, other_text + ambiguous) == {}


def test_layers_of_a_language_model_are_not_those_of_a_vision_tower() -> None:
    text = ["model.layers.0.q.weight", "model.norm.weight", "lm_head.weight"]
    whole = {
        "model.layers.0.q.weight": "model.language_model.layers.0.q.weight",
        "model.norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    vision = ["model.vision_tower.layers.0.q.weight", "vision_model.norm.weight"]
    assert match_names(text, [*whole.values(), *vision]) == whole
    assert match_names([*whole.values(), *vision], text) == {other: name for name, other in whole.items()}


PARTS = st.lists(st.sampled_from(["a", "b", "layers", "0", "1", "w"]), min_size=1, max_size=5).map(".".join)
NAMES = st.lists(PARTS, max_size=12, unique=True)


@given(NAMES, NAMES)
def test_matches_are_one_to_one_and_keep_exact_names(mine: list[str], theirs: list[str]) -> None:
    found = match_names(mine, theirs)
    assert set(found) <= set(mine)
    assert set(found.values()) <= set(theirs)
    assert len(set(found.values())) == len(found)
    assert all(found[name] == name for name in mine if name in theirs)
    for name, other in found.items():
        numbers = [[part for part in each.split(".") if part.isdecimal()] for each in (name, other)]
        assert numbers[0] == numbers[1]


@given(NAMES, st.sampled_from(["p", "p.q", "model"]))
def test_a_common_prefix_changes_nothing(names: list[str], prefix: str) -> None:
    """Whatever is matched under a prefix that no name has is the very same name."""
    found = match_names([f"{prefix}.{name}" for name in names], names)
    tails = {name: [other for other in names if name.endswith(f".{other}")] for name in names}
    for name in names:
        unique = not tails[name] and not any(name in tail for tail in tails.values())
        if unique:
            assert found.get(f"{prefix}.{name}") == name


def test_needs_the_fine_tuned_model() -> None:
    with pytest.raises(PairingError, match="--finetuned"):
        pair({"base": model("base", LLAMA)})


def test_a_dequantised_model_is_noted() -> None:
    pairing = pair(models(LLAMA, {"quantization_config": {"quant_method": "gguf"}}))
    assert all("speaks of quantisation (gguf)" in note for note in pairing.notes)
    assert len(pairing.notes) == 3
