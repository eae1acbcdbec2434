"""Stage 2, pairing: one row per output tensor, its counterparts by name, and whether to analyse it.

Tensors are matched by name, never by position. Only headers and configurations are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._engine import TensorInfo
from ..checkpoint.adapter import Adapter
from ..checkpoint.model import FLOATS, ROLES, Model, quantization_method
from ..errors import PairingError
from .adapter_terms import adapter_notes, adapter_terms
from .counterparts import Counterparts, counterparts
from .encoded import encoded_of
from .experts import Experts, find_experts
from .missing import (
    Lacking,
    Missing,
    filled_config,
    filled_rows,
    lacking_tensors,
    reduced_config,
    require_complete,
)
from .module import Module, modules_of_rows
from .modules import (
    EMBEDDING,
    HEAD,
    MTP,
    PROJECTION,
    Classifier,
    is_float_matrix,
    layer_of,
    lies_in_layer,
    module_type,
)
from .names import match_names
from .operand import Operand, Term
from .orientation import Orientations
from .row import NOT_ADAPTED, Row, SameName, Shared
from .selection import Selection
from .stack import Elsewhere, Slices
from .structure import structure_of
from .untied import untied_config, untied_head

__all__ = [
    "Counterparts",
    "Missing",
    "Pairing",
    "Row",
    "SameName",
    "counterparts",
    "in_file_order",
    "match_names",
    "pair",
    "pair_adapter",
]


@dataclass(frozen=True, slots=True)
class Pairing:
    """All rows of a merge.

    Attributes:
        rows: In the order of the fine-tuned (or, if that is an adapter, the aligned) model's files, and of
            offsets within a file.
        unused: For each other role, its tensors that no row uses; for an adapter, those it adapts.
        notes: What a person should know, in sentences.
        config: What the output's config.json says in place of the model's that the rows are of; None if it is that.
    """

    rows: tuple[Row, ...]
    unused: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    config: Mapping[str, Any] | None = None

    @property
    def modules(self) -> Iterator[Module]:
        """The modules that are analysed, in the rows' order; made as they are asked for."""
        return modules_of_rows(self.rows)


def pair(
    models: Mapping[str, Model],
    *,
    include: str | None = None,
    exclude: str | None = None,
    analyse: bool = True,
    missing: Missing = Missing.NOTE,
    untie: bool = False,
) -> Pairing:
    """Finds the counterparts of every tensor of the fine-tuned model.

    An adapter stands for the aligned model with some of its tensors changed. If the fine-tuned model is one,
    rows are the aligned model's tensors, and only those that it adapts are analysed.

    Args:
        models: Models by role; "finetuned" must be among them, and "aligned" if one is an adapter. Names are
            matched as match_names does; besides, a tied head that the fine-tuned model stores and another
            role does not is that role's embedding.
        include: Regular expression on names: analyses what is left out by default, if it is 2-D
            float.
        exclude: Regular expression on names: leaves out what it matches, whatever include says.
        analyse: Whether anything is to be analysed.
        missing: What becomes of tensors that the aligned model has and the fine-tuned one lacks.
        untie: Whether a tied head becomes a tensor of its own.

    Returns:
        The pairing.

    Raises:
        PairingError: No fine-tuned model is given, a pattern is malformed, a tensor to be analysed or any matrix of a
            layer is missing or of another shape in a role and not excluded, or tensors of the aligned model are
            lacking.
        AdapterError: An adapter does not fit the aligned model.
    """
    if "finetuned" not in models:
        raise PairingError("pairing needs the fine-tuned model; give --finetuned")
    adapted, notes = _adapted(models)
    # What rows are made from: the fine-tuned model, or the one that it is an adapter of.
    anchor = models["aligned" if "finetuned" in adapted else "finetuned"]
    tensors = in_file_order(anchor)
    selection = Selection(include, exclude)
    others = {
        role: models[role] for role in ROLES if role in models and role not in adapted and role != anchor.role
    }
    matches: dict[str, Counterparts] = {}
    for role, model in others.items():
        matches[role], found = counterparts(anchor.headers, model)
        notes += found
    structure = structure_of(anchor, (model for role, model in models.items() if role != anchor.role))
    classify, orientations = Classifier(anchor, structure), Orientations(anchor, structure)
    experts = find_experts(models, anchor.role)
    shared = Shared((anchor.role, *others))
    rows: list[Row] = []
    unfit: list[str] = []
    misfits: list[str] = []
    kept: list[str] = []
    for tensor in tensors:
        own = tensor.name
        kind = classify(tensor)
        slices = None if experts is None else experts.slices(own)
        is_stack = slices is not None and kind != MTP
        if is_stack or ("finetuned" in adapted and _is_adapted_matrix(tensor, kind, adapted["finetuned"])):
            kind = PROJECTION
        reason = selection.reason(tensor, own, kind)
        if reason == PROJECTION and "finetuned" in adapted and own not in adapted["finetuned"]:
            reason = _not_adapted(own, adapted)
        analysed = analyse and reason == PROJECTION
        names: dict[str, str] = {anchor.role: own}
        elsewhere: dict[str, Elsewhere] = {}
        parts: dict[str, tuple[Term, ...]] = {}
        faults = []
        for role, model in others.items():
            name = matches[role].get(own)
            fault = "missing" if name is None else _difference(tensor, model.headers.tensor(name))
            if experts is not None:
                part = _among_experts(experts, tensor, slices, role, name if fault is None else None)
                if isinstance(part, str):
                    fault = part
                elif isinstance(part, tuple):
                    parts[role] = part
                    continue
                elif part is not None:
                    elsewhere[role] = part
                    continue
            if name is None or fault is not None:
                faults.append(f"{fault} in {role}")
            else:
                names[role] = name
        if faults:
            sentence = f"{own} is {_shape(tensor)} in {anchor.role} but {' and '.join(faults)}"
            essential = analysed or (_is_matrix_of_layer(tensor) and not selection.excludes(own))
            # What is to be analysed is named first.
            (unfit if analysed else misfits if essential else kept).append(sentence)
            reason = f"{reason}, {', '.join(faults)}"
        rows.append(
            Row(
                name=own,
                file=shared(tensor.file),
                dtype=shared(tensor.dtype),
                shape=shared(tensor.shape),
                names=shared.names(own, names),
                module_type=shared(module_type(own, kind)),
                layer=shared(layer_of(own)),
                analysed=analysed,
                transposed=_is_transposed(tensor, orientations, adapted)
                if slices is None
                else slices.stack.transposed,
                reason=reason,
                adapted=_made(names.get("aligned"), adapted, parts),
                slices=replace(slices, elsewhere=elsewhere) if slices is not None and elsewhere else slices,
                encoded=encoded_of(tensor, anchor.role),
            )
        )
    if unfit := unfit + misfits:
        more = f" (and {len(unfit) - 1} more tensors do not fit)" if len(unfit) > 1 else ""
        way_out = ", or leave such tensors out with --exclude REGEX" if analyse else ""
        raise PairingError(f"{unfit[0]}{more}; give models of one architecture{way_out}")
    unused = {**_unused(rows, others, experts), **_unused_adapted(rows, adapted)}
    notes += [] if experts is None else experts.notes()
    config: Mapping[str, Any] | None = None
    if "aligned" in others:
        lacking = _lacking(rows, anchor, others["aligned"], matches["aligned"], unused["aligned"])
        notes += lacking.notes
        if missing is Missing.REFUSE:
            require_complete(lacking)
        if missing is Missing.LEAVE_OUT and lacking.names:
            config = reduced_config(anchor.config, others["aligned"].config, lacking)
            if config != anchor.config:
                notes.append(
                    "config.json counts no layers for multi-token prediction, since the output has none"
                )
        if missing is Missing.FILL and lacking.names:
            rows += filled_rows(lacking, anchor, others["aligned"])
            unused["aligned"] = tuple(sorted(set(unused["aligned"]) - set(lacking.names)))
            config = filled_config(anchor.config, others["aligned"].config)
            notes.append(
                f"{len(lacking.names)} tensors that finetuned lacks are copied from aligned, such as {lacking.names[0]}"
            )
    if untie:
        config = untied_config(anchor.config if config is None else config)
        if (head := untied_head(anchor, others, matches, adapted)) is not None:
            rows.append(head)
            notes.append(_untied_note(head, anchor.role))
    if config == anchor.config:
        config = None
    notes += _kept_notes(kept) + _unused_notes(unused) + selection.notes() + orientations.notes()
    notes += _config_notes(models)
    return Pairing(tuple(rows), unused, tuple(notes), config)


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
    rows = tuple(
        Row(
            name=tensor.name,
            file=shared(tensor.file),
            dtype=shared(tensor.dtype),
            shape=shared(tensor.shape),
            names={model.role: tensor.name},
            module_type=shared(module_type(tensor.name, classify(tensor))),
            layer=shared(layer_of(tensor.name)),
            analysed=False,
            transposed=orientations.is_stored_transposed(tensor),
            reason="adapted" if tensor.name in adapted else "not adapted",
            adapted={adapter.role: adapted.get(tensor.name, (Term(Operand(model.role, tensor.name)),))},
            encoded=encoded_of(tensor, model.role),
        )
        for tensor in in_file_order(model)
    )
    notes = (*adapter_notes(adapter, model, adapted), *_config_notes({model.role: model}))
    if not untie:
        return Pairing(rows, {}, notes)
    head = untied_head(model, {}, {}, (adapter.role,))
    if head is None:
        return Pairing(rows, {}, notes, untied_config(model.config))
    notes = (*_config_notes({model.role: model}), _untied_note(head, model.role))
    return Pairing((*rows, head), {}, notes, untied_config(model.config))


def _untied_note(head: Row, anchor: str) -> str:
    return f"{head.name} is written as a tensor of its own, beside {head.names[anchor]}"


_Adapted = Mapping[str, Mapping[str, tuple[Term, ...]]]
"""The terms of adapted tensors by role and by the aligned model's names; a role is there if it is an adapter."""


def _adapted(models: Mapping[str, Model]) -> tuple[_Adapted, list[str]]:
    """Finds out what the adapters among the models do to the aligned one, and what to say of it."""
    adapted: dict[str, Mapping[str, tuple[Term, ...]]] = {}
    notes: list[str] = []
    for role, model in models.items():
        if not isinstance(model, Adapter):
            continue
        if "aligned" not in models:
            raise PairingError(
                f"{role} is an adapter, which needs the model it was trained on; give --aligned"
            )
        adapted[role] = adapter_terms(model, models["aligned"])
        notes += adapter_notes(model, models["aligned"], adapted[role])
    return adapted, notes


def _among_experts(
    experts: Experts, tensor: TensorInfo, slices: Slices | None, role: str, counterpart: str | None
) -> Elsewhere | tuple[Term, ...] | str | None:
    """How a role has what a tensor holds, if it has it in another layout; what is wrong, in words; else None."""
    if slices is None:
        return experts.terms(tensor, role) if counterpart is None else None
    if counterpart is not None and experts.is_alike(tensor.name, role, counterpart):
        return None
    return experts.elsewhere(tensor.name, role)


def _made(
    aligned: str | None, adapted: _Adapted, parts: Mapping[str, tuple[Term, ...]]
) -> Mapping[str, tuple[Term, ...]]:
    """What a tensor is in the roles that have it as something else than a tensor of theirs."""
    if not adapted and not parts:
        return NOT_ADAPTED
    return {**_adapter_terms(aligned, adapted), **parts}


def _adapter_terms(aligned: str | None, adapted: _Adapted) -> dict[str, tuple[Term, ...]]:
    """What the adapters make of one tensor of the aligned model: those that do not adapt it leave it as it is."""
    if aligned is None:
        return {}
    plain = (Term(Operand("aligned", aligned)),)
    return {role: terms.get(aligned, plain) for role, terms in adapted.items()}


def _not_adapted(name: str, adapted: _Adapted) -> str:
    """Why a projection that the fine-tuned adapter leaves alone is not analysed: its update is zero."""
    return "only the safe adapter changes it" if name in adapted.get("safe", ()) else "not adapted"


def _is_adapted_matrix(tensor: TensorInfo, kind: str, terms: Mapping[str, tuple[Term, ...]]) -> bool:
    """Whether the fine-tuned adapter adds to a matrix that is no table and no head: such a one is analysed."""
    if kind in (PROJECTION, HEAD, EMBEDDING) or not is_float_matrix(tensor):
        return False
    return any(term.operand.low_rank for term in terms.get(tensor.name, ()))


def _is_matrix_of_layer(tensor: TensorInfo) -> bool:
    """Whether a tensor is one that no model of the same architecture can lack, whatever its class."""
    return len(tensor.shape) > 1 and tensor.dtype in FLOATS and lies_in_layer(tensor.name)


def _lacking(
    rows: Iterable[Row], anchor: Model, aligned: Model, found: Counterparts, unused: Sequence[str]
) -> Lacking:
    """What the output lacks of the aligned model; most have all, and that is seen at once."""
    if not unused:
        return Lacking()
    met = {name for row in rows if (name := found.get(row.name)) is not None}
    return lacking_tensors(anchor, aligned, met)


def _is_transposed(tensor: TensorInfo, orientations: Orientations, adapted: _Adapted) -> bool:
    """Whether a tensor is stored as (in, out), as the shapes of adapters' factors say or those of the model."""
    terms = adapted.get("finetuned", {}).get(tensor.name, ())
    products = [product for term in terms for product in term.operand.low_rank]
    if products:
        return products[0].transpose
    return orientations.is_stored_transposed(tensor)


def in_file_order(model: Model) -> list[TensorInfo]:
    """Tensors by file, and by offset within a file, which is the order in which the headers list them."""
    return model.headers.tensors


def _difference(mine: TensorInfo, other: TensorInfo) -> str | None:
    """Says what of another model's tensor does not fit, or returns None."""
    if tuple(other.shape) != tuple(mine.shape):
        return _shape(other)
    if (other.dtype in FLOATS) != (mine.dtype in FLOATS):
        return other.dtype
    return None


def _shape(tensor: TensorInfo) -> str:
    return str(tuple(tensor.shape))


def _unused(
    rows: Iterable[Row], others: Mapping[str, Model], experts: Experts | None
) -> dict[str, tuple[str, ...]]:
    """Lists what no row uses, by role."""
    rows = list(rows)
    unused = {}
    for role, model in others.items():
        plain = sum(row.is_plain(role) for row in rows)
        used = {row.names[role] for row in rows if role in row.names} if plain < len(model.headers) else set()
        used |= set() if experts is None else experts.used(role)
        unused[role] = tuple(
            name for name in (model.headers.names if plain < len(model.headers) else ()) if name not in used
        )
    return unused


def _unused_adapted(rows: Iterable[Row], adapted: _Adapted) -> dict[str, tuple[str, ...]]:
    """Lists the aligned model's tensors that an adapter changes and no row is made of, by role."""
    used = {row.names.get("aligned") for row in rows}
    return {role: tuple(name for name in terms if name not in used) for role, terms in adapted.items()}


def _kept_notes(kept: Sequence[str]) -> list[str]:
    """Notes on tensors that are not analysed and whose counterparts do not fit; a few one by one."""
    notes = [f"{sentence}; the fine-tuned tensor is kept" for sentence in kept[:4]]
    if len(kept) > 4:
        notes.append(f"{len(kept) - 4} more tensors that are not analysed do not fit and are kept")
    return notes


def _unused_notes(unused: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"{len(names)} tensors of {role} have no counterpart in the fine-tuned model and are not used, "
        f"such as {names[0]}"
        for role, names in unused.items()
        if names
    ]


def _config_notes(models: Mapping[str, Model]) -> list[str]:
    """Notes on configurations that say something else than the tensors."""
    return [
        f"the config.json of {role} speaks of quantisation ({method}), "
        f"but all its weights are stored in full precision"
        for role, model in models.items()
        if (method := quantization_method(model.config)) is not None
        and all(tensor.encoding is None for tensor in model.headers.tensors)
    ]
