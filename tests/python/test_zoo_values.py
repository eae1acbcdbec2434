"""ρ of models that transformers made and saved, against float64 on the modules' own weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import rho
from small_models import bert_and_gpt2, bert_with_a_head, ctrl, gpt2, lfm2, t5
from torch import nn
from transformers.pytorch_utils import Conv1D

from safemerge_fast import analyze

IN_LAYER = re.compile(r"\.\d+\.")


def moved(model: Any, seed: int, size: float) -> None:
    """Adds noise to all floats, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """(out, in) of the matrices in layers, by the names of their modules."""
    return {
        f"{name}.weight": (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and IN_LAYER.search(name)
    }


@pytest.mark.parametrize("build", [gpt2, bert_and_gpt2, lfm2, t5, bert_with_a_head, ctrl])
@pytest.mark.parametrize("without", [(), ("finetuned",), ("base", "aligned")])
def test_rho_of_what_linear_modules_own(
    tmp_path: Path, build: Callable[[], Any], without: tuple[str, ...]
) -> None:
    """Also where the config.json of some roles is missing."""
    torch.manual_seed(0)
    model = build()
    found = {}
    for number, (role, size) in enumerate((("base", 0.0), ("aligned", 0.02), ("finetuned", 0.02))):
        moved(model, number, size)
        model.save_pretrained(tmp_path / role)
        found[role] = weights(model)
        if role in without:
            (tmp_path / role / "config.json").unlink()
    scores = analyze(**{role: tmp_path / role for role in found}).modules
    in_layers = {name for name in scores if IN_LAYER.search(name)}
    assert in_layers == set(found["base"])
    for name in in_layers:
        expected = rho(*(found[role][name] for role in ("base", "aligned", "finetuned")))
        assert scores[name].rho == pytest.approx(expected, abs=2e-6), name
    tables = re.compile(r"lm_head|embed|relative_attention|\.w\.|wte|wpe|decoder\.weight")
    assert not [name for name in scores if tables.search(name.replace("embed_tokens", "embed"))]
