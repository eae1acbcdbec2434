"""`check ADAPTER MODEL`: every key is accounted for, and the sizes are those of the dense updates."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from invoke import run
from safetensors.torch import load_file
from tiny_adapter import KV, PREFIX, Q, factors, write_adapter, write_aligned

from safemerge_fast import AdapterError, CheckReport, check
from safemerge_fast.checkpoint.adapter import open_adapter
from safemerge_fast.pairing.adapter_terms import adapter_terms

C_PROJ = "transformer.h.0.attn.c_proj"
EMBEDDING = "model.embed_tokens"


def random(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in tensors.items()
    }


def keys_of(report: CheckReport) -> list[str]:
    parts = (*report.updates, *report.unused)
    return sorted([key for part in parts for key in part.keys] + list(report.unread))


def everything() -> dict[str, torch.Tensor]:
    """Each kind of key that an adapter can have, and the two that nothing reads."""
    return {
        **factors(),
        f"{PREFIX}{Q}.lora_B.bias": torch.ones(12),
        f"{PREFIX}{Q}.base_layer.bias": torch.ones(12),
        **factors(KV, 4, 6),
        f"{PREFIX}{KV}.lora_magnitude_vector": torch.ones(6),
        f"{PREFIX}model.norm.weight": torch.ones(12),
        f"{PREFIX}model.norm.modules_to_save.weight": torch.ones(12),
        f"{PREFIX}model.norm.original_module.weight": torch.ones(12),
        f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(2, 12),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_key_is_accounted_for(tmp_path: Path, dtype: torch.dtype) -> None:
    model = write_aligned(tmp_path / "model", tie_word_embeddings=False)
    tensors = random(everything(), dtype)
    adapter = write_adapter(
        tmp_path / "adapter", tensors, trainable_token_indices=[7, 3], alpha_pattern={"k_proj": 2}
    )
    report = check(adapter, model.path)
    assert keys_of(report) == sorted(tensors)
    assert not report.unused
    assert len(report.unread) == 2
    updates = {update.parameter: update for update in report.updates}
    forms = {parameter: (update.form, update.dora) for parameter, update in updates.items()}
    assert forms == {
        f"{Q}.weight": ("Linear", False),
        f"{Q}.bias": ("bias", False),
        f"{KV}.weight": ("Linear", True),
        "model.norm.weight": ("replaced", False),
        f"{EMBEDDING}.weight": ("tokens", False),
    }
    for module, scale in ((Q, 2.0), (KV, 0.5)):
        found = updates[f"{module}.weight"]
        a, b = (tensors[f"{PREFIX}{module}.lora_{factor}.weight"].double() for factor in "AB")
        assert found.norm == pytest.approx(float((scale * b @ a).norm()), rel=1e-12)
        assert (found.rank, found.scale, found.stored) == (4, scale, "(out, in)")
    bias = tensors[f"{PREFIX}{Q}.lora_B.bias"].double()
    assert updates[f"{Q}.bias"].norm == pytest.approx(2.0 * float(bias.norm()), rel=1e-12)
    assert updates["model.norm.weight"].norm is None


def test_how_matrices_are_stored(tmp_path: Path) -> None:
    model = write_aligned(
        tmp_path / "model", model_type="gpt2", more={f"{C_PROJ}.weight": torch.zeros(12, 12)}
    )
    tensors = random(
        {
            **factors(C_PROJ),
            f"{PREFIX}{EMBEDDING}.lora_embedding_A": torch.ones(4, 20),
            f"{PREFIX}{EMBEDDING}.lora_embedding_B": torch.ones(12, 4),
        }
    )
    report = check(write_adapter(tmp_path / "adapter", tensors), model.path)
    assert {(update.form, update.stored) for update in report.updates} == {
        ("Conv1D", "(in, out)"),
        ("embedding", "(in, out)"),
    }
    result = run("check", tmp_path / "adapter", model.path)
    assert result.exit_code == 0
    assert "Conv1D" in result.stdout
    assert "ties its head" in result.stderr


def test_keys_that_go_nowhere_are_all_listed_and_the_exit_is_a_merge_s(tmp_path: Path) -> None:
    model = write_aligned(tmp_path / "model")
    tensors = random({**factors(), **factors(KV, 4, 5), **factors("model.layers.7.self_attn.q_proj")})
    adapter = write_adapter(tmp_path / "adapter", tensors)
    report = check(adapter, model.path)
    assert keys_of(report) == sorted(tensors)
    assert [len(unused.keys) for unused in report.unused] == [2, 2]
    assert "12 outputs" not in report.unused[0].problem
    with pytest.raises(AdapterError, match=r"^4 of 6 keys go nowhere; the first: adapter: "):
        report.require_all_used()
    with pytest.raises(AdapterError) as raised:
        adapter_terms(open_adapter("adapter", adapter), model)
    assert str(raised.value).replace("aligned", "model") in {unused.problem for unused in report.unused}
    for words in ((), ("--json",), ("-v",)):
        result = run("check", adapter, model.path, *words)
        assert result.exit_code == 3
        assert result.stderr.startswith("error: 4 of 6 keys go nowhere")
        assert result.stderr.count("\n") == 1
    document = json.loads(run("check", adapter, model.path, "--json").stdout)
    assert [key for unused in document["unused"] for key in unused["keys"]] == [
        key for unused in report.unused for key in unused.keys
    ]


def test_json_is_the_report_and_v_lists_every_key(tmp_path: Path) -> None:
    model = write_aligned(tmp_path / "model", tie_word_embeddings=False)
    tensors = random(everything())
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices=[7, 3])
    assert run("check", adapter, model.path, "--json").stdout == check(adapter, model.path).to_json()
    shown = run("check", adapter, model.path, "-v").stdout
    assert all(f"{key} → " in shown for key in tensors)
    assert "2 that nothing needs to read" in shown
    assert run("check", adapter, model.path, "-q").stdout == ""


def test_the_model_s_weights_are_not_read(tmp_path: Path) -> None:
    """They are gone: a file of headers and holes."""
    model = write_aligned(tmp_path / "model", tie_word_embeddings=False)
    adapter = write_adapter(tmp_path / "adapter", random(factors()))
    before = check(adapter, model.path)
    (file,) = model.path.glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    data = file.read_bytes()
    file.write_bytes(data[:header] + b"\xff" * (len(data) - header))
    assert check(adapter, model.path) == before


def test_fused_experts_size_up_to_what_their_dense_updates_do(tmp_path: Path) -> None:
    experts, rank, hidden, inner = 3, 2, 12, 5
    name = "model.layers.0.mlp.experts"
    model = write_aligned(
        tmp_path / "model",
        hidden_size=hidden,
        more={
            f"{name}.gate_up_proj": torch.zeros(experts, 2 * inner, hidden),
            f"{name}.down_proj": torch.zeros(experts, hidden, inner),
        },
        tie_word_embeddings=False,
    )
    tensors = random(
        {
            f"{PREFIX}{name}.base_layer.lora_A.weight": torch.ones(experts * rank, hidden),
            f"{PREFIX}{name}.base_layer.lora_B.weight": torch.ones(2 * inner, rank * experts),
            f"{PREFIX}{name}.lora_A.weight": torch.ones(experts * rank, inner),
            f"{PREFIX}{name}.lora_B.weight": torch.ones(hidden, rank * experts),
        }
    )
    adapter = write_adapter(
        tmp_path / "adapter",
        tensors,
        r=rank,
        lora_alpha=6,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        peft_version="0.21.2",
    )
    norms = {}
    for layout, order in (("peft", "ore,eri->eoi"), ("unsloth", "oer,eri->eoi")):
        report = check(adapter, model.path, expert_lora_layout=layout)
        assert keys_of(report) == sorted(tensors)
        assert report.expert_lora_layout == layout
        assert len([note for note in report.notes if "LoRA of fused experts" in note]) == 1
        for update, wrapper in zip(report.updates, (".base_layer", ""), strict=True):
            a, b = (tensors[f"{PREFIX}{name}{wrapper}.lora_{factor}.weight"].double() for factor in "AB")
            columns = (rank, experts) if layout == "peft" else (experts, rank)
            dense = 3.0 * torch.einsum(order, b.reshape(len(b), *columns), a.reshape(experts, rank, -1))
            assert update.norm == pytest.approx(float(dense.norm()), rel=1e-12)
            assert (update.experts, update.rank, update.form) == (experts, rank, "experts")
            norms[layout, update.parameter] = update.norm
    assert not math.isclose(norms["peft", f"{name}.down_proj"], norms["unsloth", f"{name}.down_proj"])
    assert load_file(adapter / "adapter_model.safetensors").keys() == tensors.keys()
