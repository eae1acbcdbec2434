"""Checks an adapter against its model before any work: which key goes where, how it is understood, how large it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

from ..analysis.update_sizes import UpdateSizes
from ..checkpoint.adapter import Adapter, open_adapter
from ..checkpoint.model import Model, open_model
from ..errors import AdapterError
from ..pairing.adapter_terms import AdapterUses, adapter_notes, adapter_uses
from ..settings import ExpertLoraLayout, Kind, Progress, ReadBackend, Setting, Settings
from .roles import access_of

__all__ = ["CheckReport", "CheckSettings", "CheckedUpdate", "UnusedKey", "check_adapter"]


class CheckSettings(Settings, frozen=True):
    """What to check, and against what."""

    recipe: ClassVar[str] = "check"

    adapter: Annotated[
        str, Setting("The adapter.", kind=Kind.MODEL, metavar="ADAPTER", on_command_line=False)
    ]
    model: Annotated[
        str,
        Setting(
            "The checkpoint that the adapter was trained on; only its headers are read.",
            kind=Kind.MODEL,
            metavar="MODEL",
            on_command_line=False,
        ),
    ]
    expert_lora_layout: ExpertLoraLayout = "peft"
    read_backend: ReadBackend = "auto"
    progress: Progress = None


@dataclass(frozen=True, slots=True)
class CheckedUpdate:
    """One change that an adapter makes to a parameter.

    Attributes:
        parameter: The parameter's name in the model that was trained.
        form: "Linear", "Conv1D" (stored as (in, out)), "embedding", "experts", "bias", "tokens" or "replaced".
        dora: Whether the matrix is rescaled to norms of the adapter's besides (DoRA).
        tensors: The checkpoint's tensors that change; several where it has one for each expert.
        shape: The shape of the first.
        experts: How many matrices change, if they are experts.
        stored: "(out, in)" or "(in, out)", as each matrix is stored; None where nothing is multiplied.
        rank: The rank of the product, of each expert's if they are experts; 0 where there is none.
        scale: The factor s of s·B·A.
        norm: ‖s·B·A‖ over all experts, or of what is added to a bias; None where tensors or rows are replaced, since
            that depends on the model's.
        keys: The keys that make it.
    """

    parameter: str
    form: str
    dora: bool
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    experts: int
    stored: str | None
    rank: int
    scale: float
    norm: float | None
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UnusedKey:
    """Keys that nothing can be made of.

    Attributes:
        keys: The keys.
        problem: Why, in a sentence.
    """

    keys: tuple[str, ...]
    problem: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What an adapter is to a model.

    Attributes:
        adapter: The adapter's directory.
        model: The model's.
        expert_lora_layout: How B of fused experts was read; None if there is no LoRA of such.
        updates: All changes, in the order of the adapter's file.
        unread: Keys that PEFT stores twice or of the untrained model, which nothing reads.
        unused: Keys that go nowhere. A merge is refused if there are any.
        notes: What a person should know, in sentences.
    """

    adapter: str
    model: str
    expert_lora_layout: str | None
    updates: tuple[CheckedUpdate, ...]
    unread: tuple[str, ...]
    unused: tuple[UnusedKey, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Writes the report as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def require_all_used(self) -> None:
        """Does what a merge does if some keys go nowhere.

        Raises:
            AdapterError: There are such keys.
        """
        if self.unused:
            count = sum(len(unused.keys) for unused in self.unused)
            total = count + sum(len(update.keys) for update in self.updates)
            raise AdapterError(f"{count} of {total} keys go nowhere; the first: {self.unused[0].problem}")


def check_adapter(settings: CheckSettings) -> CheckReport:
    """Checks an adapter: reads its factors, and of the model nothing but headers.

    Args:
        settings: What to check.

    Returns:
        The report, in which every key of the adapter is; those that go nowhere too.

    Raises:
        CheckpointError: The model cannot be found, read or trusted.
        AdapterError: The adapter cannot be read or is of a kind that cannot be merged exactly.
    """
    access = access_of(settings)
    adapter = open_adapter("adapter", settings.adapter, access=access)
    model = open_model("model", settings.model, access=access)
    uses = adapter_uses(adapter, model)
    updates = (*_module_updates(adapter, model, uses), *_stacked_updates(adapter, model, uses))
    lost = [(use.keys, use.problem) for use in uses.modules]
    lost += [(use.group.keys, use.problem) for use in uses.parameters]
    unused = tuple(UnusedKey(keys, problem) for keys, problem in lost if problem is not None)
    spoken_of = {key for update in updates for key in update.keys} | {key for keys, _ in lost for key in keys}
    terms = {use.tensor: use.terms for use in uses.modules if use.tensor is not None and use.terms}
    return CheckReport(
        adapter=str(adapter.path),
        model=model.location,
        expert_lora_layout=settings.expert_lora_layout if adapter.parameters else None,
        updates=updates,
        unread=tuple(key for key in adapter.headers.names if key not in spoken_of),
        unused=unused,
        notes=tuple(adapter_notes(adapter, model, terms)),
    )


def _module_updates(adapter: Adapter, model: Model, uses: AdapterUses) -> Iterator[CheckedUpdate]:
    """What changes of modules."""
    sizes = UpdateSizes(adapter)
    for use in uses.modules:
        if use.problem is not None or use.tensor is None:
            continue
        module, operand = use.module, use.terms[0].operand
        form, stored, rank, norm = "replaced", None, 0, None
        if operand.low_rank:
            (product,) = operand.low_rank
            form = "embedding" if module.is_embedding else "Conv1D" if product.transpose else "Linear"
            stored = _STORED[product.transpose]
            rank, norm = product.rank, sizes.of_product(product)
        elif operand.rows is not None:
            form = "tokens"
        elif use.parameter == "bias" and module.b_bias is not None:
            form, norm = "bias", sizes.of_tensor(module.b_bias, module.scale)
        yield CheckedUpdate(
            parameter=f"{module.name}.{use.parameter}",
            form=form,
            dora=operand.magnitude is not None,
            tensors=(use.tensor,),
            shape=tuple(model.headers.tensor(use.tensor).shape),
            experts=0,
            stored=stored,
            rank=rank,
            scale=module.scale,
            norm=norm,
            keys=use.keys,
        )


def _stacked_updates(adapter: Adapter, model: Model, uses: AdapterUses) -> Iterator[CheckedUpdate]:
    """What changes of bare parameters."""
    sizes = UpdateSizes(adapter)
    for use in uses.parameters:
        for update in use.updates:
            stored = update.stored
            products = [
                product
                for piece in update.pieces(adapter.role, model.role)
                for product in piece.term.operand.low_rank
            ]
            yield CheckedUpdate(
                parameter=update.parameter,
                form="Linear" if stored.is_matrix else "experts",
                dora=False,
                tensors=stored.tensors,
                shape=tuple(model.headers.tensor(stored.tensors[0]).shape),
                experts=0 if stored.is_matrix else update.experts,
                stored=_STORED[update.transposed],
                rank=update.rank,
                scale=update.scale,
                norm=math.hypot(*(sizes.of_product(product) for product in products)),
                keys=(update.factors.a, update.factors.b),
            )


_STORED = {False: "(out, in)", True: "(in, out)"}
