"""Trains the models of the study: a base, and for each seed an aligned one, safe ones and fine-tunings."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from smollm2 import Phase, load, load_gguf, train  # isort: skip (sets how threads wait)

import torch
from dense_merge import PROJECTION
from peft import LoraConfig, get_peft_model
from prompts import benign_examples, refusal_examples
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from .tasks import TASKS

# The user's turn alone. The model's own template adds a system message that is longer than most prompts here.
TEMPLATE = (
    "{% for message in messages if message.role == 'user' %}<|im_start|>user\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
_DONE = "tokenizer_config.json"


class Kind(Enum):
    """How a model is fine-tuned."""

    QV = "lora-qv"
    LINEAR = "lora-all"
    FULL = "full"

    @property
    def targets(self) -> list[str]:
        """The modules that an adapter has."""
        attention = ["q_proj", "v_proj"]
        if self is Kind.QV:
            return attention
        return [*attention, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Training:
    """How long and how hard each model is trained.

    Attributes:
        aligned: Steps from base to aligned.
        finetuned: Steps on a task.
        safe: Steps on refusals.
        batch: Examples in a step.
        rank: Rank of adapters.
    """

    aligned: int = 50
    finetuned: int = 25
    safe: int = 8
    batch: int = 4
    rank: int = 8

    def rate(self, kind: Kind, role: str) -> float:
        """Learning rate: adapters need a larger one, refusals a smaller one."""
        if kind is Kind.FULL:
            return 5e-4 if role == "finetuned" else 1e-4
        return (5e-3 if kind is Kind.QV else 2e-3) if role == "finetuned" else 5e-4


@dataclass(frozen=True)
class Models:
    """Where models of one study lie, and how they are made; what is there already is left alone.

    Attributes:
        out: The study's directory.
        training: How they are trained.
        alignments: How many aligned models there are; seeds take them in turn.
    """

    out: Path
    training: Training
    alignments: int = 1

    def base(self, given: Path | None) -> Path:
        """SmolLM2-135M-Instruct in float32, or the model that was given."""
        place = self.out / "base"
        if not (place / _DONE).exists():
            model, tokenizer = (
                load_gguf() if given is None else (load(given), AutoTokenizer.from_pretrained(given))
            )
            tokenizer.chat_template = TEMPLATE
            _save(model, tokenizer, place)
        return place

    def aligned(self, seed: int) -> Path:
        """The base model trained to refuse."""
        number = seed % self.alignments
        # Twice as many harmless requests as harmful ones; otherwise refusing everything is learned first.
        examples = refusal_examples(random.Random(number)) + benign_examples() * 2
        phase = Phase("aligned", "base", examples, self.training.aligned, 1.5e-4)
        return self._full(self.out / f"aligned-{number}", self.out / "base", phase, number)

    def safe(self, seed: int, kind: Kind) -> Path:
        """The aligned model trained further to refuse."""
        rate = self.training.rate(kind, "safe")
        examples = refusal_examples(random.Random(seed + 1000)) * 2 + benign_examples()
        phase = Phase("safe", "aligned", examples, self.training.safe, rate)
        return self._tuned(seed, kind, phase, "safe")

    def finetuned(self, seed: int, kind: Kind, task: str) -> Path:
        """The aligned model trained on a task."""
        rate = self.training.rate(kind, "finetuned")
        phase = Phase("finetuned", "aligned", TASKS[task].examples(seed), self.training.finetuned, rate)
        return self._tuned(seed, kind, phase, task)

    def _tuned(self, seed: int, kind: Kind, phase: Phase, name: str) -> Path:
        place = self.out / f"seed-{seed}" / kind.value / name
        start = self.aligned(seed)
        if kind is Kind.FULL:
            return self._full(place, start, phase, seed)
        if (place / _DONE).exists():
            return place
        began = time.monotonic()
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(start)
        rank = self.training.rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=kind.targets, task_type="CAUSAL_LM")
        adapted = get_peft_model(load(start), config)
        loss = self._train(adapted.base_model.model, tokenizer, phase, seed, trained="lora_")
        adapted.save_pretrained(place)
        tokenizer.save_pretrained(place)
        _tell(place, phase, loss, began)
        return place

    def _full(self, place: Path, start: Path, phase: Phase, seed: int) -> Path:
        if not (place / _DONE).exists():
            began = time.monotonic()
            model, tokenizer = load(start), AutoTokenizer.from_pretrained(start)
            loss = self._train(model, tokenizer, phase, seed, trained=PROJECTION)
            _save(model, tokenizer, place)
            _tell(place, phase, loss, began)
        return place

    def _train(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        phase: Phase,
        seed: int,
        trained: str,
    ) -> float:
        # The products in bfloat16, weights and their updates in float32. Without the cache, which would keep the
        # bfloat16 weights of the first step.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return train(model, tokenizer, phase, seed, trained, self.training.batch)


def _save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    # In float32: what alignment changes is so little that bfloat16 would round much of it away.
    model.save_pretrained(place, max_shard_size="5GB")
    # Last, so that it says that all is there.
    tokenizer.save_pretrained(place)


def _tell(place: Path, phase: Phase, loss: float, began: float) -> None:
    print(
        f"  {place}: {phase.steps} steps in {time.monotonic() - began:.0f} s, loss {loss:.3f}",
        flush=True,
    )
