"""The competitors: what each tool's command line is for a job."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from timing import Competitor

HERE = Path(__file__).parent

TOOL = [sys.executable, "-m", "safemerge_fast"]
"""The command line under test."""

RUN = [*TOOL, "run"]
"""Runs a mergekit-style configuration: CONFIG -o OUTPUT [--threads N]."""

MERGEKIT_FLAGS = [
    "--no-copy-tokenizer",
    "--no-write-model-card",
    "--async-write",
    "--write-threads",
    "2",
    "--quiet",
]
"""Its fastest settings on a CPU: shards are written in the background; the inputs have no tokenizer."""

FLOOR = "copy floor (cat inputs, cp one, sync)"
READ = "cat inputs"
WRITE = "dd past the cache"
OURS = "safemerge-fast"


def copy_floor(inputs: list[Path], output: Path) -> Competitor:
    """Reads the inputs once and copies one of them: no merge through the page cache beats that."""
    script = f"cat {_weights(inputs)} >/dev/null && cp -r '{inputs[0]}' '{output}'"
    return Competitor(FLOOR, ["sh", "-c", script], output)


def read_alone(inputs: list[Path], output: Path) -> Competitor:
    """Reads the inputs."""
    return Competitor(READ, ["sh", "-c", f"cat {_weights(inputs)} >/dev/null"], output)


def write_alone(size: int, output: Path) -> Competitor:
    """Writes as many bytes as the output has in large direct writes, the fastest way that a shell has."""
    target = output / "zeros.safetensors"
    dd = f"dd if=/dev/zero of='{target}' bs=4M count={-(-size // (4 << 20))} oflag=direct"
    return Competitor(WRITE, ["sh", "-c", f"mkdir -p '{output}' && {dd}"], output)


def ours(configuration: Path, output: Path, *, threads: int | None = None) -> Competitor:
    """safemerge-fast on a configuration."""
    return _threaded([*RUN, str(configuration), "-o", str(output)], output, threads)


def safemerge(directory: Path, scores: Path, output: Path, *, threads: int | None = None) -> Competitor:
    """SafeMERGE of first and second, which are the fine-tuned and the safe model, with scores that are there."""
    roles = {"base": "sparse", "aligned": "sparse", "finetuned": "first", "safe": "second"}
    words = [word for role, folder in roles.items() for word in (f"--{role}", str(directory / folder))]
    # base and aligned are one model of holes, which a merge with scores does not read.
    command = [*TOOL, "merge", *words, "--scores", str(scores), "-o", str(output), "--force"]
    return _threaded(command, output, threads)


def analyze(directory: Path, output: Path) -> Competitor:
    """The scores of a full-rank fine-tune."""
    roles = {"base": "base", "aligned": "first", "finetuned": "second"}
    words = [word for role, folder in roles.items() for word in (f"--{role}", str(directory / folder))]
    script = ["sh", "-c", 'mkdir -p "$1" && shift && exec "$@"', "sh", str(output)]
    return Competitor(OURS, [*script, *TOOL, "analyze", *words, "-o", str(output / "scores.json")], output)


def torch_script(configuration: Path, output: Path) -> Competitor:
    """The careful script."""
    script = str(HERE / "torch_merge.py")
    return Competitor(
        "torch + safetensors script", [sys.executable, script, str(configuration), "-o", str(output)], output
    )


def mergekit(configuration: Path, output: Path) -> Competitor | None:
    """mergekit, if it is installed."""
    program = Path(sys.executable).parent / "mergekit-yaml"
    found = str(program) if program.exists() else shutil.which("mergekit-yaml")
    if found is None:
        return None
    return Competitor("mergekit", [found, str(configuration), str(output), *MERGEKIT_FLAGS], output)


def _threaded(command: list[str], output: Path, threads: int | None) -> Competitor:
    if threads is None:
        return Competitor(OURS, command, output)
    name = f"{OURS}, {threads} thread{'s' if threads > 1 else ''}"
    return Competitor(name, [*command, "--threads", str(threads)], output)


def _weights(directories: list[Path]) -> str:
    return " ".join(f"'{path}'/*.safetensors" for path in directories)
