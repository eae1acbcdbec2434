"""What a sweep runs for each model: it asks the judge, which waits in another process, and writes what that says.

Needs nothing but Python, so that it starts at once. The judge's socket stands in the environment: a sweep that is gone
on with must have the same command, and the socket is another one.

    STUDY_JUDGE=SOCKET python ask.py MODEL OUT.json
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path


def main(model: str, out: str) -> None:
    """Asks and writes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(os.environ["STUDY_JUDGE"])
        connection.sendall(model.encode() + b"\n")
        with connection.makefile("rb") as stream:
            answer = json.loads(stream.read())
    if "failed" in answer:
        sys.exit(str(answer["failed"]))
    Path(out).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
