"""Servers on 127.0.0.1 that checkpoints are read from: moto's S3, and one for HTTP that misbehaves on command."""

from __future__ import annotations

import hashlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYsecretKEY"

Answer = Callable[["Handler", str, bytes], bool]
"""Answers a request for an object in its own way, or says False."""


@dataclass
class Server:
    """Objects by path, and what was asked for.

    Attributes:
        objects: The bytes of each.
        asked: How often each was asked for, by method and path.
        odd: What answers first.
        etags: Whether answers carry ETags.
        url: Where it listens.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: int = 0
    odd: Answer | None = None
    etags: bool = True
    url: str = ""

    def add(self, prefix: str, directory: Path) -> str:
        """Serves the files of a directory; returns its address."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.objects[f"/{prefix}/{path.relative_to(directory).as_posix()}"] = path.read_bytes()
        return f"{self.url}/{prefix}"

    def gets(self, ending: str) -> int:
        """How many GETs there were for paths with this ending."""
        return sum(
            count for (method, path), count in self.asked.items() if method == "GET" and path.endswith(ending)
        )


class Handler(BaseHTTPRequestHandler):
    """Serves ranges, and compares ETags."""

    protocol_version = "HTTP/1.1"
    server_of: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server_of, self.path.partition("?")[0]
        server.asked[(self.command, path)] += 1
        body = server.objects.get(path)
        if server.odd is not None and server.odd(self, path, body or b""):
            return
        if body is None:
            self.answer(404, b"")
            return
        etag = tag(body)
        if self.headers.get("If-Match") not in (None, etag):
            self.answer(412, b"")
            return
        headers = {"ETag": etag} if server.etags else {}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if found is None:
            self.answer(200, body, headers)
            return
        start, end = int(found[1]), min(int(found[2]) + 1, len(body))
        if start >= len(body):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        self.answer(206, body[start:end], headers)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        """Sends an answer that says it has `length` bytes; its own if that is not given."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 12:00:00 GMT")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.server_of.sent += len(body)


def tag(body: bytes) -> str:
    """The ETag of an object."""
    return f'"{hashlib.md5(body).hexdigest()}"'


@contextmanager
def http_server() -> Iterator[Server]:
    """A server of the threads of this process."""
    server = Server()
    handler = type("Handler", (Handler,), {"server_of": server})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_address[1]}"
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def environment(url: str) -> dict[str, str]:
    """The variables that lead to a server that speaks S3."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "AKIATESTONLY",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def s3_server() -> Iterator[str]:
    """Moto's server in a process of its own; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            assert process.poll() is None, "the server did not start"
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Bucket:
    """A bucket of a server that speaks S3."""

    def __init__(self, url: str, name: str) -> None:
        import boto3

        self.client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="AKIATESTONLY",
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        self.name = name
        self.client.create_bucket(Bucket=name)

    def add(self, prefix: str, directory: Path) -> str:
        """Uploads the files of a directory; returns its address."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(directory).as_posix()}"
                self.client.put_object(Bucket=self.name, Key=key, Body=path.read_bytes())
        return f"s3://{self.name}/{prefix}"
