"""`safemerge-fast inspect`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from .options import terminal_options
from .terminal import Terminal

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter
    from ..checkpoint.model import Model
    from ..pairing.rows import Row


@click.command("inspect")
@click.argument("model")
@terminal_options
def command(*, terminal: Terminal, model: str) -> None:
    """Show what a checkpoint or a LoRA adapter holds: files, dtypes, parameters and modules. Reads headers only."""
    from ..checkpoint.adapter import Adapter, open_source
    from ..documents import write_document
    from ..pairing.rows import pair

    opened = open_source("model", model)
    if isinstance(opened, Adapter):
        document = _adapter_document(opened)
        terminal.result(lambda: write_document(document, levels=2), *_adapter_lines(document))
        return
    rows = pair({"finetuned": opened}).rows
    document = _document(opened, rows)
    terminal.result(lambda: write_document(document, levels=2), *_lines(document))


def _adapter_document(adapter: Adapter) -> dict[str, Any]:
    """All that is shown of an adapter, as JSON can hold it."""
    tensors = adapter.headers.tensors
    return {
        "path": str(adapter.path),
        "base_model": adapter.config.get("base_model_name_or_path"),
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
    }


def _adapter_lines(document: Mapping[str, Any]) -> Iterator[Any]:
    """The same for a person: modules of one kind in a line."""
    from rich import box
    from rich.table import Table

    from ..sizes import format_size

    yield document["path"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in document["dtypes"].items())
    yield (
        f"LoRA adapter of {document['base_model'] or 'an unnamed model'}, {document['parameters']:,} parameters, "
        f"{format_size(document['bytes'])} ({dtypes})"
    )
    groups = Counter(
        (module["name"].rpartition(".")[2], module["rank"], module["scale"], _change(module))
        for module in document["modules"]
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("module", "modules", "rank", "scale", "what changes"):
        table.add_column(title, justify="right" if title in ("modules", "rank", "scale") else "left")
    for (leaf, rank, scale, change), count in groups.items():
        table.add_row(leaf, str(count), str(rank or ""), f"{scale:.6g}" if rank else "", change)
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
    """All that is shown, as JSON can hold it."""
    identity = model.headers.identity()
    sizes = {tensor.name: tensor.nbytes for tensor in model.headers.tensors}
    return {
        "path": str(model.path),
        "model_type": model.config.get("model_type"),
        "index": model.headers.index,
        "parameters": sum(math.prod(row.shape) for row in rows),
        "bytes": sum(sizes.values()),
        "files": [
            {"file": file, "bytes": identity[file].size, "tensors": sum(row.file == file for row in rows)}
            for file in model.headers.files
        ],
        "dtypes": dict(Counter(row.dtype for row in rows)),
        "module_types": _module_types(rows),
        "tensors": [
            {
                "name": row.name,
                "dtype": row.dtype,
                "shape": list(row.shape),
                "file": row.file,
                "bytes": sizes[row.name],
                "module_type": row.module_type,
                "analysed": row.analysed,
            }
            for row in rows
        ],
    }


def _module_types(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """Per module type and dtype: tensors, parameters, shapes, and whether merge analyses them."""
    groups: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.module_type, row.dtype, row.analysed), []).append(row)
    return [
        {
            "module_type": module_type,
            "dtype": dtype,
            "tensors": len(group),
            "parameters": sum(math.prod(row.shape) for row in group),
            "shapes": [list(shape) for shape in sorted({row.shape for row in group})],
            "analysed": analysed,
        }
        for (module_type, dtype, analysed), group in groups.items()
    ]


def _lines(document: Mapping[str, Any]) -> Iterator[Any]:
    """The same for a person."""
    from rich import box
    from rich.table import Table

    from ..sizes import format_size

    yield document["path"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in document["dtypes"].items())
    kind = document["model_type"] or "unknown model type"
    yield (
        f"{kind}, {document['parameters']:,} parameters, {format_size(document['bytes'])}, "
        f"{len(document['tensors'])} tensors ({dtypes})"
    )
    files = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    files.add_column("file", overflow="fold")
    files.add_column("tensors", justify="right", no_wrap=True)
    files.add_column("size", justify="right", no_wrap=True)
    for file in document["files"]:
        files.add_row(file["file"], str(file["tensors"]), format_size(file["bytes"]))
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
            entry["module_type"],
            entry["dtype"],
            str(entry["tensors"]),
            f"{entry['parameters']:,}",
            first + (f" and {len(entry['shapes']) - 1} more" if len(entry["shapes"]) > 1 else ""),
            "yes" if entry["analysed"] else "no",
        )
    yield types
