"""How stacked experts lie, from shapes alone: what decides it, what is said where nothing does, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from expert_models import value
from test_pairing import Shapes, model, models

from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.errors import PairingError
from safemerge_fast.pairing.expert_facts import HALVES, ExpertFacts
from safemerge_fast.pairing.module import Module, modules_of_rows
from safemerge_fast.pairing.rows import Pairing, pair

L = "model.layers.0"
QWEN = {"model_type": "qwen3_moe", "num_experts": 5, "hidden_size": 8}


def modules(pairing: Pairing) -> dict[str, Module]:
    return {module.name: module for module in modules_of_rows(pairing.rows)}


def shapes(pairing: Pairing) -> dict[str, tuple[tuple[int, ...], bool]]:
    """(out, in) and whether it is stored the other way round, of the first expert's matrices."""
    return {
        module.name.partition("experts.0.")[2]: (module.shape, module.transposed)
        for module in modules(pairing).values()
        if "experts.0." in module.name
    }


def test_gate_up_and_down_fit_in_one_direction_only() -> None:
    """Without any configuration, direction is known; where gate and up lie is not, and that is said."""
    stacked = {f"{L}.mlp.experts.gate_up_proj": (5, 12, 8), f"{L}.mlp.experts.down_proj": (5, 8, 6)}
    pairing = pair(models(stacked))
    assert shapes(pairing) == {"gate_up_proj": ((12, 8), False), "down_proj.weight": ((8, 6), False)}
    assert len(modules(pairing)) == 10
    assert {module.module_type for module in modules(pairing).values()} == {
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    assert [note for note in pairing.notes if "where gate and up lie" in note and "finetuned" in note]
    turned = {f"{L}.mlp.experts.gate_up_proj": (5, 8, 12), f"{L}.mlp.experts.down_proj": (5, 6, 8)}
    assert shapes(pair(models(turned))) == {
        "gate_up_proj": ((12, 8), True),
        "down_proj.weight": ((8, 6), True),
    }


@pytest.mark.parametrize("config", [QWEN, {"text_config": {"deeper": QWEN}, "hidden_size": 99}])
def test_the_family_says_where_gate_and_up_lie_however_deep_it_stands(config: dict[str, Any]) -> None:
    stacked = {f"{L}.mlp.experts.gate_up_proj": (5, 12, 8), f"{L}.mlp.experts.down_proj": (5, 8, 6)}
    pairing = pair(models(stacked, config))
    assert shapes(pairing) == {
        "gate_proj.weight": ((6, 8), False),
        "up_proj.weight": ((6, 8), False),
        "down_proj.weight": ((8, 6), False),
    }
    assert not [note for note in pairing.notes if "gate and up" in note]


def test_any_role_may_know_the_family() -> None:
    stacked = {f"{L}.mlp.experts.gate_up_proj": (5, 12, 8), f"{L}.mlp.experts.down_proj": (5, 8, 6)}
    opened = models(stacked)
    opened["base"] = model("base", stacked, QWEN)
    assert set(shapes(pair(opened))) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


SQUARE = {f"{L}.mlp.experts.up_proj": (5, 8, 8), f"{L}.mlp.experts.down_proj": (5, 8, 8)}
LONELY = {f"{L}.mlp.experts.down_proj": (5, 8, 6)}


@pytest.mark.parametrize(
    ("stacked", "config", "transposed"),
    [
        pytest.param(SQUARE, {"model_type": "nemotron_h"}, None, id="an unknown family"),
        pytest.param(SQUARE, {"model_type": "llama4"}, True, id="the family, last"),
        pytest.param(SQUARE, {"model_type": "qwen3_vl_moe"}, None, id="a family that has both"),
        pytest.param(LONELY, {}, None, id="nothing"),
        pytest.param(LONELY, {"num_experts": 5, "hidden_size": 8}, False, id="hidden size is out"),
        pytest.param(LONELY, {"num_experts": 5, "hidden_size": 6}, True, id="hidden size is in"),
        pytest.param({**LONELY, f"{L}.mlp.experts.down_proj_bias": (5, 6)}, {}, True, id="a bias"),
        pytest.param({**LONELY, f"{L}.mlp.gate.weight": (5, 8)}, {}, False, id="the router"),
        pytest.param(
            {f"{L}.moe.gate_proj.weight": (5, 6, 8), f"{L}.moe.up_proj.weight": (5, 6, 8)},
            {"model_type": "step3p7", "moe_num_experts": 5, "hidden_size": 8},
            False,
            id="gate and up apart",
        ),
    ],
)  # fmt: skip
def test_what_decides_the_direction(stacked: Shapes, config: dict[str, Any], transposed: bool | None) -> None:
    pairing = pair(models(stacked, config))
    found = {row.name: row for row in pairing.rows if len(row.shape) == 3}
    notes = [note for note in pairing.notes if "tensors of experts lie in finetuned is not known" in note]
    if transposed is None:
        assert not modules(pairing)
        assert len(notes) == 1
        assert {row.reason for row in found.values()} == {"fused experts"}
    else:
        assert {row.transposed for row in found.values()} == {transposed}
        assert all(row.analysed for row in found.values())
        assert notes == []


def test_sides_that_contradict_each_other_are_not_guessed_at() -> None:
    stacked = {f"{L}.mlp.experts.gate_up_proj": (5, 12, 8), f"{L}.mlp.experts.down_proj": (5, 7, 9)}
    pairing = pair(models(stacked, QWEN))
    assert not modules(pairing)
    assert any("fit no other tensor of the layer" in note for note in pairing.notes)


def test_experts_that_are_not_the_first_axis_are_not_guessed_at() -> None:
    pairing = pair(models({f"{L}.mlp.experts.down_proj": (8, 5, 6)}, QWEN))
    assert not modules(pairing)
    assert any("has their number elsewhere" in note for note in pairing.notes)


def test_what_is_no_stack_of_experts() -> None:
    others = {
        f"{L}.mlp.down_proj.weight": (8, 6),
        f"{L}.mlp.shared_experts.gate_proj.weight": (6, 8),
        f"{L}.mlp.experts.gate_up_proj_bias": (5, 12),
        "model.layers.40.mlp.experts.down_proj": (5, 8, 6),
        "mtp.layers.0.mlp.experts.down_proj": (5, 8, 6),
        f"{L}.mlp.experts.down_proj I8": (5, 8, 6),
        f"{L}.conv.w1.weight": (7, 8, 3),
    }
    pairing = pair(models(others, {**QWEN, "num_hidden_layers": 30}))
    assert set(modules(pairing)) == {
        f"{L}.mlp.down_proj.weight",
        f"{L}.mlp.shared_experts.gate_proj.weight",
    }


def test_stacked_experts_can_be_left_out() -> None:
    stacked = {f"{L}.mlp.experts.gate_up_proj": (5, 12, 8), f"{L}.mlp.experts.down_proj": (5, 8, 6)}
    pairing = pair(models(stacked, QWEN), exclude="gate_up")
    assert {row.name.rpartition(".")[2]: row.reason for row in pairing.rows} == {
        "gate_up_proj": "excluded",
        "down_proj": "projection",
    }


def singles(
    gate: str, up: str, down: str, *, experts: int = 5, block: str = "mlp"
) -> dict[str, tuple[int, int]]:
    return {
        f"{L}.{block}.experts.{expert}.{leaf}.weight": (8, 6) if leaf == down else (6, 8)
        for expert in range(experts)
        for leaf in (gate, up, down)
    }


STACKED = {f"{L}.mlp.experts.gate_up_proj": (5, 12, 8), f"{L}.mlp.experts.down_proj": (5, 8, 6)}


@pytest.mark.parametrize(
    ("finetuned", "base", "config", "message"),
    [
        (STACKED, singles("gate_proj", "up_proj", "down_proj", experts=4), QWEN, r"4 experts of \(6, 8\) in base"),
        (singles("w1", "w3", "w2"), STACKED, {}, "gate and up in one, at places that are not known, in base"),
        (STACKED, singles("w1", "w3", "w2"), {}, "without gate and up in base"),
        (STACKED, {f"{L}.mlp.experts.gate_up_proj": (5, 12, 8)}, QWEN, "without down in base"),
        (STACKED, {"model.norm.weight": (8,)}, QWEN, "missing in base"),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit_are_refused(
    finetuned: Shapes, base: Shapes, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(PairingError, match=message):
        pair({**models(finetuned, config), "base": model("base", base, config)})


def test_a_layer_of_further_prediction_is_not_taken_for_another(tmp_path: Path) -> None:
    """Layer 0 of the model and of its MTP part hold experts of one shape; single experts go with their own."""
    deep = {f"mtp.layers.0.mlp.experts.{leaf}": shape for leaf, shape in
            (("gate_up_proj", (5, 12, 8)), ("down_proj", (5, 8, 6)))}  # fmt: skip
    base = {
        **singles("gate_proj", "up_proj", "down_proj"),
        **{
            name.replace("model.", "mtp."): shape
            for name, shape in singles("gate_proj", "up_proj", "down_proj").items()
        },
    }
    pairing = pair({**models({**STACKED, **deep}, QWEN), "base": model("base", base, QWEN)})
    assert len(modules(pairing)) == 15
    for module in modules(pairing).values():
        (term,) = module.terms["base"]
        assert term.operand.tensor == module.name
    assert pairing.unused["base"] == ()


@pytest.mark.parametrize("turned_role", ["base", "finetuned", "safe"])
def test_gpt_oss_as_it_is_and_as_its_blocks_of_four_bits_decode(tmp_path: Path, turned_role: str) -> None:
    """[E, in, out] in BF16, [E, out, in] decoded: the square down projection differs, though its shape does not."""
    torch.manual_seed(0)
    opened, expected = {}, {}
    config = {"model_type": "gpt_oss", "num_local_experts": 3, "hidden_size": 8, "intermediate_size": 8}
    for role in ("base", "aligned", "finetuned", "safe"):
        gate_up, down = torch.randn(3, 8, 16), torch.randn(3, 8, 8)
        expected[role] = {
            f"{L}.mlp.experts.{expert}.{part}_proj.weight": matrix
            for expert in range(3)
            for part, matrix in (
                ("gate", gate_up[expert, :, ::2].T),
                ("up", gate_up[expert, :, 1::2].T),
                ("down", down[expert].T),
            )
        }
        if role == turned_role:
            gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        tensors = {f"{L}.mlp.experts.gate_up_proj": gate_up, f"{L}.mlp.experts.down_proj": down}
        opened[role] = open_model(role, write_checkpoint(tmp_path / role, tensors, config))
    found = modules(pair(opened))
    assert found.keys() == expected["base"].keys()
    for role, matrices in expected.items():
        for name, matrix in matrices.items():
            stored = value(opened, found[name].terms[role])
            assert np.array_equal(stored.T if found[name].transposed else stored, matrix.numpy())


def test_alternating_rows_that_inkling_writes_as_w13(tmp_path: Path) -> None:
    torch.manual_seed(0)
    w13, w2 = torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    config = {"model_type": "inkling_text", "num_experts": 3, "hidden_size": 8}
    tensors = {f"{L}.mlp.experts.w13_weight": w13, f"{L}.mlp.experts.w2_weight": w2}
    path = write_checkpoint(tmp_path, tensors, config)
    opened = {role: open_model(role, path) for role in ("base", "aligned", "finetuned")}
    found = modules(pair(opened))
    for expert in range(3):
        for part, matrix in (("gate", w13[expert, ::2]), ("up", w13[expert, 1::2]), ("down", w2[expert])):
            module = found[f"{L}.mlp.experts.{expert}.{part}_proj.weight"]
            assert np.array_equal(value(opened, module.terms["base"]), matrix.numpy())


def test_the_families_are_those_of_transformers() -> None:
    """Which families compute with halves, by their own classes; a new family must be looked at."""
    import pkgutil

    import transformers.models

    concatenated: set[str] = set()
    alternating: set[str] = set()
    transposed: set[str] = set()
    for entry in pkgutil.iter_modules(transformers.models.__path__):
        file = Path(transformers.models.__path__[0]) / entry.name / f"modeling_{entry.name}.py"
        if not file.exists() or "use_experts_implementation" not in file.read_text(encoding="utf-8"):
            continue
        source = file.read_text(encoding="utf-8")
        if "has_gate=False" in source:
            continue
        (alternating if "is_concatenated=False" in source else concatenated).add(entry.name)
        if "is_transposed=True" in source:
            transposed.add(entry.name)
    assert concatenated - HALVES == set()
    for family in concatenated:
        assert ExpertFacts({"model_type": family}).split("gate_up_proj") == "halves"
    for family in alternating:
        assert ExpertFacts({"model_type": family}).split("gate_up_proj") == "alternating"
    for family in transposed:
        assert ExpertFacts({"model_type": family}).is_transposed


def test_the_experts_of_a_layer_are_one_line(tmp_path: Path) -> None:
    """Single or stacked; other modules have a line each."""
    from safemerge_fast.analysis.score import Score
    from safemerge_fast.report.expert_lines import ExpertLine, lines

    attention = {f"{L}.self_attn.q_proj.weight": (8, 8)}
    for tensors in (STACKED, singles("gate_proj", "up_proj", "down_proj")):
        pairing = pair(models({**tensors, **attention}, QWEN))
        rhos = {name: 0.1 * place for place, name in enumerate(sorted(modules(pairing)))}
        scores = {name: Score(rho, 0.5, 1.0, 1.0, 1.0, 0.0, None) for name, rho in rhos.items()}
        found = list(lines(pairing.modules, scores))
        assert sorted(line.module_type for line in found) == [
            "experts.down_proj",
            "experts.gate_proj",
            "experts.up_proj",
            "q_proj",
        ]
        for line in found:
            if isinstance(line, ExpertLine):
                # Sorted names: experts 0 to 4, each down, gate, up.
                first = {"down": 0, "gate": 1, "up": 2}[line.module_type[8:-5]]
                assert line.rhos == pytest.approx([0.1 * (first + 3 * expert) for expert in range(5)])
                assert line.name == f"{L}, 5 experts"
                below = sum(rho < 0.35 for rho in line.rhos)
                assert f"{below} of 5 below" in line.describe(0.35)
