"""Ctrl-C and SIGTERM: one line and exit code 130, within a fifth of a second, whatever is under way.

Three things that can be under way, and what stops them:
- imports: the handler ends the process itself, since libraries that are loading turn KeyboardInterrupt into errors of
  their own;
- Python and the engine, which looks for signals between tiles: the handler raises KeyboardInterrupt;
- one long call of another library: a thread of the engine ends the process.
Where the process is ended, what is on disk is as after a kill, which --resume continues from.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._engine import Watchdog

__all__ = [
    "EXIT_CODE",
    "end_at_once",
    "expect_job",
    "expect_nothing",
    "leave",
    "message",
    "raise_here",
    "remove_at_end",
    "said",
    "was_received",
]

EXIT_CODE = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PLAIN = "interrupted"
_RESUMABLE = "interrupted; what is committed stays, continue with --resume"


class _State:
    """What the handlers know of the process, of which there is one."""

    received = False
    message = _PLAIN
    watchdog: Watchdog | None = None
    temporary: str | None = None


def remove_at_end(directory: str) -> None:
    """Has a temporary directory removed when a signal ends the process: functions of atexit are not called then."""
    _State.temporary = directory
    if _State.watchdog is not None:
        _State.watchdog.set_temporary(directory)


def _clear_up() -> None:
    if _State.temporary is not None:
        shutil.rmtree(_State.temporary, ignore_errors=True)


def end_at_once() -> None:
    """From here on a signal ends the process after one line: nothing has begun that must be put in order."""
    for number in _SIGNALS:
        # A signal that the parent had ignored (nohup, a background job) stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def raise_here() -> None:
    """From here on a signal raises KeyboardInterrupt in the main thread, and a thread sees to it that this ends."""
    from ._engine import Watchdog

    watchdog = _State.watchdog = Watchdog()
    watchdog.set_message(_State.message)
    os.set_blocking(watchdog.fileno(), False)
    signal.set_wakeup_fd(watchdog.fileno(), warn_on_full_buffer=False)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    sys.unraisablehook = _see_to_it


def expect_nothing() -> None:
    """From here on an interruption leaves nothing that could be resumed, and does not advise it."""
    _expect(_PLAIN)


def expect_job() -> None:
    """From here on an interruption leaves a job that --resume goes on with, and says so."""
    _expect(_RESUMABLE)


def message() -> str:
    """What is said of an interruption, without `error: `."""
    return _State.message


def _expect(message: str) -> None:
    _State.message = message
    if _State.watchdog is not None:
        _State.watchdog.set_message(message)


def was_received() -> bool:
    """Whether there was a signal. Libraries turn KeyboardInterrupt into errors of their own while they load."""
    return _State.received


def said() -> None:
    """Notes that the interruption is about to be said, so that it is said once."""
    if _State.watchdog is not None:
        _State.watchdog.said()


def leave(code: int) -> None:
    """Ends the process; after an interruption without waiting for threads that still work."""
    for number in _SIGNALS:
        # All is done: what the interpreter does at its end would answer with a traceback.
        signal.signal(number, signal.SIG_IGN)
    if code != EXIT_CODE:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            # It is closed, or nobody reads it.
            continue
    _clear_up()
    os._exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    said()
    try:
        # Progress bars hide the cursor.
        clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{clear}error: {_State.message}\n".encode())
        _clear_up()
    finally:
        os._exit(EXIT_CODE)


def _raise(number: int, frame: FrameType | None) -> None:
    _State.received = True
    if _is_importing(frame):
        _end(number, frame)
    if _State.watchdog is not None:
        _State.watchdog.answer()
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _see_to_it(problem: sys.UnraisableHookArgs) -> None:
    """Ends the process if KeyboardInterrupt was lost, in a finalizer or another place that cannot raise."""
    if _State.received and problem.exc_type is KeyboardInterrupt:
        _end(signal.SIGINT, None)
    sys.__unraisablehook__(problem)
