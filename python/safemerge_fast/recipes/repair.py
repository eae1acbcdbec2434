"""Repairs that treat every tensor alike: the fine-tuned model's tensors, blended with those of other roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import msgspec

from ..checkpoint.model import FLOATS, Model
from ..decision import Decision
from ..errors import PairingError
from ..pairing.coverage import why_nothing_is_analysed
from ..pairing.missing import FILLED
from ..pairing.row import Row
from ..pairing.rows import pair
from ..plan.blend import Blend, Composer
from ..plan.masked import Masked
from ..plan.operation import Operation
from ..plan.pieces import Pieces, compose_row
from ..settings import RunSettings
from .mask import MASK, MaskFile, open_mask
from .planned import PlannedJob
from .role_check import refuse_or_warn, same_models
from .roles import access_of, open_roles, shape_of_repair
from .shape import OutputShape

__all__ = ["RepairJob", "Selected"]

_Settings = TypeVar("_Settings", bound=RunSettings)


@dataclass(frozen=True, slots=True)
class Selected:
    """Which matrices are changed: those that an analysis would look at.

    Attributes:
        include: Regular expression on names of tensors that are changed too.
        exclude: Regular expression on names of tensors that are left alone.
    """

    include: str | None
    exclude: str | None


class RepairJob(PlannedJob[_Settings], Generic[_Settings]):
    """A job of such a repair.

    Attributes:
        changed: What is done to a tensor, in words for the report.
        chosen: Names of the tensors that may be changed; None where all may.
        mask: How much of each element is changed; None for all of it.
    """

    changed: str = ""
    chosen: frozenset[str] | None = None
    mask: MaskFile | None = None

    def open(
        self,
        settings: _Settings,
        roles: Mapping[str, str],
        shape: OutputShape,
        *,
        force: bool,
        selected: Selected | None = None,
        mask: str | None = None,
    ) -> None:
        """Opens the models and pairs their tensors; only headers are read.

        Args:
            settings: What was asked for.
            roles: What was given for each role.
            shape: What the output's tensors and files are like.
            force: Whether two roles may be one model.
            selected: The matrices that are changed; None changes every tensor.
            mask: The file that says how much of each element is changed, or None.

        Raises:
            CheckpointError: A model cannot be found, read or trusted.
            AdapterError: An adapter does not fit the aligned model.
            PairingError: The models do not fit together.
            RoleError: Two roles are one model.
        """
        self.settings = settings
        self.models = open_roles(roles, access_of(settings))
        self.warnings = refuse_or_warn(same_models(self.models, force=force), force=force)
        pairing = pair(
            self.models,
            include=None if selected is None else selected.include,
            exclude=None if selected is None else selected.exclude,
            analyse=selected is not None,
            missing=shape.missing,
            untie=shape.untie,
        )
        self.rows, self.unused, self.notes = pairing.rows, pairing.unused, pairing.notes
        if selected is not None:
            self.chosen = frozenset(row.name for row in self.rows if row.analysed)
            if not self.chosen:
                raise PairingError(f"nothing to change: {why_nothing_is_analysed(self.rows)}")
            # Nothing of them is measured.
            self.rows = tuple(
                msgspec.structs.replace(row, analysed=False) if row.analysed else row for row in self.rows
            )
        self.config = pairing.config
        self.dtype, self.max_shard_size, self.encode = shape.dtype, shape.max_shard_size, shape.encode
        if mask is not None:
            self._open_mask(mask)
        if not any(self.decision(row).merge for row in self.rows):
            raise PairingError("no tensor is in all of the models; give models of one architecture")

    @property
    def merging(self) -> int:
        """How many tensors are changed."""
        return sum(self.decision(row).merge for row in self.rows)

    def blend(self) -> Blend:
        """What a tensor that is changed is made of."""
        raise NotImplementedError

    @cached_property
    def _composer(self) -> Composer:
        blend = self.blend()
        return blend if self.mask is None else Masked(blend, MASK)

    def _open_mask(self, spec: str) -> None:
        """Opens the mask, once the tensors that would be changed are known."""
        wanted = [row.name for row in self.rows if self.decision(row).merge]
        mask = open_mask(spec, self.rows, access_of(self.settings))
        # From here on, what the mask does not have is kept.
        self.mask = mask
        self.models = {**self.models, MASK: mask.model}
        self.notes = (*self.notes, *mask.notes, *mask.without(wanted))
        self.unused = {**self.unused, MASK: mask.unused}

    @property
    def host(self) -> Model:
        """The fine-tuned model, or the aligned one for an adapter."""
        return shape_of_repair(self.models)

    @property
    def tokenizer(self) -> Model:
        """The fine-tuned model, which may have tokens of its own."""
        return self.models["finetuned"]

    def operation(self, row: Row) -> Operation | Pieces:
        """The blend of a tensor that all roles have, else a copy."""
        return compose_row(self._composer, row, self.decision)

    def decision(self, row: Row) -> Decision:
        """All float tensors that every role has are changed."""
        if row.reason == FILLED:
            return Decision(False, FILLED)
        if row.dtype not in FLOATS:
            return Decision(False, f"{row.dtype} cannot be averaged: kept")
        if missing := [role for role in self.models if role != MASK and not row.has(role)]:
            return Decision(False, f"not in {missing[0]} with this shape: kept")
        if self.chosen is not None and row.name not in self.chosen:
            return Decision(False, f"{row.reason}: kept")
        if self.mask is not None and row.name not in self.mask.names:
            return Decision(False, "not in the mask: kept")
        return Decision(True, self.changed)
