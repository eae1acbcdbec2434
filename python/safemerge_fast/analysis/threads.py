"""Scores modules side by side: the engine's passes over one use one processor, and release the interpreter."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

from .. import interruption

__all__ = ["one_thread_each", "processors", "score_in_threads"]

# Beyond this the interpreter, which one thread at a time can use, is what limits them.
_MOST_THREADS = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def score_in_threads(score: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Applies a function to items in as many threads as there are processors.

    Args:
        score: What to do with an item; runs in several threads at once.
        items: The items. Eight per thread are under way or wait, so that nobody idles while the oldest takes long.

    Yields:
        The results in the order of the items.
    """
    count = min(processors(), _MOST_THREADS)
    executor = ThreadPoolExecutor(count, thread_name_prefix="safemerge-analysis")
    waiting: deque[Future[_Result]] = deque()
    wait = True
    try:
        with one_thread_each():
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


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def one_thread_each() -> AbstractContextManager[object]:
    """While it is entered, numpy's products use the thread that asks for them, and no other.

    The products here are small. OpenBLAS hands even those to threads of its own, which then wait for more by spinning:
    that was measured to take as much of the processors as all else.
    """
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits
