"""The job of a configuration in mergekit's format: its settings, the models opened, and the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from ...checkpoint.model import Model
from ...decision import Decision
from ...pairing.row import Row
from ...plan.checkpoint import plan_checkpoint
from ...report.card import recipe_card
from ...report.report import Report
from ...settings import Kind, RunSettings, Setting
from ..base import CheckpointContents, Job, Measurement
from ..roles import access_of
from .configuration import check_architectures, check_vocabularies, stacked_configuration, tokenizer_model
from .document import read_document
from .models import Participant, Participants
from .operations import Operations
from .slices import Section, list_parts, open_sections, stacked_layers
from .tensors import MERGED, find_tensors

__all__ = ["MergekitJob", "MergekitSettings", "read_settings_of"]

# Stacked layers come from files of several models, so that none of their layouts is the output's.
_STACKED_SHARD_SIZE = 5_000_000_000


class MergekitSettings(RunSettings, frozen=True, kw_only=True):
    """A configuration in mergekit's format, and how to carry it out.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str] = "mergekit"

    config: Annotated[
        dict[str, Any],
        Setting(
            "The fields of the configuration, as YAML holds them.",
            kind=Kind.DOCUMENT,
            in_files=False,
            on_command_line=False,
        ),
    ]
    source: Annotated[
        str,
        Setting(
            "What messages call the configuration, such as its file.",
            decides=False,
            in_files=False,
            on_command_line=False,
        ),
    ] = "config"

    def file_fields(self) -> dict[str, Any]:
        """The configuration itself."""
        return self.config


def read_settings_of(
    file: str, document: Mapping[str, Any], run: Mapping[str, Any]
) -> MergekitSettings | None:
    """Makes settings of a document that is a configuration in mergekit's format: one that has a merge_method.

    Args:
        file: Where it lies, for messages.
        document: Its fields.
        run: Settings of the run, which win over the document's.

    Raises:
        PlanError: A field or value is unknown, missing, unsupported or out of range.
        SettingError: A setting of the run is.
    """
    if "merge_method" not in document:
        return None
    known = read_document(file, document)
    given = {"allow_nonfinite": known.allow_nonfinite, **run}
    return MergekitSettings(config=dict(document), source=file, **given)


class MergekitJob(Job[MergekitSettings]):
    """The merge that a configuration says, ready to start: models are opened, and every tensor is planned."""

    def __init__(self, settings: MergekitSettings) -> None:
        """Opens the models and plans every tensor; only headers are read, and tensors that are not float.

        Raises:
            PlanError: The configuration is malformed, or does not fit the models.
            CheckpointError: A model cannot be found, read or trusted.
            AdapterError: An adapter does not fit its model, or cannot be merged exactly.
            PairingError: A model lacks a tensor, or has it in another shape.
        """
        self.settings = settings
        document = read_document(settings.source, settings.config)
        participants = Participants(access_of(settings))
        host, sections = open_sections(document, participants)
        notes = check_architectures(host, sections)
        asked = None
        owner = host
        if document.tokenizer_source is not None:
            asked = f"{document.file}: tokenizer_source"
            owner = participants.open(document.tokenizer_source)
        self._tokenizer = tokenizer_model(owner, asked)
        notes += check_vocabularies(owner, _merged(sections), asked)
        layers = stacked_layers(host, sections)
        stacked = bool(layers)
        operations = Operations(document)
        parts = list_parts(host, sections, stacked=stacked, gradients=document.has_gradients)
        tensors = find_tensors(host, sections, parts, operations, stacked=stacked)
        for participant in participants:
            notes += participant.notes()
        notes += [*tensors.notes, *operations.notes()]
        self.models = participants.models
        self.notes = tuple(dict.fromkeys(notes))
        self.unused = tensors.unused
        self._host = host.model
        roles = ", ".join(f"{{{role}}}" for role in self.models)
        method = document.method.name
        self._sentence = (
            f"A merge of {roles} by the method `{method}`, as a configuration in mergekit's format says"
        )
        size = document.max_shard_size or (_STACKED_SHARD_SIZE if stacked else None)
        # Rows of slices may be of other models than the host.
        whole = all(section.layers is None for section in sections)
        self._plan, self._config = plan_checkpoint(
            self.models,
            tensors.rows,
            lambda row: tensors.operations[row.name],
            host=host.model,
            anchor=host.role if whole else "",
            dtype=document.dtype,
            max_shard_size=size,
            config=stacked_configuration(host, layers) if layers else None,
        )

    @property
    def host(self) -> Model:
        """The base, or else the first model."""
        return self._host

    @property
    def tokenizer(self) -> Model:
        """The model that the configuration names for it, or the host."""
        return self._tokenizer

    def contents(self, measurement: Measurement | None) -> CheckpointContents:
        """The checkpoint that the plan makes."""
        return CheckpointContents(
            self._plan, _decision, self._host, self._config, read_backend=self.settings.read_backend
        )

    def card(self, report: Report) -> str:
        """The model card."""
        return recipe_card(report, self.models, self._sentence, tags=("mergekit",))


def _decision(row: Row) -> Decision:
    """Whether a tensor is computed, and why not."""
    return Decision(row.reason == MERGED, row.reason)


def _merged(sections: Sequence[Section]) -> list[Participant]:
    """The models that tensors are made of, each once."""
    return list({item.participant: None for section in sections for item in section.all_inputs})
