"""Names that nobody vouches for, made harmless where they are shown: on a terminal, in Markdown, in a plot.

Tensors, files and fields are named by whoever made a checkpoint. A name may hold escape sequences that move the
cursor, line breaks, marks that turn the direction of writing, or the syntax of the place where it is shown.
"""

from __future__ import annotations

import re
from html import escape

__all__ = ["code", "fenced", "markdown", "plot_label", "printable", "shortened"]

MOST = 400
"""Characters of a name that are shown; a path that is longer says little at its middle."""

MOST_OF_A_MESSAGE = 4000

# All that CommonMark and its tables give a meaning to within a line, what makes links of addresses, and `$`, which
# some readers take for formulas.
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$:@])")
# Names as most are; underscores within a word are no emphasis.
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def printable(text: str, most: int = MOST) -> str:
    r"""Escapes what is not printable, and shortens what is long; the result is one line.

    Args:
        text: Any string, also one with lone surrogates, as paths that are not UTF-8 have.
        most: Characters of the result, about; beyond them the middle is left out.

    Returns:
        The text, in which control characters, line breaks, direction marks, surrogates and spaces other than " " are
        written like `\x1b` or `\u202e`.
    """
    if len(text) > most:
        # First what is read at all: escaping a gigabyte would take its time.
        text = shortened(text, most)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def shortened(text: str, most: int) -> str:
    """Leaves the middle of a text out, if it has more than that many characters."""
    if len(text) <= most:
        return text
    half = max((most - 1) // 2, 1)
    return f"{text[:half]}…{text[-half:]}"


def markdown(text: str) -> str:
    """A name as plain text in Markdown, also in a cell of a table: no link, no emphasis, no HTML."""
    if _PLAIN.fullmatch(text) and len(text) <= MOST:
        return text
    return escape(_MARKDOWN.sub(r"\\\1", printable(text)), quote=False)


def code(text: str, *, in_table: bool = False) -> str:
    """A name as code within a line of Markdown.

    Args:
        text: The name.
        in_table: Whether it stands in a cell of a table, which ends at a bar even within code.
    """
    text = printable(text)
    if in_table:
        text = text.replace("|", "\\|")
    if not text.strip():
        return f"`{text or ' '}`"
    fence = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""
    return f"{fence}{space}{text}{space}{fence}"


def fenced(language: str, text: str) -> str:
    """A block of code in Markdown, whose fence no line of the text can close.

    Args:
        language: What the block is marked as.
        text: Lines of code; each is escaped as printable does it, but none is shortened.
    """
    fence = "`" * max(3, _longest_run(text) + 1)
    lines = "\n".join(printable(line, len(line)) for line in text.rstrip("\n").split("\n"))
    return f"{fence}{language}\n{lines}\n{fence}"


def plot_label(text: str) -> str:
    """A name as a label of matplotlib: no formula, and not hidden for its first character."""
    text = printable(text, 60).replace("$", r"\$")
    # A label that begins with an underscore is left out of legends.
    return f" {text}" if text.startswith("_") else text


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
