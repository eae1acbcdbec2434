"""Workers of a Ray cluster: tasks only, each one attempt at one shard.

Ray is told to retry nothing, since attempts belong to the job. A worker or node that dies fails its attempt; one that
hangs gets no further, which the stall rule answers. Ray itself may take minutes to notice it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any

from .. import _engine, errors
from ..errors import OutputError, PlanError, SafemergeError, SettingError
from ..plan.plan import Plan
from ..settings import RunSettings
from .handing_out import Done, Failed, HandingOut, Moved, News, Order, Queued
from .job_document import PlanDocument, write_plan
from .ray_worker import Answer, Listener, Task, prepare

__all__ = ["ray_executor"]

_TASK_CPUS = 8
_LISTEN_SECONDS = 1.0
_STOP_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


def ray_executor(run: RunSettings) -> HandingOut:
    """An executor that has Ray's workers prepare shards.

    Args:
        run: Its setting executor says which cluster: ray, ray:HOST:PORT or ray:local.

    Raises:
        SettingError: Ray is not installed, or no cluster answers.
    """
    if importlib.util.find_spec("ray") is None:
        raise SettingError("--executor ray needs Ray: pip install 'safemerge-fast[ray]', on all machines")
    address = run.executor.partition(":")[2]
    if address != "local":
        # An analysis may take an hour; that nobody answers should be known before.
        _connect(address)

    def make(plan: Plan, directory: _engine.JobDirectory, run: RunSettings) -> _RayPool:
        owned = _connect(address)
        try:
            return _RayPool(write_plan(directory, plan, run.read_backend), run, owned=owned)
        except BaseException:
            if owned:
                _disconnect()
            raise

    return HandingOut(make, stall_after=run.stall_after)


def _connect(address: str) -> bool:
    """Connects; returns whether there is a connection of one's own to end."""
    # Nothing is sent anywhere. On one machine, Ray would replace 127.0.0.1 by an address that others can reach.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address.startswith(("local", "127.")):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return _Connection.owned
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if address == "local":
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        named = address or os.environ.get("RAY_ADDRESS", "auto")
        if named.startswith("ray://"):
            raise SettingError(
                "RAY_ADDRESS is that of a Ray client; run the command on the cluster: "
                "ray job submit -- safemerge-fast merge ... --executor ray"
            )
        if named not in ("auto", "local"):
            _require_listener(named)
        options["address"] = named
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(error) from error
    finally:
        # Ray sets one of its own; ours end a job in good order.
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
    _Connection.owned = True
    return True


def _require_listener(address: str) -> None:
    """Looks whether anybody listens: Ray itself goes on looking for minutes, and then ends the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(error) from error


def _no_cluster(error: Exception) -> SettingError:
    reason = " ".join(str(error).split())[:200]
    return SettingError(
        f"no Ray cluster answers ({reason}); start one with ray start --head, name it as ray:HOST:PORT, or take "
        f"ray:local"
    )


def _disconnect() -> None:
    import ray

    _Connection.owned = False
    ray.shutdown()


class _Connection:
    """The one that a process has to Ray."""

    owned = False


class _RayPool:
    """See Pool."""

    def __init__(self, document: PlanDocument, run: RunSettings, *, owned: bool) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._document, self._run, self._owned = ray, document, run, owned
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        most = max(cpus, default=0)
        self._cpus = min(_TASK_CPUS, most) if run.task_cpus is None else run.task_cpus
        if not 0 < self._cpus <= most:
            raise SettingError(
                f"no machine of the Ray cluster has {max(self._cpus, 1)} processors, the largest has {most}; ask for "
                f"fewer with --task-cpus"
            )
        self._slots = sum(count // self._cpus for count in cpus)
        here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
        self._listener: Any = ray.remote(Listener).options(num_cpus=0, scheduling_strategy=here).remote()
        self._task = ray.remote(_attempt).options(
            num_cpus=self._cpus, max_retries=0, scheduling_strategy="SPREAD"
        )
        self._running: dict[Any, str] = {}
        self._heard: Any = None
        self._listened = time.monotonic()

    @property
    def slots(self) -> int:
        """Tasks that the cluster can run at once."""
        return self._slots

    def start(self, order: Order) -> None:
        """Submits a task."""
        run = self._run
        task = Task(
            order.job,
            order.file,
            order.attempt,
            _engine.__version__,
            self._document,
            self._cpus if run.threads is None else run.threads,
            None if run.memory_budget is None else int(run.memory_budget),
            run.allow_nonfinite,
        )
        self._running[self._task.remote(task, self._listener)] = order.attempt

    def wait(self, seconds: float) -> Sequence[News]:
        """Tasks that ended, and how far the others are."""
        if not self._running:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._running), timeout=seconds)
        ended = [self._ended(task, self._running.pop(task)) for task in ready]
        return [*self._moved(), *(news for news in ended if news is not None)]

    def _ended(self, task: Any, attempt: str) -> News | None:
        exceptions = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(task)
        except exceptions.TaskCancelledError:
            return Failed(attempt, OutputError("it was cancelled"), "a worker", True)
        except exceptions.RayTaskError as error:
            reason = " ".join(str(error.cause).split())[:300]
            return Failed(
                attempt, PlanError(f"a Ray worker cannot do its work ({reason})"), "a worker", False
            )
        except exceptions.RayError as error:
            reason = str(error).split("\n")[0][:200]
            return Failed(attempt, OutputError(f"the worker died ({reason})"), "a worker", True)
        if answer.prepared is not None:
            return Done(_engine.Prepared.from_json(answer.prepared))
        kind: type[SafemergeError] = getattr(errors, answer.error)
        return Failed(attempt, kind(f"{answer.message} (on {answer.node})"), answer.node, answer.again)

    def _moved(self) -> Sequence[News]:
        """What the listener has heard, asked for now and then and not waited for."""
        if self._heard is None:
            if time.monotonic() - self._listened >= _LISTEN_SECONDS:
                self._heard, self._listened = self._listener.moved.remote(), time.monotonic()
            return []
        ready, _ = self._ray.wait([self._heard], timeout=0)
        if not ready:
            return []
        try:
            moved: dict[str, int] = self._ray.get(self._heard)
        except self._ray.exceptions.RayError:
            moved = {}
        self._heard = None
        waiting = self._running.values() if self._is_busy() else ()
        # An attempt that waits for a processor cannot say anything.
        queued = [Queued(attempt) for attempt in waiting if attempt not in moved]
        return [*queued, *(Moved(attempt, done) for attempt, done in moved.items())]

    def _is_busy(self) -> bool:
        return float(self._ray.available_resources().get("CPU", 0)) < self._cpus

    def stop(self, attempt: str) -> None:
        """Interrupts a task: it stops within a tile and removes what it made."""
        for task, of in self._running.items():
            if of == attempt:
                self._ray.cancel(task, force=False)

    def close(self) -> None:
        """Interrupts all tasks, and ends the processes of those that do not hear."""
        for task in self._running:
            self._ray.cancel(task, force=False)
        if self._running:
            tasks = list(self._running)
            _, deaf = self._ray.wait(tasks, num_returns=len(tasks), timeout=_STOP_SECONDS)
            for task in deaf:
                self._ray.cancel(task, force=True)
        self._ray.kill(self._listener)
        if self._owned:
            _disconnect()


def _attempt(task: Task, listener: Any) -> Answer:
    """The task."""
    return prepare(task, lambda attempt, done: listener.hear.remote(attempt, done))
