"""`safemerge-fast judge`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..printable import printable
from ..quick_judge.settings import JudgeSettings
from .options import output_file, settings_options, terminal_options
from .terminal import Terminal

if TYPE_CHECKING:
    from ..quick_judge.judge import Judgement


@click.command("judge")
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="[OUT.json]", required=False, type=output_file)
@settings_options(JudgeSettings)
@terminal_options
def command(*, terminal: Terminal, model: str, out: Path | None, **values: Any) -> None:
    """Judge MODEL quickly: the share of refusals of harmful and of harmless prompts, and the loss of a held-out text.

    Answers are greedy and read by how they open. This compares the candidates of a sweep; it is no evaluation of
    safety. OUT.json gets all answers. Needs transformers, and peft for adapters: pip install safemerge-fast[judge].
    """
    from ..quick_judge.judge import judge_model, write_judgement

    judgement = judge_model(JudgeSettings(model, **values))
    if out is not None:
        write_judgement(judgement, out)
    terminal.result(judgement.to_json, *_lines(judgement))
    if out is not None:
        terminal.say(f"wrote {out}")


def _lines(judgement: Judgement) -> Iterator[str]:
    """The figures, a line each."""
    yield f"{printable(judgement.model)}, judged quickly on {judgement.device}"
    for what, refusals in (("harmful", judgement.refusals), ("harmless", judgement.harmless)):
        if refusals is not None:
            yield f"{what:<9} {refusals.refused} of {refusals.prompts} prompts refused ({refusals.rate:.1%})"
    if judgement.text is not None:
        yield f"text      loss {judgement.text.loss:.4f} per token, of {judgement.text.tokens} tokens"
