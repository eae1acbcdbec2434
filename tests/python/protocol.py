"""Outputs of every kind: what they are if nothing disturbs their making, and what may stand there if it is."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import write_quartet
from forking import Done, Run, Server
from lora import write_lora
from pages import Parsed

__all__ = [
    "Case",
    "Files",
    "World",
    "comparable",
    "job_of",
    "marks",
    "mounted",
    "quick_directory",
    "standing",
]

Files = dict[str, bytes]

REPORT, PAGE = "safemerge_report.json", "safemerge_report.html"
# What a run measures of itself, and how it was asked to treat what stood there.
_OF_THE_RUN = ("seconds", "peak_memory_bytes", "bytes_read", "bytes_written", "output")
_FLAGS = ("output", "resume", "overwrite", "threads")
_PAGE_OF_THE_RUN = ("facts", "title", "command", "repeat", "settings")

_Item = TypeVar("_Item")

HIDDEN, INTERMEDIATE = 24, 32


@dataclass
class World:
    """Inputs, the command of each kind of output, and what each comes to.

    Attributes:
        path: Where everything lies.
        servers: Each runs the command line.
        words: The command line of each kind, without an output.
        whole: The files of each kind, made without any disturbance.
    """

    path: Path
    servers: Sequence[Server]
    words: dict[str, list[str]] = field(default_factory=dict, repr=False)
    whole: dict[str, Files] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Makes the inputs and the references."""
        self._free: queue.SimpleQueue[Server] = queue.SimpleQueue()
        for server in self.servers:
            self._free.put(server)
        quartet = write_quartet(
            self.path / "in", hidden=HIDDEN, layers=1, vocabulary=60, intermediate=INTERMEDIATE, shards=2
        )
        roles = {role: ["--" + role, str(path)] for role, path in quartet.items()}
        modules = {"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)}
        modules["model.layers.0.mlp.up_proj"] = (INTERMEDIATE, HIDDEN)
        adapters = {
            role: write_lora(self.path / "in" / role, modules, rank=2, seed=seed)
            for seed, role in enumerate(("fine-adapter", "safe-adapter"))
        }
        # A folder and a file that lies deeper than the output itself.
        templates = quartet["finetuned"] / "additional_chat_templates"
        templates.mkdir()
        (templates / "tool.jinja").write_text("{{ tools }}")

        of_all = [word for words in roles.values() for word in words]
        scores = self._analyze("scores.json", *roles["base"], *roles["aligned"], *roles["finetuned"])
        scored = ["merge", *of_all, "--scores", scores, "--select", "lowest:3"]
        adapted = [*roles["base"], *roles["aligned"], "--finetuned", str(adapters["fine-adapter"])]
        thin = self._analyze("thin.json", *adapted)
        self.words = {
            "scored": scored,
            "measured": ["merge", *of_all, "--select", "lowest:3"],
            "single": [*scored, "--max-shard-size", "1GB", "--alpha", "0.5"],
            "adapter": [
                *("merge", *adapted, "--safe", str(adapters["safe-adapter"])),
                *("--scores", thin, "--select", "lowest:1"),
            ],
            "fold": self._recipe(
                "fold.yml",
                recipe="fold",
                model=str(quartet["aligned"]),
                adapter=str(adapters["fine-adapter"]),
            ),
            "mergekit": self._recipe(
                "mergekit.yml",
                merge_method="linear",
                models=[
                    {"model": str(quartet[role]), "parameters": {"weight": weight}}
                    for role, weight in (("finetuned", 0.75), ("safe", 0.25))
                ],
                dtype="float32",
            ),
        }
        for kind in self.words:
            output = self.path / kind / "out"
            done = self.run(*self.words[kind], "-o", output, "-q")
            assert (done.code, done.stderr) == (0, ""), done
            self.whole[kind] = files_of(output)

    def run(self, *words: str | Path, **options: Any) -> Done:
        """Runs the command line once."""
        return self.run_at_once(Run([str(word) for word in words], **options))[0]

    def run_at_once(self, *runs: Run) -> list[Done]:
        """Starts runs at the same time, and waits for all."""
        server = self._free.get()
        try:
            return server.run_at_once(runs)
        finally:
            self._free.put(server)

    def each(self, items: Iterable[_Item], check: Callable[[_Item], object]) -> None:
        """Checks all items, several at a time, and tells of all that failed."""
        with ThreadPoolExecutor(len(self.servers)) as executor:
            waiting = {item: executor.submit(check, item) for item in items}
        failed = {item: str(future.exception()) for item, future in waiting.items() if future.exception()}
        assert not failed, "\n".join(f"{item}: {why}" for item, why in failed.items())

    def _analyze(self, name: str, *words: str) -> str:
        done = self.run("analyze", *words, "-o", self.path / name, "-q")
        assert done.code == 0, done
        return str(self.path / name)

    def _recipe(self, name: str, **document: Any) -> list[str]:
        (self.path / name).write_text(json.dumps(document))
        return ["run", str(self.path / name)]

    def stand(self, kind: str, output: Path) -> None:
        """Puts a finished output of a kind there."""
        shutil.copytree(self.path / kind / "out", output, dirs_exist_ok=True)

    def case(self, kind: str, place: Path, *flags: str, old: str | None = None) -> Case:
        """A run that makes an output in a new directory `place`, where one of the kind `old` may stand already."""
        output = place / "out"
        place.mkdir(parents=True, exist_ok=True)
        if old is not None:
            self.stand(old, output)
        return Case(self, kind, output, flags, old)


@dataclass
class Case:
    """One output in the making.

    Attributes:
        world: Where it is made.
        kind: What it will be.
        output: Where.
        flags: What is said of an older output.
        old: Which that is.
        plain: Whether permissions hold for its runs even if they are root's.
    """

    world: World
    kind: str
    output: Path
    flags: Sequence[str] = ()
    old: str | None = None
    plain: bool = False

    def run(self, *flags: str, **options: Any) -> Run:
        """The run, to be started."""
        words = [*self.world.words[self.kind], "-o", str(self.output), "-q", "--threads", "1"]
        return Run([*words, *flags], plain=self.plain, **options)

    def work(self, *flags: str, **options: Any) -> Done:
        """Runs it."""
        return self.world.run_at_once(self.run(*flags, **options))[0]

    def is_new(self) -> bool:
        """Whether the new output stands there, whole."""
        found = standing(self.output)
        return found is not None and comparable(found) == comparable(self.world.whole[self.kind])

    def is_old(self) -> bool:
        """Whether the old output stands there as it was, or nothing if there was none."""
        return standing(self.output) == (None if self.old is None else self.world.whole[self.old])

    def check_whole(self, *, nothing: bool = False) -> None:
        """The old output, the new one, or, if that is allowed, nothing stands there."""
        if self.is_old() or self.is_new():
            return
        found = standing(self.output)
        assert found is None, f"a mixture: {sorted(found)}"
        assert nothing, "the old output is gone, and no new one is there"

    def check_unmarked(self) -> None:
        """Where files are moved one by one: what looks like a model is whole."""
        found = standing(self.output)
        if self.is_old() or self.is_new() or found is None or not marks(found):
            return
        # The last moves are the marks themselves: all else is there by then.
        new = comparable({name: data for name, data in found.items() if not marks([name])})
        whole = self.world.whole[self.kind]
        assert new == comparable({name: data for name, data in whole.items() if not marks([name])}), (
            f"a mixture that looks like a model: {sorted(found)}"
        )

    def check_resumed(self) -> str:
        """Resumes as a person would; in the end the new output stands there and nothing else was left.

        Returns:
            "resumed", or "anew" where there was nothing to resume and the old output stands, as before.
        """
        how = "resumed"
        begun = any((job_of(self.output) / name).exists() for name in ("job.json", "publish.json"))
        begun = begun or any(
            (self.output / ".safemerge" / name).exists() for name in ("job.json", "publish.json")
        )
        done = self.work("--resume")
        if done.code == 5 and not begun and "replace it with --overwrite" in done.stderr:
            assert self.is_old()
            done, how = self.work(*self.flags), "anew"
        assert (done.code, done.stderr) == (0, ""), done
        self.check_done()
        return how

    def check_done(self) -> None:
        """The new output stands there, whole, and nothing was left beside it or in it."""
        found = standing(self.output)
        assert found is not None
        expected = comparable(self.world.whole[self.kind])
        for name, data in comparable(found).items():
            assert data == expected.get(name), f"{name} differs"
        assert sorted(found) == sorted(expected)
        assert sorted(os.listdir(self.output.parent)) == [self.output.name]
        assert ".safemerge" not in os.listdir(self.output)


def job_of(output: Path) -> Path:
    """The job directory beside an output."""
    return output.with_name(f".{output.name}.safemerge")


def files_of(directory: Path) -> Files:
    """All files under a directory."""
    found = sorted(path for path in directory.rglob("*") if path.is_file() or path.is_symlink())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def standing(output: Path) -> Files | None:
    """What stands under an output's name, a job inside left out; None if that is nothing."""
    if not os.path.lexists(output):
        return None
    inside = ".safemerge/"
    return {n: data for n, data in files_of(output).items() if not n.startswith(inside)} or None


def marks(names: Any) -> list[str]:
    """Those of the names that loaders look for first."""
    return [n for n in names if n in ("config.json", "adapter_config.json") or n.endswith(".index.json")]


def comparable(files: Files) -> dict[str, Any]:
    """Files as any run makes them: reports without times, flags, and places."""
    result: dict[str, Any] = dict(files)
    if REPORT in files:
        report = json.loads(files[REPORT])
        report["shards"] = [shard["file"] for shard in report["shards"]]
        result[REPORT] = {name: value for name, value in report.items() if name not in _OF_THE_RUN}
        configuration = report["configuration"]
        result[REPORT]["configuration"] = {n: v for n, v in configuration.items() if n not in _FLAGS}
        # The page has a digest as its bytes are, and they hold times.
        result[REPORT]["files"] = [file for file in report["files"] if file["name"] != PAGE]
    if PAGE in files:
        page = Parsed(files[PAGE].decode())
        result[PAGE] = {name: value for name, value in page.data.items() if name not in _PAGE_OF_THE_RUN}
    return result


@contextmanager
def quick_directory(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory if the system has such a place, so that nobody waits for a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield factory.mktemp("world")
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="safemerge-tests-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    """A file system of its own, in memory; skips the test where nothing may be mounted."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(path)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if made.returncode != 0:
        pytest.skip(f"nothing may be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)
