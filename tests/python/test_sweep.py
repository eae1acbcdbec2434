"""Sweeps: what is made and judged equals direct merges, controls equal their formulas, and nothing is judged twice."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dense import assert_same_bits, cosines, dense_merge, load, weight_files
from lora import update, write_lora
from sweep_judges import METRICS, FakeJudge

import safemerge_fast as sf
from safemerge_fast.sweeps.result import Result

GRID: dict[str, Any] = {"threshold": [0.3, 0.6], "select": ["lowest:4"], "alpha": [0.5, 0.8]}
RECIPES = ({"recipe": "wise-ft", "alpha": [0.25]}, {"recipe": "resta", "gamma": [0.5, 1.0]})


def sweep(quartet: dict[str, Path], judge: FakeJudge, output: Path, **more: Any) -> sf.SweepReport:
    settings = {"eval": judge.command, "metrics": METRICS, "grid": GRID, **more}
    return sf.sweep(**quartet, output=output, **settings)


@pytest.fixture(scope="module")
def made(
    quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[sf.SweepReport, FakeJudge, Path]:
    """A sweep of all kinds, all of whose models are kept."""
    path = tmp_path_factory.mktemp("sweep")
    judge = FakeJudge(path / "judge")
    report = sweep(quartet, judge, path / "out", recipes=RECIPES, keep="all", randoms=2)
    return report, judge, path / "out"


def by_name(report: sf.SweepReport) -> dict[str, Result]:
    return {result.name: result for result in report.results}


def weights_digest(directory: Path) -> str:
    return hashlib.sha256(b"".join(weight_files_only(directory).values())).hexdigest()


def weight_files_only(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


CANDIDATES = {
    **{
        f"{rule}-{value}-alpha-{alpha}": {rule: value, "alpha": alpha}
        for rule, value in (("threshold", 0.3), ("threshold", 0.6))
        for alpha in (0.5, 0.8)
    },
    "lowest-4-alpha-0.5": {"select": "lowest:4", "alpha": 0.5},
    "lowest-4-alpha-0.8": {"select": "lowest:4", "alpha": 0.8},
}


def test_candidates_are_the_combinations(made: tuple[sf.SweepReport, FakeJudge, Path]) -> None:
    report, judge, _ = made
    names = {result.name for result in report.results if result.control is None}
    assert names == {*CANDIDATES, "wise-ft-alpha-0.25", "resta-gamma-0.5", "resta-gamma-1.0"}
    assert not report.failed
    assert set(judge.judged) == {result.name for result in report.results if result.same_as is None}
    assert len(judge.judged) == len(set(judge.judged))


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_candidate_has_the_bytes_of_a_direct_merge(
    made: tuple[sf.SweepReport, FakeJudge, Path], quartet: dict[str, Path], tmp_path: Path, name: str
) -> None:
    report, _, output = made
    sf.merge(**quartet, output=tmp_path / "direct", **CANDIDATES[name])
    assert weight_files(output / "candidates" / name) == weight_files(tmp_path / "direct")
    result = by_name(report)[name]
    merged = sf.preview(sf_settings(quartet, output / "scores-0.json", CANDIDATES[name])).merged
    assert result.counts == (merged, 21)


def sf_settings(quartet: dict[str, Path], scores: Path, values: dict[str, Any]) -> sf.MergeConfiguration:
    roles = {role: str(path) for role, path in quartet.items()}
    return sf.MergeConfiguration(**roles, output="unused", scores=str(scores), **values)


def test_other_recipes_have_the_bytes_of_direct_ones(
    made: tuple[sf.SweepReport, FakeJudge, Path], quartet: dict[str, Path], tmp_path: Path
) -> None:
    output = made[2]
    sf.wise_ft(quartet["aligned"], quartet["finetuned"], output=tmp_path / "w", alpha=0.25)
    roles = [quartet[role] for role in ("base", "aligned", "finetuned")]
    sf.resta(*roles, output=tmp_path / "r", gamma=1.0)
    assert weight_files(output / "candidates" / "wise-ft-alpha-0.25") == weight_files(tmp_path / "w")
    assert weight_files(output / "candidates" / "resta-gamma-1.0") == weight_files(tmp_path / "r")


def test_metrics_are_what_the_judge_saw(
    made: tuple[sf.SweepReport, FakeJudge, Path], quartet: dict[str, Path]
) -> None:
    report, _, output = made
    seen = 0
    for result in report.results:
        if result.same_as is not None:
            continue
        model = Path(result.model) if result.model is not None else output / "candidates" / result.name
        digest = bytes.fromhex(weights_digest(model))
        assert result.metrics == {"refusals": digest[0] / 255, "task": float(digest[2])}, result.name
        seen += 1
    assert seen == len(made[1].judged)


def test_inputs_are_judged_as_they_are(
    made: tuple[sf.SweepReport, FakeJudge, Path], quartet: dict[str, Path]
) -> None:
    results = by_name(made[0])
    for role in ("aligned", "finetuned", "safe"):
        assert results[role].control is not None
        assert results[role].control.value == role
        assert results[role].model == str(quartet[role])
        assert results[role].settings is None


@pytest.mark.parametrize("name", CANDIDATES)
def test_without_a_safe_model_the_same_modules_shrink(
    made: tuple[sf.SweepReport, FakeJudge, Path], quartet: dict[str, Path], name: str
) -> None:
    report, _, output = made
    rho = cosines(quartet)
    values = CANDIDATES[name]
    if "threshold" in values:
        merged = {module for module, value in rho.items() if value < values["threshold"]}
    else:
        merged = set(sorted(rho, key=lambda module: rho[module])[:4])
    expected = dense_merge(quartet, merged, alpha=values["alpha"], safe="aligned")
    result = by_name(report)[f"no-safe-{name}"]
    assert result.beside == name or by_name(report)[name].same_as is not None
    assert_same_bits(load(output / "candidates" / result.name), expected)
    # And by the formula: aligned + α·(finetuned - aligned), in float64.
    aligned, finetuned = load(quartet["aligned"]), load(quartet["finetuned"])
    found = load(output / "candidates" / result.name)
    for module in merged:
        update_of = finetuned[module].double() - aligned[module].double()
        wanted = aligned[module].double() + values["alpha"] * update_of
        assert float((found[module].double() - wanted).norm() / wanted.norm()) < 4e-3, module


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_shrinking_everything_is_one_control_for_each_alpha(
    made: tuple[sf.SweepReport, FakeJudge, Path], quartet: dict[str, Path], alpha: float
) -> None:
    report, _, output = made
    expected = dense_merge(quartet, set(cosines(quartet)), alpha=alpha, safe="aligned")
    name = f"shrink-only-alpha-{alpha}"
    assert_same_bits(load(output / "candidates" / name), expected)
    assert by_name(report)[name].counts == (21, 21)
    assert by_name(report)[name].beside is None


def kind(module: str) -> str:
    return module.split(".")[-2]


def test_random_modules_are_as_many_of_each_type(
    made: tuple[sf.SweepReport, FakeJudge, Path], quartet: dict[str, Path]
) -> None:
    report, _, output = made
    rho = cosines(quartet)
    draws: dict[str, list[frozenset[str]]] = {}
    for result in report.results:
        if result.drawn is None:
            continue
        assert result.beside is not None
        values = CANDIDATES[result.beside]
        if "threshold" in values:
            merged = {module for module, value in rho.items() if value < values["threshold"]}
        else:
            merged = set(sorted(rho, key=lambda module: rho[module])[:4])
        assert Counter(map(kind, result.drawn)) == Counter(map(kind, merged)), result.name
        expected = dense_merge(quartet, set(result.drawn), alpha=values["alpha"])
        made_as = result.same_as or result.name
        assert made_as != result.beside
        assert_same_bits(load(output / "candidates" / made_as), expected)
        draws.setdefault(result.beside, []).append(frozenset(result.drawn))
    assert draws
    assert all(len(sets) == 2 for sets in draws.values())
    assert any(first != second for first, second in draws.values())


def test_random_modules_follow_from_the_seed(quartet: dict[str, Path], tmp_path: Path) -> None:
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        judge = FakeJudge(tmp_path / f"judge{number}")
        report = sweep(
            quartet,
            judge,
            tmp_path / str(number),
            grid={"select": "lowest:7"},
            controls=["random"],
            random_seed=seed,
        )
        (control,) = [result for result in report.results if result.control is not None]
        drawn.append(control.drawn)
    assert drawn[0] == drawn[1] != drawn[2]


def test_equal_weights_are_judged_once(quartet: dict[str, Path], tmp_path: Path) -> None:
    rho = sorted(cosines(quartet).values())
    low, high = rho[4] + 1e-6, rho[5] - 1e-6
    judge = FakeJudge(tmp_path / "judge")
    grid = {"threshold": [low, high], "select": "lowest:5"}
    report = sweep(quartet, judge, tmp_path / "out", grid=grid, controls=[])
    first, second, third = report.results
    assert second.same_as == third.same_as == first.name
    assert first.metrics == second.metrics == third.metrics
    assert judge.judged == [first.name]
    assert first.counts == second.counts == (5, 21)


def test_a_rule_that_leaves_nothing_to_chance_has_no_random_control(
    quartet: dict[str, Path], tmp_path: Path
) -> None:
    judge = FakeJudge(tmp_path / "judge")
    report = sweep(quartet, judge, tmp_path / "out", grid={"threshold": 1.0}, controls=["random", "no-safe"])
    assert [result.name for result in report.results] == ["threshold-1.0", "no-safe-threshold-1.0"]
    assert report.notes == (
        "threshold-1.0 merges all or none of each module type, so that no random choice of as many is another one",
    )


def test_a_control_that_cannot_be_made_is_left_out_with_the_reason(
    quartet: dict[str, Path], tmp_path: Path
) -> None:
    judge = FakeJudge(tmp_path / "judge")
    grid = {"threshold": 0.5, "method": "ties", "density": 0.5}
    report = sweep(quartet, judge, tmp_path / "out", grid=grid, controls=["no-safe", "shrink"])
    assert [result.name for result in report.results] == ["threshold-0.5-method-ties-density-0.5"]
    assert len(report.notes) == 2
    assert all("lets updates vote on signs" in note for note in report.notes)


# --- what stays -----------------------------------------------------------------------------------


def test_only_what_is_to_be_kept_stays(quartet: dict[str, Path], tmp_path: Path) -> None:
    for keep in ("none", "best"):
        judge = FakeJudge(tmp_path / f"judge-{keep}")
        report = sweep(quartet, judge, tmp_path / keep, keep=keep, controls=["shrink"])
        left = {path.name for path in (tmp_path / keep / "candidates").iterdir()}
        assert left == ({report.best} if keep == "best" else set())
        assert report.kept == ((report.best,) if keep == "best" else ())
    candidates = [result for result in report.results if result.control is None and result.same_as is None]
    best = max(candidates, key=lambda result: (result.metrics["refusals"], -result.metrics["task"]))
    assert report.best == best.name


def test_a_candidate_is_made_again_with_the_weights_that_were_judged(
    made: tuple[sf.SweepReport, FakeJudge, Path], tmp_path: Path
) -> None:
    report, _, output = made
    drawn = [result for result in report.results if result.drawn is not None and result.same_as is None]
    for name in (
        "threshold-0.6-alpha-0.5",
        "resta-gamma-0.5",
        "shrink-only-alpha-0.8",
        "no-safe-lowest-4-alpha-0.5",
        drawn[0].name,
    ):
        kept = sf.keep(output, name, tmp_path / name)
        assert kept.output == str(tmp_path / name)
        assert weight_files(tmp_path / name) == weight_files(output / "candidates" / name)
        sf.verify(tmp_path / name)


def test_what_cannot_be_made_again_is_refused(
    made: tuple[sf.SweepReport, FakeJudge, Path], tmp_path: Path
) -> None:
    _, _, output = made
    for name, message in (
        ("aligned", "aligned was judged as it is, at .*; nothing is to be made"),
        ("lowest-5", "has no model 'lowest-5', like .*lowest-4-alpha-0.[58]"),
    ):
        with pytest.raises(sf.SettingError, match=message):
            sf.keep(output, name, tmp_path / "x")
    with pytest.raises(sf.PlanError, match="no such file"):
        sf.keep(tmp_path, "aligned", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_candidate_of_a_model_that_has_changed_is_not_made_again(make_quartet: Any, tmp_path: Path) -> None:
    quartet = make_quartet(tmp_path / "models", layers=1)
    judge = FakeJudge(tmp_path / "judge")
    report = sweep(quartet, judge, tmp_path / "out", grid={"alpha": 0.5}, controls=[])
    file = min(quartet["safe"].glob("*.safetensors"))
    file.write_bytes(file.read_bytes())
    with pytest.raises(sf.PlanError, match="is made of is not what was judged"):
        sf.keep(tmp_path / "out", report.results[0].name, tmp_path / "x")


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", ["auto", "checkpoint"])
def test_adapters(quartet: dict[str, Path], tmp_path: Path, output_format: str) -> None:
    shapes = {f"model.layers.{layer}.self_attn.q_proj": (72, 72) for layer in range(3)}
    adapters = {
        role: write_lora(tmp_path / role, shapes, rank=4, seed=seed)
        for seed, role in enumerate(("finetuned", "safe"))
    }
    models = {**quartet, **adapters}
    judge = FakeJudge(tmp_path / "judge")
    report = sweep(
        models,
        judge,
        tmp_path / "out",
        grid={"select": "lowest:2", "alpha": 0.5},
        recipes=[{"recipe": "wise-ft", "alpha": 0.5}],
        output_format=output_format,
        keep="all",
    )
    assert not report.failed
    results = by_name(report)
    kept = tmp_path / "out" / "candidates"
    is_adapter = (kept / "lowest-2-alpha-0.5" / "adapter_config.json").exists()
    assert is_adapter == (output_format == "auto")
    aligned = load(quartet["aligned"])
    q = "model.layers.1.self_attn.q_proj.weight"
    if is_adapter:
        assert results["finetuned"].model == str(adapters["finetuned"])
    else:
        # Folded, so that the judge meets checkpoints alone.
        found = load(kept / "finetuned")[q].double()
        wanted = aligned[q].double() + update(adapters["finetuned"], q)
        assert float((found - wanted).norm() / wanted.norm()) < 4e-3
    sf.merge(**models, output=tmp_path / "direct", select="lowest:2", alpha=0.5, output_format=output_format)
    assert weight_files(kept / "lowest-2-alpha-0.5") == weight_files(tmp_path / "direct")
    assert results["shrink-only-alpha-0.5"].counts == (3, 3)


# --- the Pareto set and what controls say ----------------------------------------------------------


def judged(name: str, *values: float, control: Any = None, beside: str | None = None) -> Result:
    metrics = dict(zip(("a", "b", "c"), values, strict=False))
    return Result(name=name, identity=name, what=name, control=control, beside=beside, metrics=metrics)


def report_of(directions: str, results: list[Result]) -> sf.SweepReport:
    from safemerge_fast.sweeps.metrics import read_metrics

    given = {
        name: f":{'max' if sign == '+' else 'min'}" for name, sign in zip("abc", directions, strict=False)
    }
    return sf.SweepReport("x", read_metrics(given), tuple(results))


@pytest.mark.parametrize("directions", ["+", "+-", "--", "+-+"])
def test_the_pareto_set_is_what_nothing_dominates(directions: str) -> None:
    rng = random.Random(directions)
    signs = [1 if sign == "+" else -1 for sign in directions]
    for size in (0, 1, 2, 5, 40):
        for steps in (2, 5, 1000):
            points = [[float(rng.randrange(steps)) for _ in signs] for _ in range(size)]
            results = [judged(str(number), *point) for number, point in enumerate(points)]
            wanted = []
            for number, point in enumerate(points):
                gains = [sign * value for sign, value in zip(signs, point, strict=True)]
                others = [[s * v for s, v in zip(signs, other, strict=True)] for other in points]
                beaten = any(
                    all(x >= y for x, y in zip(other, gains, strict=True))
                    and any(x > y for x, y in zip(other, gains, strict=True))
                    for other in others
                )
                if not beaten:
                    wanted.append(str(number))
            report = report_of(directions, results)
            assert list(report.pareto) == wanted
            if size:
                assert report.best == str(
                    max(
                        range(size),
                        key=lambda n: ([s * v for s, v in zip(signs, points[n], strict=True)], -n),
                    )
                )


def test_what_lesser_means_do_as_well_is_said() -> None:
    from safemerge_fast.sweeps.candidates import Control

    results = [
        judged("finetuned", 0.0, 5.0, control=Control.FINETUNED),
        judged("aligned", 9.0, 9.0, control=Control.ALIGNED),
        judged("shrink", 3.0, 3.0, control=Control.SHRINK),
        judged("one", 2.0, 3.0),
        judged("no-safe-one", 2.0, 3.0, control=Control.NO_SAFE, beside="one"),
        judged("two", 4.0, 1.0),
        judged("no-safe-two", 1.0, 9.0, control=Control.NO_SAFE, beside="two"),
        judged("random-1-two", 9.0, 9.0, control=Control.RANDOM, beside="two"),
    ]
    report = report_of("++", results)
    assert report.remarks() == (
        "shrinking the update of every module, without a safe model, is in no metric worse than 1 of 2 candidates, "
        "such as one",
        "shrinking the same modules, without the safe model, is in no metric worse than 1 of 2 candidates, such as one",
        "a random choice of as many modules of each type is in no metric worse than 1 of 1 candidates, such as two",
    )
    assert report.outdone == {
        "one": ("aligned", "shrink", "random-1-two"),
        "two": ("aligned", "random-1-two"),
    }
    assert report.best == "two"
    document = json.loads(report.to_json())
    assert document["best"] == "two"
    assert document["results"][4]["control"] == "no-safe"
    assert document["pareto"] == ["aligned", "random-1-two"]


def test_a_picture_is_drawn(made: tuple[sf.SweepReport, FakeJudge, Path], tmp_path: Path) -> None:
    from safemerge_fast.sweeps.drawing import write_drawing

    for name in ("a.svg", "b.svg", "c.png"):
        write_drawing(tmp_path / name, made[0])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(sf.OutputError, match=r"its name should end in \.png or \.svg"):
        write_drawing(tmp_path / "d.html", made[0])


def test_one_analysis_settles_the_rules_of_all_candidates(
    quartet: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safemerge_fast.decision import Rule
    from safemerge_fast.sweeps import run as runs

    asked: list[Any] = []
    real = runs.score_models

    def remember(models: Any, rows: Any, settings: Any, question: Any, known: Any) -> Any:
        asked.append(question)
        return real(models, rows, settings, question, known)

    monkeypatch.setattr(runs, "score_models", remember)
    sweep(quartet, FakeJudge(tmp_path / "judge"), tmp_path / "out", controls=["no-safe", "random"])
    (question,) = asked
    assert set(question.questions) == {Rule(threshold=0.3), Rule(threshold=0.6), Rule(select="lowest:4")}
    assert not question.is_local

    class Asked:
        def __init__(self, names: set[str], is_local: bool) -> None:
            self.names, self.is_local = names, is_local

        def open_modules(self, modules: Any, scores: Any) -> set[str]:
            return self.names

    together = runs.Together((Asked({"a"}, True), Asked({"b", "a"}, True)))
    assert together.is_local
    assert together.open_modules([], {}) == {"a", "b"}
