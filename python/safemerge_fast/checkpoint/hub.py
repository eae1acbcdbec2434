"""Downloads from the Hugging Face Hub, and what to do when it gives nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError
from ..printable import printable

__all__ = ["download"]

_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.py",
    "*.txt",
    "LICENSE*",
    "vocab.*",
]
_UNWANTED = ["original/*", "onnx/*", "openvino/*", "consolidated*", "checkpoint-*/*", "runs/*"]

_Result = TypeVar("_Result")


def download(role: str, name: str, revision: str | None, *, progress: bool = True) -> Path:
    """Fetches a repository's weights and small files into the Hub's cache.

    Args:
        role: Error messages name it.
        name: org/name.
        revision: A branch, tag or commit; None is the main branch.
        progress: Whether the Hub's bars are shown on stderr.

    Returns:
        The directory of the snapshot.

    Raises:
        CheckpointError: The Hub did not give it: it does not exist, is gated, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)

    try:
        with _bars(progress):
            snapshot = Path(_interruptible(fetch))
    except Exception as error:
        # The Hub's client, its HTTP library and its transfer library each raise classes of their own.
        raise CheckpointError(f"{role}: {_sentence(error, name, revision)}") from error
    if not any(snapshot.glob("*.safetensors")):
        raise CheckpointError(
            f"{role}: {name} has no .safetensors file{_at(revision)} on the Hugging Face Hub; look at "
            f"{_address(name)}/tree/{revision or 'main'} for a revision or another repository that has"
        )
    return snapshot


def _interruptible(work: Callable[[], _Result]) -> _Result:
    """Does work in a thread of its own, so that Ctrl-C does not wait until the files under way are there."""
    results: list[_Result] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run, name="safemerge-download", daemon=True)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]
    return results[0]


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Hides the Hub's progress bars, if they are not wanted, and brings back what was."""
    # The package exports them, but not for type checkers.
    bars: Any = import_module("huggingface_hub.utils")
    hide = not shown and not bars.are_progress_bars_disabled()
    if hide:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bars()


def _sentence(error: Exception, name: str, revision: str | None) -> str:
    """What went wrong and what to do, by the class of the error."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: accept its conditions at {_address(name)} with your account, then give this machine a "
            f"token of it with `hf auth login` (or HF_TOKEN)"
        )
    if isinstance(error, errors.DisabledRepoError):
        return (
            f"{name} has been disabled on the Hugging Face Hub; give another repository or a local directory"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision or 'main'} on the Hugging Face Hub{_revisions(name)}"
    if status in (401, 403) and "credentials" in str(getattr(error, "server_message", None)):
        return (
            f"the Hugging Face Hub refused the token of this machine, so that {name} cannot be read; log in anew with "
            f"`hf auth login`, or correct HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"{name} is no local path, and no repository of that name can be seen on the Hugging Face Hub; names look "
            f"like org/name[@revision], and a private one needs `hf auth login` with an account that may read it"
        )
    if status == 403:
        return (
            f"the token of this machine may not read {name} on the Hugging Face Hub; log in with `hf auth login` as "
            f"somebody who may, or give HF_TOKEN the right to read it"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{name} is no local path, and no name that a repository can have: {_first_line(error)}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            return (
                f"{name}{_at(revision)} is not in the Hugging Face Hub's cache, and HF_HUB_OFFLINE forbids to download "
                f"it; unset it, or give a local directory"
            )
        return _unreachable(name, error.__cause__ or error)
    if status == 429:
        return f"the Hugging Face Hub has had too many requests from here for now; try {name} again later"
    if isinstance(status, int) and status >= 500:
        return f"the Hugging Face Hub has a problem of its own ({status}); try {name} again later"
    if isinstance(error, OSError) and error.errno is not None:
        # The disk, above all.
        return f"{name} cannot be stored in the Hugging Face Hub's cache: {printable(error.strerror or str(error))}"
    return _unreachable(name, error)


def _unreachable(name: str, error: BaseException) -> str:
    return (
        f"{name} is no local path, and the Hugging Face Hub cannot be reached to download it "
        f"({type(error).__name__}: {_first_line(error)}); check the connection, or give a local directory"
    )


def _revisions(name: str) -> str:
    """Names a few revisions that there are, if the Hub tells."""
    from huggingface_hub import list_repo_refs

    try:
        refs = _interruptible(lambda: list_repo_refs(name))
    except Exception:
        return f"; {_address(name)}/tree/main lists those it has"
    found = [ref.name for ref in (*refs.branches, *refs.tags)]
    shown = ", ".join(printable(ref, 60) for ref in found[:6])
    return f"; it has {shown}{' and more' if len(found) > 6 else ''}"


def _address(name: str) -> str:
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{name}"


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at {revision}"


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return printable(next((line for line in lines if line), "no reason given"), 200)
