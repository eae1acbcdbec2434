"""What a person is told when the Hugging Face Hub gives nothing: by its own errors, and by a server that plays it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from safemerge_fast import CheckpointError
from safemerge_fast.checkpoint.model import Access, locate

SHA = "0123456789abcdef0123456789abcdef01234567"


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            errors.GatedRepoError("401 Client Error.", response=answer(401)),
            ("org/name is gated", "https://huggingface.co/org/name", "hf auth login"),
        ),
        (
            errors.RepositoryNotFoundError("401 Client Error.", response=answer(401)),
            ("no repository of that name", "org/name[@revision]", "private", "hf auth login"),
        ),
        (
            errors.RevisionNotFoundError("404 Client Error.", response=answer(404)),
            ("org/name has no revision v9", "it has main, v1"),
        ),
        (
            errors.HfHubHTTPError(
                "401 Client Error.", response=answer(401), server_message="Invalid credentials in …"
            ),
            ("refused the token", "hf auth login", "HF_TOKEN"),
        ),
        (errors.HfHubHTTPError("401 Client Error.", response=answer(401)), ("no repository of that name",)),
        (errors.HfHubHTTPError("403 Client Error.", response=answer(403)), ("may not read", "HF_TOKEN")),
        (errors.HfHubHTTPError("429", response=answer(429)), ("too many requests", "later")),
        (errors.HfHubHTTPError("502", response=answer(502)), ("problem of its own (502)", "later")),
        (errors.DisabledRepoError("403", response=answer(403)), ("has been disabled",)),
        (
            chained(errors.LocalEntryNotFoundError("Got: …"), ConnectionError("no route\nand more")),
            ("cannot be reached", "ConnectionError: no route)", "local directory"),
        ),
        (errors.HFValidationError("Repo id must\nbe short"), ("no name that a repository can have",)),
        (OSError(28, "No space left on device"), ("cannot be stored", "No space left on device")),
        (RuntimeError("\x1b[31mred"), (r"RuntimeError: \x1b[31mred",)),
    ],
)
def test_each_class_of_errors_has_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, parts: tuple[str, ...]
) -> None:
    def fail(name: str, **options: Any) -> str:
        raise error

    def refs(name: str) -> Any:
        return SimpleNamespace(branches=[SimpleNamespace(name="main")], tags=[SimpleNamespace(name="v1")])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "list_repo_refs", refs)
    with pytest.raises(CheckpointError) as caught:
        locate("base", "org/name@v9")
    message = str(caught.value)
    assert message.startswith("base: ")
    assert message.isprintable()
    assert "Client Error" not in message
    for part in parts:
        assert part in message


def test_without_a_network_by_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(name: str, **options: Any) -> str:
        raise errors.LocalEntryNotFoundError("Cannot find …")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"not in the Hugging Face Hub's cache.*HF_HUB_OFFLINE.*local"):
        locate("base", "org/name")


@pytest.mark.parametrize("before", [True, False])
def test_bars_are_hidden_on_demand_and_come_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: bool
) -> None:
    from huggingface_hub import utils

    seen: list[bool] = []

    def look(name: str, **options: Any) -> str:
        seen.append(utils.are_progress_bars_disabled())
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", look)
    switch = {True: utils.enable_progress_bars, False: utils.disable_progress_bars}
    try:
        switch[before]()
        for progress in (True, False):
            locate("base", "org/name", access=Access(bars=progress))
            assert utils.are_progress_bars_disabled() is not before
        assert seen == [not before, True]
    finally:
        utils.enable_progress_bars()


class Hub(BaseHTTPRequestHandler):
    """Repositories by name, each with a behaviour of its own."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        if name == "org/missing":
            return self.reply(401, {"error": "Invalid username or password."})
        if name == "org/token":
            return self.reply(401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if name == "org/broken":
            return self.reply(503, {})
        if name == "org/tags" and parts[-1] == "refs":
            refs = [{"name": "main", "ref": "refs/heads/main", "targetCommit": SHA}]
            return self.reply(200, {"branches": refs, "converts": [], "tags": []})
        if name == "org/tags":
            return self.reply(404, {}, {"X-Error-Code": "RevisionNotFound"})
        file = "README.txt" if name == "org/text" else "model.safetensors"
        if "resolve" in parts and name == "org/gated":
            return self.reply(403, {}, {"X-Error-Code": "GatedRepo"})
        if "resolve" in parts:
            return self.reply(200, {}, {"ETag": '"abc"', "X-Repo-Commit": SHA})
        if "tree" in parts:
            return self.reply(200, [{"type": "file", "path": file, "size": 2, "oid": "abc"}])
        return self.reply(200, {"id": name, "sha": SHA, "siblings": [{"rfilename": file}]})

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/missing", ("no repository of that name",)),
        ("org/token", ("refused the token",)),
        ("org/tags@v9", ("org/tags has no revision v9", "it has main")),
        ("org/gated", ("org/gated is gated", "/org/gated")),
        ("org/text", ("has no .safetensors file",)),
    ],
)
def test_a_server_that_plays_the_hub(
    endpoint: str, tmp_path: Path, name: str, parts: tuple[str, ...]
) -> None:
    message = ask(endpoint, tmp_path, name)
    for part in parts:
        assert part in message


def test_nobody_listens(tmp_path: Path) -> None:
    message = ask("http://127.0.0.1:9", tmp_path, "org/name")
    assert "cannot be reached" in message
    assert "local directory" in message


def ask(endpoint: str, directory: Path, name: str) -> str:
    """What `inspect` says; its one line."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(directory / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_x",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-m", "safemerge_fast", "inspect", name, "--no-progress"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Client Error" not in done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]
