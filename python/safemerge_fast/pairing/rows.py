"""Stage 2, pairing: one row per output tensor, its counterparts by name, and whether to analyse it.

Tensors are matched by name, never by position. Only headers and configurations are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._engine import TensorInfo
from ..checkpoint.model import FLOATS, ROLES, Model, quantization_method
from ..errors import PairingError
from .adapted import Adapted
from .counterparts import Counterparts, counterparts
from .encoded import encoded_of, encoding_notes
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
    MTP,
    PROJECTION,
    Classifier,
    layer_of,
    lies_in_layer,
    module_type,
)
from .names import match_names
from .operand import Operand, Term
from .orientation import Orientations
from .row import Row, SameName, Shared
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
    "config_notes",
    "counterparts",
    "in_file_order",
    "match_names",
    "pair",
    "untied_note",
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
    adapted = Adapted(models)
    notes = list(adapted.notes)
    # What rows are made from: the fine-tuned model, or the one that it is an adapter of.
    anchor = models["aligned" if "finetuned" in adapted else "finetuned"]
    tensors = in_file_order(anchor)
    selection = Selection(include, exclude)
    others = {
        role: models[role] for role in ROLES if role in models and role not in adapted and role != anchor.role
    }
    matches: dict[str, Counterparts] = {}
    for role, model in others.items():
        matches[role], found = counterparts(anchor.headers, model, anchor.config)
        notes += found
    structure = structure_of(anchor, (model for role, model in models.items() if role != anchor.role))
    classify, orientations = Classifier(anchor, structure), Orientations(anchor, structure)
    experts = find_experts(models, anchor.role)
    shared = Shared((anchor.role, *others))
    rows: list[Row] = []
    unfit: list[str] = []
    misfits: list[str] = []
    kept: list[str] = []
    # Tensors of other roles that hold rows of several of the anchor's, by role.
    split: dict[str, set[str]] = {}
    for tensor in tensors:
        own = tensor.name
        kind = classify(tensor)
        slices = (None if experts is None else experts.slices(own)) or adapted.slices(own)
        is_stack = slices is not None and kind != MTP
        if is_stack or adapted.is_matrix(tensor, kind):
            kind = PROJECTION
        reason = selection.reason(tensor, own, kind)
        if reason == PROJECTION:
            reason = adapted.why_not(own) or reason
        analysed = analyse and reason == PROJECTION
        names: dict[str, str] = {anchor.role: own}
        elsewhere: dict[str, Elsewhere] = {**adapted.stacks(own, slices)}
        parts: dict[str, tuple[Term, ...]] = {}
        faults = []
        for role, model in others.items():
            name = matches[role].get(own)
            fault = (
                matches[role].why_missing(own)
                if name is None
                else _difference(tensor, model.headers.tensor(name))
            )
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
            if name is None and (rows_of := matches[role].part(own, tensor.shape)) is not None:
                held, view = rows_of
                parts[role] = (Term(Operand(role, held, view=view)),)
                split.setdefault(role, set()).add(held)
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
                transposed=adapted.is_transposed(tensor, orientations)
                if slices is None
                else slices.stack.transposed,
                reason=reason,
                adapted=adapted.made(names.get("aligned"), parts),
                slices=replace(slices, elsewhere=elsewhere) if slices is not None and elsewhere else slices,
                encoded=encoded_of(tensor, anchor.role),
            )
        )
    if unfit := unfit + misfits:
        more = f" (and {len(unfit) - 1} more tensors do not fit)" if len(unfit) > 1 else ""
        way_out = ", or leave such tensors out with --exclude REGEX" if analyse else ""
        raise PairingError(f"{unfit[0]}{more}; give models of one architecture{way_out}")
    unused = {**_unused(rows, others, experts, split), **adapted.unused(rows)}
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
        if (head := untied_head(anchor, others, matches, tuple(adapted.terms), "aligned")) is not None:
            rows.append(head)
            notes.append(untied_note(head, anchor.role))
    if config == anchor.config:
        config = None
    notes += _kept_notes(kept) + _unused_notes(unused) + selection.notes() + orientations.notes()
    notes += config_notes(models)
    return Pairing(tuple(rows), unused, tuple(notes), config)


def untied_note(head: Row, anchor: str) -> str:
    """That a head is written which is tied in the model of that role."""
    return f"{head.name} is written as a tensor of its own, beside {head.names[anchor]}"


def _among_experts(
    experts: Experts, tensor: TensorInfo, slices: Slices | None, role: str, counterpart: str | None
) -> Elsewhere | tuple[Term, ...] | str | None:
    """How a role has what a tensor holds, if it has it in another layout; what is wrong, in words; else None."""
    if slices is None:
        return experts.terms(tensor, role) if counterpart is None else None
    if counterpart is not None and experts.is_alike(tensor.name, role, counterpart):
        return None
    return experts.elsewhere(tensor.name, role)


def _is_matrix_of_layer(tensor: TensorInfo) -> bool:
    """Whether a tensor is one that no model of the same architecture can lack, whatever its class."""
    return len(tensor.shape) > 1 and tensor.dtype in FLOATS and lies_in_layer(tensor.name)


def _lacking(
    rows: Iterable[Row], anchor: Model, aligned: Model, found: Counterparts, unused: Sequence[str]
) -> Lacking:
    """What the output lacks of the aligned model; most have all, and that is seen at once."""
    if not unused:
        return Lacking()
    met = {name for row in rows for name in found.held_in(row.name)}
    # What is a part of others, or has others as parts, is not lacking either.
    met |= {*aligned.headers.names} - {*unused}
    return lacking_tensors(anchor, aligned, met)


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
    rows: Iterable[Row],
    others: Mapping[str, Model],
    experts: Experts | None,
    split: Mapping[str, set[str]],
) -> dict[str, tuple[str, ...]]:
    """Lists what no row uses, by role."""
    rows = list(rows)
    unused = {}
    for role, model in others.items():
        plain = sum(row.is_plain(role) for row in rows)
        used = {row.names[role] for row in rows if role in row.names} if plain < len(model.headers) else set()
        used |= split.get(role, set()) | (set() if experts is None else experts.used(role))
        unused[role] = tuple(
            name for name in (model.headers.names if plain < len(model.headers) else ()) if name not in used
        )
    return unused


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


def config_notes(models: Mapping[str, Model]) -> list[str]:
    """Notes on formats of quantised tensors, and on configurations that say something else than the tensors."""
    return encoding_notes(models) + [
        f"the config.json of {role} speaks of quantisation ({method}), "
        f"but all its weights are stored in full precision"
        for role, model in models.items()
        if (method := quantization_method(model.config)) is not None
        and all(tensor.encoding is None for tensor in model.headers.tensors)
    ]
