"""Whether a matrix that an adapter changes is stored as (in, out), as a Conv1D's is: asked of each module.

PEFT's fan_in_fan_out is one flag for a whole adapter, and that of the module which it happened to visit last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .._engine import TensorInfo
from ..checkpoint.adapter import AdaptedModule, Adapter
from ..checkpoint.model import Model
from ..errors import AdapterError
from .modules import is_stored_transposed, layer_of

__all__ = ["Orientations"]


class Orientations:
    """How the matrices of one checkpoint are stored, as far as an adapter of it needs to know."""

    def __init__(self, adapter: Adapter, model: Model) -> None:
        """Looks at nothing yet.

        Args:
            adapter: The adapter.
            model: The checkpoint it was trained on.
        """
        self._adapter = adapter
        self._model = model
        self._votes: dict[str | None, set[bool]] | None = None

    def is_transposed(self, module: AdaptedModule, tensor: TensorInfo) -> bool:
        """Whether a module's matrix is stored as (in, out).

        The shapes of the factors say it, unless the matrix is square. Then the module's neighbours do: those of its
        layer that are not square and have a bias, whose length is that of the outputs. Then the model type of the part
        of the model that it belongs to; and the adapter's flag last, which is set where there is some Conv1D.

        Args:
            module: The module; it has factors.
            tensor: Its weight in the checkpoint.

        Raises:
            AdapterError: The factors make a matrix of another shape.
        """
        adapter = self._adapter
        assert module.a is not None
        assert module.b is not None
        inner, out = adapter.headers.tensor(module.a).shape[1], adapter.headers.tensor(module.b).shape[0]
        shape = tuple(tensor.shape)
        if shape not in ((out, inner), (inner, out)) or (module.is_embedding and shape != (inner, out)):
            raise AdapterError(
                f"{adapter.role}: {module.a} and its lora_B make a matrix of {out} outputs and {inner} inputs, but "
                f"{tensor.name} has shape {shape} in {self._model.path}; give the checkpoint that the adapter was "
                f"trained on"
            )
        if module.is_embedding:
            return True
        if out != inner:
            return shape == (inner, out)
        votes = self._of_layers().get(layer_of(tensor.name), set())
        if len(votes) == 1:
            return next(iter(votes))
        config = _part(self._model.config, tensor.name)
        if is_stored_transposed(tensor, config):
            return True
        # The flag is of some other module, if there are matrices that it explains.
        explained = any(True in votes for votes in self._of_layers().values())
        return adapter.settings.fan_in_fan_out and not explained

    def _of_layers(self) -> dict[str | None, set[bool]]:
        """What matrices that are not square say of how they are stored, by layer."""
        if self._votes is None:
            self._votes = {}
            for layer, transposed in (*self._by_biases(), *self._by_factors()):
                self._votes.setdefault(layer, set()).add(transposed)
        return self._votes

    def _by_biases(self) -> Iterator[tuple[str | None, bool]]:
        """What the lengths of biases say."""
        headers = self._model.headers
        for bias in headers.tensors:
            if len(bias.shape) != 1 or not bias.name.endswith(".bias"):
                continue
            name = f"{bias.name.removesuffix('bias')}weight"
            shape = tuple(headers.tensor(name).shape) if name in headers else ()
            if len(shape) == 2 and shape[0] != shape[1] and bias.shape[0] in shape:
                yield layer_of(name), shape[1] == bias.shape[0]

    def _by_factors(self) -> Iterator[tuple[str | None, bool]]:
        """What the shapes of the adapter's other factors say."""
        factors = self._adapter.headers
        for module in self._adapter.modules.values():
            name = f"{module.name}.weight"
            if module.a is None or module.b is None or module.is_embedding or name not in self._model.headers:
                continue
            made = factors.tensor(module.b).shape[0], factors.tensor(module.a).shape[1]
            if made[0] != made[1]:
                shape = tuple(self._model.headers.tensor(name).shape)
                if shape in (made, made[::-1]):
                    yield layer_of(name), shape != made


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The configuration of the part of a model that a tensor belongs to: `decoder` for `decoder.transformer.h.0…`."""
    for word in name.split("."):
        part = next((config.get(field) for field in (word, f"{word}_config") if field in config), None)
        if isinstance(part, Mapping) and "model_type" in part:
            return _part(part, name.partition(f"{word}.")[2])
    return config
