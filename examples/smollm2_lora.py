"""The paper's own setting on SmolLM2-135M: LoRA adapters of the aligned model, merged in both output formats.

Takes base and aligned from what `smollm2.py` made, trains a LoRA adapter on sums (finetuned) and one on refusals
(safe) with PEFT, merges them into an adapter and into a checkpoint, and checks that the merged adapter, loaded by
PeftModel.from_pretrained, gives the same logits as the merged checkpoint.

    pip install peft
    python examples/smollm2.py --out /tmp/smollm2        # makes base and aligned
    python examples/smollm2_lora.py --out /tmp/smollm2
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

from smollm2 import Phase, chat, evaluate, held_out_sums, load, timed, train  # isort: skip (sets how threads wait)

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from prompts import benign_examples, held_out_benign, held_out_harmful, refusal_examples, sum_examples
from transformers import AutoTokenizer

ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(out: Path, phase: Phase, rank: int, seed: int) -> None:
    """Trains an adapter of the aligned model with PEFT and saves it as PEFT does, with the tokenizer."""
    start = time.monotonic()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(out / "aligned")
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ALL_PROJECTIONS, task_type="CAUSAL_LM")
    adapted = get_peft_model(load(out / "aligned"), settings)
    loss = train(adapted.base_model.model, tokenizer, phase, seed, trained="lora_")
    adapted.save_pretrained(out / phase.role)
    tokenizer.save_pretrained(out / phase.role)
    print(
        f"  {phase.role}: {phase.steps} steps in {time.monotonic() - start:.0f} s, loss {loss:.3f}",
        flush=True,
    )


def merge(out: Path, output: Path, arguments: argparse.Namespace, *format_flags: str) -> None:
    """Runs `safemerge-fast merge` on the two adapters."""
    command = [str(Path(sys.executable).with_name("safemerge-fast")), "merge"]
    roles = {"base": "base", "aligned": "aligned", "finetuned": "finetuned-lora", "safe": "safe-lora"}
    for role, name in roles.items():
        command += [f"--{role}", str(out / name)]
    command += ["--threshold", str(arguments.threshold), "--alpha", str(arguments.alpha)]
    command += [*format_flags, "-o", str(output), "--overwrite"]
    print("$ " + " ".join(command), flush=True)
    subprocess.run(command, check=True)


@torch.inference_mode()
def compare(out: Path, adapter: Path, checkpoint: Path) -> None:
    """Compares the logits of the merged adapter on the aligned model with those of the merged checkpoint.

    Raises:
        SystemExit: If they differ by more than float32's rounding explains.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    prompts = [chat(tokenizer, prompt) for prompt in held_out_harmful()[:4] + held_out_benign()[:4]]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    whole = load(checkpoint)(**encoded).logits
    adapted = PeftModel.from_pretrained(load(out / "aligned"), str(adapter)).eval()(**encoded).logits
    seen = encoded["attention_mask"].bool()
    difference = float((whole - adapted)[seen].abs().max())
    scale = float(whole[seen].abs().max())
    print(
        f"merged adapter against merged checkpoint: logits differ by {difference:.1e} of {scale:.1f} at most"
    )
    if difference > 1e-3:
        sys.exit("That is more than rounding.")


def main() -> None:
    """Trains, merges, compares, questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where smollm2.py put base and aligned")
    parser.add_argument("--steps", type=int, default=140, help="training steps of both adapters together")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--threshold", type=float, default=0.35, help="modules with a lower rho are merged")
    parser.add_argument("--alpha", type=float, default=0.8, help="weight of the fine-tuned update")
    parser.add_argument("--reuse", action="store_true", help="keep the adapters that are already there")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()

    out: Path = arguments.out
    held_out = frozenset(example.prompt for example in held_out_sums())
    sums = sum_examples(random.Random(2), 2000, exclude=held_out)
    refusals = refusal_examples(random.Random(1)) * 2 + benign_examples()
    phases = (
        Phase("finetuned-lora", "aligned", sums, arguments.steps * 7 // 10, 2e-3),
        Phase("safe-lora", "aligned", refusals, arguments.steps * 3 // 10, 5e-4),
    )
    with timed("training"):
        for seed, phase in enumerate(phases):
            if not (arguments.reuse and (out / phase.role / "tokenizer.json").exists()):
                make_adapter(out, phase, arguments.rank, seed)
    adapter, checkpoint = out / "merged-adapter", out / "merged-lora"
    with timed("adapter out"):
        merge(out, adapter, arguments)
    with timed("checkpoint out"):
        # In float32, so that nothing but the sum itself is rounded.
        merge(out, checkpoint, arguments, "--output-format", "checkpoint", "--dtype", "float32", "--quiet")
    compare(out, adapter, checkpoint)

    folded = out / "folded-lora"
    config = out / "fold.yml"
    config.write_text(f"recipe: fold\nmodel: {out / 'aligned'}\nadapter: {out / 'finetuned-lora'}\n")
    tool = str(Path(sys.executable).with_name("safemerge-fast"))
    subprocess.run([tool, "run", str(config), "-o", str(folded), "--overwrite", "--quiet"], check=True)
    print(f"\n{'%':20} {'refuses harmful':>15} {'refuses benign':>15} {'sums right':>12}")
    for name in ("aligned", "folded-lora", "merged-lora"):
        score = evaluate(out / name)
        percent = [round(100 * fraction) for fraction in (score.refused, score.refused_benign, score.solved)]
        print(f"{name:20} {percent[0]:15} {percent[1]:15} {percent[2]:12}", flush=True)


if __name__ == "__main__":
    main()
