"""Scores modules side by side, each in one thread, instead of one after the other with all threads in each product.

The products of a low-rank update are thin: a thread has a tenth of a millisecond of work between two waits for
the others. While other work (the engine's, above all) wants the processors too, each such wait can cost a time
slice, and was measured to make the analysis ten times slower.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from .. import interruption

__all__ = ["score_in_threads"]

# Beyond this the interpreter, which one thread at a time can use, is what limits them.
_MOST_THREADS = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def score_in_threads(score: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Applies a function to items in threads in which torch uses one processor each.

    Args:
        score: What to do with an item; runs in several threads at once.
        items: The items. Eight per thread are under way or wait, so that nobody idles while the oldest takes long.

    Yields:
        The results in the order of the items.
    """
    count = min(torch.get_num_threads(), _MOST_THREADS)
    executor = _single_threaded_executor(count)
    waiting: deque[Future[_Result]] = deque()
    wait = True
    try:
        for item in items:
            waiting.append(executor.submit(score, item))
            if len(waiting) >= 8 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        # Also when nobody wants the rest. What is under way takes a fraction of a second, which nobody should wait for
        # who pressed Ctrl-C.
        executor.shutdown(wait=wait and not interruption.was_received(), cancel_futures=True)


def _single_threaded_executor(count: int) -> ThreadPoolExecutor:
    """Starts the threads, and leaves torch's number of threads elsewhere as it was."""
    usual = torch.get_num_threads()
    started = threading.Barrier(count + 1)

    def initialize() -> None:
        # A thread takes over the usual number when it first needs one: that must not come after the change.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    executor = ThreadPoolExecutor(count, thread_name_prefix="safemerge-analysis", initializer=initialize)
    for _ in range(count):
        executor.submit(lambda: None)
    started.wait()
    # The number is the calling thread's, and also that of threads which are started later.
    torch.set_num_threads(usual)
    return executor
