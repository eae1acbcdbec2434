"""The program: what happens before and around the command line, so that it can be stopped from the first moment."""

from __future__ import annotations

import atexit
import gc
import os
import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line on sys.argv and ends the process with its exit code."""
    try:
        from . import interruption

        interruption.end_at_once()
        _open_streams()
        _collect_seldom()
        from .cli import main as command

        interruption.raise_here()
        code = command(prog_name="safemerge-fast", standalone_mode=False)
        interruption.leave(code)
    except KeyboardInterrupt:
        # Before there were handlers, or after the command had come to its end.
        os.write(2, b"error: interrupted\n")
        os._exit(130)


def _collect_seldom() -> None:
    """Spares the process the search for garbage among what lives as long as it does.

    Importing torch makes a hundred thousand objects. Looking at them again and again, and once more at the exit, would
    take a third of a second. This is the program's to decide: who calls the command line from a process of their own
    keeps their collector, and hears nothing of what other libraries leave to it at the exit.
    """
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)


def _open_streams() -> None:
    """Puts something in the place of standard streams that are closed.

    Otherwise the next file that is opened gets such a stream's number, and what a library writes to stderr lands in
    the merged weights.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            # Never closed: it is the process's.
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


if __name__ == "__main__":
    main()
