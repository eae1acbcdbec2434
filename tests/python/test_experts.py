"""Experts: which part of which tensor is an expert's matrix, against transformers' models; roles in any layout."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expert_models import FAMILIES, SAVED_SINGLY, make, matrices, save, value

from safemerge_fast.checkpoint.model import Model, open_model
from safemerge_fast.pairing.module import Module, modules_of_rows
from safemerge_fast.pairing.rows import pair

ROLES = ("base", "aligned", "finetuned", "safe")

_ATTENTION = re.compile(r"self_attention\.experts|self_attn")
_KINDS = {
    "gate": r"(gate_proj|w1)\.weight",
    "up": r"(up_proj|w3|v1)\.weight",
    "down": r"(down_proj|w2)\.weight",
    "input": r"input_linear\.weight",
    "output": r"output_linear\.weight",
}


@cache
def model_of(family: str, seed: int) -> Any:
    return make(family, seed)


def key_of(name: str) -> tuple[str, int, str] | None:
    """The key that expert_models.matrices gives the matrix that a module is called as."""
    match = re.search(r"(?:layers|blocks)\.(\d+)\.(.*)\bexperts\.(\d+)\.(.*)$", name)
    if match is None or "shared" in match[2]:
        return None
    part = "attention" if "attention" in match[2] else "mlp"
    kind = next(kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, match[4]))
    return f"{match[1]}.{part}", int(match[3]), kind


def opened(tmp_path: Path, family: str, singly: dict[str, bool]) -> dict[str, Model]:
    models = {}
    for seed, role in enumerate(ROLES):
        path = save(model_of(family, seed), tmp_path / role, singly=singly[role])
        models[role] = open_model(role, path)
    return models


def experts(models: dict[str, Model]) -> dict[tuple[str, int, str], Module]:
    pairing = pair(models)
    found: dict[tuple[str, int, str], Module] = {}
    for module in modules_of_rows(pairing.rows):
        if (key := key_of(module.name)) is not None:
            assert key not in found
            found[key] = module
    return found


def check(models: dict[str, Model], family: str) -> None:
    """Every expert's matrix of every role is what the model of transformers computes with."""
    found = experts(models)
    for seed, role in enumerate(ROLES):
        expected = dict(matrices(model_of(family, seed)))
        assert found.keys() == expected.keys()
        for key, module in found.items():
            stored = value(models, module.terms[role])
            matrix = stored.T if module.transposed else stored
            assert matrix.shape == module.shape
            assert np.array_equal(matrix, expected[key].detach().numpy()), (key, role)


@pytest.mark.parametrize(
    ("family", "singly"),
    [
        *((family, True) for family in FAMILIES),
        *((family, False) for family in (*SAVED_SINGLY, "granitemoe")),
    ],
)
def test_every_expert_of_every_family_is_a_module(tmp_path: Path, family: str, singly: bool) -> None:
    check(opened(tmp_path, family, dict.fromkeys(ROLES, singly)), family)


@pytest.mark.parametrize("family", [*SAVED_SINGLY, "granitemoe"])
@pytest.mark.parametrize("stacked", ["finetuned", "base", "aligned,finetuned", "base,aligned,safe"])
def test_roles_may_differ_in_layout(tmp_path: Path, family: str, stacked: str) -> None:
    singly = {role: role not in stacked.split(",") for role in ROLES}
    check(opened(tmp_path, family, singly), family)


@pytest.mark.parametrize("family", SAVED_SINGLY)
def test_names_do_not_depend_on_the_layout(tmp_path: Path, family: str) -> None:
    names = []
    for singly in (True, False):
        models = opened(tmp_path / str(singly), family, dict.fromkeys(ROLES, singly))
        names.append({module.name for module in experts(models).values()})
    if family == "nemotron_h":  # transformers calls the whole model otherwise, too
        names[0] = {name.replace("backbone.", "model.", 1) for name in names[0]}
    assert names[0] == names[1]
