"""Runs the command line many times without starting Python and torch each time: a server imports them, and forks.

A run is a process of its own: it may be killed, be limited, meet fail points. The package under test, and with it the
engine, which reads its fail points from the environment when it is loaded, is imported anew in each.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType

__all__ = ["Done", "Run", "Server"]

_HELD_BACK = (signal.SIGINT, signal.SIGTERM)
# Long enough for any run here on a busy machine; what takes longer hangs.
_HANGS = 60.0


@dataclass
class Run:
    """A run of the command line.

    Attributes:
        words: Its arguments.
        points: Fail points, as FAILPOINTS has them.
        after: Seconds until it is sent a signal, or None.
        signal: That signal.
        file_limit: Most bytes of a file (RLIMIT_FSIZE), or None.
        plain: Whether permissions hold for it even if it is root's.
        before: Python that is run first.
    """

    words: Sequence[str]
    points: str = ""
    after: float | None = None
    signal: int = signal.SIGKILL
    file_limit: int | None = None
    plain: bool = False
    before: str = ""


@dataclass
class Done:
    """What came of it.

    Attributes:
        code: The exit code, a signal's number with a minus, or None if it hung and was killed.
        stdout: What it printed.
        stderr: What it said.
        seconds: How long it took.
    """

    code: int | None
    stdout: str
    stderr: str
    seconds: float


@dataclass
class Server:
    """Forks runs; a context manager."""

    process: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=_HANGS)

    def run_at_once(self, runs: Sequence[Run]) -> list[Done]:
        """Starts several runs at the same time, and waits for all."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([asdict(run) for run in runs]).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            read = self.process.stdout.read(1 << 20)
            assert read, "the server is gone"
            line += read
        return [Done(**done) for done in json.loads(line)]


# --- the server -----------------------------------------------------------------------------------


class _Child:
    def __init__(self, run: Run) -> None:
        self.run = run
        # Pipes: a limit on the size of files is none on what is said. One line fits into them.
        pipes = [os.pipe() for _ in range(2)]
        self.streams = [reader for reader, _ in pipes]
        self.code: int | None = None
        self.started = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            # Whatever happens, the child never becomes a second server.
            try:
                _become(run, [writer for _, writer in pipes])
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(1)
            os._exit(0)
        for _, writer in pipes:
            os.close(writer)

    def ended(self) -> bool:
        """Whether it has come to its end; sends it the signal when its time has come."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
            return True
        passed = time.perf_counter() - self.started
        if self.run.after is not None and passed >= self.run.after:
            self.run.after = None
            os.kill(self.pid, self.run.signal)
        if passed > _HANGS:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return True
        return False

    def done(self) -> Done:
        """What came of it."""
        texts = []
        for stream in self.streams:
            with open(stream, "rb") as file:
                texts.append(file.read().decode(errors="replace"))
        return Done(self.code, *texts, time.perf_counter() - self.started)


def _become(run: Run, streams: Sequence[int]) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate([nothing, *streams]):
        os.dup2(descriptor, number)
    # The server's own know where they were.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ["FAILPOINTS"] = run.points
    if run.file_limit is not None:
        # As a shell's ulimit -f: without SIGXFSZ, which Python ignores.
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.file_limit, run.file_limit))
    if run.plain:
        _heed_permissions()
    sys.argv = ["safemerge-fast", *run.words]
    from safemerge_fast import interruption

    # A signal that came before waits for the handlers: Python's own start is not what is tested.
    interruption.end_at_once()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
    exec(run.before, {})
    from safemerge_fast.__main__ import main

    main()


def _heed_permissions() -> None:
    """Gives up root's right to write what nobody may write (CAP_DAC_OVERRIDE); others never had it."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    # Effective, permitted and inheritable capabilities, the first 32, and the rest.
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for index in range(3):
        sets[index] &= ~(1 << 1)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _serve() -> None:
    while line := sys.stdin.buffer.readline():
        waiting = children = [_Child(Run(**run)) for run in json.loads(line)]
        while waiting := [child for child in waiting if not child.ended()]:
            time.sleep(0.0005)
        sys.stdout.buffer.write(json.dumps([asdict(child.done()) for child in children]).encode() + b"\n")
        sys.stdout.buffer.flush()


def _import_what_takes_long() -> None:
    for name in ("torch", "numpy", "click", "msgspec", "rich.table", "rich.console", "yaml", "safetensors"):
        __import__(name)
    __import__("huggingface_hub")
    assert "safemerge_fast" not in sys.modules


if __name__ == "__main__":
    _import_what_takes_long()
    # Where the tests run in the background, a shell has it ignored, and so would the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    _serve()
