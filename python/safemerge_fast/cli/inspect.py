"""`safemerge-fast inspect`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from ..printable import printable
from .options import terminal_options
from .terminal import Terminal

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter
    from ..checkpoint.foreign import Foreign
    from ..checkpoint.model import Model
    from ..pairing.row import Row

# Lines of JSON that are written together.
_LINES = 10_000


@click.command("inspect")
@click.argument("model")
@terminal_options
def command(*, terminal: Terminal, model: str) -> None:
    """Show what a checkpoint or a LoRA adapter holds: files, dtypes, parameters and modules. Reads headers only.

    Models in formats that a merge refuses are shown too, and why it does.
    """
    from ..checkpoint.adapter import is_adapter, open_adapter
    from ..checkpoint.model import locate, open_model
    from ..documents import write_document
    from ..pairing.rows import pair

    path = locate("model", model)
    if is_adapter(path):
        document = _adapter_document(open_adapter("model", model, path))
        terminal.result(lambda: write_document(document, levels=2), *_adapter_lines(document))
        return
    opened = open_model("model", model, path, foreign=True)
    rows = pair({"finetuned": opened}).rows
    document = _document(opened, rows)
    terminal.result(lambda: _json_pieces(document, opened, rows), *_lines(document))


def _adapter_document(adapter: Adapter) -> dict[str, Any]:
    """All that is shown of an adapter, as JSON can hold it."""
    tensors = adapter.headers.tensors
    return {
        "path": adapter.location,
        # Whatever else stands there is no name, and JSON may not be able to hold it.
        "base_model": base
        if isinstance(base := adapter.config.get("base_model_name_or_path"), str)
        else None,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors)),
        "modules": [
            {
                "name": module.name,
                "rank": module.rank,
                "scale": module.scale,
                "keys": [
                    key for key in (module.a, module.b, module.b_bias, module.magnitude) if key is not None
                ],
                "replaced": dict(module.replaced),
                "rows": list(module.token_indices),
            }
            for module in adapter.modules.values()
        ],
        # Which parameters these are, and of what rank, only the model's shapes say.
        "parameter_groups": [
            {"module": group.module, "keys": list(group.keys), "products": len(group.factors)}
            for group in adapter.parameters.values()
        ],
    }


def _adapter_lines(document: Mapping[str, Any]) -> Iterator[Any]:
    """The same for a person: modules of one kind in a line."""
    from rich import box
    from rich.table import Table

    from ..sizes import format_size

    yield printable(document["path"])
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in document["dtypes"].items())
    yield (
        f"LoRA adapter of {printable(str(document['base_model'] or 'an unnamed model'))}, "
        f"{document['parameters']:,} parameters, "
        f"{format_size(document['bytes'])} ({dtypes})"
    )
    groups = Counter(
        (module["name"].rpartition(".")[2], module["rank"], module["scale"], _change(module))
        for module in document["modules"]
    )
    groups.update(
        (
            group["module"].rpartition(".")[2],
            0,
            1.0,
            f"low rank of {group['products']} bare parameters; see check",
        )
        for group in document["parameter_groups"]
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("module", "modules", "rank", "scale", "what changes"):
        table.add_column(title, justify="right" if title in ("modules", "rank", "scale") else "left")
    for (leaf, rank, scale, change), count in groups.items():
        table.add_row(
            printable(leaf), str(count), str(rank or ""), f"{scale:.6g}" if rank else "", printable(change)
        )
    yield table


def _change(module: Mapping[str, Any]) -> str:
    """What an adapter does to a module, in words."""
    suffixes = [key.rpartition("lora_")[2] for key in module["keys"]]
    parts = ["low rank"] if module["rank"] else []
    parts += ["norms (DoRA)"] if any(suffix.startswith("magnitude") for suffix in suffixes) else []
    parts += ["bias"] if "B.bias" in suffixes else []
    parts += [f"{', '.join(module['replaced'])} replaced"] if module["replaced"] else []
    parts += [f"{len(module['rows'])} rows replaced"] if module["rows"] else []
    return ", ".join(parts)


def _document(model: Model, rows: tuple[Row, ...]) -> dict[str, Any]:
    """All that is shown but the single tensors, as JSON can hold it."""
    identity = model.headers.identity()
    of_file = Counter(row.file for row in rows)
    return {
        "path": model.location,
        "model_type": model.config.get("model_type"),
        "index": model.headers.index,
        "parameters": model.headers.parameters if model.foreign is None else model.foreign.parameters,
        "bytes": model.headers.nbytes,
        "quantised": None if model.foreign is None else _foreign(model.foreign),
        "count": len(rows),
        "files": [
            {"file": file, "bytes": identity[file].size, "tensors": of_file[file]}
            for file in model.headers.files
        ],
        "dtypes": dict(Counter(row.dtype for row in rows if row.encoded is None)),
        "encodings": dict(Counter(row.encoded.format for row in rows if row.encoded is not None)),
        "module_types": _module_types(rows),
    }


def _foreign(foreign: Foreign) -> dict[str, Any]:
    """What is shown of weights that the engine does not decode."""
    return {
        "format": foreign.name,
        "tensors": foreign.tensors,
        "bytes": foreign.nbytes,
        "example": foreign.tensor,
        "mergeable": False,
        "way_out": foreign.way_out,
    }


def _json_pieces(document: Mapping[str, Any], model: Model, rows: tuple[Row, ...]) -> Iterator[str]:
    """The document with a line for each tensor, in pieces: there may be a million."""
    from ..documents import write_document

    yield write_document(document, levels=2).rstrip()[:-1].rstrip() + ',\n  "tensors": ['
    lines: list[str] = []
    for place, row in enumerate(rows):
        line = {
            "name": row.name,
            "dtype": row.dtype,
            "encoding": _encoding(row),
            "shape": list(row.shape),
            "file": row.file,
            "bytes": model.headers.tensor(row.name).nbytes,
            "module_type": row.module_type,
            "analysed": row.analysed,
        }
        lines.append((",\n    " if place else "\n    ") + json.dumps(line, ensure_ascii=False))
        if len(lines) == _LINES:
            yield "".join(lines)
            lines.clear()
    yield "".join(lines) + "\n  ]\n}\n"


def _module_types(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """Per module type, dtype and format: tensors, parameters, shapes, and whether merge analyses them."""
    groups: dict[tuple[str, str, str | None, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.module_type, row.dtype, _encoding(row), row.analysed), []).append(row)
    return [
        {
            "module_type": module_type,
            "dtype": dtype,
            "encoding": encoding,
            "tensors": len(group),
            "parameters": sum(math.prod(row.shape) for row in group),
            "shapes": [list(shape) for shape in sorted({row.shape for row in group})],
            "analysed": analysed,
        }
        for (module_type, dtype, encoding, analysed), group in groups.items()
    ]


def _encoding(row: Row) -> str | None:
    """The format of a quantised tensor."""
    return None if row.encoded is None else row.encoded.format


def _lines(document: Mapping[str, Any]) -> Iterator[Any]:
    """The same for a person."""
    from rich import box
    from rich.table import Table

    from ..sizes import format_size

    yield printable(document["path"])
    stored = {**document["encodings"], **document["dtypes"]}
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in stored.items())
    kind = printable(document["model_type"] or "unknown model type")
    known = document["parameters"]
    parameters = "an unknown number of parameters" if known is None else f"{known:,} parameters"
    yield (f"{kind}, {parameters}, {format_size(document['bytes'])}, {document['count']} tensors ({dtypes})")
    if (quantised := document["quantised"]) is not None:
        yield (
            f"quantised ({quantised['format']}): {quantised['tensors']} tensors, "
            f"{format_size(quantised['bytes'])}, such as {printable(quantised['example'])}; a merge refuses it, since "
            f"averaging its stored numbers would be silently wrong: {quantised['way_out']}"
        )
    files = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    files.add_column("file", overflow="fold")
    files.add_column("tensors", justify="right", no_wrap=True)
    files.add_column("size", justify="right", no_wrap=True)
    for file in document["files"]:
        files.add_row(printable(file["file"]), str(file["tensors"]), format_size(file["bytes"]))
    yield files
    types = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (
        ("module type", "left"),
        ("dtype", "left"),
        ("tensors", "right"),
        ("parameters", "right"),
        ("shape", "left"),
        ("analysed", "left"),
    ):
        types.add_column(title, justify="right" if justify == "right" else "left")
    for entry in document["module_types"]:
        first = "×".join(map(str, entry["shapes"][0])) or "scalar"
        types.add_row(
            printable(entry["module_type"]),
            entry["encoding"] or entry["dtype"],
            str(entry["tensors"]),
            f"{entry['parameters']:,}",
            first + (f" and {len(entry['shapes']) - 1} more" if len(entry["shapes"]) > 1 else ""),
            "yes" if entry["analysed"] else "no",
        )
    yield types
