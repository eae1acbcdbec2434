"""What can go wrong, as one tree; each class carries the exit code of the command line.

The Rust engine raises these same classes. Every message is one sentence for a person: which file, which tensor,
what was expected, what was found, and the way out.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "AnalysisError",
    "CheckpointError",
    "OutputError",
    "PairingError",
    "PlanError",
    "RoleError",
    "SafemergeError",
    "SettingError",
    "VerificationError",
    "show_as",
]

_names: dict[str, str] = {}


def show_as(place: str, name: str) -> None:
    """Lets messages say a name in place of a path: of a temporary copy, where it was copied from."""
    _names[place] = name


def _named(text: object) -> object:
    if isinstance(text, str):
        for place, name in _names.items():
            text = text.replace(place, name)
    return text


class SafemergeError(Exception):
    """Base of every error that safemerge-fast raises on purpose."""

    exit_code = 3

    def __init__(self, *arguments: object) -> None:
        super().__init__(*map(_named, arguments))


class CheckpointError(SafemergeError):
    """A checkpoint cannot be found, read or trusted, or is of a kind that cannot be merged exactly."""


class AdapterError(SafemergeError):
    """A PEFT adapter cannot be read or cannot be merged exactly."""


class PairingError(SafemergeError):
    """The roles do not fit together: a tensor is missing or its shape differs."""


class RoleError(SafemergeError):
    """The models are not what their roles say, or nothing of them is analysed; --force goes on all the same."""


class AnalysisError(SafemergeError):
    """A score cannot be computed or reused."""


class PlanError(SafemergeError):
    """A plan is malformed, or the inputs are not those it was made for."""


class SettingError(PlanError, ValueError):
    """A setting has a value that it may not have."""

    exit_code = 2


class OutputError(SafemergeError):
    """The output cannot be written: it exists, is locked, overlaps an input, or the disk is full."""

    exit_code = 5


class VerificationError(SafemergeError):
    """The bytes on disk are not those that the plan says."""

    exit_code = 4
