"""Settings of recipes whose output is shaped like the fine-tuned model: what it may lack, and a head of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from ..errors import SettingError
from ..pairing.missing import Missing
from ..plan.encoding import Encode
from ..settings import Setting

__all__ = ["AllowMissing", "EncodeAs", "FillFrom", "OutputShape", "Untie"]

AllowMissing = Annotated[
    bool, Setting("Make an output that lacks tensors which the aligned model has, instead of refusing it.")
]
FillFrom = Annotated[
    Literal["aligned"] | None,
    Setting(
        "Copy tensors that the fine-tuned model lacks from the aligned one, such as layers that predict further tokens "
        "(MTP).",
        default="refuse",
    ),
]
Untie = Annotated[
    bool,
    Setting(
        "Write a head that is tied to the embedding as a tensor of its own; config.json then says "
        "tie_word_embeddings false."
    ),
]


EncodeAs = Annotated[
    Literal["keep", "bfloat16", "all"],
    Setting(
        "What becomes of quantised tensors: keep stores changed ones in their own format again and leaves the others "
        "as they are; bfloat16 dequantises the changed ones, all dequantises all of them.",
    ),
]


class _Settings(Protocol):
    """Settings of such a recipe."""

    @property
    def dtype(self) -> str:
        """Output dtype of float tensors."""

    @property
    def max_shard_size(self) -> int | str | None:
        """Most bytes per output file."""

    @property
    def encode(self) -> str:
        """What becomes of quantised tensors."""

    @property
    def allow_missing(self) -> bool:
        """Whether the output may lack tensors."""

    @property
    def fill_from(self) -> str | None:
        """The role that such tensors are copied from."""

    @property
    def untie(self) -> bool:
        """Whether a tied head becomes a tensor of its own."""


@dataclass(frozen=True, slots=True)
class OutputShape:
    """What an output's tensors and files are like.

    Attributes:
        dtype: Output dtype of float tensors.
        max_shard_size: Most bytes per output file, or None.
        encode: What becomes of quantised tensors.
        missing: What becomes of tensors that the fine-tuned model lacks.
        untie: Whether a tied head becomes a tensor of its own.
    """

    dtype: str
    max_shard_size: int | None
    encode: Encode
    missing: Missing
    untie: bool

    @classmethod
    def of(cls, settings: _Settings) -> OutputShape:
        """What the settings say.

        Raises:
            SettingError: They contradict each other.
        """
        if settings.allow_missing and settings.fill_from is not None:
            raise SettingError("allow_missing leaves tensors out that fill_from would copy; give one of them")
        size = settings.max_shard_size
        missing = Missing.LEAVE_OUT if settings.allow_missing else Missing.REFUSE
        return cls(
            settings.dtype,
            None if size is None else int(size),
            Encode(settings.encode),
            missing if settings.fill_from is None else Missing.FILL,
            settings.untie,
        )
