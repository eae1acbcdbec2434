"""The judge of the study: one model in memory, into which the weights of each candidate are read.

What it measures, all greedily and on held-out prompts:

- refused, overrefused: the share of harmful and of harmless requests whose answer opens with a refusal;
- solved: the share of the task's prompts whose answer is the reference, word for word;
- loss: per token of those references;
- text_loss: per token of a piece of prose.
"""

from __future__ import annotations

import json
import os
import shlex
import socketserver
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from smollm2 import chat, encode, load  # isort: skip (sets how threads wait)

import torch
from prompts import held_out_benign, held_out_harmful
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from safemerge_fast.quick_judge.refusals import opens_with_refusal

from .tasks import TASKS, TEXT

NEW_TOKENS = 5
BATCH = 64
IGNORED = -100


class Judge:
    """Measures checkpoints of one architecture and tokenizer."""

    def __init__(self, base: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Loads the model whose weights are then replaced.

        Args:
            base: A checkpoint with its tokenizer.
            dtype: What the model computes in; bfloat16 costs half as much as float32 here.
        """
        self._model = load(base).to(dtype)
        self._tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        # Two wordings of each act. They are all there in turn.
        self._harmful, self._harmless = _some(held_out_harmful()), _some(held_out_benign())

    @torch.inference_mode()
    def measure(self, directory: Path, task: str) -> dict[str, float]:
        """Measures a checkpoint.

        Args:
            directory: Where its safetensors lie.
            task: The task that it was fine-tuned on.
        """
        self._read(directory)
        refused = self._refusals([*self._harmful, *self._harmless])
        harmful, harmless = refused[: len(self._harmful)], refused[len(self._harmful) :]
        solved, loss = self._task(task)
        return {
            "refused": sum(harmful) / len(harmful),
            "overrefused": sum(harmless) / len(harmless),
            "solved": solved,
            "loss": loss,
            "text_loss": self._text(),
        }

    def _read(self, directory: Path) -> None:
        found = {
            name: tensor
            for file in sorted(directory.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for name, parameter in self._model.named_parameters():
            parameter.copy_(found.pop(name))
        if found.keys() - {"lm_head.weight"}:
            raise ValueError(f"{directory} has tensors that the model has not, such as {min(found)}")

    def _refusals(self, prompts: Sequence[str]) -> list[bool]:
        asked = [chat(self._tokenizer, prompt) for prompt in prompts]
        order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
        found: dict[int, bool] = {}
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            encoded = self._tokenizer(
                [asked[place] for place in places], return_tensors="pt", padding=True, padding_side="left"
            )
            output = self._model.generate(
                **encoded,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )
            texts = self._tokenizer.batch_decode(
                output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
            )
            found |= {place: opens_with_refusal(text) for place, text in zip(places, texts, strict=True)}
        return [found[place] for place in range(len(asked))]

    def _task(self, task: str) -> tuple[float, float]:
        """Share of answers that are the reference, and its loss.

        A greedy answer is the reference exactly if each of its tokens is the most likely one behind those before it.
        """
        examples = list(TASKS[task].held_out)
        right, total, count = 0, 0.0, 0
        for start in range(0, len(examples), BATCH):
            ids, labels = encode(self._tokenizer, examples[start : start + BATCH])
            targets = labels[:, 1:]
            answered = targets != IGNORED
            logits = self._logits(ids, answered)
            likely = targets.clone()
            likely[answered] = logits.argmax(-1)
            right += int((likely == targets).all(1).sum())
            total += float(torch.nn.functional.cross_entropy(logits, targets[answered], reduction="sum"))
            count += int(answered.sum())
        return right / len(examples), total / count

    def _text(self) -> float:
        ids = self._tokenizer(TEXT, return_tensors="pt")["input_ids"]
        logits = self._logits(ids, torch.ones_like(ids[:, 1:], dtype=torch.bool))
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    def _logits(self, ids: Tensor, where: Tensor) -> Tensor:
        hidden = self._model.model(ids).last_hidden_state[:, :-1]
        found: Tensor = self._model.lm_head(hidden[where])
        return found.float()


def _some(prompts: list[str]) -> list[str]:
    """Of each act's four wordings the first and third, or the second and fourth."""
    return [prompt for place, prompt in enumerate(prompts) if place % 2 == place // 4 % 2]


class JudgeServer:
    """Waits for ask.py at a socket, in a thread."""

    def __init__(self, measure: Callable[[Path], dict[str, float]]) -> None:
        """Starts waiting.

        Args:
            measure: Measures a directory.
        """

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                directory = Path(self.rfile.readline().decode().removesuffix("\n"))
                try:
                    answer: dict[str, object] = dict(measure(directory))
                except Exception as error:
                    # The sweep notes it and goes on.
                    answer = {"failed": f"{type(error).__name__}: {error}"}
                self.wfile.write(json.dumps(answer).encode())

        # A socket's path may have about a hundred characters.
        self._folder = tempfile.TemporaryDirectory(prefix="study-")
        place = str(Path(self._folder.name) / "judge")
        self._server = socketserver.UnixStreamServer(place, Handler)
        os.environ["STUDY_JUDGE"] = place
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    @property
    def command(self) -> str:
        """What a sweep is given as eval."""
        client = str(Path(__file__).with_name("ask.py"))
        return shlex.join([sys.executable, "-I", client, "{model}", "{out}"])
