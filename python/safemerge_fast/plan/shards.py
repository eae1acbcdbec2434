"""Stage 5, plan: rows and decisions become plain data that says what every output tensor is made of.

The engine validates the data again and executes it; see `_engine.Plan`. Nothing here opens or writes a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.model import FLOATS, Model
from ..decision import Decision
from ..errors import AdapterError, PairingError
from ..pairing.operand import Operand, references
from ..pairing.rows import Row
from ..settings import DTYPES
from .composition import Composition, combine
from .invocation import Argument, Invocation

__all__ = [
    "Blend",
    "Shard",
    "compose",
    "compose_sum",
    "index_document",
    "lay_out",
    "output_dtype",
    "plan_document",
    "plan_shard",
]

VERSION = 2
"""Version of the plan's format."""

SINGLE_FILE = "model.safetensors"
"""Name of the weights of a checkpoint that has one file."""

INDEX_FILE = "model.safetensors.index.json"
"""Name of the index of a checkpoint that has several."""

PLAN_FILE = "safemerge_plan.json"
"""Name of the plan within the output that it was executed into."""

_STANDARD_NAME = re.compile(r"model-\d{5}-of-(?P<count>\d{5})\.safetensors")

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class Blend:
    """What every merged tensor is made of.

    Attributes:
        method: Name of the engine's method.
        parameters: The method's parameters.
        weights: Weight by role, in the order in which the roles are accumulated; None where the method takes none.
        kept: The role that tensors which are not merged come from.
        base: The role that is the method's base; None if it has none.
        each: Parameters that each of the roles in weights gets.
    """

    method: str
    parameters: Mapping[str, Any]
    weights: Mapping[str, float | None]
    kept: str = "finetuned"
    base: str | None = None
    each: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file and the rows whose tensors it holds, in the order of their bytes."""

    file: str
    rows: tuple[Row, ...]


def output_dtype(row: Row, dtype: str) -> str:
    """The dtype of a row's tensor in the output.

    Args:
        row: The row.
        dtype: "auto" or a key of configuration.DTYPES; tensors that are not float keep theirs.

    Returns:
        A dtype as safetensors names it.
    """
    return row.dtype if dtype == "auto" or row.dtype not in FLOATS else DTYPES[dtype]


def tensor_bytes(row: Row, dtype: str) -> int:
    """Bytes of a row's tensor in the output."""
    return math.prod(row.shape) * _ITEM_BYTES[output_dtype(row, dtype)]


def lay_out(rows: Sequence[Row], *, dtype: str = "auto", max_shard_size: int | None = None) -> list[Shard]:
    """Distributes the rows over output files, without changing their order.

    Args:
        rows: All rows of the pairing.
        dtype: Output dtype of float tensors, as in output_dtype.
        max_shard_size: Most bytes of tensors in a file (a larger tensor gets a file of its own). None keeps
            the fine-tuned model's files; they keep their names where transformers would find them by these.

    Returns:
        The output files in order; none is empty.
    """
    groups: list[list[Row]] = []
    if max_shard_size is None:
        by_file: dict[str, list[Row]] = {}
        for row in rows:
            by_file.setdefault(row.file, []).append(row)
        groups = list(by_file.values())
        if len(groups) > 1 and _names_are_standard(by_file):
            return [Shard(file, tuple(group)) for file, group in by_file.items()]
    else:
        filled = 0
        for row in rows:
            size = tensor_bytes(row, dtype)
            if not groups or filled + size > max_shard_size:
                groups.append([])
                filled = 0
            groups[-1].append(row)
            filled += size
    count = len(groups)
    if count == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def plan_shard(
    shard: Shard, decisions: Mapping[str, Decision], blend: Blend, *, dtype: str = "auto"
) -> dict[str, Any]:
    """Says what each tensor of one output file is made of.

    Args:
        shard: The output file.
        decisions: At least the decisions of the shard's rows.
        blend: What merged tensors are made of, and where the others come from.
        dtype: Output dtype of float tensors, as in output_dtype.

    Returns:
        One entry of the plan's "shards".

    Raises:
        PairingError: A tensor is to be merged that one of the blend's models does not have.
    """
    return {
        "file": shard.file,
        "metadata": {"format": "pt"},
        "tensors": [
            {
                "name": row.name,
                "dtype": output_dtype(row, dtype),
                "shape": list(row.shape),
                **compose(row, decisions[row.name], blend).to_plan(),
            }
            for row in shard.rows
        ],
    }


def compose(row: Row, decision: Decision, blend: Blend) -> Composition | Invocation:
    """Says what one tensor is made of.

    Args:
        row: The row.
        decision: Whether it is merged.
        blend: What merged tensors are made of, and where the others come from.

    Returns:
        What the plan and the report need. What comes down to one tensor as it is stored is a copy of it.

    Raises:
        PairingError: It is to be merged, and one of the blend's models does not have it.
        AdapterError: It is to be merged by a method that is no sum, and an adapter makes it one.
    """
    if blend.base is None or not decision.merge:
        return compose_sum(row, decision, blend)
    _require_terms(row, [*blend.weights, blend.base])
    arguments = [
        Argument(_single(row, role, blend.method), weight, blend.each)
        for role, weight in blend.weights.items()
    ]
    base = _single(row, blend.base, blend.method)
    return Invocation(blend.method, tuple(arguments), base, blend.parameters)


def compose_sum(row: Row, decision: Decision, blend: Blend) -> Composition:
    """As compose, for a blend that is a weighted sum.

    Raises:
        PairingError: It is to be merged, and one of the blend's models does not have it.
    """
    weights = blend.weights if decision.merge else {blend.kept: 1.0}
    _require_terms(row, weights)
    terms = combine((1.0 if weight is None else weight, row.terms[role]) for role, weight in weights.items())
    # A tensor that is not merged is a sum, too, where an adapter adds to it.
    sums = blend.base is None
    parameters = blend.parameters if sums else {"normalize": False}
    return Composition(blend.method if sums else "linear", parameters, terms)


def _require_terms(row: Row, roles: Iterable[str]) -> None:
    if missing := [role for role in roles if role not in row.terms]:
        raise PairingError(
            f"{row.name} is to be merged, but the {missing[0]} model has no tensor of that name and shape; "
            f"leave it out with --exclude"
        )


def _single(row: Row, role: str, method: str) -> Operand:
    """The one operand that a method other than a sum takes of a role."""
    terms = row.terms[role]
    if len(terms) > 1 or terms[0].weight != 1.0:
        raise AdapterError(
            f"the {role} adapter adds a vector to {row.name} (lora_bias), which {method} cannot take as one tensor; "
            f"use the method linear, or fold the adapter first (recipe: fold)"
        )
    return terms[0].operand


def plan_document(models: Mapping[str, Model], shards: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds to shards of a plan the identity of the files they read, which makes them a plan of their own.

    Args:
        models: The models by role; roles that no tensor comes from are left out.
        shards: What plan_shard returned, one or many.

    Returns:
        The plan, ready for json.dumps and `_engine.Plan`.
    """
    shards = list(shards)
    used: dict[str, set[str]] = {}
    for shard in shards:
        for tensor in shard["tensors"]:
            for source, name in _inputs(tensor):
                used.setdefault(source, set()).add(models[source].headers.tensor(name).file)
    sources = {}
    for role in sorted(used):
        headers = models[role].headers
        identity = headers.identity()
        sources[role] = {
            "path": headers.path,
            "files": {file: identity[file].to_dict() for file in headers.files if file in used[role]},
        }
    operations: list[Any] = []
    known: dict[str, int] = {}
    tabled = [
        {**shard, "tensors": [_tabled(tensor, operations, known) for tensor in shard["tensors"]]}
        for shard in shards
    ]
    return {"version": VERSION, "sources": sources, "operations": operations, "shards": tabled}


def _tabled(tensor: Mapping[str, Any], operations: list[Any], known: dict[str, int]) -> dict[str, Any]:
    """A planned tensor with its operation put into the table that tensors share."""
    kind = "copy" if "copy" in tensor else "merge"
    operation = {kind: _without(tensor[kind], tensor["name"])}
    number = known.setdefault(json.dumps(operation), len(operations))
    if number == len(operations):
        operations.append(operation)
    rest = {key: value for key, value in tensor.items() if key != kind}
    return {"name": rest.pop("name"), "operation": number, **rest}


def _without(operation: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An operation whose operands do not repeat the tensor's own name."""
    plain = dict(operation)
    if plain.get("tensor") == name:
        del plain["tensor"]
    if "operands" in plain:
        plain["operands"] = [
            {**operand, "operand": _without(operand["operand"], name)} for operand in plain["operands"]
        ]
    if "base" in plain:
        plain["base"] = _without(plain["base"], name)
    return plain


def index_document(shards: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The index of a checkpoint with these shards, as transformers 5 writes it."""
    parameters = size = 0
    weight_map = {}
    for shard in shards:
        for tensor in shard["tensors"]:
            elements = math.prod(tensor["shape"])
            parameters += elements
            size += elements * _ITEM_BYTES[tensor["dtype"]]
            weight_map[tensor["name"]] = shard["file"]
    return {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _names_are_standard(files: Iterable[str]) -> bool:
    """Whether all files are named as parts of one and the same sharded checkpoint."""
    matches = [_STANDARD_NAME.fullmatch(file) for file in files]
    counts = {match["count"] for match in matches if match is not None}
    return None not in matches and len(counts) == 1


def _inputs(tensor: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All (source, tensor) that one planned tensor reads."""
    if "copy" in tensor:
        return references(tensor["copy"])
    merge = tensor["merge"]
    operands = [weighted["operand"] for weighted in merge["operands"]]
    if "base" in merge:
        operands.append(merge["base"])
    return [reference for operand in operands for reference in references(operand)]
