"""Keep or merge: the rule on its own, with scores made up."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_fast.analysis.score import Score
from safemerge_fast.decision import Decision, Rule, decide
from safemerge_fast.errors import AnalysisError
from safemerge_fast.pairing.rows import Row

ALL_ROLES = ("base", "aligned", "finetuned", "safe")


def score(rho: float | None) -> Score:
    return Score(rho, None, 1.0, 1.0, 1.0, 0.0, None if rho is not None else "V is zero")


def row(
    name: str,
    *,
    analysed: bool = True,
    layer: str | None = None,
    roles: tuple[str, ...] = ALL_ROLES,
    dtype: str = "BF16",
    reason: str | None = None,
) -> Row:
    return Row(
        name=name,
        file="model.safetensors",
        dtype=dtype,
        shape=(2, 2),
        names=dict.fromkeys(roles, name),
        module_type="q_proj",
        layer=layer,
        analysed=analysed,
        transposed=False,
        reason=reason or ("projection" if analysed else "embedding"),
    )


def merged(rhos: dict[str, float | None], rule: Rule) -> set[str]:
    rows = [row(name) for name in rhos]
    decisions = decide(rows, {name: score(rho) for name, rho in rhos.items()}, rule)
    assert list(decisions) == list(rhos)
    return {name for name, decision in decisions.items() if decision.merge}


RHOS = st.dictionaries(
    st.text("abcxyz.0123456789", min_size=1, max_size=6),
    st.one_of(st.none(), st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.35, 0.5])),
    max_size=12,
)


@given(RHOS, st.floats(0, 1), st.sampled_from(["merge", "keep"]))
def test_threshold_is_strict_and_every_row_gets_a_decision(
    rhos: dict[str, float | None], threshold: float, on_undefined: str
) -> None:
    expected = {
        name for name, rho in rhos.items() if (on_undefined == "merge" if rho is None else rho < threshold)
    }
    assert merged(rhos, Rule(threshold=threshold, on_undefined=on_undefined)) == expected


@given(RHOS, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_never_merges_less(
    rhos: dict[str, float | None], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assert merged(rhos, Rule(threshold=low)) <= merged(rhos, Rule(threshold=high))


@given(RHOS, st.integers(0, 15))
def test_lowest_takes_exactly_so_many_in_order_of_rho_and_name(
    rhos: dict[str, float | None], count: int
) -> None:
    known = [(rho, name) for name, rho in rhos.items() if rho is not None]
    chosen = merged(rhos, Rule(select=f"lowest:{count}", on_undefined="keep"))
    assert len(chosen) == min(count, len(known))
    rest = [pair for pair in known if pair[1] not in chosen]
    assert all(pair < other for pair in known if pair[1] in chosen for other in rest)


@given(RHOS, st.floats(0, 1))
def test_fraction_takes_the_nearest_number(rhos: dict[str, float | None], fraction: float) -> None:
    known = sum(rho is not None for rho in rhos.values())
    chosen = merged(rhos, Rule(select=f"fraction:{fraction!r}", on_undefined="keep"))
    assert abs(len(chosen) - fraction * known) <= 0.5 + 1e-9


def test_ties_go_by_name_whatever_the_order_of_the_rows() -> None:
    for names in (["a", "b", "c"], ["c", "b", "a"]):
        assert merged(dict.fromkeys(names, 0.5), Rule(select="lowest:2")) == {"a", "b"}


def test_reasons_say_the_comparison() -> None:
    rows = [row("low"), row("high"), row("none"), row("embed", analysed=False)]
    scores = {"low": score(0.21349), "high": score(0.71), "none": score(None)}
    assert decide(rows, scores, Rule()) == {
        "low": Decision(True, "ρ 0.213 < 0.35"),
        "high": Decision(False, "kept: ρ 0.71 ≥ 0.35"),
        "none": Decision(True, "merged: ρ is undefined, V is zero"),
        "embed": Decision(False, "embedding: not analysed"),
    }
    kept = decide(rows, scores, Rule(on_undefined="keep", select="lowest:1"))
    assert kept["none"] == Decision(False, "kept: ρ is undefined, V is zero")
    assert kept["low"].reason == "ρ 0.213 is among the 1 lowest of 2"
    assert kept["high"].reason == "kept: ρ 0.71 is not among the 1 lowest of 2"


@given(st.floats(0, 1), st.floats(0.001, 1))
def test_the_numbers_in_a_reason_are_in_the_order_it_says(rho: float, threshold: float) -> None:
    decision = decide([row("a")], {"a": score(rho)}, Rule(threshold=threshold))["a"]
    left, sign, right = decision.reason.removeprefix("kept: ").removeprefix("ρ ").split(" ")
    assert sign == ("<" if rho < threshold else "≥")
    assert (float(left) < float(right)) == (rho < threshold)
    assert decision.merge == (rho < threshold)


def test_a_layer_follows_the_mean_of_its_modules() -> None:
    rows = [row(f"{layer}.{module}", layer=layer) for layer in ("l0", "l1", "l2") for module in "ab"]
    rows.append(row("alone"))
    rhos = (0.1, 0.5, 0.3, 0.5, None, 0.2, 0.4)
    scores = {row.name: score(rho) for row, rho in zip(rows, rhos, strict=True)}
    by_threshold = decide(rows, scores, Rule(granularity="layer"))
    assert {name for name, decision in by_threshold.items() if decision.merge} == {
        "l0.a",  # the mean of 0.1 and 0.5 is below 0.35
        "l0.b",
        "l2.a",  # has no ρ of its own and follows its layer
        "l2.b",
    }
    assert by_threshold["l0.b"].reason == "mean ρ of l0 0.3 < 0.35"
    lowest = decide(rows, scores, Rule(granularity="layer", select="lowest:1"))
    assert {name for name, decision in lowest.items() if decision.merge} == {"l2.a", "l2.b"}


def test_others_are_merged_only_where_all_needed_roles_have_them() -> None:
    rows = [
        row("whole", analysed=False),
        row("missing", analysed=False, roles=("base", "aligned", "finetuned")),
        row("integer", analysed=False, dtype="I64"),
        row("kept", analysed=False, roles=("finetuned",)),
    ]
    decisions = decide(rows, {}, Rule(others="merge"))
    assert [decision.merge for decision in decisions.values()] == [True, False, False, False]
    assert decisions["whole"].reason == "embedding: not analysed, merged with the others"
    assert not any(decision.merge for decision in decide(rows, {}, Rule()).values())
    without_safe = [row("a", analysed=False, roles=("base", "aligned", "finetuned"))]
    assert decide(without_safe, {}, Rule(others="merge"))["a"].merge


def test_a_missing_score_is_an_error_that_names_it() -> None:
    with pytest.raises(AnalysisError, match=r"no score for q_proj"):
        decide([row("q_proj")], {}, Rule())


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": math.nan},
        {"threshold": math.inf},
        {"select": "lowest"},
        {"select": "lowest:-1"},
        {"select": "lowest:2.5"},
        {"select": "fraction:1.5"},
        {"select": "fraction:nan"},
        {"select": "threshold:1"},
        {"select": "threshold:"},
        {"select": "null"},
        {"select": "null:-0.1"},
        {"select": "null:nan"},
        {"select": "null:inf"},
        {"select": "z:"},
        {"select": "z:nan"},
        {"select": "z:-inf"},
        {"per_type": True, "select": "lowest:1", "granularity": "layer"},
        {"select": "highest:1"},
        {"granularity": "tensor"},
        {"on_undefined": "drop"},
        {"others": ""},
    ],
)
def test_refuses_a_malformed_rule(options: dict[str, object]) -> None:
    with pytest.raises(AnalysisError, match=f"^{next(iter(options))} (should be|ranks modules)"):
        Rule(**options)  # type: ignore[arg-type]


def test_only_a_threshold_on_modules_is_local() -> None:
    assert Rule().is_local
    assert not Rule(select="lowest:3").is_local
    assert not Rule(granularity="layer").is_local
    assert Rule(select="null:0.8").is_local
    assert Rule(select="z:-2").is_local
    assert not Rule(select="z:-2", granularity="layer").is_local
    assert Rule(select="lowest:3", modules=frozenset()).is_local
