"""Rules beyond one threshold: by chance, by rank within types, by a list; and what intervals of ρ leave open."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safemerge_fast.analysis.question import Question
from safemerge_fast.analysis.score import Score
from safemerge_fast.decision import Rule, decide, uncertified
from safemerge_fast.errors import AnalysisError, SettingError
from safemerge_fast.pairing.module import modules_of_rows
from safemerge_fast.pairing.rows import Row

TYPES = ("q_proj", "v_proj", "up_proj")


def row(name: str, module_type: str = "q_proj", layer: str | None = None) -> Row:
    return Row(
        name=name,
        file="model.safetensors",
        dtype="BF16",
        shape=(2, 2),
        names=dict.fromkeys(("base", "aligned", "finetuned"), name),
        module_type=module_type,
        layer=layer,
        analysed=True,
        transposed=False,
        reason="projection",
    )


def score(
    rho: float | None,
    null: float | None = 0.5,
    sd: float | None = 0.1,
    *,
    low: float | None = None,
    high: float | None = None,
) -> Score:
    undefined = None if rho is not None else "Δ is zero"
    return Score(rho, null, 1.0, 1.0, 1.0, 0.0, undefined, rho_low=low, rho_high=high, null_sd=sd)


def merged(rows: list[Row], scores: dict[str, Score], rule: Rule) -> set[str]:
    return {name for name, decision in decide(rows, scores, rule).items() if decision.merge}


def open_names(rows: list[Row], scores: dict[str, Score], rule: Rule) -> set[str]:
    question: Question = rule
    return set(question.open_modules(list(modules_of_rows(rows)), scores))


# The first draw of a process may take seconds where the machine is busy.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

RATIOS = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0.01, 1), st.floats(0.001, 1)), min_size=1, max_size=12
)


@patient
@given(RATIOS, st.floats(0, 3))
def test_null_compares_with_chance(modules: list[tuple[float, float, float]], limit: float) -> None:
    rows = [row(f"m{place}") for place in range(len(modules))]
    scores = {row.name: score(*numbers) for row, numbers in zip(rows, modules, strict=True)}
    expected = {f"m{place}" for place, (rho, null, _) in enumerate(modules) if rho / null < limit}
    assert merged(rows, scores, Rule(select=f"null:{limit!r}")) == expected


@patient
@given(RATIOS, st.floats(-5, 5))
def test_z_counts_standard_deviations(modules: list[tuple[float, float, float]], limit: float) -> None:
    rows = [row(f"m{place}") for place in range(len(modules))]
    scores = {row.name: score(*numbers) for row, numbers in zip(rows, modules, strict=True)}
    chosen = merged(rows, scores, Rule(select=f"z:{limit!r}"))
    for place, (rho, null, sd) in enumerate(modules):
        # In another form, and so only where rounding decides nothing.
        border = null * math.exp(limit * sd)
        if abs(rho - border) > 1e-9 * border:
            assert (f"m{place}" in chosen) == (rho < border)


def test_no_rho_at_all_is_further_from_chance_than_anything() -> None:
    assert merged([row("a")], {"a": score(0.0)}, Rule(select="z:-1e300")) == {"a"}
    assert decide([row("a")], {"a": score(0.0)}, Rule(select="z:-2"))["a"].reason == "z -inf < -2"


def test_what_chance_is_not_known_for_is_undefined() -> None:
    rows = [row("a"), row("b")]
    known = {"a": score(0.1), "b": score(0.1, sd=None)}
    decisions = decide(rows, known, Rule(select="z:0", on_undefined="keep"))
    assert decisions["a"].merge
    assert (decisions["b"].merge, decisions["b"].reason) == (
        False,
        "kept: z is undefined, there is no null_sd",
    )
    without_null = {"a": score(0.1), "b": score(0.1, None)}
    decision = decide(rows, without_null, Rule(select="null:1"))["b"]
    assert decision.reason == "merged: ρ/ρ_null is undefined, there is no ρ_null"
    with pytest.raises(AnalysisError, match="no score has null_sd"):
        decide(rows, {name: score(0.1, sd=None) for name in "ab"}, Rule(select="z:0"))


def test_reasons_say_what_was_compared() -> None:
    rows = [row("a"), row("b", "v_proj"), row("c", "v_proj")]
    scores = {"a": score(0.2), "b": score(0.25), "c": score(0.8)}
    by_chance = decide(rows, scores, Rule(select="null:0.5"))
    assert by_chance["a"].reason == "ρ/ρ_null 0.4 < 0.5"
    assert by_chance["b"].reason == "kept: ρ/ρ_null 0.5 ≥ 0.5"
    by_z = decide(rows, scores, Rule(select="z:-8"))
    assert by_z["a"].reason == "z -9.16 < -8"
    by_type = decide(rows, scores, Rule(select="lowest:1", per_type=True))
    assert by_type["b"].reason == "ρ 0.25 is among the 1 lowest of 2 v_proj"
    assert by_type["c"].reason == "kept: ρ 0.8 is not among the 1 lowest of 2 v_proj"


def test_ranks_per_type_are_of_each_type_alone() -> None:
    generator = random.Random(1)
    rows = [row(f"m{place}", TYPES[place % 3]) for place in range(20)]
    scores = {row.name: score(generator.random()) for row in rows}
    for select, number in (("lowest:2", lambda n: 2), ("fraction:0.3", lambda n: math.floor(0.3 * n + 0.5))):
        chosen = merged(rows, scores, Rule(select=select, per_type=True))
        for kind in TYPES:
            names = [row.name for row in rows if row.module_type == kind]
            names.sort(key=lambda name: scores[name].rho or 0.0)
            assert chosen & set(names) == set(names[: number(len(names))])


def test_a_boundary_is_the_same_for_every_type() -> None:
    rows = [row("a"), row("b", "v_proj")]
    scores = {"a": score(0.3), "b": score(0.4)}
    for select in ("threshold", "null:0.7", "z:-1"):
        alone, by_type = Rule(select=select), Rule(select=select, per_type=True)
        assert decide(rows, scores, alone) == decide(rows, scores, by_type)
        assert alone.idle is None
        assert by_type.idle is not None
        assert f"select is {select}, which judges each module alone" in by_type.idle
    assert Rule(select="lowest:1", per_type=True).idle is None


def test_more_than_any_type_has_is_refused() -> None:
    rows = [row(f"m{place}", TYPES[place == 0]) for place in range(4)]
    Rule(select="lowest:3", per_type=True).check_units(rows)
    with pytest.raises(SettingError, match="only 3 modules of any type are analysed"):
        Rule(select="lowest:4", per_type=True).check_units(rows)
    Rule(select="lowest:4").check_units(rows)


def test_a_layer_follows_the_mean_of_what_it_is_judged_by() -> None:
    rows = [row(f"{layer}.{kind}", kind, layer) for layer in ("l0", "l1") for kind in ("q_proj", "v_proj")]
    numbers = [(0.5, 0.5), (0.1, 1.0), (0.5, 0.5), (0.9, 1.0)]
    scores = {row.name: score(*pair) for row, pair in zip(rows, numbers, strict=True)}
    decisions = decide(rows, scores, Rule(select="null:0.6", granularity="layer"))
    assert {name for name, decision in decisions.items() if decision.merge} == {"l0.q_proj", "l0.v_proj"}
    assert decisions["l0.q_proj"].reason == "mean ρ/ρ_null of l0 0.55 < 0.6"


def test_a_list_is_merged_and_nothing_else() -> None:
    rows = [row("a"), row("b"), row("c")]
    scores = {"a": score(0.9), "b": score(None), "c": score(0.1)}
    rule = Rule(select="lowest:3", modules=frozenset({"a"}))
    decisions = decide(rows, scores, rule)
    assert [(decision.merge, decision.reason) for decision in decisions.values()] == [
        (True, "listed"),
        (False, "kept: not listed"),
        (False, "kept: not listed"),
    ]
    assert decide(rows, {}, rule) == decisions
    assert open_names(rows, scores, rule) == set()
    rule.check_units(rows[:1])


# What can be: a few modules of several types and layers, some exact, some with ends that coincide, some without ρ.
ENDS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.2, 0.35, 0.5, 1.0]))


@st.composite
def measured(draw: st.DrawFn) -> tuple[list[Row], dict[str, Score]]:
    rows, scores = [], {}
    for place in range(draw(st.integers(1, 9))):
        name = f"m{place}"
        rows.append(row(name, draw(st.sampled_from(TYPES)), draw(st.sampled_from(["l0", "l1", "l2", None]))))
        null, sd = draw(st.sampled_from([0.3, 0.5, 0.7])), draw(st.sampled_from([0.05, 0.5]))
        if draw(st.integers(0, 9)) == 0:
            scores[name] = score(None)
        elif draw(st.booleans()):
            scores[name] = score(draw(ENDS), null, sd)
        else:
            low, rho, high = sorted((draw(ENDS), draw(ENDS), draw(ENDS)))
            scores[name] = score(rho, null, sd, low=low, high=high)
    return rows, scores


RULES = st.one_of(
    st.builds(
        lambda kind, amount, layer: Rule(
            threshold=min(max(amount, 0.0), 1.0),
            select={
                "threshold": kind,
                "null": f"null:{abs(2 * amount)!r}",
                "z": f"z:{10 * (amount - 0.5)!r}",
            }[kind],
            granularity="layer" if layer else "module",
        ),
        st.sampled_from(["threshold", "null", "z"]),
        ENDS,
        st.booleans(),
    ),
    st.builds(
        lambda ranked, layer: Rule(select=ranked, granularity="layer" if layer else "module"),
        st.sampled_from(["lowest:0", "lowest:1", "lowest:3", "lowest:7", "fraction:0.4", "fraction:1"]),
        st.booleans(),
    ),
    st.builds(
        lambda ranked: Rule(select=ranked, per_type=True),
        st.sampled_from(["lowest:1", "lowest:2", "fraction:0.5"]),
    ),
)


def truths(scores: dict[str, Score], generator: random.Random, count: int) -> Iterator[dict[str, Score]]:
    """Exact scores that the intervals allow: ends and anything between them."""
    for _ in range(count):
        exact = {}
        for name, found in scores.items():
            rho = found.rho
            if rho is not None:
                low, high = found.rho_low, found.rho_high
                assert low is not None
                assert high is not None
                rho = generator.choice((low, high, generator.uniform(low, high)))
                rho = min(max(rho, low), high)
            exact[name] = score(rho, found.rho_null, found.null_sd)
        yield exact


@settings(patient, max_examples=300)
@given(measured(), RULES, st.integers(0, 1000))
def test_what_is_settled_is_what_the_exact_rule_says(
    made: tuple[list[Row], dict[str, Score]], rule: Rule, seed: int
) -> None:
    rows, scores = made
    decisions = decide(rows, scores, rule)
    certified = {name for name, found in decisions.items() if "not certified" not in found.reason}
    for exact in truths(scores, random.Random(seed), 20):
        said = decide(rows, exact, rule)
        assert open_names(rows, exact, rule) == set()
        for name in certified:
            assert said[name].merge == decisions[name].merge, name


@settings(patient, max_examples=300)
@given(measured(), RULES)
def test_open_modules_are_those_that_measuring_can_settle(
    made: tuple[list[Row], dict[str, Score]], rule: Rule
) -> None:
    rows, scores = made
    found = open_names(rows, scores, rule)
    decisions = decide(rows, scores, rule)
    unsettled = {name for name, decision in decisions.items() if "not certified" in decision.reason}
    assert bool(found) == bool(unsettled), "an exact module is open only where another is"
    assert all(scores[name].rho_low != scores[name].rho_high for name in found)
    assert found <= unsettled
    said = uncertified(rows, scores, rule)
    assert (said is None) == (not found)
    assert said is None or said.startswith(
        f"{len(found)} decisions are not certified, such as that for {min(found)}, whose ρ"
        if len(found) > 1
        else f"not certified is that for {min(found)}, whose ρ"
    )


@settings(patient, max_examples=200)
@given(measured(), RULES, st.integers(0, 1000))
def test_what_is_open_could_go_either_way(
    made: tuple[list[Row], dict[str, Score]], rule: Rule, seed: int
) -> None:
    """Ends that fall on the boundary apart: there an interval that touches it from above is open by one point."""
    rows, scores = made
    if rule.granularity == "layer":
        # Means of ends are reached only together.
        return
    for name in open_names(rows, scores, rule):

        def at(low: bool, name: str = name) -> bool:
            exact = {}
            for other, known in scores.items():
                rho = known.rho_low if (other == name) == low else known.rho_high
                exact[other] = score(rho, known.rho_null, known.null_sd)
            return decide(rows, exact, rule)[name].merge

        assert at(low=True)
        assert not at(low=False)


def test_a_boundary_at_an_end_is_settled_where_it_can_be() -> None:
    rows = [row("a")]
    for low, high, is_open in (
        (0.35, 0.4, False),
        (0.3, 0.35, True),
        (0.3, 0.349, False),
        (0.35, 0.35, False),
    ):
        scores = {"a": score((low + high) / 2, low=low, high=high)}
        assert bool(open_names(rows, scores, Rule())) == is_open, (low, high)


def test_nothing_is_settled_of_modules_that_are_not_measured() -> None:
    rows = [row("a"), row("b"), row("c")]
    scores = {"a": score(0.3, low=0.2, high=0.31), "c": score(0.1)}
    assert open_names(rows, scores, Rule()) == {"b"}
    # Ranks hang on all of them.
    assert open_names(rows, scores, Rule(select="lowest:1")) == {"a", "b"}


def test_ranks_are_settled_as_counting_says() -> None:
    generator = random.Random(3)
    rows = [row(f"m{place}") for place in range(400)]
    scores = {}
    for each in rows:
        rho = round(generator.random(), 2)
        width = generator.choice((0.0, 0.01, 0.1))
        scores[each.name] = score(rho, low=max(rho - width, 0.0), high=rho + width)
    decisions = decide(rows, scores, Rule(select="lowest:150"))
    for each in rows:
        own = scores[each.name]
        others = [(name, other) for name, other in scores.items() if name != each.name]
        may = sum((other.rho_low, name) < (own.rho_high, each.name) for name, other in others)
        must = sum((other.rho_high, name) < (own.rho_low, each.name) for name, other in others)
        certified = "not certified" not in decisions[each.name].reason
        assert certified == (may < 150 or must >= 150)
