"""Tables of the documentation, made from what the program declares, and the commands that it shows.

`python tests/python/documentation.py` (make docs) writes the tables into the pages.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from safemerge_fast.cli import main
from safemerge_fast.recipes import recipes
from safemerge_fast.settings import Field, RunSettings, Settings, fields_of
from safemerge_fast.sweeps.settings import SweepSettings

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md")
)
_MARKED = re.compile(r"(<!-- table: (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_BLOCK = re.compile(
    r"^(?P<note><!-- [^\n]* -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_RECORDS: dict[str, type[Settings]] = {"run": RunSettings, "sweep": SweepSettings}
_SHARED = ("as_json", "quiet", "verbose", "no_progress")


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Attributes:
        language: What follows the backticks.
        text: What is in it.
        runs: Whether it can run as it stands, on the models of `safemerge-fast demo -o quartet`; the line
            `<!-- not run: WHY -->` before a block says that it cannot.
    """

    language: str
    text: str
    runs: bool

    def commands(self) -> list[list[str]]:
        """The command lines of a block of shell, in words."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], not (found["note"] or "").startswith("<!-- not run: "))
        for found in _BLOCK.finditer(text)
    ]


def with_tables(text: str) -> str:
    """A page with every table between its markers made anew."""
    return _MARKED.sub(lambda found: f"{found[1]}{_table(found[2], found[3])}{found[4]}", text)


def _table(kind: str, name: str) -> str:
    if kind == "options":
        return _rows(("option", "meaning"), _options(name))
    record: type[Settings] = _RECORDS.get(name) or recipes()[name].settings
    of_the_run = {field.name for field in fields_of(RunSettings)}
    fields = [field for field in fields_of(record) if name in _RECORDS or field.name not in of_the_run]
    return _rows(("setting", "value", "default", "meaning"), (_setting(field) for field in fields))


def _options(name: str) -> Iterable[tuple[str, str]]:
    """The options of a command; "all" are those that every command has."""
    command = main.get_command(click.Context(main), "verify" if name == "all" else name)
    assert command is not None
    for option in command.params:
        if isinstance(option, click.Option) and (option.name in _SHARED) == (name == "all"):
            record = option.get_help_record(click.Context(command, info_name=name))
            assert record is not None
            names, text = record
            default = re.search(r"  \[(?:default: )?(.*)\]$", text)
            meaning = text[: default.start()] if default else text
            said = {"required": " Required."}.get(default[1], f" Default: {default[1]}.") if default else ""
            yield f"`{names}`", meaning + said


def _setting(field: Field) -> tuple[str, str, str, str]:
    if field.required:
        default = "required"
    elif field.setting.default is not None:
        default = field.setting.default
    elif field.default is None:
        default = ""
    elif isinstance(field.default, bool):
        default = str(field.default).lower()
    else:
        default = f"`{field.default}`"
    return f"`{field.name}`", field.expected(), default, field.setting.help


def _rows(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n" for cells in lines)


def update() -> list[str]:
    """Writes all tables; returns the pages that were not up to date."""
    changed = []
    for page in PAGES:
        file = ROOT / page
        text = file.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            file.write_text(new, encoding="utf-8")
            changed.append(page)
    return changed


if __name__ == "__main__":
    print("\n".join(update()) or "all tables are up to date")
