"""Which parameters an adapter's stacked products update, and where these are in a checkpoint.

The keys do not name the parameters, only how deep their wrappers lie: target_parameters names them, the shapes tell
them apart, and where they cannot, the order in which the loaded model has them, which is that of the wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

from ..checkpoint.adapter import Adapter
from ..checkpoint.adapter_parameters import AdaptedParameters, Factors
from ..checkpoint.model import FLOATS, Model
from ..errors import AdapterError
from .expert_updates import StackedUpdate, Stored
from .names import match_names
from .tensor_names import TensorNames

__all__ = ["StackedParameters"]

_MOST_PARAMETERS = 6
_ONE_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<index>\d{1,6})\.(?P<leaf>[^.]+)\.weight$")
# What transformers 5 makes of tensors of single experts: names of the parts, whose rows follow each other.
_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_STACKING = ("MergeModulelist(dim=0)", "Concatenate(dim=1)")
# Model types whose experts say of themselves that they are stored as (in, out), which is what PEFT goes by.
_TRANSPOSED_MODEL_TYPES = frozenset({"aria", "gpt_oss", "openai_privacy_filter"})
# Those whose experts are stored so and do not say it: PEFT adds B·A to them as it is.
_SILENT_MODEL_TYPES = frozenset({"llama4", "llama4_text"})
_INNER_PROJECTION = re.compile(r"down|w2|out")


class StackedParameters:
    """The parameters of one checkpoint that adapters may update expert by expert."""

    def __init__(self, adapter: Adapter, model: Model, names: TensorNames) -> None:
        """Looks at nothing yet.

        Args:
            adapter: The adapter.
            model: The checkpoint it was trained on.
            names: The checkpoint's names.
        """
        self._adapter = adapter
        self._model = model
        self._names = names
        self._known: dict[str, Stored | None] | None = None

    def updates(self, group: AdaptedParameters) -> tuple[StackedUpdate, ...]:
        """What an adapter does to the parameters of one module, from the innermost wrapper to the outermost.

        Raises:
            AdapterError: The checkpoint has not the parameters, or which is which cannot be told.
        """
        adapter = self._adapter
        if self._known is None:
            self._known = self._places()
        known = self._known
        candidates = self._candidates(group)
        stored = {name: found for name in candidates if (found := known.get(name)) is not None}
        if len(stored) < len(group.factors):
            raise AdapterError(self._missing(group, candidates, stored))
        if len(stored) > _MOST_PARAMETERS:
            raise AdapterError(
                f"{adapter.role}: {adapter.path} has {len(stored)} target_parameters of {group.module}; "
                f"at most {_MOST_PARAMETERS} can be told apart"
            )
        chosen = self._assigned(group, stored)
        return tuple(
            self._update(group, name, factors, stored[name])
            for name, factors in zip(chosen, group.factors, strict=True)
        )

    def _candidates(self, group: AdaptedParameters) -> list[str]:
        """The parameters of one module that target_parameters names."""
        settings = self._adapter.settings
        leaves = dict.fromkeys(target.rpartition(".")[2] for target in settings.target_parameters)
        return [name for leaf in leaves if settings.targets_parameter(name := f"{group.module}.{leaf}")]

    def _assigned(self, group: AdaptedParameters, stored: Mapping[str, Stored]) -> tuple[str, ...]:
        """The parameter of each product."""
        fitting = [
            names
            for names in permutations(stored, len(group.factors))
            if all(
                self._fits(name, factors, stored[name])
                for name, factors in zip(names, group.factors, strict=True)
            )
        ]
        if not fitting:
            raise AdapterError(self._unfit(group, stored))
        if len(fitting) == 1:
            return fitting[0]
        order = {name: place for place, name in enumerate(self._names.live.parameters)}
        live = {name: match_names([name], order).get(name, "") for name in stored}
        known = all(live[name] in order for name in stored)
        # Modules are wrapped once for each parameter, in the model's own order.
        ordered = [
            names
            for names in fitting
            if known and [*names] == sorted(names, key=lambda name: order[live[name]])
        ]
        if len(ordered) != 1:
            raise AdapterError(
                f"{self._adapter.role}: the keys of {group.module} in {self._adapter.path} fit "
                f"{' and '.join(fitting[0])} in either order, and nothing says which is which"
                + (f"; {self._names.live.problem}" if self._names.live.problem else "")
            )
        return ordered[0]

    def _fits(self, name: str, factors: Factors, stored: Stored) -> bool:
        """Whether factors make updates of a parameter's shape."""
        headers = self._adapter.headers
        a, b = headers.tensor(factors.a).shape, headers.tensor(factors.b).shape
        experts, *matrix = stored.shape
        width = experts * self._adapter.settings.rank(name)
        return (a[0], b[1]) == (width, width) and [b[0], a[1]] in (matrix, matrix[::-1])

    def _update(self, group: AdaptedParameters, name: str, factors: Factors, stored: Stored) -> StackedUpdate:
        adapter = self._adapter
        inputs = adapter.headers.tensor(factors.a).shape[1]
        outputs = adapter.headers.tensor(factors.b).shape[0]
        for tensor in map(self._model.headers.tensor, stored.tensors):
            if tensor.dtype not in FLOATS:
                raise AdapterError(
                    f"{adapter.role}: {adapter.path} adapts {tensor.name}, which is {tensor.dtype} in "
                    f"{self._model.path}; give the full-precision checkpoint"
                )
        transposed = self._is_transposed(group, stored, name, outputs, inputs)
        says_so = bool(self._types() & _TRANSPOSED_MODEL_TYPES)
        return StackedUpdate(
            parameter=name,
            factors=factors,
            rank=adapter.settings.rank(name),
            scale=adapter.settings.scale(name),
            transposed=transposed,
            inputs=inputs,
            outputs=outputs,
            is_swapped=transposed and adapter.settings.swaps_stacked and not says_so,
            layout=adapter.expert_layout,
            stored=stored,
        )

    def _is_transposed(
        self, group: AdaptedParameters, stored: Stored, name: str, outputs: int, inputs: int
    ) -> bool:
        """Whether an expert's matrix is stored as (in, out); what cannot be told by shapes is refused."""
        if outputs != inputs:
            return stored.shape[1:] == (inputs, outputs)
        # PEFT adds B·A as it is where there is but one matrix.
        if stored.shape[0] == 1:
            return False
        if self._adapter.settings.swaps_stacked:
            return True
        if stored.rows:
            return False
        if self._types() & _SILENT_MODEL_TYPES:
            return False
        if (found := self._by_neighbours(stored)) is not None:
            return found
        if self._types() & _TRANSPOSED_MODEL_TYPES:
            return True
        raise AdapterError(
            f"{self._adapter.role}: {name} consists of square matrices, and neither its neighbours nor the hidden_size "
            f"of {self._model.path} say whether they are stored as (out, in) or (in, out)"
        )

    def _types(self) -> set[Any]:
        """The model types that the configuration and its parts name."""
        return {part.get("model_type") for part in _parts(self._model.config)}

    def _by_neighbours(self, stored: Stored) -> bool | None:
        """What the other parameters of the same experts say, of which one side is the hidden size."""
        sizes = {part.get("hidden_size") for part in _parts(self._model.config)}
        container = stored.names[0][0].rpartition(".")[0]
        for tensor in self._model.headers.tensors:
            shape = tuple(tensor.shape)
            if tensor.name.rpartition(".")[0] != container or len(shape) != 3 or shape[1] == shape[2]:
                continue
            hidden = [side for side in (1, 2) if shape[side] in sizes]
            if len(hidden) == 1:
                # The hidden size is the side of the outputs for what leads out of the experts, else of the inputs.
                leads_out = _INNER_PROJECTION.search(tensor.name.rpartition(".")[2]) is not None
                return (hidden == [1]) != leads_out
        return None

    def _places(self) -> dict[str, Stored | None]:
        """Where all parameters are that the adapter could mean; None for what is no stack of matrices."""
        headers = self._model.headers
        wanted = [name for group in self._adapter.parameters.values() for name in self._candidates(group)]
        # All names are looked for at once, since a name that is not an exact one is looked for among all there are.
        direct = match_names(wanted, headers.names)
        places = {name: self._stacked(tensor) for name, tensor in direct.items()}
        places |= self._of_single_experts([name for name in wanted if name not in places])
        if lost := [name for name in wanted if name not in places]:
            places |= {name: self._stacked(tensor) for name, tensor in self._names.stored(lost).items()}
            for name, made in self._names.made(lost).items():
                if made.operations in (_STACKING, _STACKING[:1]):
                    places[name] = self._parts(made.sources)
                elif made.operations == ("Transpose",):
                    places[name] = self._stacked(made.sources[0][0])
        return places

    def _of_single_experts(self, wanted: Sequence[str]) -> dict[str, Stored | None]:
        """Those parameters that the checkpoint stores expert by expert under the same module."""
        if not wanted:
            return {}
        experts: dict[str, dict[str, dict[int, str]]] = {}
        for other in self._model.headers.names:
            if match := _ONE_EXPERT.match(other):
                leaves = experts.setdefault(match["experts"], {})
                leaves.setdefault(match["leaf"], {})[int(match["index"])] = other
        containers = match_names([*dict.fromkeys(name.rpartition(".")[0] for name in wanted)], experts)
        found = {}
        for name in wanted:
            container, _, leaf = name.rpartition(".")
            leaves = experts.get(containers.get(container, ""), {})
            for parts in _PARTS.get(leaf, ((leaf,),)):
                if all(part in leaves for part in parts):
                    found[name] = self._parts(
                        [
                            [names[index] for index in sorted(names)]
                            for names in map(leaves.__getitem__, parts)
                        ]
                    )
        return found

    def _stacked(self, tensor: str) -> Stored | None:
        """One tensor of all experts; or a matrix, which is one of one."""
        shape = tuple(self._model.headers.tensor(tensor).shape)
        if len(shape) == 2:
            return Stored(((tensor,),), (1, *shape), is_matrix=True)
        return Stored(((tensor,),), (shape[0], shape[1], shape[2])) if len(shape) == 3 else None

    def _parts(self, names: Sequence[Sequence[str]]) -> Stored | None:
        """Tensors of single experts as one parameter, if they go together."""
        headers = self._model.headers
        shapes = [{tuple(headers.tensor(name).shape) for name in part} for part in names]
        first = [next(iter(found)) for found in shapes]
        regular = all(len(found) == 1 for found in shapes) and len({len(part) for part in names}) == 1
        if not regular or any(len(shape) != 2 or shape[1] != first[0][1] for shape in first):
            return None
        rows = tuple(shape[0] for shape in first)
        return Stored(tuple(tuple(part) for part in names), (len(names[0]), sum(rows), first[0][1]), rows)

    def _missing(
        self, group: AdaptedParameters, candidates: Sequence[str], stored: Mapping[str, Stored]
    ) -> str:
        """Says that the checkpoint has no parameter for a product."""
        adapter = self._adapter
        where = f"{adapter.role}: the key {group.factors[0].a} adapts a parameter of {group.module}"
        lost = next((name for name in candidates if name not in stored), None)
        if lost is None:
            return f"{where}, but target_parameters names only {len(candidates)} of it"
        why = self._names.why_missing(lost) or "give the checkpoint that the adapter was trained on"
        return f"{where}, and {self._model.path} does not have {lost}; {why}"

    def _unfit(self, group: AdaptedParameters, stored: Mapping[str, Stored]) -> str:
        adapter = self._adapter
        factors = group.factors[0]
        name, found = next(iter(stored.items()))
        return (
            f"{adapter.role}: {factors.a} of shape {tuple(adapter.headers.tensor(factors.a).shape)} and its lora_B of "
            f"shape {tuple(adapter.headers.tensor(factors.b).shape)} fit no parameter of {group.module}, such as "
            f"{name} of {found.shape[0]} experts and shape {found.shape[1:]} in {self._model.path}, for which "
            f"adapter_config.json says rank {adapter.settings.rank(name)}"
        )


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those inside of it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)
