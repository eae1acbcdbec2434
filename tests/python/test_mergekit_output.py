"""Configurations in mergekit's format: dtypes, files, config.json, tokenizers, resumption, and loading the output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from configurations import HIDDEN, assert_close, merged, read, tensors_of, write_llama
from lora import load_checkpoint, write_lora

from safemerge_fast import CheckpointError, PairingError, PlanError
from safemerge_fast.recipes.run import carry_out, read_recipe

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    made = {
        "a": write_llama(tmp_path / "a", seed=1, layers=4, dtype=torch.bfloat16, shards=3),
        "b": write_llama(tmp_path / "b", seed=2, layers=4, dtype=torch.float16),
    }
    for name, path in made.items():
        (path / "tokenizer_config.json").write_text(json.dumps({"made_for": name}))
        (path / "generation_config.json").write_text(json.dumps({"made_for": name}))
    return made


def both(models: dict[str, Path], **document: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": models["a"]}, {"model": models["b"]}],
        "parameters": {"weight": 1},
        **document,
    }


def stacked(models: dict[str, Path], *layers: tuple[str, int, int], **document: Any) -> dict[str, Any]:
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": models[n], "layer_range": [a, b]}]} for n, a, b in layers],
        **document,
    }


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "expected", "named"),
    [
        ({}, torch.bfloat16, "bfloat16"),
        ({"base": "b"}, torch.float16, "float16"),
        ({"dtype": "float32"}, torch.float32, "float32"),
        ({"dtype": "float32", "out_dtype": "float16"}, torch.float16, "float16"),
        ({"out_dtype": "torch.float16"}, torch.float16, "float16"),
        ({"dtype": "bfloat16", "base": "b"}, torch.bfloat16, "bfloat16"),
    ],
)
def test_dtype(
    models: dict[str, Path], tmp_path: Path, document: dict[str, Any], expected: Any, named: str
) -> None:
    base = document.pop("base", None)
    _, report = merged(tmp_path, **both(models, **document, **({"base_model": models[base]} if base else {})))
    found = load_checkpoint(Path(report.output))
    assert {tensor.dtype for tensor in found.values()} == {expected}
    mine, theirs = tensors_of(models["a"])[Q], tensors_of(models["b"])[Q]
    assert torch.equal(found[Q], ((mine + theirs) / 2).to(expected))
    assert json.loads((Path(report.output) / "config.json").read_text())["dtype"] == named


# --- files ----------------------------------------------------------------------------------------


def test_the_files_are_the_base_s_or_the_first_model_s(models: dict[str, Path], tmp_path: Path) -> None:
    for base, host in (({}, "a"), ({"base_model": models["b"]}, "b")):
        _, report = merged(tmp_path, **both(models, **base))
        out = Path(report.output)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (models[host] / name).read_bytes()
        assert len(list(out.glob("*.safetensors"))) == (3 if host == "a" else 1)
        document = json.loads((out / "safemerge_report.json").read_text())
        assert document == json.loads(report.to_json())
        assert document["recipe"] == "mergekit"
        assert document["configuration"]["config"]["merge_method"] == "linear"
        assert document["inputs"]["b"]["spec"] == str(models["b"])
        card = (out / "README.md").read_text()
        assert '"merge_method": "linear"' in card
        assert "A merge of `a`, `b` by the method `linear`" in card.replace("`b`, `a`", "`a`, `b`")
        assert "\n- mergekit\n" in card


@pytest.mark.parametrize(("source", "expected"), [("base", "b"), ("a", "a"), ("b", "b"), (None, "b")])
def test_tokenizer_source(models: dict[str, Path], tmp_path: Path, source: str | None, expected: str) -> None:
    named = models.get(source, source) if source else None
    _, report = merged(tmp_path, **both(models, base_model=models["b"], tokenizer_source=named))
    out = Path(report.output)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"made_for": expected}
    assert json.loads((out / "generation_config.json").read_text()) == {"made_for": "b"}


def test_an_adapter_s_tokenizer_comes_with_it(models: dict[str, Path], tmp_path: Path) -> None:
    lora = write_lora(
        tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)}, rank=1, seed=0
    )
    document = {"merge_method": "passthrough", "models": [{"model": f"{models['a']}+{lora}"}]}
    _, report = merged(tmp_path, **document)
    assert (Path(report.output) / "tokenizer_config.json").read_text() == '{"made_for": "a"}'
    (lora / "tokenizer_config.json").write_text('{"made_for": "lora"}')
    _, report = merged(tmp_path, **document)
    assert (Path(report.output) / "tokenizer_config.json").read_text() == '{"made_for": "lora"}'


def write_tokenizer(
    path: Path, *tokens: str, added: dict[str, int] | None = None, unigram: bool = False
) -> None:
    vocabulary = (
        [[token, 0.0] for token in tokens] if unigram else {token: i for i, token in enumerate(tokens)}
    )
    extra = [{"content": token, "id": number} for token, number in (added or {}).items()]
    path.joinpath("tokenizer.json").write_text(
        json.dumps({"added_tokens": extra, "model": {"vocab": vocabulary}})
    )


def test_vocabularies_that_differ(models: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(models["a"], "x", "y", "z")
    for tokens, options, agrees in [
        (("x", "y", "z"), {"unigram": True}, True),
        (("x", "y"), {"added": {"z": 2, "end": 3}}, True),
        (("x", "z", "y"), {}, False),
        (("x", "y", "z"), {"added": {"pad": 2}}, False),
    ]:
        write_tokenizer(models["b"], *tokens, **options)
        _, report = merged(tmp_path, **both(models))
        assert any("may mean different tokens" in note for note in report.notes) is not agrees
        if agrees:
            merged(tmp_path, **both(models, tokenizer_source=models["b"]))
            continue
        with pytest.raises(
            PairingError, match=r"tokenizer_source: the vocabulary of a .* rows of embeddings are not"
        ):
            merged(tmp_path, **both(models, tokenizer_source=models["b"]))
    (models["b"] / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        merged(tmp_path, **both(models))
    bare = write_llama(tmp_path / "bare", seed=3, layers=4)
    with pytest.raises(CheckpointError, match=r"tokenizer_source: .*bare has neither tokenizer.json nor"):
        merged(tmp_path, **both(models, tokenizer_source=bare))


# --- config.json of other layers ------------------------------------------------------------------


def test_the_number_of_layers_and_lists_of_them(models: dict[str, Path], tmp_path: Path) -> None:
    for name, kinds in (("a", "fsfs"), ("b", "ffss")):
        words = {"f": "full_attention", "s": "sliding_attention"}
        config = json.loads((models[name] / "config.json").read_text())
        config |= {
            "layer_types": [words[kind] for kind in kinds],
            "sliding_window_pattern": 2,
            "mlp_only_layers": [],
        }
        (models[name] / "config.json").write_text(json.dumps(config))
    _, report = merged(tmp_path, **stacked(models, ("a", 0, 3), ("b", 0, 4), ("a", 3, 4)))
    found = json.loads((Path(report.output) / "config.json").read_text())
    assert found.pop("num_hidden_layers") == 8
    assert "".join(kind[0] for kind in found.pop("layer_types")) == "fsfffsss"
    original = json.loads((models["a"] / "config.json").read_text())
    assert found == {
        key: value for key, value in original.items() if key not in ("num_hidden_layers", "layer_types")
    }
    # The whole of the host is its file as it is.
    _, report = merged(tmp_path, **stacked(models, ("a", 0, 2), ("a", 2, 4)))
    assert (Path(report.output) / "config.json").read_bytes() == (models["a"] / "config.json").read_bytes()
    assert len(report.shards) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_only_layers": [1]}, "says by mlp_only_layers which layers are of which kind"),
        ({"sliding_window_pattern": 6}, "says by sliding_window_pattern"),
        ({"max_window_layers": 2, "use_sliding_window": True}, "says by max_window_layers"),
        ({"max_window_layers": 2, "use_sliding_window": False}, None),
        ({"first_k_dense_replace": 1}, "says by first_k_dense_replace"),
        ({"first_k_dense_replace": 0}, None),
        ({"decoder_sparse_step": 1}, None),
        ({"heads_of": [1, 2, 3, 4]}, "says by heads_of"),
        ({"eos_token_id": [1, 2, 3, 4]}, None),
        ({"num_hidden_layers": None}, "does not say its number of layers as num_hidden_layers"),
        ({"layer_types": ["x"]}, "should have an entry for layer 2 in layer_types"),
    ],
)
def test_configurations_that_cannot_be_cut(
    models: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str | None
) -> None:
    config = json.loads((models["a"] / "config.json").read_text())
    (models["a"] / "config.json").write_text(json.dumps(config | change))
    document = stacked(models, ("a", 2, 4), ("b", 0, 1), ("a", 0, 1))
    if message is None:
        merged(tmp_path, **document)
        return
    with pytest.raises(PlanError, match=message):
        merged(tmp_path, **document)


def test_a_text_model_within_another(models: dict[str, Path], tmp_path: Path) -> None:
    """Layers of a tower are no layers of the language model, and the count is in text_config."""
    text = json.loads((models["a"] / "config.json").read_text())
    config = {"model_type": "seeing", "text_config": text, "vision_config": {"num_hidden_layers": 4}}
    tower = {
        f"model.vision_tower.layers.{layer}.weight": torch.full((2,), float(layer)) for layer in range(4)
    }
    made = write_llama(tmp_path / "seeing", seed=3, layers=4, more=tower)
    (made / "config.json").write_text(json.dumps(config))
    found, report = merged(tmp_path, **stacked({"m": made}, ("m", 0, 2), ("m", 1, 4), dtype="float16"))
    written = json.loads((Path(report.output) / "config.json").read_text())
    assert written["text_config"]["num_hidden_layers"] == 5
    assert written["text_config"]["dtype"] == "float16"
    assert written["vision_config"] == {"num_hidden_layers": 4}
    assert sorted(name for name in found if "vision" in name) == sorted(tower)
    assert found["model.vision_tower.layers.3.weight"].tolist() == [3, 3]


def test_layers_past_the_last_have_no_place_among_slices(tmp_path: Path) -> None:
    more = {"model.layers.2.eh_proj.weight": torch.ones(2, 2)}
    a = write_llama(tmp_path / "a", seed=1, layers=2, more=more)
    found, _ = merged(tmp_path, **stacked({"a": a}, ("a", 0, 1), ("a", 1, 2)))
    assert "model.layers.2.eh_proj.weight" in found
    with pytest.raises(PairingError, match=r"model.layers.2.eh_proj.weight of a is past its 2 layers"):
        merged(tmp_path, **stacked({"a": a}, ("a", 0, 2), ("a", 1, 2)))


def test_layers_that_cannot_be_told(tmp_path: Path) -> None:
    more = {f"encoder.layers.{layer}.weight": torch.ones(2) for layer in range(2)}
    a = write_llama(tmp_path / "a", seed=1, layers=2, more=more)
    merged(tmp_path, merge_method="passthrough", models=[{"model": a}])
    with pytest.raises(PlanError, match=r"the layers of a .* cannot be told .* needed to cut slices"):
        merged(tmp_path, **stacked({"a": a}, ("a", 0, 2)))
    with pytest.raises(PlanError, match=r"the layers of a .* cannot be told .* needed to apply gradients"):
        merged(tmp_path, merge_method="passthrough", models=[{"model": a, "parameters": {"scale": [0, 1]}}])


# --- the work itself ------------------------------------------------------------------------------


def test_an_interrupted_run_is_resumed(models: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    document = both(models, max_shard_size="2KB")
    with pytest.raises(KeyboardInterrupt):
        carry_out(msgspec.structs.replace(read(tmp_path / "config.yml", out, **document), progress=interrupt))
    assert not (out / "config.json").exists()
    assert not (out / "model.safetensors.index.json").exists()
    _, whole = merged(tmp_path, **document)
    resumed = carry_out(read_recipe(tmp_path / "config.yml", {"output": str(out), "resume": True}))
    assert len(resumed.shards) > 3
    for file in Path(whole.output).glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_torch_is_not_imported(models: dict[str, Path], tmp_path: Path) -> None:
    read(tmp_path / "config.yml", **both(models))
    code = (
        "import sys; from safemerge_fast.cli import main\n"
        f"try: main(['run', {str(tmp_path / 'config.yml')!r}, '-o', {str(tmp_path / 'out')!r}, '-q'])\n"
        "finally: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_values_that_are_not_finite(models: dict[str, Path], tmp_path: Path) -> None:
    bad = torch.full((2,), torch.inf)
    broken = write_llama(tmp_path / "broken", seed=1, layers=1, more={"x.bias": bad})
    document = {"merge_method": "passthrough", "models": [{"model": broken, "parameters": {"scale": 2}}]}
    with pytest.raises(CheckpointError, match=r"x\.bias"):
        merged(tmp_path, **document)
    found, report = merged(tmp_path, **document, allow_nonfinite=True)
    assert found["x.bias"].isinf().all()
    assert any("holds NaN or infinity" in warning.message for warning in report.warnings)


def test_transformers_loads_stacked_layers(models: dict[str, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    document = stacked(models, ("a", 0, 3), ("b", 1, 4), dtype="float32", max_shard_size="4KB")
    found, report = merged(tmp_path, **document)
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(
        report.output, dtype=torch.float32, output_loading_info=True
    )
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(model.model.layers) == 6
    for name, tensor in model.state_dict().items():
        assert_close(tensor.double(), found[name])
    with torch.no_grad():
        assert model(torch.tensor([[1, 5, 7]])).logits.isfinite().all()
