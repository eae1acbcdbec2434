"""Which tensor of a checkpoint an adapter means: by name, by the end of a name, or as transformers renames it."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint.model import Model
from .live_names import LiveNames, Made, live_names
from .names import match_names
from .tied import is_head, ties_head

__all__ = ["TensorNames"]


class TensorNames:
    """The tensors of one checkpoint by the names that an adapter of it has for them.

    Attributes:
        renamed: Names that only transformers' table explains, and the tensors they are of.
    """

    def __init__(self, model: Model, wanted: Sequence[str]) -> None:
        """Finds all names.

        Args:
            model: The checkpoint.
            wanted: The names, each of a module's parameter.
        """
        self._model = model
        self._live: LiveNames | None = None
        # Looking for ends of names takes a model of many experts most of a second.
        exact = all(name in model.headers for name in wanted)
        self._found = {name: name for name in wanted} if exact else match_names(wanted, model.headers.names)
        self.renamed: dict[str, str] = {}
        # A head that the model ties is stored under no name at all.
        lost = [name for name in wanted if name not in self._found and not self._is_tied_head(name)]
        if lost:
            # What is a loaded model's name once is one throughout, even where the checkpoint has that name too.
            renamed = self.stored(wanted)
            self.renamed = {
                name: tensor for name, tensor in renamed.items() if tensor != self._found.get(name)
            }
            self._found |= renamed

    @property
    def live(self) -> LiveNames:
        """What transformers says of the loaded model's names; the first time this is asked it takes seconds."""
        if self._live is None:
            self._live = live_names(self._model.config, self._model.headers.names)
        return self._live

    def get(self, name: str) -> str | None:
        """The tensor of a name, or None."""
        return self._found.get(name)

    def made(self, names: Sequence[str]) -> dict[str, Made]:
        """What loading makes parameters of, for those of the names that it makes of more than one tensor renamed."""
        made = self.live.made
        return {name: made[live] for name, live in match_names(names, made).items()}

    def stored(self, names: Sequence[str]) -> dict[str, str]:
        """The tensors that loading renames to the names, for those of them that it does."""
        tensors = self.live.tensors
        return {name: tensors[live] for name, live in match_names(names, tensors).items()}

    def why_missing(self, name: str) -> str | None:
        """What is to be said of a name that has no tensor, if there is more to say than that."""
        if self._live is None:
            return None
        if self._live.problem is not None:
            return self._live.problem
        made = self.made([name]).get(name)
        return (
            None
            if made is None
            else f"loading makes it of {made.describe()}, and updates of such weights are not supported"
        )

    def _is_tied_head(self, name: str) -> bool:
        return is_head(name) and ties_head(self._model.config)
