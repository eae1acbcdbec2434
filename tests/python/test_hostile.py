"""Every row of the corpus: the right exit code, one escaped line, no hang, little memory, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import pytest
from hostile import ROWS, Outcome, Row

MEMORY = 256 << 20


@pytest.fixture(scope="module")
def outcome_of() -> Iterator[Callable[[hostile.Words], Outcome]]:
    """Runs a command line; one server for all rows, started anew should it fail."""
    server = subprocess.Popen(
        [sys.executable, hostile.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )

    def run(words: hostile.Words) -> Outcome:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([os.fsdecode(word) for word in words]) + "\n")
        server.stdin.flush()
        return Outcome(**json.loads(server.stdout.readline()))

    yield run
    server.communicate(timeout=30)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, tmp_path: Path, outcome_of: Callable[[hostile.Words], Outcome]) -> None:
    words = row.arrange(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    outcome = outcome_of(words)
    assert outcome.code == row.code, outcome
    assert_printable(outcome.stdout)
    assert_printable(outcome.stderr)
    if row.code:
        assert outcome.stderr.startswith("error: ")
        assert outcome.stderr.count("\n") == 1
        assert outcome.stderr.endswith("\n")
        assert row.part in outcome.stderr
        assert len(outcome.stderr) < 5000
    assert outcome.memory < MEMORY
    assert sorted(tmp_path.rglob("*")) == before


def assert_printable(text: str) -> None:
    """Lines of characters that a terminal shows; tables use no others."""
    for line in text.splitlines():
        assert line.isprintable(), line
