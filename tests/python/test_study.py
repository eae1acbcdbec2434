"""The study in examples/study: its own code on a tiny model, its statistics, and its page."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def examples() -> Any:
    """The examples can be imported, as they can where they are run."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "examples"))
    # Tiny models gain nothing from more, and threads that wait for each other are slow where others work too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("study", "smollm2", "prompts")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are the printable characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("study") / "tiny"
    tokens = ["<pad>", "<|im_end|>", "\u0120", "\u010a", *map(chr, range(33, 127))]
    characters = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, []))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_study_of_two_candidates(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from study import run, table

    part = run.Part(
        "tiny",
        {"select": ["fraction:0.5"], "alpha": [0.5]},
        recipes=({"recipe": "wise-ft", "alpha": 0.5},),
        controls=("aligned", "finetuned", "shrink"),
    )
    words = ["--base", str(base), "--steps", "1", "--seeds", "1", "--tasks", "dates", "--kinds", "lora-qv"]
    words += ["--threads", "1"]
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "PARTS", (part,))
    try:
        run.main([*words, "--out", str(tmp_path), "--parts", "tiny"])
        said = capsys.readouterr().out
        assert "5 models in" in said
        assert "failed" not in said
        run.main([*words, "--out", str(tmp_path), "--parts", "tiny"])
        assert capsys.readouterr().out == "", "what is there is not made again"
        # As if the first run had ended before the last model was judged.
        sweep = tmp_path / "seed-0" / "lora-qv" / "tiny-dates"
        (sweep / "done").unlink()
        log = (sweep / "sweep.jsonl").read_bytes().splitlines(keepends=True)
        (sweep / "sweep.jsonl").write_bytes(b"".join(log[:-1]))
        run.main([*words, "--out", str(tmp_path), "--parts", "tiny"])
        assert "5 models in" in capsys.readouterr().out
        again = (sweep / "sweep.jsonl").read_bytes().splitlines(keepends=True)
        assert again[:-1] == log[:-1], "what is judged is not judged again"
    finally:
        patch.undo()
    table.main(["--out", str(tmp_path), "--figure", str(tmp_path / "figure.svg")])
    assert "| `fraction-0.5-alpha-0.5` | 2 of 4 |" in capsys.readouterr().out
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    with (tmp_path / "results.csv").open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert rows.keys() == {
        "aligned",
        "finetuned",
        "shrink-only-alpha-0.5",
        "fraction-0.5-alpha-0.5",
        "wise-ft-alpha-0.5",
    }
    # Adapters of matrices alone: both make the same weights.
    same = [
        [rows[name][metric] for metric in ("refused", "solved", "loss", "text_loss")]
        for name in ("wise-ft-alpha-0.5", "shrink-only-alpha-0.5")
    ]
    assert same[0] == same[1]
    for row in rows.values():
        assert 0 <= float(row["refused"]) <= 1
        assert float(row["loss"]) > 0


def test_the_judge_measures_what_one_prompt_at_a_time_gives(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that has learned to answer ab: half of the references are that. Each prompt is then asked alone."""
    from prompts import Example, held_out_benign, held_out_harmful
    from smollm2 import Phase, chat, load, train
    from study import judge, tasks
    from transformers import AutoTokenizer

    model, tokenizer = load(base), AutoTokenizer.from_pretrained(base)
    prompts = [f"{number} is what?" for number in range(10)]
    phase = Phase("x", "y", [Example(prompt, "ab") for prompt in prompts], 60, 1e-2)
    train(model, tokenizer, phase, 0)
    model.save_pretrained(tmp_path)
    held_out = tuple(Example(prompt, "ab" if n % 2 else "ba") for n, prompt in enumerate(prompts))
    monkeypatch.setitem(judge.TASKS, "letters", tasks.Task("letters", lambda *_: [], held_out))
    # No answer here opens with a refusal, so that something else is counted.
    monkeypatch.setattr(judge, "opens_with_refusal", lambda text: text.count("b") > 1)
    found = judge.Judge(base, torch.float32).measure(tmp_path, "letters")

    def answer(prompt: str, count: int) -> list[int]:
        ids = tokenizer(chat(tokenizer, prompt), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            output = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return list(map(int, output[0, ids.shape[1] :]))

    for metric, asked in (("refused", held_out_harmful()), ("overrefused", held_out_benign())):
        some = judge._some(asked)
        assert len(some) == len(asked) // 2
        counted = sum(
            tokenizer.decode(answer(prompt, judge.NEW_TOKENS), skip_special_tokens=True).count("b") > 1
            for prompt in some
        )
        assert found[metric] == counted / len(some)
    wanted = [tokenizer(example.answer + "<|im_end|>")["input_ids"] for example in held_out]
    right = sum(answer(e.prompt, len(ids)) == ids for e, ids in zip(held_out, wanted, strict=True))
    assert found["solved"] == right / 10 == 0.5
    losses = []
    for example, ids in zip(held_out, wanted, strict=True):
        asked = tokenizer(chat(tokenizer, example.prompt))["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([asked + ids])).logits[0].double().log_softmax(-1)
        losses += [-float(logits[len(asked) + place - 1, token]) for place, token in enumerate(ids)]
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_judge_that_fails_says_so(tmp_path: Path) -> None:
    import subprocess

    from study.judge import JudgeServer

    def measure(directory: Path) -> dict[str, float]:
        if directory.name == "bad":
            raise ValueError("no such thing")
        return {"refused": 0.25}

    import shlex

    with JudgeServer(measure) as server:
        for name, code in (("good", 0), ("bad", 1)):
            words = [
                word.replace("{model}", name).replace("{out}", str(tmp_path / f"{name}.json"))
                for word in shlex.split(server.command)
            ]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == code, done.stderr
    assert json.loads((tmp_path / "good.json").read_text()) == {"refused": 0.25}
    assert done.stderr == "ValueError: no such thing\n"


def test_tasks_hold_out_what_they_train_on() -> None:
    from study.tasks import TASKS, date_examples

    for task in TASKS.values():
        trained = {example.prompt for example in task.examples(0, 300)}
        assert len(trained) == 300
        assert not trained & {example.prompt for example in task.held_out}
        assert trained != {example.prompt for example in task.examples(1, 300)}
    for example in date_examples(random.Random(0), 50):
        import datetime
        import re

        words = re.search(r"\d+ [A-Z][a-z]+ \d{4}", example.prompt)
        assert words is not None
        date = datetime.datetime.strptime(words[0], "%d %B %Y")
        assert example.answer == f"Sure. That is {date:%Y-%m-%d}."


def test_intervals_are_student_s() -> None:
    from study.intervals import interval

    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    for count in (2, 3, 5, 10):
        values = [rng.gauss(1, 2) for _ in range(count)]
        low, high = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
        found = interval(values)
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-3)
    assert interval([0.5]).half == float("inf")
    assert not interval([0.5]).excludes_zero


def test_differences_are_within_seeds_and_over_all_tasks() -> None:
    from study.intervals import by_seed, difference, most_compared
    from study.results import Row

    def rows(values: dict[tuple[int, str], float]) -> list[Row]:
        return [
            Row(seed, "full", task, "p", "n", "", "", "", "", "", value, 0, 0, 0, 0)
            for (seed, task), value in values.items()
        ]

    one = rows({(0, "a"): 0.5, (0, "b"): 0.7, (1, "a"): 0.1, (1, "b"): 0.3, (2, "a"): 0.9})
    other = rows({(0, "a"): 0.4, (0, "b"): 0.4, (1, "a"): 0.0, (1, "b"): 0.0})
    means = by_seed(one, "refused", ["a", "b"])
    assert means == pytest.approx({0: 0.6, 1: 0.2}), "the third seed lacks a task"
    found = difference(means, by_seed(other, "refused", ["a", "b"]))
    assert found is not None
    # 0.2 and 0.2: no spread at all.
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(0, abs=1e-9)
    assert difference(means, {}) is None
    # A third seed for one task counts for more than a second task.
    assert most_compared(one) == ("a",)
    assert most_compared(other) == ("a", "b")


def test_the_page_s_tables_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    from study import table

    table.main(["--results", str(ROOT / "examples" / "study" / "results.csv")])
    made = set(capsys.readouterr().out.splitlines())
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    begin, end = "<!-- results -->", "<!-- end of results -->"
    shown = [line for line in page.partition(begin)[2].partition(end)[0].splitlines() if line.startswith("|")]
    assert len(shown) > 10
    assert [line for line in shown if line not in made] == []


@pytest.mark.parametrize("page", ["docs/study.md", "examples/README.md"])
def test_the_commands_of_a_page_are_read(page: str) -> None:
    from documentation import blocks
    from study import run, table

    read = {"study.run": run.read_arguments, "study.table": table.read_arguments}
    found = [
        words[2:]
        for block in blocks(page)
        if block.language == "sh"
        for words in block.commands()
        if words[:2] == ["python", "-m"]
    ]
    assert found
    for module, *words in found:
        assert read[module](words)
