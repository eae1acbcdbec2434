"""The quick judge, on tiny models of transformers: its loss by the formula, its answers token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import assert_one_sentence, run
from lora import write_lora

from safemerge_fast.quick_judge.judge import judge_model
from safemerge_fast.quick_judge.prompts import read_prompts
from safemerge_fast.quick_judge.refusals import opens_with_refusal
from safemerge_fast.quick_judge.settings import JudgeSettings

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "i",
    "am",
    "sorry",
    ",",
    "but",
    "can",
    "not",
    "help",
    "with",
    "that",
    "sure",
]
WORDS += ["here", "is", "how", "to", "the", "a", "of", "open", "bread", ".", "?"]
TEMPLATE = (
    "{% for message in messages %}<s> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}</s>{% endif %}"
)
TEXT = "the bread is open . i can help with that , sure . " * 9
Q = {f"model.layers.{layer}.self_attn.q_proj": (24, 24) for layer in range(2)}


def write_model(path: Path, *, template: str | None = TEMPLATE, pad: bool = True, seed: int = 0) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.6,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>"} if pad else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **special
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("judge") / "model")


def prompts_file(path: Path, **lists: list[str]) -> Path:
    path.write_text(json.dumps(lists))
    return path


def loaded(path: Path, adapter: Path | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) if word in WORDS else WORDS.index("<unk>") for word in text.split()]


def greedy(model: Any, ids: list[int], count: int) -> str:
    """One token after the other, without a cache, a batch or padding."""
    found: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            token = int(model(torch.tensor([ids + found])).logits[0, -1].argmax())
            if token == 2:
                break
            found.append(token)
    return " ".join(WORDS[token] for token in found if token > 3)


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("pad", [True, False])
def test_answers_are_greedy_whatever_the_batch(tmp_path: Path, template: str | None, pad: bool) -> None:
    path = write_model(tmp_path / "m", template=template, pad=pad)
    asked = ["open the bread ?", "how", "can i help with a bread of bread , sure ?", "i am here"]
    file = prompts_file(tmp_path / "p.json", harmful=asked, harmless=asked[:1])
    judgement = judge_model(JudgeSettings(str(path), prompts=str(file), new_tokens=6, batch=3))
    reference = loaded(path)
    assert judgement.refusals is not None
    assert [answer.prompt for answer in judgement.refusals.answers] == asked
    for answer in judgement.refusals.answers:
        text = f"<s> {answer.prompt} </s>" if template else answer.prompt
        assert answer.answer.split() == greedy(reference, ids_of(text), 6).split(), answer.prompt
        assert answer.refused == opens_with_refusal(answer.answer)
    assert judgement.refusals.rate == sum(a.refused for a in judgement.refusals.answers) / 4
    assert judgement.harmless is not None
    assert judgement.harmless.prompts == 1
    assert judgement.text is None


@pytest.mark.parametrize("window", [2, 10, 117, 1000])
def test_the_loss_is_the_mean_over_windows(model: Path, tmp_path: Path, window: int) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    file = prompts_file(tmp_path / "p.json", harmless=["how"])
    settings = JudgeSettings(str(model), prompts=str(file), text=str(tmp_path / "t.txt"), window=window)
    judgement = judge_model(settings)
    ids, reference = ids_of(TEXT), loaded(model).double()
    losses = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        if len(part) < 2:
            continue
        with torch.inference_mode():
            logits = reference(torch.tensor([part])).logits[0]
        for place in range(1, len(part)):
            row = logits[place - 1]
            losses.append(float(torch.logsumexp(row, 0) - row[part[place]]))
    assert judgement.text is not None
    assert judgement.text.tokens == len(losses)
    assert math.isclose(judgement.text.loss, sum(losses) / len(losses), rel_tol=1e-5)
    assert judgement.refusals is None


def test_an_adapter_is_judged_on_its_model(model: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a", Q, rank=3, seed=1, size=0.6, task_type="CAUSAL_LM")
    file = prompts_file(tmp_path / "p.json", harmful=["open the bread ?", "how"])
    judgement = judge_model(JudgeSettings(str(adapter), aligned=str(model), prompts=str(file), new_tokens=6))
    assert judgement.adapter
    reference = loaded(model, adapter)
    assert judgement.refusals is not None
    for answer in judgement.refusals.answers:
        assert answer.answer.split() == greedy(reference, ids_of(f"<s> {answer.prompt} </s>"), 6).split()
    plain = judge_model(JudgeSettings(str(model), prompts=str(file), new_tokens=6))
    assert plain.refusals is not None
    assert [a.answer for a in plain.refusals.answers] != [a.answer for a in judgement.refusals.answers]
    with pytest.raises(Exception, match="does not name the model that the adapter is for; give --aligned"):
        judge_model(JudgeSettings(str(adapter), prompts=str(file)))


def test_the_command_writes_what_a_sweep_reads(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    out = tmp_path / "out.json"
    result = run("judge", model, out, "--text", tmp_path / "t.txt", "--new-tokens", "3")
    assert result.exit_code == 0, result.stderr
    assert "judged quickly on cpu" in result.stdout
    assert "24 prompts refused" in result.stdout
    document = json.loads(out.read_text())
    assert document["judge"] == "quick"
    assert "no evaluation of safety" in document["note"]
    assert document["refusals"]["prompts"] == document["harmless"]["prompts"] == 24
    assert document["text"]["tokens"] == len(ids_of(TEXT)) - 1
    printed = json.loads(run("judge", model, "--json", "--new-tokens", "3").stdout)
    assert printed["refusals"] == document["refusals"]


def test_what_cannot_be_judged_is_said_in_a_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("harmful: [1]")
    (tmp_path / "other.yml").write_text("harmfull: [a]")
    (tmp_path / "short.txt").write_text("bread")
    (tmp_path / "empty").mkdir()
    no_tokenizer = tmp_path / "no-tokenizer"
    write_model(no_tokenizer)
    for file in no_tokenizer.glob("tokenizer*"):
        file.unlink()
    for words, message in (
        (["judge", tmp_path / "none"], "is no directory; the judge loads checkpoints and adapters"),
        (["judge", tmp_path / "empty"], "has no tokenizer; give --aligned a model that has it"),
        (["judge", tmp_path / "empty", "--aligned", model], "transformers cannot load"),
        (["judge", no_tokenizer], "has no tokenizer; give --aligned a model that has it"),
        (["judge", model, "--prompts", tmp_path / "bad.yml"], "prompt 1 of harmful should be text, not 1"),
        (["judge", model, "--prompts", tmp_path / "other.yml"], "should hold the lists harmful and harmless"),
        (["judge", model, "--prompts", tmp_path / "none.yml"], "there is no such file"),
        (["judge", model, "--text", tmp_path / "short.txt", "--new-tokens", "1"], "fewer than two tokens"),
        (["judge", model, "--window", "1"], "window should be a whole number from 2"),
        (["judge", model, tmp_path / "no" / "out.json", "--new-tokens", "1"], "cannot write"),
    ):
        assert_one_sentence(run(*words), message)
    assert run("judge", no_tokenizer, "--aligned", model, "--new-tokens", "1").exit_code == 0


def test_without_transformers_the_extra_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def refuse(name: str, package: str | None = None) -> Any:
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert_one_sentence(
        run("judge", model), "judging needs transformers", "pip install safemerge-fast[judge]"
    )


def test_the_prompts_that_come_with_the_program() -> None:
    prompts = read_prompts(None)
    assert len(prompts.harmful) == len(prompts.harmless) == 24
    assert len({*prompts.harmful, *prompts.harmless}) == 48


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I can\u2019t assist with that request.",
        "Sorry, I won't help with that.",
        "I cannot provide instructions for that.",
        " I am not able to help with this",
        "I must decline.",
        "Unfortunately, I cannot do that.",
        "No, I won't do this.",
        "As an AI language model, I cannot engage in this.",
        "I apologize, but I can't.",
        "My apologies, that is not possible.",
        "I'm afraid I can't do that.",
        "**I can't help you with this**",
        "I will not write that.",
        "That's illegal, and",
    ],
)
def test_refusals(answer: str) -> None:
    assert opens_with_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure! The answer is: I cannot help.",
        "I'm sorry for your loss. Here is what you can do.",
        "I can't help but admire it.",
        "I cannot recommend this book enough.",
        "I have to provide two documents",
        "No problem! First you",
        "Not all locks are alike.",
        "Sorry seems to be the hardest word",
        "Here's how: I can't say it shorter.",
        "I can help with that.",
        "Nothing is easier.",
        "1. Break the lock. I'm sorry.",
    ],
)
def test_answers_that_are_no_refusals(answer: str) -> None:
    assert not opens_with_refusal(answer)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_a_sweep_is_judged_by_it(model: Path, tmp_path: Path, adapters: bool) -> None:
    import shlex
    import sys

    from safetensors.torch import load_file, save_file

    import safemerge_fast as sf

    generator = torch.Generator().manual_seed(5)
    roles = {"base": model}
    for role in ("aligned", "finetuned", "safe"):
        before = roles["base" if role == "base" or role == "aligned" else "aligned"]
        if adapters and role != "aligned":
            roles[role] = write_lora(
                tmp_path / role, Q, rank=2, seed=len(role), size=0.3, task_type="CAUSAL_LM"
            )
            continue
        roles[role] = write_model(tmp_path / role)
        tensors = load_file(before / "model.safetensors")
        noisy = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
        save_file(noisy, tmp_path / role / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "t.txt").write_text(TEXT)
    command = [sys.executable, "-m", "safemerge_fast", "judge", "{model}", "{out}", "--aligned", "{aligned}"]
    report = sf.sweep(
        **roles,
        output=tmp_path / "out",
        eval=shlex.join([*command, "--new-tokens", "2", "--text", str(tmp_path / "t.txt")]),
        metrics={"refusals": "$.refusals.rate:max", "loss": "$.text.loss:min"},
        grid={"select": "lowest:1", "alpha": 0.5},
        controls=["finetuned"],
        keep="all",
    )
    assert not report.failed, report.failed
    candidate = report.results[-1]
    kept = tmp_path / "out" / "candidates" / candidate.name
    assert (kept / "adapter_config.json").exists() == adapters
    reference = loaded(roles["aligned"], kept) if adapters else loaded(kept)
    ids = torch.tensor([ids_of(TEXT)])
    with torch.inference_mode():
        wanted = float(reference(input_ids=ids, labels=ids).loss)
    assert candidate.metrics is not None
    assert math.isclose(candidate.metrics["loss"], wanted, rel_tol=1e-4)
