"""Modules: the matrices that are scored and decided one by one. Mostly a whole tensor, or one expert of many in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import msgspec

from .operand import Operand, Term
from .row import Row
from .stack import Part
from .view import View

__all__ = ["Module", "modules_of", "modules_of_rows", "slices_of", "whole"]


class Module(msgspec.Struct, frozen=True, gc=False):
    """One matrix.

    Attributes:
        row: The output tensor that it lies in.
        name: Its name: the tensor's, or what the tensor would be called if the expert had one of its own.
        module_type: "q_proj", "experts.gate_proj", …
        stored: (rows, columns) as it is stored.
        expert: The number of the expert whose matrix it is; None if it is the whole tensor.
        part: Which of the expert's matrices.
    """

    row: Row
    name: str
    module_type: str
    stored: tuple[int, ...]
    expert: int | None = None
    part: Part | None = None

    @property
    def layer(self) -> str | None:
        """The layer it belongs to, or None."""
        return self.row.layer

    @property
    def transposed(self) -> bool:
        """Whether it is stored as (in, out)."""
        return self.row.transposed

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in)."""
        return self.stored[::-1] if self.transposed else self.stored

    @property
    def view(self) -> View | None:
        """Where it lies in the output tensor; None if it is the whole of it."""
        if self.part is None or self.expert is None or self.row.slices is None:
            return None
        return self.row.slices.stack.view(self.expert, self.part)

    @property
    def terms(self) -> Mapping[str, tuple[Term, ...]]:
        """What each role's matrix is made of, for the roles that have it; rows and columns as they are stored."""
        slices, view = self.row.slices, self.view
        if slices is None and len(self.row.shape) > 2:
            # One matrix of three dimensions, whose rows are long.
            flat = View(0, self.stored, (self.stored[1], 1))
            return {
                role: tuple(replace(term, operand=_cut(term.operand, flat)) for term in terms)
                for role, terms in self.row.terms.items()
            }
        if slices is None or view is None or self.part is None or self.expert is None:
            return self.row.terms
        found = {
            role: tuple(replace(term, operand=_cut(term.operand, view)) for term in terms)
            for role, terms in self.row.terms.items()
        }
        for role, place in slices.elsewhere.items():
            found[role] = place.terms(self.expert, self.part, transposed=self.transposed)
        return found

    @property
    def piece_terms(self) -> Mapping[str, tuple[Term, ...]]:
        """The same for a piece of the output tensor: operands without a view are meant with the piece's."""
        if self.row.slices is None or self.part is None or self.expert is None:
            return self.row.terms
        own = self.view
        elsewhere = {
            role: tuple(
                replace(term, operand=self._of_piece(term.operand, own))
                for term in place.terms(self.expert, self.part, transposed=self.transposed)
            )
            for role, place in self.row.slices.elsewhere.items()
        }
        return {**self.row.terms, **elsewhere}

    def _of_piece(self, operand: Operand, own: View | None) -> Operand:
        """The operand without its view, if that is the piece's own part of a tensor like the output's."""
        same = operand.view == own and self.row.names.get(operand.source) == operand.tensor
        return replace(operand, view=None) if same else operand

    def has(self, role: str) -> bool:
        """Whether a role has the matrix, or makes it."""
        return self.row.has(role)

    def is_plain(self, role: str) -> bool:
        """Whether a role has the matrix stored at the same place of a tensor of the same name and shape."""
        return self.row.is_plain(role)


def whole(row: Row) -> Module:
    """A row's tensor as one module."""
    shape = row.shape
    stored = shape if len(shape) <= 2 else (shape[0], math.prod(shape[1:]))
    return Module(row, row.name, row.module_type, stored)


def modules_of(row: Row) -> Iterator[Module]:
    """The modules of a row that is analysed; of others none."""
    return slices_of(row) if row.analysed else iter(())


def modules_of_rows(rows: Iterable[Row]) -> Iterator[Module]:
    """The modules of all rows, in their order."""
    for row in rows:
        if row.analysed:
            yield from slices_of(row)


def slices_of(row: Row) -> Iterator[Module]:
    """The matrices that a row consists of, analysed or not; without experts, the one that it is."""
    slices = row.slices
    if slices is None:
        yield whole(row)
        return
    for expert, part in slices.stack:
        yield Module(row, slices.name(expert, part), part.module_type, part.view.shape, expert, part)


def _cut(operand: Operand, view: View) -> Operand:
    return replace(operand, view=view)
