"""What goes into an output beside the weights, and the order in which it is written."""

from __future__ import annotations

import platform
import re
import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import _engine
from ..checkpoint.model import Model
from ..documents import write_document
from ..plan.shards import INDEX_FILE, PLAN_FILE, index_document, plan_document
from .companions import CONFIGURATION, companion_files, configuration_file

__all__ = [
    "CARD_FILE",
    "REPORT_FILE",
    "describe_inputs",
    "peak_memory",
    "publish",
    "remove_stray_shards",
    "versions",
]

REPORT_FILE = "safemerge_report.json"
CARD_FILE = "README.md"


def publish(
    output: _engine.Output,
    *,
    models: Mapping[str, Model],
    host: Model,
    tokenizer: Model,
    planned: Sequence[Mapping[str, Any]],
    card: str,
    report: str,
    dtype: str,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes all that is not weights; what makes the output loadable comes last.

    Args:
        output: Where the weights are committed already.
        models: The models by role.
        host: The checkpoint that the output is shaped like; its configuration and other files are taken over.
        tokenizer: The model whose tokenizer wins, if it has one.
        planned: The plan's shards.
        card: README.md.
        report: safemerge_report.json.
        dtype: The dtype that was asked for, as configuration_file takes it.
        config: What config.json says in place of the host's, if it is not to be that.

    Raises:
        OutputError: A file cannot be written.
    """
    for path, name in companion_files(host, tokenizer):
        output.copy_file(path, name)
    output.write_file(CARD_FILE, card.encode())
    # A line per tensor in both.
    output.write_file(PLAN_FILE, write_document(plan_document(models, planned), levels=4).encode())
    output.write_file(REPORT_FILE, report.encode())
    configuration = configuration_file(host, dtype, config)
    if configuration is not None:
        output.write_file(CONFIGURATION, configuration)
    if len(planned) > 1:
        output.write_file(INDEX_FILE, write_document(index_document(planned), levels=2).encode())


def remove_stray_shards(output: _engine.Output, files: Collection[str]) -> None:
    """Removes committed shards of an unfinished merge that this one, of another layout, does not write.

    Loaders without an index take every .safetensors file of a directory.

    Args:
        output: The output.
        files: The files that this merge writes.
    """
    for file in set(output.committed) - set(files):
        (Path(output.path) / file).unlink(missing_ok=True)


def describe_inputs(models: Mapping[str, Model]) -> dict[str, dict[str, Any]]:
    """What was read, by role: "spec", "path", and "files" with the identity of each."""
    return {
        role: {
            "spec": model.spec,
            "path": str(model.path),
            "files": {file: facts.to_dict() for file, facts in model.headers.identity().items()},
        }
        for role, model in models.items()
    }


def versions() -> dict[str, str]:
    """Versions of what took part: torch is named only if it was imported."""
    found = {"safemerge-fast": _engine.__version__, "python": platform.python_version()}
    for name in ("numpy", "torch"):
        if name in sys.modules:
            found[name] = str(sys.modules[name].__version__)
    return found


def peak_memory() -> int:
    """Largest resident memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        # Unlike ru_maxrss, which starts from the memory that the parent had before exec.
        return int(re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.M)[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
