"""Files that are almost right, but for a value or a byte: each is merged, or refused in one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import adapter, model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invoke import run

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**39), 10**39),
    st.sampled_from([0, -1, 1, 2, 8, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, 5e-324]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        ["", "x", "\x1b[31m", "\n", "\u202e", "(", "(?=x)", "../x", "/etc/passwd", "x" * 100_000, "12"]
    ),
    st.lists(st.integers(-2, 9) | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(-2, 9) | st.none() | st.text(max_size=3), max_size=3),
    st.just([[[[{}]]]]),
)

CONFIGURATION: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "auto_map": {"AutoModel": "modeling.Model", "AutoTokenizer": ["tok.Tok", None]},
    "dtype": "float32",
    "hidden_size": 8,
    "model_type": "llama",
    "num_hidden_layers": 1,
    "quantization_config": {"quant_method": "gptq"},
    "text_config": {"num_hidden_layers": 1, "tie_word_embeddings": False, "dtype": "float32"},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
ADAPTER: dict[str, Any] = {
    "alpha_pattern": {"q_proj": 3.5},
    "auto_mapping": None,
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "lora_alpha": 4,
    "lora_dropout": 0.1,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {"k_proj": 7, r"layers\.\d+\.self_attn\.q_proj": 2},
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": True,
}
TOKENIZER: dict[str, Any] = {
    "added_tokens_decoder": {"0": {"content": "<s>"}},
    "auto_map": {"AutoTokenizer": ["tok.Tok", None]},
    "model_max_length": int(1e30),
}


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of a document."""
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*here, key))
    return found


def mutated(document: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The document with one value replaced, removed, or one field added."""

    @st.composite
    def draw_one(draw: Callable[..., Any]) -> dict[str, Any]:
        changed = copy.deepcopy(document)
        place = draw(st.sampled_from(places(document)))
        parent: Any = changed
        for key in place[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if kind == "replace":
            parent[place[-1]] = draw(odd)
        elif kind == "remove":
            del parent[place[-1]]
        else:
            changed[draw(st.text(max_size=8))] = draw(odd)
        return changed

    return draw_one()


def assert_done_or_refused(path: Path, *words: str | Path) -> None:
    """Exit code 0, or 2, 3, 5 with one printable line; never 1."""
    result = run(*words)
    assert result.exit_code in (0, 2, 3, 5), (result.stderr, result.exception)
    if result.exit_code:
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert result.stderr[:-1].isprintable()
    shutil.rmtree(path / "out", ignore_errors=True)


@pytest.fixture
def fold(tmp_path: Path) -> Callable[[], None]:
    """Inspects and folds what lies in the directory, as it is by then."""
    (tmp_path / "recipe.yml").write_text(
        f"recipe: fold\nmodel: {model(tmp_path)}\nadapter: {adapter(tmp_path)}\ndtype: bfloat16\n"
    )

    def both() -> None:
        assert_done_or_refused(tmp_path, "inspect", tmp_path / "model")
        assert_done_or_refused(tmp_path, "inspect", tmp_path / "adapter", "--json")
        assert_done_or_refused(tmp_path, "run", tmp_path / "recipe.yml", "-o", tmp_path / "out")

    return both


def test_what_is_right_is_folded(fold: Callable[[], None], tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIGURATION))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    result = run("run", tmp_path / "recipe.yml", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr


@quick
@given(document=mutated(CONFIGURATION))
def test_configurations(fold: Callable[[], None], tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "model" / "config.json").write_text(json.dumps(document))
    fold()


@quick
@given(document=mutated(ADAPTER))
def test_adapter_configurations(fold: Callable[[], None], tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(document))
    fold()


@quick
@given(document=mutated(TOKENIZER))
def test_tokenizer_configurations(fold: Callable[[], None], tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(document))
    fold()


FILES = {
    "config.json": "model/config.json",
    "tokenizer_config.json": "model/tokenizer_config.json",
    "adapter_config.json": "adapter/adapter_config.json",
    "weights": "model/model.safetensors",
    "factors": "adapter/adapter_model.safetensors",
    "recipe": "recipe.yml",
}


@st.composite
def spoilt(draw: Callable[..., Any], data: bytes) -> bytes:
    """Bytes with a part cut off, replaced, repeated, or some put in."""
    start = draw(st.integers(0, len(data)))
    stop = min(len(data), start + draw(st.sampled_from([0, 1, 1, 2, 8, 64, len(data)])))
    new = draw(
        st.binary(max_size=4)
        | st.sampled_from(
            [b"", b"\xff", b"\x00", b"[" * 5000, b'{"a":' * 200, b"9" * 400, b"\x1b[31m", b"NaN", b"\n"]
        )
        | st.just(data[start:stop] * 2)
    )
    return data[:start] + new + data[stop:]


@settings(quick, max_examples=15)
@pytest.mark.parametrize("file", FILES)
@given(draw=st.data())
def test_any_bytes_of_any_file(
    fold: Callable[[], None], tmp_path: Path, file: str, draw: st.DataObject
) -> None:
    for name, document in (
        ("model/config.json", CONFIGURATION),
        ("model/tokenizer_config.json", TOKENIZER),
        ("adapter/adapter_config.json", ADAPTER),
    ):
        (tmp_path / name).write_text(json.dumps(document, indent=2))
    path = tmp_path / FILES[file]
    whole = path.read_bytes()
    try:
        path.write_bytes(draw.draw(spoilt(whole)))
        fold()
    finally:
        path.write_bytes(whole)
