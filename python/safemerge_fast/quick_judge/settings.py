"""What somebody asks of the quick judge."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from ..settings import Kind, Setting, Settings

__all__ = ["JudgeSettings"]


class JudgeSettings(Settings, frozen=True):
    """Which model to judge, and by what."""

    recipe: ClassVar[str] = "judge"

    model: Annotated[
        str,
        Setting(
            "A checkpoint that transformers loads, or a PEFT adapter.",
            kind=Kind.PATH,
            metavar="MODEL",
            on_command_line=False,
        ),
    ]
    aligned: Annotated[
        str | None,
        Setting(
            "The model that an adapter is loaded on, and whose tokenizer serves where MODEL has none.",
            kind=Kind.MODEL,
            metavar="MODEL",
            default="what the adapter's configuration names",
        ),
    ] = None
    prompts: Annotated[
        str | None,
        Setting(
            "YAML or JSON with the lists harmful and harmless.",
            kind=Kind.PATH,
            metavar="FILE",
            default="48 prompts that come with the program",
        ),
    ] = None
    text: Annotated[
        str | None,
        Setting(
            "A text that no model was trained on; its loss per token is measured.",
            kind=Kind.PATH,
            metavar="FILE",
        ),
    ] = None
    system: Annotated[
        str | None, Setting("System prompt, for models whose chat template knows one.", default="none")
    ] = None
    new_tokens: Annotated[int, Setting("Tokens of an answer that are looked at.", least=1, most=4096)] = 16
    window: Annotated[int, Setting("Tokens of the text that are seen at once.", least=2, most=1 << 20)] = 512
    batch: Annotated[int, Setting("Prompts that are answered at once.", least=1, most=4096)] = 16
    device: Annotated[str, Setting("Where the model runs.", metavar="auto|cpu|cuda[:N]|mps")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Setting("What the model computes in; auto is float32 on a CPU and the checkpoint's own elsewhere."),
    ] = "auto"
