"""A checkpoint and an adapter of it alone: one row per tensor, with what the adapter makes of it."""

from __future__ import annotations

from dataclasses import replace

from .._engine import TensorInfo
from ..checkpoint.adapter import Adapter
from ..checkpoint.model import Model
from .adapted_stack import AdaptedStack, slices_of
from .adapter_terms import adapter_notes, adapter_terms
from .encoded import encoded_of
from .expert_updates import StackedUpdate
from .modules import Classifier, layer_of, module_type
from .operand import Operand, Term
from .orientation import Orientations
from .row import Row, Shared
from .rows import Pairing, config_notes, in_file_order, untied_note
from .stack import Slices
from .structure import structure_of
from .untied import untied_config, untied_head

__all__ = ["pair_adapter"]


def pair_adapter(model: Model, adapter: Adapter, *, untie: bool = False) -> Pairing:
    """Pairs a checkpoint with an adapter of it alone; nothing is to be analysed.

    Args:
        model: The checkpoint.
        adapter: The adapter.
        untie: Whether a tied head becomes a tensor of its own, which the adapter then leaves as it is.

    Returns:
        A row per tensor of the checkpoint; both roles' terms are in each.

    Raises:
        AdapterError: The adapter does not fit the checkpoint.
    """
    adapted = adapter_terms(adapter, model)
    structure = structure_of(model, (adapter,))
    classify, orientations = Classifier(model, structure), Orientations(model, structure)
    shared = Shared((model.role,))

    def taken_apart(update: StackedUpdate) -> Slices:
        slices = slices_of(update)
        (tensor,) = update.stored.tensors
        stack = AdaptedStack(adapter.role, model.role, tensor, slices.stack, update)
        return replace(slices, elsewhere={adapter.role: stack})

    def row(tensor: TensorInfo) -> Row:
        # Only a tensor that is adapted expert by expert is taken apart.
        update = adapted.stacks.get(tensor.name)
        slices = None if update is None else taken_apart(update)
        plain = (Term(Operand(model.role, tensor.name)),)
        return Row(
            name=tensor.name,
            file=shared(tensor.file),
            dtype=shared(tensor.dtype),
            shape=shared(tensor.shape),
            names={model.role: tensor.name},
            module_type=shared(module_type(tensor.name, classify(tensor))),
            layer=shared(layer_of(tensor.name)),
            analysed=False,
            transposed=orientations.is_stored_transposed(tensor)
            if slices is None
            else slices.stack.transposed,
            reason="adapted" if tensor.name in adapted else "not adapted",
            adapted={} if slices is not None else {adapter.role: adapted.terms.get(tensor.name, plain)},
            slices=slices,
            encoded=encoded_of(tensor, model.role),
        )

    rows = tuple(row(tensor) for tensor in in_file_order(model))
    notes = (*adapter_notes(adapter, model, adapted.terms), *config_notes({model.role: model}))
    if not untie:
        return Pairing(rows, {}, notes)
    head = untied_head(model, {}, {}, (adapter.role,), model.role)
    if head is None:
        return Pairing(rows, {}, notes, untied_config(model.config))
    notes = (*config_notes({model.role: model}), untied_note(head, model.role))
    return Pairing((*rows, head), {}, notes, untied_config(model.config))
