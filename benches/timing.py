"""Whole commands, timed from outside until their output is durable: seconds, memory, and what the disk saw."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Measurement:
    """One run.

    Attributes:
        seconds: From the start until the output is on the disk.
        cpu_seconds: User and system time of the process and its children.
        peak_mb: Largest resident memory of any of them, mapped files included; 0 if it is not known.
        disk_read_mb: What was read from the disk and not from the cache.
        output_bytes: Bytes of weights that were written.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float
    disk_read_mb: float
    output_bytes: int


@dataclass
class Competitor:
    """A command and what the runs of it measured.

    Attributes:
        name: How tables call it.
        command: What is run.
        output: The directory that it writes; removed before and after every run.
        least_bytes: Bytes of weights that have to be there afterwards: a quick wrong answer is no answer.
        rounds: In how many of the rounds it takes part; None is all of them.
        limit_mb: Resident memory above which it is killed, and the most it can allocate.
        environment: Variables that it gets beside those of this process.
    """

    name: str
    command: Sequence[str]
    output: Path
    least_bytes: int = 0
    rounds: int | None = None
    limit_mb: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)

    def run(self) -> None:
        """Runs the command once, into a fresh output directory."""
        shutil.rmtree(self.output, ignore_errors=True)
        with tempfile.TemporaryFile() as complaint:
            started = time.perf_counter()
            process = subprocess.Popen(
                self.command,
                stdout=subprocess.DEVNULL,
                stderr=complaint,
                env={**os.environ, **self.environment},
                preexec_fn=None if self.limit_mb is None else self._limit_allocations,
            )
            watcher = _Watcher(process.pid, self.limit_mb)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            watched_mb = watcher.stop()
            # ru_maxrss starts from what this process had at most before the other was there. Where that hides
            # the answer, what the watcher saw last stands for it, or 0 if it came too late.
            peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
            if peak <= peak_mb("self"):
                peak = watched_mb
            if self.limit_mb is not None and max(peak, watched_mb) > self.limit_mb:
                end = "was killed at" if watcher.exceeded else "took"
                raise SystemExit(f"{self.name} {end} {peak:.0f} MB, but {self.limit_mb} MB is the limit")
            if process.returncode:
                complaint.seek(0)
                words = complaint.read().decode(errors="replace")[-2000:]
                raise SystemExit(f"{self.name} failed with {process.returncode}: {words}")
        written = make_durable(self.output)
        seconds = time.perf_counter() - started
        if written < self.least_bytes:
            raise SystemExit(f"{self.name} wrote {written} bytes of weights, not {self.least_bytes}")
        self.measurements.append(
            Measurement(
                seconds=seconds,
                cpu_seconds=usage.ru_utime + usage.ru_stime,
                peak_mb=peak,
                disk_read_mb=usage.ru_inblock * 512 / 1e6,
                output_bytes=written,
            )
        )
        shutil.rmtree(self.output, ignore_errors=True)

    def _limit_allocations(self) -> None:
        """Bounds heap and anonymous mappings; the kernel refuses what goes beyond. Mapped files do not count."""
        import resource

        assert self.limit_mb is not None
        resource.setrlimit(resource.RLIMIT_DATA, (self.limit_mb << 20, self.limit_mb << 20))


class _Watcher:
    """Follows the peak of a process's resident memory, and kills it above a limit."""

    def __init__(self, process: int, limit_mb: int | None) -> None:
        self.exceeded = False
        self._process, self._limit_mb = process, limit_mb
        self._peak_mb = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Returns the last peak that was seen, in MB; 0 where /proc does not tell."""
        self._stopped.set()
        self._thread.join()
        return self._peak_mb

    def _watch(self) -> None:
        # Without a limit it only stands in for ru_maxrss, and need not take time from what is timed.
        while not self._stopped.wait(POLL_SECONDS if self._limit_mb else 10 * POLL_SECONDS):
            self._peak_mb = max(self._peak_mb, peak_mb(self._process))
            if self._limit_mb is not None and self._peak_mb > self._limit_mb:
                self.exceeded = True
                os.kill(self._process, signal.SIGKILL)
                return


def peak_mb(process: int | str) -> float:
    """Peak resident memory of a live process since its exec, in MB; 0 if it is gone or /proc is not there."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) / 1024


def make_durable(directory: Path) -> int:
    """Syncs every file of a directory, if it is there; returns the bytes of weights among them."""
    total = 0
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            if path.suffix == ".safetensors":
                total += path.stat().st_size
    return total


def alternate(competitors: Sequence[Competitor], rounds: int, before: Callable[[], None]) -> None:
    """Runs all competitors in turn, `rounds` times, calling `before` ahead of each run."""
    for number in range(rounds):
        for competitor in competitors:
            if competitor.rounds is None or number < competitor.rounds:
                before()
                competitor.run()
                print(f"  {competitor.measurements[-1].seconds:8.2f} s  {competitor.name}", file=sys.stderr)
