"""Plans of models with experts: each is merged or kept by itself, in any layout; against torch, element by element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expert_models import look, make, matrices, read, save
from test_experts import ROLES, key_of

from safemerge_fast.checkpoint.model import Model, open_model
from safemerge_fast.decision import Decision
from safemerge_fast.pairing.module import modules_of, modules_of_rows
from safemerge_fast.pairing.rows import Pairing, pair
from safemerge_fast.pairing.view import View
from safemerge_fast.plan.blend import Blend
from safemerge_fast.plan.layout import lay_out
from safemerge_fast.plan.pieces import compose_row
from safemerge_fast.plan.plan import Plan, build_plan
from safemerge_fast.recipes.safemerge.blend import safemerge

ALPHA = 0.75


def view_of(document: dict[str, Any]) -> View:
    return View(document["start"], tuple(document["shape"]), tuple(document["strides"]))


class Interpreter:
    """Makes what a plan says, from its JSON alone: copies and sums, of parts and of wholes."""

    def __init__(self, plan: Plan, models: dict[str, Model]) -> None:
        self.document = json.loads(plan.to_json())
        self.models = models

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        return {
            tensor["name"]: self.tensor(tensor)
            for shard in self.document["shards"]
            for tensor in shard["tensors"]
        }

    def tensor(self, tensor: dict[str, Any]) -> np.ndarray[Any, Any]:
        name = tensor["name"]
        if "pieces" not in tensor:
            whole = self.operation(tensor["operation"], name, None, ())
            return whole.reshape(tensor["shape"]) if "shape" in tensor else whole
        assert "operation" not in tensor
        shape = tuple(tensor["shape"])
        made = np.zeros(int(np.prod(shape)), np.float32)
        covered = np.zeros(made.size, int)
        numbers = np.arange(made.size)
        for piece in tensor["pieces"]:
            view = view_of(piece["view"])
            places = look(numbers, view)
            made[places] = self.operation(piece["operation"], name, view, shape)
            covered[places] += 1
        assert (covered == 1).all()
        return made.reshape(shape)

    def operation(
        self, number: int, name: str, view: View | None, shape: tuple[int, ...]
    ) -> np.ndarray[Any, Any]:
        operation = self.document["operations"][number]
        if "copy" in operation:
            return self.operand(operation["copy"], name, view, shape)
        assert operation["merge"]["method"] == "linear"
        return np.asarray(
            sum(
                np.float32(part["weight"]) * self.operand(part["operand"], name, view, shape)
                for part in operation["merge"]["operands"]
            )
        )

    def operand(
        self, operand: dict[str, Any], name: str, view: View | None, shape: tuple[int, ...]
    ) -> np.ndarray[Any, Any]:
        model = self.models[operand["source"]]
        tensor = operand.get("tensor", name)
        elements, stored = read(model, tensor), tuple(model.headers.tensor(tensor).shape)
        if "view" in operand:
            return look(elements, view_of(operand["view"]))
        if view is not None and stored == shape:
            return look(elements, view)
        return elements.reshape(stored)


def opened(tmp_path: Path, family: str, stacked: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Model]]:
    made, models = {}, {}
    for seed, role in enumerate(ROLES):
        made[role] = make(family, seed)
        models[role] = open_model(role, save(made[role], tmp_path / role, singly=role not in stacked))
    return made, models


def planned(models: dict[str, Model], pairing: Pairing, decisions: dict[str, Decision], blend: Blend) -> Plan:
    return build_plan(
        models, lay_out(pairing.rows), lambda row: compose_row(blend, row, decisions), anchor="finetuned"
    )


def decide_by(pairing: Pairing, merged: set[tuple[str, int, str]]) -> dict[str, Decision]:
    decisions = {row.name: Decision(False, "") for row in pairing.rows if not row.analysed}
    for module in modules_of_rows(pairing.rows):
        decisions[module.name] = Decision(key_of(module.name) in merged, "")
    return decisions


STACKED = [
    ("mixtral", ()),
    ("mixtral", ROLES),
    ("mixtral", ("finetuned",)),
    ("mixtral", ("safe",)),
    ("granitemoe", ("finetuned",)),
    ("gpt_oss", ()),
    ("llama4_text", ()),
    ("jetmoe", ()),
    ("dbrx", ()),
]


@pytest.mark.parametrize(("family", "stacked"), STACKED)
def test_each_expert_is_made_by_its_own_decision(
    tmp_path: Path, family: str, stacked: tuple[str, ...]
) -> None:
    made, models = opened(tmp_path, family, stacked)
    pairing = pair(models)
    ours, safe = (dict(matrices(made[role])) for role in ("finetuned", "safe"))
    merged = {key for number, key in enumerate(sorted(ours)) if number % 3 == 0 or key[1] == 1}
    decisions = decide_by(pairing, merged)
    plan = planned(models, pairing, decisions, safemerge(ALPHA, safe_role="safe", method="linear"))
    tensors = Interpreter(plan, models).tensors()
    for module in modules_of_rows(pairing.rows):
        elements = tensors[module.row.name].reshape(-1)
        stored = look(elements, module.view) if module.view else elements.reshape(module.stored)
        found = stored.T if module.transposed else stored
        if (key := key_of(module.name)) is None:
            continue
        expected = ours[key] if key not in merged else ALPHA * ours[key] + (1 - ALPHA) * safe[key]
        assert np.allclose(found, expected.detach().numpy(), rtol=1e-6, atol=1e-6), key
    others = {row.name for row in pairing.rows} - {
        module.row.name for module in modules_of_rows(pairing.rows)
    }
    for name in others:
        assert np.array_equal(tensors[name].reshape(-1), read(models["finetuned"], name))


def test_experts_that_are_alike_share_a_piece_or_the_whole(tmp_path: Path) -> None:
    """Two operations for all tensors in one layout; neighbours that are made alike are one piece."""
    _, models = opened(tmp_path, "qwen3_moe", ROLES)
    pairing = pair(models)
    blend = safemerge(ALPHA, safe_role="safe", method="linear")
    row = next(row for row in pairing.rows if row.name.endswith("0.mlp.experts.gate_up_proj"))
    modules = [module.name.rpartition("experts.")[2] for module in modules_of(row)]
    assert modules == [f"{expert}.{part}_proj.weight" for expert in range(3) for part in ("gate", "up")]

    def pieces(*merged: str) -> Any:
        decisions = {
            module.name: Decision(
                module.name.rpartition("experts.")[2].removesuffix("_proj.weight") in merged, ""
            )
            for module in modules_of(row)
        }
        plan = build_plan(
            models, lay_out([row]), lambda row: compose_row(blend, row, decisions), anchor="finetuned"
        )
        (tensor,) = json.loads(plan.to_json())["shards"][0]["tensors"]
        kinds = ["copy" if operation.is_copy else "merge" for operation in plan.operations]
        if "pieces" not in tensor:
            return kinds[tensor["operation"]]
        assert len(kinds) == 2
        return [(view_of(piece["view"]), kinds[piece["operation"]]) for piece in tensor["pieces"]]

    assert pieces() == "copy"
    assert pieces(*(f"{expert}.{part}" for expert in range(3) for part in ("gate", "up"))) == "merge"
    # (3, 24, 16): an expert is 24 rows of 16, gate the first 12.
    assert pieces("1.up", "2.gate", "2.up") == [
        (View(0, (36, 16), (16, 1)), "copy"),
        (View(36 * 16, (36, 16), (16, 1)), "merge"),
    ]
    assert pieces("0.up") == [
        (View(0, (12, 16), (16, 1)), "copy"),
        (View(12 * 16, (12, 16), (16, 1)), "merge"),
        (View(24 * 16, (48, 16), (16, 1)), "copy"),
    ]


def test_gate_and_up_that_lie_side_by_side(tmp_path: Path) -> None:
    """Llama 4: (in, out), so that a part of an expert is columns of its slice, and the whole of it is not."""
    _, models = opened(tmp_path, "llama4_text", ())
    pairing = pair(models)
    blend = safemerge(ALPHA, safe_role="safe", method="linear")
    row = next(row for row in pairing.rows if row.name.endswith("0.feed_forward.experts.gate_up_proj"))
    merged = ("experts.0.gate_proj.weight", "experts.0.up_proj.weight", "experts.2.up_proj.weight")
    decisions = {module.name: Decision(module.name.endswith(merged), "") for module in modules_of(row)}
    plan = build_plan(
        models, lay_out([row]), lambda row: compose_row(blend, row, decisions), anchor="finetuned"
    )
    (tensor,) = json.loads(plan.to_json())["shards"][0]["tensors"]
    assert tensor["shape"] == [3, 16, 48]
    assert [piece["view"] for piece in tensor["pieces"]] == [
        {"start": 0, "shape": [16, 48], "strides": [48, 1]},
        {"start": 768, "shape": [16, 48], "strides": [48, 1]},
        {"start": 1536, "shape": [16, 24], "strides": [48, 1]},
        {"start": 1560, "shape": [16, 24], "strides": [48, 1]},
    ]
    numbers = [piece["operation"] for piece in tensor["pieces"]]
    assert numbers == [numbers[0], numbers[1], numbers[1], numbers[0]]


def test_a_method_that_looks_at_whole_matrices_gets_one_expert_at_a_time(tmp_path: Path) -> None:
    _, models = opened(tmp_path, "qwen3_moe", ROLES)
    pairing = pair(models)
    blend = safemerge(ALPHA, safe_role="safe", method="ties")
    row = next(row for row in pairing.rows if row.name.endswith("0.mlp.experts.gate_up_proj"))
    decisions = {module.name: Decision(True, "") for module in modules_of(row)}
    plan = build_plan(
        models, lay_out([row]), lambda row: compose_row(blend, row, decisions), anchor="finetuned"
    )
    (tensor,) = json.loads(plan.to_json())["shards"][0]["tensors"]
    assert [piece["view"]["shape"] for piece in tensor["pieces"]] == [[12, 16]] * 6
    assert len(plan.operations) == 1
