"""The pages say what the program does: their tables are its declarations, and what they show runs."""

from __future__ import annotations

import re
from pathlib import Path

import click
import documentation
import pytest
from documentation import ROOT, Block, blocks
from invoke import run

from safemerge_fast.cli import main
from safemerge_fast.recipes.run import read_recipe

# What a page may tell a person to type besides the program itself.
_OTHER_PROGRAMS = {"cargo", "cd", "git", "make", "pip", "python"}


@pytest.mark.parametrize("page", documentation.PAGES)
def test_tables_are_what_the_program_declares(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert documentation.with_tables(text) == text, "run `make docs`, which writes the tables anew"


def test_a_table_that_is_not_up_to_date_is_found() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert "| `--density NUMBER` |" in text
    assert "| `alpha` | a finite number from 0 to 1 |" in (ROOT / "docs" / "recipes.md").read_text(
        encoding="utf-8"
    )
    stale = text.replace("| `--density NUMBER` |", "| `--beta NUMBER` |")
    assert documentation.with_tables(stale) == text


def test_every_command_has_a_section_and_a_table() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in main.list_commands(click.Context(main)):
        assert f"\n## {name}\n" in text
        # It is inspect alone that has no options of its own.
        assert f"<!-- table: options {name} -->" in text or name == "inspect"


def programs(page: str, *, runs: bool) -> list[list[str]]:
    return [
        words
        for block in blocks(page)
        if block.language == "sh" and block.runs == runs
        for words in block.commands()
    ]


@pytest.mark.parametrize("page", documentation.PAGES)
def test_what_a_page_shows_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in an empty directory. Commands that a page shows first make the models it speaks of."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language == "yaml":
            name, _, document = block.text.partition("\n")
            Path(name.removeprefix("# ")).write_text(document, encoding="utf-8")
        elif block.language == "sh" and block.runs:
            for program, *words in block.commands():
                if program == "safemerge-fast":
                    result = run(*words)
                    assert result.exit_code == 0, (program, *words, result.stderr)
                else:
                    assert program in _OTHER_PROGRAMS
        elif block.language == "python" and (name := re.match(r"# (\S+\.py)\n", block.text)):
            Path(name[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "python" and block.runs:
            exec(compile(block.text, page, "exec"), {})


@pytest.mark.parametrize("page", documentation.PAGES)
def test_commands_that_cannot_run_here_have_the_right_options(page: str) -> None:
    """Those on models of the Hub, say: what click reads of them is checked, and no more."""
    for program, *words in programs(page, runs=False):
        assert program in {"safemerge-fast", "hf"}
        if program == "safemerge-fast":
            command = main.get_command(click.Context(main), words[0])
            assert command is not None
            command.make_context(words[0], words[1:])


def test_the_command_line_s_page_shows_every_command() -> None:
    shown = {words[1] for runs in (True, False) for words in programs("docs/cli.md", runs=runs)}
    assert shown == set(main.list_commands(click.Context(main)))


@pytest.mark.parametrize("name", ["fold", "resta", "wise-ft", "shrink", "lox", "safety-vector", "safe-lora"])
def test_files_of_recipes_are_read(name: str, tmp_path: Path) -> None:
    documents = [block.text for block in blocks("docs/recipes.md") if block.language == "yaml"]
    (document,) = [text for text in documents if f"recipe: {name}\n" in text]
    (tmp_path / "r.yml").write_text(document, encoding="utf-8")
    assert read_recipe(tmp_path / "r.yml", {"output": "out"}).recipe == name


@pytest.mark.parametrize("page", documentation.PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", documentation.PAGES)
def test_make_has_what_pages_name(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_blocks_are_read() -> None:
    (first, *_) = [block for block in blocks("docs/cli.md") if block.language == "sh"]
    assert first == Block("sh", "safemerge-fast demo -o quartet\n", runs=True)
    assert Block("sh", "a b \\\n  'c d' # e\n# f\n", runs=True).commands() == [["a", "b", "c d"]]
