"""Small quartets of quantised models, and what each role's tensors are as numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import write_quartet
from dense import linear, load, rho
from quantised_formats import BF16, Array, Form
from torch import Tensor

ROLES = ("base", "aligned", "finetuned", "safe")


def encode_tensors(
    tensors: Mapping[str, Tensor], form_of: Callable[[str], Form | None], *, apart: bool = True
) -> dict[str, Tensor]:
    """What a checkpoint stores for tensors.

    Args:
        tensors: The tensors as numbers.
        form_of: The format of a tensor, or None.
        apart: Whether scales stand at the end, so that they lie in another file than their codes.
    """
    stored: dict[str, Tensor] = {}
    behind: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        form = form_of(name)
        if form is None:
            stored[name] = tensor
            continue
        codes, *others = form.encode(name, tensor.double().numpy()).items()
        stored[codes[0]] = codes[1]
        (behind if apart else stored).update(others)
    return {**stored, **behind}


@dataclass(frozen=True)
class Role:
    """A model on disk, and its tensors.

    Attributes:
        path: The directory.
        forms: The format of each quantised tensor, by its logical name.
    """

    path: Path
    forms: Mapping[str, Form]

    @property
    def stored(self) -> dict[str, Tensor]:
        """All stored tensors."""
        return load(self.path)

    def exact(self) -> dict[str, Array]:
        """All tensors as numbers, in float64."""
        stored = self.stored
        return {name: np.asarray(value.double().numpy()) for name, value in self._plain(stored).items()} | {
            name: form.decode(name, stored) for name, form in self.forms.items()
        }

    def single(self) -> dict[str, Tensor]:
        """All tensors as numbers, quantised ones in float32 as its arithmetic decodes them."""
        stored = self.stored
        return self._plain(stored) | {
            name: form.decode_single(name, stored) for name, form in self.forms.items()
        }

    def _plain(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = {part for name, form in self.forms.items() for part in form.names(name)}
        return {name: tensor for name, tensor in stored.items() if name not in parts}


@dataclass(frozen=True)
class Quartet:
    """Four models.

    Attributes:
        roles: By their names.
    """

    roles: Mapping[str, Role]

    @property
    def paths(self) -> dict[str, Path]:
        """The directories, by role."""
        return {name: role.path for name, role in self.roles.items()}

    def words(self) -> dict[str, str]:
        """The directories as the API takes them."""
        return {name: str(path) for name, path in self.paths.items()}

    def merged(self, names: Collection[str], alpha: float = 0.8) -> dict[str, Tensor]:
        """The linear merge of some tensors in float32, as a chain of fused multiply-adds."""
        finetuned, safe = self.roles["finetuned"].single(), self.roles["safe"].single()
        single = torch.float32
        return {name: linear([(finetuned[name], alpha), (safe[name], 1 - alpha)], single) for name in names}

    def cosine(self, name: str) -> float:
        """ρ of a tensor, in float64."""
        base, aligned, finetuned = (
            torch.from_numpy(self.roles[role].exact()[name]) for role in ("base", "aligned", "finetuned")
        )
        return rho(base, aligned, finetuned)


def llama_quartet(
    path: Path,
    form: Form,
    *,
    roles: Collection[str] = ROLES,
    quantization: Mapping[str, Any] | None = None,
    edit: Callable[[str, dict[str, Tensor]], None] | None = None,
    **options: Any,
) -> Quartet:
    """A quartet of Llamas whose projections are quantised in some roles.

    Args:
        path: Where to.
        form: The format.
        roles: Roles that are quantised; the others are the same numbers in bfloat16.
        quantization: What config.json says of it.
        edit: Changes what is stored.
        **options: As for write_quartet.
    """
    wide = {"hidden": 96, "intermediate": 320, "layers": 2, "vocabulary": 65}
    forms: dict[str, dict[str, Form]] = {role: {} for role in ROLES}

    def store(role: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        def form_of(name: str) -> Form | None:
            if not name.endswith("_proj.weight") or role not in roles:
                return None
            forms[role][name] = form
            return form

        stored = encode_tensors(tensors, form_of)
        if edit is not None:
            edit(role, stored)
        return stored

    def speak(role: str, config: dict[str, Any]) -> None:
        if role in roles:
            config["quantization_config"] = dict(
                {"quant_method": "fp8"} if quantization is None else quantization
            )

    paths = write_quartet(path, edit=store, edit_config=speak, **{**wide, **options})
    return Quartet({role: Role(directory, forms[role]) for role, directory in paths.items()})


def assert_requantised(form: Form, name: str, found: Mapping[str, Tensor], wanted: Array) -> None:
    """What is stored is the best that its scales can say of the numbers, and the scales are those of the format's rule.

    Numbers are computed in float32: a code may be the neighbour where the exact quotient is as good as halfway.
    """
    decoded = form.decode(name, found)
    slack = 1e-6 * np.abs(wanted).max()
    assert np.all(np.abs(decoded - wanted) <= np.abs(form.best(name, found, wanted) - wanted) + slack), name
    expected = form.factors(name, form.encode(name, wanted, like=found), wanted.shape)
    scales = form.factors(name, found, wanted.shape)
    step = {"f32": 2.0**-23, "bf16": 2.0**-8, "e4m3": 2.0**-3}.get(form.scale, 1.0)
    other = scales != expected
    assert np.all(np.abs(scales - expected) <= 1.01 * step * expected), name
    if form.scale != "f32":
        assert other.mean() < 0.02, name


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )


def bfloat16(tensor: Tensor) -> Tensor:
    """As a dequantised tensor is stored."""
    return tensor.to(BF16)
