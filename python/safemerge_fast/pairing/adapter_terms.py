"""What an adapter makes of the tensors of the checkpoint that it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .._engine import TensorInfo
from ..checkpoint.adapter import AdaptedModule, Adapter
from ..checkpoint.adapter_parameters import AdaptedParameters
from ..checkpoint.model import FLOATS, Model
from ..errors import AdapterError
from .adapter_orientation import Orientations
from .expert_updates import ExpertPiece, StackedUpdate
from .operand import LowRank, Magnitude, Operand, Rows, Term
from .stacked_parameters import StackedParameters
from .tensor_names import TensorNames
from .tied import embedding_name, is_head, ties_head

__all__ = [
    "AdapterTerms",
    "AdapterUses",
    "StackedUse",
    "Use",
    "adapter_notes",
    "adapter_terms",
    "adapter_uses",
    "stacked_pieces",
]


@dataclass(frozen=True, slots=True)
class Use:
    """What becomes of some keys of an adapter.

    Attributes:
        module: The module that they are of.
        parameter: Its parameter that they change: "weight", "bias", ….
        keys: The keys.
        tensor: The checkpoint's tensor that changes, or None if it has none.
        terms: What that becomes.
        problem: Why nothing can become of them, in a sentence; None if all is well.
    """

    module: AdaptedModule
    parameter: str
    keys: tuple[str, ...]
    tensor: str | None = None
    terms: tuple[Term, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class StackedUse:
    """What becomes of the keys of one module's bare parameters.

    Attributes:
        group: The module's keys.
        updates: The updates of its parameters.
        problem: As in Use.
    """

    group: AdaptedParameters
    updates: tuple[StackedUpdate, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterUses:
    """What becomes of every key of an adapter.

    Attributes:
        modules: Uses of modules' keys.
        parameters: Uses of bare parameters' keys.
        renamed: Names of the adapter that only transformers' table explains, and the tensors they are of.
    """

    modules: tuple[Use, ...]
    parameters: tuple[StackedUse, ...]
    renamed: Mapping[str, str]

    @property
    def problems(self) -> list[str]:
        """Why some keys are of no use."""
        problems = [use.problem for use in self.modules] + [use.problem for use in self.parameters]
        return [problem for problem in problems if problem is not None]


def adapter_uses(adapter: Adapter, model: Model) -> AdapterUses:
    """Says what becomes of every key of an adapter, also where nothing can.

    Args:
        adapter: The adapter.
        model: The checkpoint it was trained on. Names are matched exactly, then by a unique suffix, then by what
            transformers' loading makes of the checkpoint's names.
    """
    names = TensorNames(model, _wanted(adapter))
    orientations = Orientations(adapter, model)
    uses = _each_once(
        adapter,
        (
            _use(adapter, model, names, orientations, module, parameter, key)
            for module in adapter.modules.values()
            for parameter, key in _parameters(module).items()
        ),
    )
    stacked = StackedParameters(adapter, model, names)
    parameters = tuple(_stacked_use(stacked, group) for group in adapter.parameters.values())
    return AdapterUses(uses, parameters, names.renamed)


@dataclass(frozen=True, slots=True)
class AdapterTerms:
    """What an adapter makes of a checkpoint's tensors.

    Attributes:
        terms: The terms by the checkpoint's tensor names, for the tensors that it changes as a whole.
        stacks: The updates of the experts of stacked tensors, by the tensors' names.
    """

    terms: Mapping[str, tuple[Term, ...]]
    stacks: Mapping[str, StackedUpdate]

    def __contains__(self, name: object) -> bool:
        return name in self.terms or name in self.stacks


def adapter_terms(adapter: Adapter, model: Model) -> AdapterTerms:
    """Says what every adapted tensor is made of; all keys of the adapter are used.

    With s the module's scale, a weight becomes W + s·B·A, an embedding or a Conv1D W + s·(B·A)ᵀ, with DoRA
    rescaled to the magnitudes; a bias becomes b + s·b_B; other tensors are replaced, or rows of them.

    Args:
        adapter: The adapter.
        model: The checkpoint it was trained on; names are matched as adapter_uses does.

    Returns:
        What the adapter changes.

    Raises:
        AdapterError: The checkpoint has no tensor for a key, or one of another shape.
    """
    uses = adapter_uses(adapter, model)
    if problems := uses.problems:
        raise AdapterError(problems[0])
    terms = {use.tensor: use.terms for use in uses.modules if use.tensor is not None}
    stacks: dict[str, StackedUpdate] = {}
    for use in uses.parameters:
        for update in use.updates:
            stored = update.stored
            if not stored.rows and not stored.is_matrix:
                stacks[stored.names[0][0]] = update
                continue
            terms |= {piece.tensor: (piece.term,) for piece in update.pieces(adapter.role, model.role)}
    return AdapterTerms({**terms, **_stored_tied_head(model, terms)}, stacks)


def stacked_pieces(adapter: Adapter, model: Model, uses: AdapterUses) -> Iterator[ExpertPiece]:
    """The matrices of single experts that an adapter updates, with what each becomes."""
    for use in uses.parameters:
        for update in use.updates:
            yield from update.pieces(adapter.role, model.role)


def adapter_notes(adapter: Adapter, model: Model, terms: Mapping[str, tuple[Term, ...]]) -> list[str]:
    """What a person should know of folding an adapter into a model, in sentences.

    Args:
        adapter: The adapter.
        model: The checkpoint it was trained on.
        terms: What adapter_terms says of the two.
    """
    notes = []
    if renamed := TensorNames(model, _wanted(adapter)).renamed:
        name, tensor = next(iter(renamed.items()))
        notes.append(
            f"{len(renamed)} tensors have other names in {adapter.role} than in {model.role}, by transformers' own "
            f"table: such as {name} for {tensor}"
        )
    if adapter.parameters:
        trained = "PEFT" if adapter.expert_layout == "peft" else "Unsloth before September 2026"
        notes.append(
            f"{adapter.role} holds LoRA of fused experts, read as {trained} lays it out; its files do not say who "
            f"trained them, so choose expert_lora_layout if that was another"
        )
    embedding = embedding_name(tensor.name for tensor in model.headers.tensors)
    tied = embedding is not None and embedding in terms and ties_head(model.config)
    # PEFT keeps trainable tokens of tied layers in step by itself.
    if embedding is not None and tied and terms[embedding][0].operand.rows is None:
        notes.append(
            f"{adapter.role} adapts {embedding}, to which {model.role} ties its head: in the output both change, as "
            f"with merge_and_unload, while PEFT changes the embedding only as long as the adapter is not merged"
        )
    return notes


def _stored_tied_head(model: Model, terms: Mapping[str, tuple[Term, ...]]) -> dict[str, tuple[Term, ...]]:
    """A head that is tied by the configuration and stored nevertheless follows its embedding."""
    names = [tensor.name for tensor in model.headers.tensors]
    embedding = embedding_name(names)
    head = next((name for name in names if is_head(name)), None)
    if head is None or head in terms or embedding is None or embedding not in terms:
        return {}
    # A configuration that does not say it may stand for a head of its own.
    if not ties_head(model.config, default=False):
        return {}
    return {head: terms[embedding]}


def _wanted(adapter: Adapter) -> list[str]:
    """The names that an adapter has for the parameters of modules that change."""
    return [
        f"{module.name}.{parameter}"
        for module in adapter.modules.values()
        for parameter in _parameters(module)
    ]


def _parameters(module: AdaptedModule) -> dict[str, str]:
    """The parameters of a module that change, and a key that changes each."""
    parameters = dict(module.replaced)
    if (key := module.a or module.token_rows) is not None:
        parameters["weight"] = key
    if module.b_bias is not None:
        parameters["bias"] = module.b_bias
    return parameters


def _keys(module: AdaptedModule, parameter: str) -> tuple[str, ...]:
    """All keys that change a parameter of a module."""
    keys = [module.replaced.get(parameter)]
    if parameter == "weight":
        keys += [module.a, module.b, module.magnitude, module.token_rows]
    if parameter == "bias":
        keys.append(module.b_bias)
    return tuple(key for key in keys if key is not None)


def _use(
    adapter: Adapter,
    model: Model,
    names: TensorNames,
    orientations: Orientations,
    module: AdaptedModule,
    parameter: str,
    key: str,
) -> Use:
    """What becomes of the keys of one parameter."""
    keys = _keys(module, parameter)
    name = names.get(f"{module.name}.{parameter}")
    if name is None:
        return Use(module, parameter, keys, problem=_missing(adapter, model, names, module, parameter, key))
    tensor = model.headers.tensor(name)
    if tensor.dtype not in FLOATS:
        problem = (
            f"{adapter.role}: {adapter.path} adapts {name}, which is {tensor.dtype} in {model.path}; "
            f"give the full-precision checkpoint"
        )
        return Use(module, parameter, keys, name, problem=problem)
    try:
        terms = tuple(_terms(adapter, model, orientations, module, parameter, tensor))
    except AdapterError as error:
        return Use(module, parameter, keys, name, problem=str(error))
    return Use(module, parameter, keys, name, terms)


def _each_once(adapter: Adapter, uses: Iterable[Use]) -> tuple[Use, ...]:
    """The uses; of two that are of one tensor, whose names mean the same, the second is none."""
    found: list[Use] = []
    first: dict[str | None, Use] = {}
    for use in uses:
        other = first.setdefault(use.tensor, use)
        if other is not use and use.tensor is not None and use.problem is None:
            problem = (
                f"{adapter.role}: {use.keys[0]} and {other.keys[0]} both adapt {use.tensor}; only one of them can be "
                f"applied"
            )
            use = Use(use.module, use.parameter, use.keys, use.tensor, problem=problem)
        found.append(use)
    return tuple(found)


def _stacked_use(stacked: StackedParameters, group: AdaptedParameters) -> StackedUse:
    """What becomes of the keys of one module's parameters."""
    try:
        return StackedUse(group, stacked.updates(group))
    except AdapterError as error:
        return StackedUse(group, problem=str(error))


def _terms(
    adapter: Adapter,
    model: Model,
    orientations: Orientations,
    module: AdaptedModule,
    parameter: str,
    tensor: TensorInfo,
) -> Iterator[Term]:
    """The terms of one adapted parameter, whose tensor in the checkpoint is given."""
    role = adapter.role
    operand = Operand(model.role, tensor.name)
    if (key := module.replaced.get(parameter)) is not None:
        _check_shape(adapter, model, key, tensor, tuple(tensor.shape))
        operand = Operand(role, key)
    if parameter == "weight" and module.token_rows is not None:
        shape = tuple(tensor.shape)
        _check_shape(adapter, model, module.token_rows, tensor, (len(module.token_indices), *shape[1:]))
        if max(module.token_indices) >= shape[0]:
            raise AdapterError(
                f"{role}: {module.token_rows} replaces row {max(module.token_indices)}, but {tensor.name} has only "
                f"{shape[0]} rows in {model.path}; resize its embedding first, as was done before training"
            )
        operand = Operand(
            operand.source, operand.tensor, rows=Rows(role, module.token_rows, module.token_indices)
        )
    if parameter == "weight" and module.a is not None and module.b is not None:
        transpose = orientations.is_transposed(module, tensor)
        product = LowRank(role, module.a, module.b, module.scale, module.rank, transpose)
        magnitude = None
        if module.magnitude is not None:
            # A vector; (1, out) in adapters of early versions.
            features = tensor.shape[1 if transpose else 0]
            stored = tuple(adapter.headers.tensor(module.magnitude).shape)
            if sorted(stored)[-1:] != [features] or set(stored[:-1]) - {1}:
                _check_shape(adapter, model, module.magnitude, tensor, (features,))
            magnitude = Magnitude(role, module.magnitude, transpose)
        operand = Operand(operand.source, operand.tensor, operand.rows, (product,), magnitude)
    yield Term(operand)
    if parameter == "bias" and module.b_bias is not None:
        _check_shape(adapter, model, module.b_bias, tensor, tuple(tensor.shape))
        yield Term(Operand(role, module.b_bias), module.scale)


def _check_shape(
    adapter: Adapter, model: Model, key: str, tensor: TensorInfo, expected: tuple[int, ...]
) -> None:
    shape = tuple(adapter.headers.tensor(key).shape)
    if shape != expected:
        raise AdapterError(
            f"{adapter.role}: {key} has shape {shape}, but {tensor.name} of {model.path} needs {expected}; give the "
            f"checkpoint that the adapter was trained on (with its embedding resized, if that was done)"
        )


def _missing(
    adapter: Adapter, model: Model, names: TensorNames, module: AdaptedModule, parameter: str, key: str
) -> str:
    """Says that the checkpoint has no tensor for a key, and why that may be."""
    name = f"{module.name}.{parameter}"
    where = f"{adapter.role}: the key {key} adapts {name}, which {model.path} does not have"
    if parameter == "bias" and module.b_bias == key:
        return f"{where}; a bias that the model lacks cannot be merged into it"
    if is_head(name) and ties_head(model.config):
        return (
            f"{where}: its head is tied to the embedding, and a head of its own would change the model's architecture; "
            f"untie it first (tie_word_embeddings false, with the head stored)"
        )
    why = names.why_missing(name) or "give the checkpoint that the adapter was trained on"
    return f"{where}; {why}"
