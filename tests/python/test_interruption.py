"""Ctrl-C and SIGTERM from the first moment to the last: one line, exit code 130; and streams that are closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import merge_words

SIGNALS = [signal.SIGINT, signal.SIGTERM]
RESUMABLE = "error: interrupted; what is committed stays, continue with --resume\n"

# Sends the process a signal when it is about to import a module.
AT_IMPORT = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
from safemerge_fast.__main__ import main
main()
"""

# A call of C that looks for no signals and takes minutes, as loading a library from a slow disk can.
IN_C = """
import safemerge_fast.pairing.rows as rows
def pair(*arguments, **options):
    print("in C", flush=True)
    sum(range(10**12))
rows.pair = pair
from safemerge_fast.__main__ import main
main()
"""

# KeyboardInterrupt cannot leave a finalizer; Python would print it and go on.
IN_A_FINALIZER = """
import os, signal, time
import safemerge_fast.pairing.rows as rows
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass
def pair(*arguments, **options):
    last = Last()
    del last
    time.sleep(300)
rows.pair = pair
from safemerge_fast.__main__ import main
main()
"""


def start(script: str, *words: str | Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("safemerge_fast.cli", signal.SIGINT),
        ("click", signal.SIGTERM),
        ("safemerge_fast.cli.analyze", signal.SIGINT),
        ("safemerge_fast.pairing.rows", signal.SIGTERM),
        ("msgspec", signal.SIGINT),
        ("numpy", signal.SIGINT),
        ("torch", signal.SIGTERM),
        ("torch.cuda", signal.SIGINT),
        ("rich.table", signal.SIGINT),
    ],
)
def test_a_signal_while_a_module_is_imported(
    quartet: dict[str, Path], module: str, number: signal.Signals
) -> None:
    words = [word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", quartet[role])]
    # The exact analysis alone needs torch.
    words += ["--estimator", "exact"]
    process = start(AT_IMPORT.format(module=module, number=int(number)), "analyze", *words)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr, stdout) == (130, "error: interrupted\n", "")


def test_a_signal_before_there_are_handlers(quartet: dict[str, Path]) -> None:
    process = start(
        AT_IMPORT.format(module="safemerge_fast.interruption", number=2), "inspect", quartet["base"]
    )
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_library_does_not_return(
    quartet: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    for command in (["inspect", quartet["base"]], merge_words(quartet, tmp_path / "out")):
        process = start(IN_C, *command)
        assert process.stdout is not None
        assert process.stdout.readline() == "in C\n"
        process.send_signal(number)
        # Far less than the call takes.
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 130
        assert stderr == "error: interrupted\n"
        assert not (tmp_path / "out").exists()


def test_a_signal_in_a_finalizer_is_not_lost(quartet: dict[str, Path]) -> None:
    process = start(IN_A_FINALIZER, "inspect", quartet["base"])
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "error: interrupted\n")


def test_a_signal_that_the_parent_ignores_stays_ignored(quartet: dict[str, Path]) -> None:
    script = AT_IMPORT.format(module="click", number=2)
    process = start(
        script, "inspect", quartet["base"], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "q_proj" in stdout


def test_a_signal_during_a_download(tmp_path: Path) -> None:
    """The Hub's own threads are in the middle of something that ends much later."""
    script = (
        "import huggingface_hub, threading, time, concurrent.futures\n"
        "def slow(*arguments, **options):\n"
        "    with concurrent.futures.ThreadPoolExecutor(1) as executor:\n"
        "        waiting = executor.submit(time.sleep, 300)\n"
        "        print('downloading', flush=True)\n"
        "        waiting.result()\n"
        "huggingface_hub.snapshot_download = slow\n"
        "from safemerge_fast.__main__ import main\n"
        "main()\n"
    )
    process = start(script, "inspect", "org/name", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "downloading\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "error: interrupted\n")


def program(*words: str | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "safemerge_fast", *map(str, words)], timeout=120, check=False, **options
    )


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_closed_streams_stop_nothing_and_get_into_no_file(
    quartet: dict[str, Path], tmp_path: Path, closed: tuple[int, ...]
) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    whole = program(*merge_words(quartet, tmp_path / "whole"), "-q")
    assert whole.returncode == 0
    done = program(*merge_words(quartet, tmp_path / "out"), preexec_fn=close)
    assert done.returncode == 0
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_gets_no_traceback(quartet: dict[str, Path], stream: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    other = "stderr" if stream == "stdout" else "stdout"
    done = program("inspect", quartet["base"], **{stream: writer, other: subprocess.PIPE})
    os.close(writer)
    assert b"Traceback" not in (getattr(done, other) or b"")
    assert b"Exception ignored" not in (getattr(done, other) or b"")
