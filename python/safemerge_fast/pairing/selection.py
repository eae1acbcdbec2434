"""Which tensors are analysed beside those that are by default, and which are not: --include and --exclude."""

from __future__ import annotations

from .._engine import TensorInfo
from ..errors import PairingError
from ..patterns import compile_pattern
from .modules import PROJECTION, is_float_matrix

__all__ = ["Selection"]


class Selection:
    """Applies --include and --exclude, and remembers what they did."""

    def __init__(self, include: str | None, exclude: str | None) -> None:
        self._include = _Pattern("--include", include)
        self._exclude = _Pattern("--exclude", exclude)
        self._impossible: list[str] = []

    def reason(self, tensor: TensorInfo, name: str, kind: str) -> str:
        """Says why a tensor is left out of the analysis, or PROJECTION; kind is what classify says of it."""
        included = self._include.matches(name)
        if self._exclude.matches(name):
            return kind if kind != PROJECTION else "excluded"
        if kind == PROJECTION or not included:
            return kind
        if is_float_matrix(tensor):
            return PROJECTION
        self._impossible.append(f"{name} ({kind})")
        return kind

    def excludes(self, name: str) -> bool:
        """Whether --exclude leaves a tensor out by name."""
        return self._exclude.matches(name)

    def notes(self) -> list[str]:
        """What a person should know of the patterns; to be asked when all tensors were looked at."""
        notes = [
            f"{pattern.flag} {pattern.text} matches no tensor of the fine-tuned model"
            for pattern in (self._include, self._exclude)
            if pattern.text is not None and not pattern.has_matched
        ]
        if self._impossible:
            count, first = len(self._impossible), self._impossible[0]
            notes.append(f"--include matches {count} tensors that are not 2-D float, such as {first}")
        return notes


class _Pattern:
    """A pattern that may not be given, and whether it ever matched."""

    def __init__(self, flag: str, text: str | None) -> None:
        self.flag = flag
        self.text = text
        self.has_matched = False
        self._pattern = None if text is None else compile_pattern(flag, text, PairingError)

    def matches(self, name: str) -> bool:
        """Whether a part of the name matches."""
        found = self._pattern is not None and self._pattern.search(name)
        self.has_matched |= found
        return found
