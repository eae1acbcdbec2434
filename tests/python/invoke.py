"""Runs the command line within the test's process."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from safemerge_fast.cli import main


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def merge_words(quartet: dict[str, Path], output: Path, *more: str | Path) -> list[str | Path]:
    roles = [word for role, path in quartet.items() for word in (f"--{role}", path)]
    return ["merge", *roles, "-o", output, *more]


def assert_one_sentence(result: Result, *parts: str) -> None:
    """stderr is one line that names what it is about; stdout is empty."""
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr
