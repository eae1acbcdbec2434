"""Settings as records: declared once, with name, type, range, default and help.

Command-line options, fields of files, signatures of the Python API and the tables of the documentation are made from
these declarations. A setting that a recipe adds is one annotated field of its record.
"""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import msgspec

from .declaration import Field, Kind, Setting
from .errors import PlanError, SettingError

if TYPE_CHECKING:
    from .progress import ProgressCallback
else:
    # A callable, which msgspec does not look into.
    ProgressCallback = Any

__all__ = [
    "DTYPES",
    "AllowNonfinite",
    "Dtype",
    "ExpertLoraLayout",
    "Field",
    "Force",
    "Kind",
    "MaxShardSize",
    "Progress",
    "ReadBackend",
    "RunSettings",
    "Setting",
    "Settings",
    "fields_of",
    "read_settings",
]

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Output dtypes that can be asked for, and their names in safetensors; "auto" keeps each tensor's own."""

MOST_THREADS = 4096
"""More worker threads than this are a slip of the finger."""


_Record = TypeVar("_Record", bound="Settings")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody asked for. Every field is checked when a record is made.

    Raises:
        SettingError: A value is not one that its setting may have.
    """

    recipe: ClassVar[str]
    """Name of the recipe that these settings are of."""

    command_name: ClassVar[str | None] = None
    """The command that takes them as options; None where a file holds them."""

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            value = field.checked(getattr(self, field.name))
            msgspec.structs.force_setattr(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as JSON can hold them; an object that Python gave is None."""
        return {
            field.name: None if field.holds_object(value := getattr(self, field.name)) else value
            for field in fields_of(type(self))
            if field.setting.kind is not Kind.CALLBACK
        }

    @classmethod
    def from_dict(cls: type[_Record], values: Mapping[str, Any]) -> _Record:
        """Reads what to_dict wrote.

        Raises:
            PlanError: A field is unknown, missing or out of range.
        """
        return read_settings(cls, values, "the settings")

    def deciding(self) -> dict[str, Any]:
        """The fields that decide the output's weights, by name, as far as they are set."""
        return {
            field.name: value
            for field in fields_of(type(self))
            if field.setting.decides and (value := getattr(self, field.name)) is not None
        }

    def file_fields(self) -> dict[str, Any]:
        """The fields of a file that makes the same weights, by `safemerge-fast run`."""
        repeated = {
            field.name: value
            for field in fields_of(type(self))
            if field.setting.repeats and (value := getattr(self, field.name)) != field.default
        }
        return {"recipe": self.recipe, **self.deciding(), **repeated}

    def command(self) -> str:
        """The command line that makes the same weights: roles, output, and what differs from the defaults."""
        if self.command_name is None:
            output = getattr(self, "output", "OUT")
            return shlex.join(["safemerge-fast", "run", f"{self.recipe}.yml", "-o", output])
        words = ["safemerge-fast", self.command_name]
        for field in fields_of(type(self)):
            value = getattr(self, field.name)
            shown = field.setting.decides or field.setting.repeats or field.name == "output"
            if not shown or value is None or value == field.default:
                continue
            words.append(f"--{field.name.replace('_', '-')}")
            if value is not True:
                words.append(str(value))
        return shlex.join(words)


@cache
def fields_of(record: type[Settings]) -> tuple[Field, ...]:
    """The fields of a record of settings as they are shown: what is required, its own, then those of every run."""
    hints = typing.get_type_hints(record, include_extras=True)
    fields = []
    for field in msgspec.structs.fields(record):
        annotation = hints[field.name]
        setting = next(extra for extra in annotation.__metadata__ if isinstance(extra, Setting))
        kind = annotation.__origin__
        fields.append(Field(field.name, kind, field.default, setting, _choices(kind, setting)))
    of_runs = frozenset(field.name for field in msgspec.structs.fields(RunSettings))
    return tuple(sorted(fields, key=lambda field: (not field.required, field.name in of_runs)))


def _choices(kind: Any, setting: Setting) -> tuple[str, ...]:
    if setting.choices is not None:
        return tuple(setting.choices())
    members = (kind, *typing.get_args(kind)) if typing.get_origin(kind) is not Literal else (kind,)
    literals = [member for member in members if typing.get_origin(member) is Literal]
    return tuple(str(word) for literal in literals for word in typing.get_args(literal))


def read_settings(
    record: type[_Record], values: Mapping[str, Any], where: str, *, missing: Collection[str] = ()
) -> _Record:
    """Makes a record of values that come from a file.

    Args:
        record: The record's class.
        values: Values by name.
        where: What holds them, for messages.
        missing: Fields that need not be there although they have no default.

    Raises:
        PlanError: A field is unknown, missing or out of range.
    """
    known = {field.name: field for field in fields_of(record)}
    if unknown := [name for name in values if name not in known]:
        held = ", ".join(name for name, field in known.items() if field.setting.in_files)
        raise PlanError(f"{where}: {record.recipe} has no setting {unknown[0]!r}; it has {held}")
    for name, field in known.items():
        if field.required and name not in values and name not in missing:
            raise PlanError(f"{where}: {record.recipe} needs the setting {name}")
    try:
        return record(**values)
    except SettingError as error:
        raise PlanError(f"{where}: {error}") from error


Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    Setting("Output dtype of float tensors; auto keeps each one's own."),
]
"""The output's dtype, as several recipes take it."""

MaxShardSize = Annotated[
    int | str | None,
    Setting(
        "Most bytes per file, like 5GB.", kind=Kind.SIZE, metavar="SIZE", default="the model's own files"
    ),
]
"""How large the output's files may be, as several recipes take it."""

ReadBackend = Annotated[
    Literal["auto", "mmap", "pread"],
    Setting("Map inputs, or read them by position; auto maps all but network file systems.", decides=False),
]
"""How inputs are read."""

ExpertLoraLayout = Annotated[
    Literal["peft", "unsloth"],
    Setting("Who trained LoRA of fused experts: PEFT, or Unsloth before September 2026, with another B."),
]
"""How adapters lay out LoRA of fused experts; the files do not say it."""

AllowNonfinite = Annotated[
    bool, Setting("Let NaN and infinity of the models through instead of refusing them.")
]
"""What becomes of values that are not finite."""

Force = Annotated[
    bool,
    Setting(
        "Go on although the models are not what their roles say, or nothing is analysed; report and card warn of it.",
        decides=False,
        repeats=True,
    ),
]
"""Whether findings of the role check are warnings instead of errors."""

Progress = Annotated[
    ProgressCallback | None,
    Setting(
        "Called with ProgressEvents; an exception that it raises stops the work.",
        kind=Kind.CALLBACK,
        decides=False,
        in_files=False,
        on_command_line=False,
    ),
]
"""Who is told how far the work is; downloads show the Hub's bars to those only."""


def _check_executor(text: str) -> None:
    """Refuses what names no executor."""
    if text.startswith("ray://"):
        raise SettingError(
            "Ray clients are not supported; run the command on the cluster: "
            "ray job submit -- safemerge-fast merge ... --executor ray"
        )
    if re.fullmatch(r"local|ray|ray:local|ray:[\w.-]+:\d{1,5}", text) is None:
        raise SettingError(f"should be local, ray, ray:HOST:PORT or ray:local, not {text[:80]!r}")


class RunSettings(Settings, frozen=True, kw_only=True):
    """What every recipe is told, besides what it is to make."""

    output: Annotated[
        str,
        Setting(
            "Output directory; new or empty.",
            kind=Kind.PATH,
            metavar="DIR",
            names=("-o",),
            decides=False,
            in_files=False,
        ),
    ]
    threads: Annotated[
        int | None,
        Setting(
            "Worker threads.",
            least=1,
            most=MOST_THREADS,
            default="processors + 2, at most 16",
            decides=False,
        ),
    ] = None
    memory_budget: Annotated[
        int | str | None,
        Setting(
            "Most bytes for the merge's buffers and input windows, like 1GB.",
            kind=Kind.SIZE,
            metavar="SIZE",
            decides=False,
        ),
    ] = None
    read_backend: ReadBackend = "auto"
    expert_lora_layout: ExpertLoraLayout = "peft"
    resume: Annotated[
        bool,
        Setting(
            "Continue an unfinished job of this output; says so if it is complete.",
            decides=False,
            in_files=False,
        ),
    ] = False
    overwrite: Annotated[
        bool | Literal["in-place"],
        Setting(
            "Replace an earlier output once the new one is complete; in-place removes the old one first, where "
            "there is no room for both.",
            decides=False,
            in_files=False,
        ),
    ] = False
    allow_nonfinite: AllowNonfinite = False
    executor: Annotated[
        str,
        Setting(
            "Who writes the weights: local, or Ray's workers on a file system that all machines share: ray, "
            "ray:HOST:PORT, or ray:local for a cluster on this machine.",
            metavar="WHO",
            check=_check_executor,
            decides=False,
            in_files=False,
        ),
    ] = "local"
    task_cpus: Annotated[
        int | None,
        Setting(
            "Processors that a Ray task asks for, each of which prepares one file.",
            least=1,
            most=MOST_THREADS,
            default="8, or what the largest machine has",
            decides=False,
            in_files=False,
        ),
    ] = None
    stall_after: Annotated[
        float,
        Setting(
            "Seconds without a word from a Ray worker after which its file is handed out again.",
            least=5,
            metavar="SECONDS",
            decides=False,
            in_files=False,
        ),
    ] = 120.0
    progress: Progress = None

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if self.resume and self.overwrite:
            raise SettingError("resume continues an output and overwrite starts it anew; give one of them")

    @property
    def overwriting(self) -> Literal["no", "exchange", "in-place"]:
        """How an earlier output is replaced, as the engine takes it."""
        if self.overwrite == "in-place":
            return "in-place"
        return "exchange" if self.overwrite else "no"
