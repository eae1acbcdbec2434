"""The table of methods: sound in itself, and the one that docs/methods.md shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_merge import engine_merge, engine_plan

from safemerge_fast import PlanError, _engine

if TYPE_CHECKING:
    from safemerge_fast._engine import MethodInfo, ParameterInfo

METHODS = _engine.methods()
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
by_method = pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])


def values(parameter: ParameterInfo) -> str:
    """What a parameter may be, in words."""
    if parameter.kind == "flag":
        return "true, false"
    if parameter.kind == "choice":
        return ", ".join(parameter.choices)
    word = "whole number" if parameter.kind == "integer" else "number"
    least, most = parameter.least, parameter.most
    if most == 2**64 - 1:
        return f"{word}, 64 bits"
    if most is not None:
        return f"{word}, {least:g} to {most:g}"
    return word if least is None else f"{word}, {least:g} or more"


def default(parameter: ParameterInfo) -> str:
    value = parameter.default
    if value is None:
        return "required"
    return str(value).lower() if isinstance(value, (bool, str)) else f"{value:g}"


def table(method: MethodInfo) -> str:
    """The parameters as the page must show them."""
    rows = ["| parameter | values | default | |", "|---|---|---|---|"]
    for parameter in method.parameters:
        scope = "*Model.* " if parameter.scope == "operand" else ""
        cells = [f"`{parameter.name}`", values(parameter), default(parameter), scope + parameter.help]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def facts(method: MethodInfo) -> str:
    """What the page must say of a method in one line."""
    least, most, passes = method.least_operands, method.most_operands, method.passes
    models = f"{least} or more models" if most is None else "1 model" if most == 1 else f"{most} models"
    base = {"none": "no base", "optional": "base optional", "required": "base required"}[method.base]
    reads = "no pass" if not passes else "at most 1 pass" if passes == 1 else f"at most {passes} passes"
    return f"{models} · {base} · {reads} before the blend · [reference]({method.reference})"


def test_names_are_unique_and_plain() -> None:
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    for method in METHODS:
        parameters = [parameter.name for parameter in method.parameters]
        assert len(set(parameters)) == len(parameters), method.name
        for name in [method.name, *parameters]:
            assert re.fullmatch(r"[a-z][a-z0-9_]*", name)


@by_method
def test_every_method_and_parameter_explains_itself(method: MethodInfo) -> None:
    assert method.title
    assert method.summary.endswith(".")
    assert method.reference.startswith("https://")
    assert method.least_operands >= 1
    for parameter in method.parameters:
        # One line of words that a table can show.
        assert re.fullmatch(r"\w[^|\n]*\.", parameter.help), parameter
        assert "  " not in parameter.help, parameter
        assert (parameter.kind == "choice") == bool(parameter.choices), parameter


def valid(parameter: ParameterInfo) -> Any:
    return 0.5 if parameter.default is None else parameter.default


@by_method
def test_defaults_and_bounds_pass_validation_and_what_lies_beyond_does_not(
    tmp_path: Path, method: MethodInfo
) -> None:
    models = [{"x": torch.tensor([[1.0, 2.0], [3.0, 5.0]])}] * method.least_operands
    base = {"x": torch.ones(2, 2)} if method.base == "required" else None

    def given(scope: str, change: dict[str, Any]) -> dict[str, Any]:
        values = {p.name: valid(p) for p in method.parameters if p.scope == scope}
        return {**values, **{name: value for name, value in change.items() if name in values}}

    def validate(**change: Any) -> None:
        each = [given("operand", change)] * len(models)
        engine_plan(tmp_path, method.name, models, base, shared=given("shared", change), each=each)

    # The defaults written out are the defaults left out.
    required = {p.name: p.scope for p in method.parameters if p.default is None}
    merged = [
        engine_merge(tmp_path, method.name, models, base, shared=shared, each=[each] * len(models))["x"]
        for shared, each in [
            (given("shared", {}), given("operand", {})),
            tuple({n: 0.5 for n, s in required.items() if s == scope} for scope in ("shared", "operand")),
        ]
    ]
    assert torch.equal(*merged)
    for parameter in method.parameters:
        name, least, most = parameter.name, parameter.least, parameter.most
        wrong: list[Any] = ["much", None, [1]]
        if parameter.kind in ("number", "integer"):
            wrong += [True, *([] if least is None else [least - 1]), *([] if most is None else [most + 1])]
            for bound in (least, most):
                if bound is not None:
                    validate(**{name: bound})
        else:
            wrong += [0]
        for value in wrong:
            if name == "weight" and value is None:
                continue  # the same as no weight
            # A weight has a place of its own in the plan, which has a type.
            with pytest.raises(PlanError, match="expected f64" if name == "weight" else f"`{name}`"):
                validate(**{name: value})


def sections() -> dict[str, str]:
    """The page's sections on methods, by the method's name."""
    text = PAGE.read_text(encoding="utf-8")
    parts = re.split(r"^## .*\(`(\w+)`\)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_lists_the_methods_in_the_table_s_order() -> None:
    assert list(sections()) == [method.name for method in METHODS]


@by_method
def test_the_page_shows_each_method_as_the_table_has_it(method: MethodInfo) -> None:
    section = sections()[method.name]
    assert method.summary in section
    for expected in (facts(method), table(method)):
        assert expected in section, f"docs/methods.md should say of {method.name}:\n{expected}"


def test_the_readme_links_the_page() -> None:
    assert "(docs/methods.md)" in (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
