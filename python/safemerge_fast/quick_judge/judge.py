"""Judges a model quickly: the share of refusals, and the loss of a held-out text."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..documents import RECORD, read_text
from ..errors import AnalysisError, OutputError, SettingError
from ..printable import printable
from .prompts import read_prompts
from .refusals import opens_with_refusal
from .settings import JudgeSettings

if TYPE_CHECKING:
    from .model import Loaded

__all__ = ["Answer", "Judgement", "Loss", "Refusals", "judge_model", "write_judgement"]

_NOTE = (
    "A quick judgement: greedy answers, read by how they open, to a few prompts. It compares candidates of one sweep; "
    "it is no evaluation of safety."
)


class Answer(msgspec.Struct, frozen=True):
    """What was asked, how the answer begins, and how that was read."""

    prompt: str
    answer: str
    refused: bool


class Refusals(msgspec.Struct, frozen=True):
    """How often a model declined.

    Attributes:
        rate: The share of prompts whose answer opens with a refusal.
        refused: How many these are.
        prompts: How many prompts there were.
        answers: All of them.
    """

    rate: float
    refused: int
    prompts: int
    answers: tuple[Answer, ...]


class Loss(msgspec.Struct, frozen=True):
    """How well a model predicts a text.

    Attributes:
        loss: Mean of -log p per token, in nats.
        tokens: How many tokens were predicted.
    """

    loss: float
    tokens: int


class Judgement(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was found.

    Attributes:
        refusals: Of harmful prompts; more is better.
        harmless: Of harmless prompts; less is better.
        text: The held-out text; less loss is better.
        model: What was judged.
        adapter: Whether it is an adapter.
        device: Where it ran.
        judge: "quick", which is all that it is.
        note: What to think of it.
    """

    model: str
    adapter: bool
    device: str
    refusals: Refusals | None = None
    harmless: Refusals | None = None
    text: Loss | None = None
    judge: str = "quick"
    note: str = _NOTE

    def to_json(self) -> str:
        """Writes all of it as JSON."""
        document = {"judge": self.judge, "note": self.note, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n"


def judge_model(settings: JudgeSettings) -> Judgement:
    """Judges a model.

    Args:
        settings: Which, and by what.

    Raises:
        SafemergeError: One of its subclasses: a file cannot be read, or the model cannot be loaded.
    """
    prompts = read_prompts(None if settings.prompts is None else Path(settings.prompts).expanduser())
    text = None
    if settings.text is not None:
        text = read_text(os.path.expanduser(settings.text), SettingError, limit=RECORD)
    from .model import load

    loaded = load(settings)
    return Judgement(
        model=settings.model,
        adapter=loaded.adapter,
        device=loaded.device,
        refusals=_refusals(loaded, prompts.harmful, settings),
        harmless=_refusals(loaded, prompts.harmless, settings),
        text=None if text is None else _loss(loaded, text, settings),
    )


def write_judgement(judgement: Judgement, file: Path) -> None:
    """Writes a judgement as JSON.

    Raises:
        OutputError: That cannot be done.
    """
    try:
        file.write_text(judgement.to_json(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from error


def _refusals(loaded: Loaded, prompts: tuple[str, ...], settings: JudgeSettings) -> Refusals | None:
    if not prompts:
        return None
    answers = tuple(
        Answer(prompt, answer, opens_with_refusal(answer))
        for prompt, answer in zip(prompts, _answers(loaded, prompts, settings), strict=True)
    )
    refused = sum(answer.refused for answer in answers)
    return Refusals(refused / len(answers), refused, len(answers), answers)


def _answers(loaded: Loaded, prompts: tuple[str, ...], settings: JudgeSettings) -> list[str]:
    """Greedy answers, in batches of prompts of similar length."""
    import torch

    asked = [_chat(loaded.tokenizer, prompt, settings.system) for prompt in prompts]
    found: dict[int, str] = {}
    order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
    for start in range(0, len(order), settings.batch):
        places = order[start : start + settings.batch]
        encoded = loaded.tokenizer(
            [asked[place] for place in places],
            return_tensors="pt",
            padding=True,
            # The chat template has written them already.
            add_special_tokens=loaded.tokenizer.chat_template is None,
        )
        ids, mask = encoded["input_ids"].to(loaded.device), encoded["attention_mask"].to(loaded.device)
        with torch.inference_mode():
            output = loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=settings.new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=loaded.tokenizer.pad_token_id,
            )
        texts = loaded.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        found.update(zip(places, texts, strict=True))
    return [found[place] for place in range(len(asked))]


def _chat(tokenizer: Any, prompt: str, system: str | None) -> str:
    """The prompt as the model's chat template puts it, up to where the answer begins; without one as it is."""
    if tokenizer.chat_template is None:
        return prompt if system is None else f"{system}\n\n{prompt}"
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:
        reason = printable(" ".join(str(error).split()), 200)
        raise AnalysisError(
            f"the chat template cannot put a prompt: {reason}; leave --system out?"
        ) from error


def _loss(loaded: Loaded, text: str, settings: JudgeSettings) -> Loss:
    """Mean loss over windows side by side; the first token of each is not predicted."""
    import torch

    ids = loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    total, count = 0.0, 0
    for start in range(0, len(ids), settings.window):
        window = ids[start : start + settings.window].unsqueeze(0).to(loaded.device)
        if window.shape[1] < 2:
            continue
        with torch.inference_mode():
            logits = loaded.model(input_ids=window).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        # In double: means over many tokens are compared at their last digits.
        total += float(losses.cpu().double().sum())
        count += window.shape[1] - 1
    if count == 0:
        raise SettingError(f"the text {settings.text} has fewer than two tokens")
    if not math.isfinite(total):
        raise AnalysisError(
            "the model's loss is not finite: its weights hold NaN, infinity or nothing sensible"
        )
    return Loss(total / count, count)
