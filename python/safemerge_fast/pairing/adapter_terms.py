"""What an adapter makes of the tensors of the checkpoint that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .._engine import TensorInfo
from ..checkpoint.adapter import AdaptedModule, Adapter
from ..checkpoint.model import FLOATS, Model
from ..errors import AdapterError
from .adapter_orientation import Orientations
from .names import match_names
from .operand import LowRank, Magnitude, Operand, Rows, Term
from .tied import embedding_name, is_head, ties_head

__all__ = ["adapter_notes", "adapter_terms"]


def adapter_terms(adapter: Adapter, model: Model) -> dict[str, tuple[Term, ...]]:
    """Says what every adapted tensor is made of; all keys of the adapter are used.

    With s the module's scale, a weight becomes W + s·B·A, an embedding or a Conv1D W + s·(B·A)ᵀ, with DoRA
    rescaled to the magnitudes; a bias becomes b + s·b_B; other tensors are replaced, or rows of them.

    Args:
        adapter: The adapter.
        model: The checkpoint it was trained on. Names are matched exactly, then by a unique suffix.

    Returns:
        The terms by the checkpoint's tensor names, for the tensors that the adapter changes.

    Raises:
        AdapterError: The checkpoint has no tensor for a key, or one of another shape.
    """
    wanted = [
        f"{module.name}.{parameter}"
        for module in adapter.modules.values()
        for parameter in _parameters(module)
    ]
    found = match_names(wanted, [tensor.name for tensor in model.headers.tensors])
    orientations = Orientations(adapter, model)
    terms: dict[str, tuple[Term, ...]] = {}
    for module in adapter.modules.values():
        for parameter, key in _parameters(module).items():
            name = found.get(f"{module.name}.{parameter}")
            if name is None:
                raise AdapterError(_missing(adapter, model, module, parameter, key))
            tensor = model.headers.tensor(name)
            if tensor.dtype not in FLOATS:
                raise AdapterError(
                    f"{adapter.role}: {adapter.path} adapts {name}, which is {tensor.dtype} in {model.path}; "
                    f"give the full-precision checkpoint"
                )
            terms[name] = tuple(_terms(adapter, model, orientations, module, parameter, tensor))
    return {**terms, **_stored_tied_head(model, terms)}


def adapter_notes(adapter: Adapter, model: Model, terms: Mapping[str, tuple[Term, ...]]) -> list[str]:
    """What a person should know of folding an adapter into a model, in sentences.

    Args:
        adapter: The adapter.
        model: The checkpoint it was trained on.
        terms: What adapter_terms says of the two.
    """
    embedding = embedding_name(tensor.name for tensor in model.headers.tensors)
    if embedding is None or embedding not in terms or not ties_head(model.config):
        return []
    # PEFT keeps trainable tokens of tied layers in step by itself.
    if terms[embedding][0].operand.rows is not None:
        return []
    return [
        f"{adapter.role} adapts {embedding}, to which {model.role} ties its head: in the output both change, as "
        f"with merge_and_unload, while PEFT changes the embedding only as long as the adapter is not merged"
    ]


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


def _parameters(module: AdaptedModule) -> dict[str, str]:
    """The parameters of a module that change, and a key that changes each."""
    parameters = dict(module.replaced)
    if (key := module.a or module.token_rows) is not None:
        parameters["weight"] = key
    if module.b_bias is not None:
        parameters["bias"] = module.b_bias
    return parameters


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


def _missing(adapter: Adapter, model: Model, module: AdaptedModule, parameter: str, key: str) -> str:
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
    return f"{where}; give the checkpoint that the adapter was trained on"
