"""What rules would merge, what speaks against one, and tables that fit a terminal."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from invoke import run

from safemerge_fast.analysis.score import Score
from safemerge_fast.decision import Rule
from safemerge_fast.decision.outlook import cautions, outcome, outlook
from safemerge_fast.pairing.module import Module, whole
from safemerge_fast.pairing.rows import Row
from safemerge_fast.report.overview import Layers, rule_table, type_table


def module(name: str, module_type: str = "q_proj", layer: str | None = None) -> Module:
    return whole(
        Row(
            name=name,
            file="model.safetensors",
            dtype="BF16",
            shape=(2, 2),
            names={"base": name},
            module_type=module_type,
            layer=layer,
            analysed=True,
            transposed=False,
            reason="projection",
        )
    )


def score(
    rho: float | None,
    *,
    null: float = 0.5,
    sd: float | None = 0.1,
    delta: float = 1.0,
    rounding: float = 0.01,
) -> Score:
    undefined = None if rho is not None else "Δ is zero"
    return Score(rho, null, 1.0, delta, 10.0, rounding, undefined, null_sd=sd)


def grid(layers: int, types: tuple[str, ...] = ("q_proj", "v_proj")) -> list[Module]:
    return [
        module(f"model.layers.{layer}.{kind}.weight", kind, f"model.layers.{layer}")
        for layer in range(layers)
        for kind in types
    ]


def test_outcomes_are_sums_of_squares() -> None:
    modules = [module(name) for name in "abcd"]
    deltas = (1.0, 2.0, math.inf, 4.0)
    rhos = (0.1, 0.4, 0.2, None)
    scores = {
        each.name: score(rho, delta=delta) for each, rho, delta in zip(modules, rhos, deltas, strict=True)
    }
    found = outcome(modules, scores, Rule(on_undefined="keep"))
    assert (found.merged, found.modules, found.share) == (2, 4, pytest.approx(1.0 / 21.0))
    found = outcome(modules, scores, Rule())
    assert (found.merged, found.share) == (3, pytest.approx(17.0 / 21.0))
    assert outcome(modules, scores, Rule(modules=frozenset("b"))).share == pytest.approx(4.0 / 21.0)
    nothing = {name: score(None, delta=0.0) for name in "abcd"}
    assert outcome(modules, nothing, Rule()).share is None


def test_the_outlook_begins_with_the_rule_and_names_each_as_it_is_typed() -> None:
    modules = grid(4)
    scores = {each.name: score(0.1 * place) for place, each in enumerate(modules)}
    found = outlook(modules, scores, Rule(select="lowest:1", per_type=True))
    options = [each.option for each in found]
    assert options[0] == "--select lowest:1 --per-type"
    assert "--threshold 0.35" in options
    assert "--select null:0.5" in options
    assert "--select z:-3" in options
    for each in found:
        if each.rule.select == "threshold":
            below = sum(scores[one.name].rho < each.rule.threshold for one in modules)  # type: ignore[operator]
            assert each.merged == below
    # The rule itself does not stand there twice.
    options = [each.option for each in outlook(modules, scores, Rule())]
    assert options.count("--threshold 0.35") == 1
    without = {name: score(found.rho, sd=None) for name, found in scores.items()}
    assert not any("z:" in each.option for each in outlook(modules, without, Rule()))


def test_cautions_say_what_speaks_against_a_rule() -> None:
    modules = grid(10)

    def said(*, threshold: float = 0.35, **options: float) -> list[str]:
        scores = {
            each.name: score(
                place / 20 if "rho" not in options else options["rho"],
                **{key: value for key, value in options.items() if key != "rho"},
            )
            for place, each in enumerate(modules)
        }
        return cautions(modules, scores, Rule(threshold=threshold))

    assert said() == []
    (rounded,) = said(rounding=0.3)
    assert rounded.startswith("in 20 of 20 modules V is to a large part rounding")
    (chance,) = said(rho=0.51)
    assert chance.startswith("ρ of 20 of 20 modules is about what a random update would have")
    # The same without a spread; and near it, but far in standard deviations.
    assert len(said(rho=0.51, sd=None)) == 1  # type: ignore[arg-type]
    assert said(rho=0.51, sd=0.001) == []
    (nearly_all,) = said(threshold=0.96)
    assert nearly_all.startswith("--threshold 0.96 merges 20 of 20 modules with 100.0% of ‖Δ‖²")
    assert "without a safe model that only shrinks the fine-tuning to α of itself" in nearly_all


@pytest.mark.parametrize("width", [60, 72, 80, 120, 200])
@pytest.mark.parametrize("layers", [1, 7, 80, 126])
def test_no_number_is_cut_at_any_width(width: int, layers: int) -> None:
    from rich.console import Console

    types = (
        "q_proj",
        "experts.gate_proj",
        "shared_expert.down_proj",
        "a_name_that_is_rather_long_for_a_type",
    )
    modules = grid(layers, types)
    scores = {each.name: score(0.25 + place * 1e-4) for place, each in enumerate(modules)}
    found = outlook(modules, scores, Rule(select="lowest:1", per_type=True))
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False)
    for part in (type_table(modules, scores, found[0]), Layers(modules, scores), rule_table(found)):
        console.print(part)
    text = stream.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    (footer,) = [line.split() for line in text.splitlines() if line.startswith(" all ")]
    assert footer == ["all", str(4 * layers), "4"]
    # Every layer is in one of the spans.
    (title,) = [line for line in text.splitlines() if "median ρ, layers" in line]
    spans = re.findall(r"(\d+)(?:-(\d+))?", title)
    covered = [place for first, last in spans for place in range(int(first), int(last or first) + 1)]
    assert covered == list(range(layers))


def test_medians_by_layer_are_those_of_the_numbers() -> None:
    from rich.console import Console

    modules = [
        *grid(2, ("experts.up_proj",) * 3),
        module("head.proj", "proj"),
        module("enc.0.q", "q", "enc.0"),
    ]
    modules = [
        module(f"{each.name}.{place}", each.module_type, each.layer) for place, each in enumerate(modules)
    ]
    rhos = (0.1, 0.2, 0.6, 0.3, None, 0.5, 0.7, 0.8)
    scores = {each.name: score(rho) for each, rho in zip(modules, rhos, strict=True)}
    stream = io.StringIO()
    Console(file=stream, width=80, highlight=False).print(Layers(modules, scores))
    lines = [line.split() for line in stream.getvalue().splitlines() if line.strip()]
    assert ["experts.up_proj", "0.20", "0.40"] in lines
    assert ["model.layers"] in lines
    assert ["outside", "of", "layers"] in lines
    assert ["proj", "0.70"] in lines
    assert ["q", "0.80"] in lines


def analyze_words(quartet: dict[str, Path]) -> list[str]:
    return [
        "analyze",
        *(word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", str(quartet[role]))),
    ]


def test_analyze_ends_with_what_rules_would_merge(
    quartet: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    file = tmp_path / "scores.json"
    result = run(*analyze_words(quartet), "-o", file, "--select", "lowest:2", "--per-type")
    assert result.exit_code == 0, result.stderr
    assert "…" not in result.stdout
    assert "--select lowest:2 --per-type (this one)" in result.stdout
    modules = json.loads(file.read_text())["modules"]
    squares = {name: found["delta_norm"] ** 2 for name, found in modules.items()}
    for threshold in (0.2, 0.5, 0.7):
        chosen = [name for name, found in modules.items() if found["rho"] < threshold]
        share = sum(squares[name] for name in chosen) / sum(squares.values())
        (line,) = [
            line.split()
            for line in result.stdout.splitlines()
            if line.strip().startswith(f"--threshold {threshold:g}")
        ]
        assert line == ["--threshold", f"{threshold:g}", str(len(chosen)), f"{share:.1%}"]


def test_analyze_says_what_changes_nothing_and_what_shrinks_all(quartet: dict[str, Path]) -> None:
    result = run(*analyze_words(quartet), "--per-type", "--threshold", "1", "-v")
    assert result.exit_code == 0, result.stderr
    assert "note: per_type changes nothing: select is threshold" in result.stderr
    assert "warning: --threshold 1 merges 21 of 21 modules" in result.stderr
    refused = run(*analyze_words(quartet), "--select", "lowest:1", "--per-type", "--granularity", "layer")
    assert refused.exit_code == 2
    assert "a layer has modules of many types" in refused.stderr
