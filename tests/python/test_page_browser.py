"""The report in a real browser, without a window: no error, no request, the decisions that Python makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import browser
import pytest
from pages import HOSTILE, dense, experts, module, write_page

from safemerge_fast.analysis.score import Score
from safemerge_fast.decision import Rule, decide
from safemerge_fast.errors import SafemergeError
from safemerge_fast.pairing.row import Row
from safemerge_fast.report.html.page import write_pieces
from safemerge_fast.report.html.sweep import Candidate, Metric, sweep_page
from safemerge_fast.report.modules import ModuleReport

pytestmark = pytest.mark.skipif(
    browser.executable() is None, reason=f"no browser is installed: {', '.join(browser.NAMES)}"
)

# What the page would save is kept for the test instead.
_SAVE = """
(() => {
  const kept = window.kept = {};
  URL.createObjectURL = blob => { kept.blob = blob; return "blob:none"; };
  HTMLAnchorElement.prototype.click = function () { kept.file = this.download; };
  document.getElementById("save").click();
  return kept.blob.text();
})()
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    with browser.started(tmp_path_factory.mktemp("browser")) as running:
        yield running


def opened(chromium: browser.Browser, path: Path, **how: Any) -> browser.Page:
    page = chromium.page()
    page.open(path, **how)
    return page


def check_quiet(page: browser.Page, path: Path) -> None:
    assert page.problems == []
    assert page.requests == [path.absolute().as_uri()]


def set_values(page: browser.Page, **values: object) -> None:
    """Puts values into controls, one after the other, as a person does."""
    page.run(
        f"""(() => {{
          for (const [id, value] of Object.entries({json.dumps(values)})) {{
            const element = document.getElementById(id.replace("_", "-"));
            if (element.type === "checkbox") element.checked = value;
            else element.value = value;
            element.dispatchEvent(new Event("input", {{ bubbles: true }}));
          }}
        }})()"""
    )
    page.settle()


def text(page: browser.Page, element: str) -> str:
    found: str = page.run(f"document.getElementById({json.dumps(element)}).textContent")
    return found


def decided(modules: list[ModuleReport], rule: Rule) -> list[str]:
    """Names of the modules that Python would merge."""
    rows = []
    scores = {}
    for found in modules:
        rows.append(
            Row(
                name=found.name,
                file="model.safetensors",
                dtype="BF16",
                shape=(2, 2),
                names=dict.fromkeys(("base", "aligned", "finetuned"), found.name),
                module_type=found.module_type,
                layer=found.layer,
                analysed=True,
                transposed=False,
                reason="projection",
            )
        )
        scores[found.name] = Score(
            rho=found.rho,
            rho_null=found.rho_null,
            v_norm=1.0,
            delta_norm=1.0,
            weight_norm=1.0,
            v_rounding=0.1,
            undefined="V is zero" if found.rho is None else None,
            rho_low=found.rho_low,
            rho_high=found.rho_high,
            null_sd=found.null_sd,
        )
    decisions = decide(rows, scores, rule)
    return [found.name for found in modules if decisions[found.name].merge]


def choose(page: browser.Page, select: str, *, by_layer: bool, per_type: bool, on_undefined: str) -> None:
    kind, _, amount = select.partition(":")
    grouping = {"by_layer": by_layer} if by_layer else {"by_layer": False, "per_type": per_type}
    set_values(page, kind=kind, **grouping, undefined=on_undefined, value=amount)


SELECTS = [
    *(f"threshold:{tau}" for tau in ("0", "0.25", "0.35", "0.5", "1")),
    *(f"null:{limit}" for limit in ("0", "0.5", "1", "1.7")),
    *(f"z:{limit}" for limit in ("-20", "-1.5", "0", "3")),
    *(f"lowest:{number}" for number in (0, 1, 7, 12)),
    *(f"fraction:{share}" for share in ("0", "0.1", "0.5", "0.77", "1")),
]


def rule_of(select: str, *, by_layer: bool, per_type: bool, on_undefined: str) -> Rule | None:
    """The rule, or None if there is none such."""
    kind, _, amount = select.partition(":")
    if per_type and (by_layer or kind not in ("lowest", "fraction")):
        return None
    values: dict[str, Any] = {
        "granularity": "layer" if by_layer else "module",
        "on_undefined": on_undefined,
        **({"per_type": True} if per_type else {}),
    }
    values |= {"threshold": float(amount)} if kind == "threshold" else {"select": select}
    try:
        return Rule(**values)
    except (SafemergeError, TypeError):
        return None


@pytest.mark.parametrize("undefined", [False, True])
def test_decides_as_python_does(chromium: browser.Browser, tmp_path: Path, *, undefined: bool) -> None:
    modules = dense(12, seed=3, undefined=undefined)
    # One outside of all layers, and names that sort by code points.
    modules += [
        module("\U0001f600", "q_proj", None, 0.25),
        module("\uffee", "q_proj", None, 0.25),
        module("lm_head", "lm_head", None, 0.25),
    ]
    path = write_page(tmp_path / "p.html", modules)
    page = opened(chromium, path)
    compared = 0
    for select, by_layer, per_type, on_undefined in product(
        SELECTS, (False, True), (False, True), ("merge", "keep")
    ):
        how: dict[str, Any] = {"by_layer": by_layer, "per_type": per_type, "on_undefined": on_undefined}
        rule = rule_of(select, **how)
        if rule is None:
            continue
        expected = decided(modules, rule)
        choose(page, select, **how)
        assert page.run(_SAVE).splitlines() == expected, (select, how)
        assert text(page, "counts").startswith(f"{len(expected)} of {len(modules)}"), (select, how)
        compared += 1
    assert compared > 50
    check_quiet(page, path)


def test_the_slider_says_what_it_would_merge_and_how(chromium: browser.Browser, tmp_path: Path) -> None:
    modules = dense(30)
    path = write_page(tmp_path / "p.html", modules)
    page = opened(chromium, path)
    assert "The same modules" in text(page, "difference")
    set_values(page, slider="0.5")
    merged = [m for m in modules if m.rho is not None and m.rho < 0.5]
    share = sum((m.delta_norm or 0) ** 2 for m in merged) / sum((m.delta_norm or 0) ** 2 for m in modules)
    assert f"{len(merged)} of {len(modules)}" in text(page, "counts")
    assert f"{100 * share:.1f} %" in text(page, "counts")
    more = len(merged) - sum(m.merged for m in modules)
    assert f"{more} more, 0 fewer" in text(page, "difference")
    assert text(page, "command") == "safemerge-fast merge --base b --threshold 0.5 -o out"
    choose(page, "lowest:3", by_layer=False, per_type=True, on_undefined="keep")
    assert text(page, "command").endswith("--select lowest:3 --per-type --on-undefined keep -o out")
    choose(page, "null:0.8", by_layer=True, per_type=False, on_undefined="merge")
    assert text(page, "command").endswith("--select null:0.8 --granularity layer -o out")
    page.run("document.getElementById('reset').click()")
    page.settle()
    assert "The same modules" in text(page, "difference")
    check_quiet(page, path)


def test_hostile_names_are_text(chromium: browser.Browser, tmp_path: Path) -> None:
    modules = [module(name, name, name, 0.3) for name in HOSTILE]
    modules += [module(f"e.experts.{n}", "experts." + HOSTILE[0], HOSTILE[0], 0.2) for n in range(3)]
    told = {"warnings": HOSTILE, "notes": HOSTILE, "facts": [[name, name] for name in HOSTILE]}
    path = write_page(tmp_path / "p.html", modules, title=HOSTILE[0], **told)
    page = opened(chromium, path, width=375)
    page.run("document.querySelectorAll('button.fold').forEach(button => button.click())")
    page.run("document.querySelectorAll('button.pick').forEach(button => button.click())")
    page.settle()
    assert page.run("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert page.run("document.scripts.length") == 2
    shown = page.run("document.body.innerText")
    assert HOSTILE[0] in shown
    assert "\\u{202e}" in shown
    assert not set("\u202e\u2066\x1b\x00\u2028") & set(shown)
    assert page.run("document.documentElement.scrollWidth <= 375")
    # The list is made of the names as they are; one of them holds a line break.
    assert json.loads(page.run(_SAVE)) == [m.name for m in modules]
    check_quiet(page, path)


def test_a_hundred_thousand_modules_are_usable(chromium: browser.Browser, tmp_path: Path) -> None:
    modules = experts(60, 556)
    path = write_page(tmp_path / "p.html", modules)
    page = opened(chromium, path)
    assert len(modules) > 100_000
    # What is drawn does not grow with the number of modules.
    assert page.run("document.getElementsByTagName('*').length") < 6000
    assert f"{sum(m.merged for m in modules):,} of {len(modules):,}" in text(page, "counts")
    assert page.run("document.querySelectorAll('#table tbody tr').length") < 100
    set_values(page, filter="layers.7.mlp.experts.55")
    assert text(page, "shown").startswith("21 of")
    page.run("document.querySelector('button.fold').click()")
    page.settle()
    assert page.run("document.querySelectorAll('#table td.inner').length") == 7
    set_values(page, filter="")
    set_values(page, slider="1")
    assert text(page, "counts").startswith(f"{len(modules):,} of {len(modules):,}")
    check_quiet(page, path)


def test_the_table_sorts_scrolls_and_takes_the_keyboard(chromium: browser.Browser, tmp_path: Path) -> None:
    modules = dense(100, undefined=True)
    path = write_page(tmp_path / "p.html", modules)
    page = opened(chromium, path)
    first = "document.querySelector('#table tbody .pick').textContent"
    heads = "document.querySelectorAll('#table thead button')"
    known = sorted((m.rho, place) for place, m in enumerate(modules) if m.rho is not None)
    page.run(f"{heads}[1].click()")
    page.settle()
    assert page.run(first) == modules[known[0][1]].name
    assert page.run("document.querySelectorAll('#table th')[1].ariaSort") == "ascending"
    page.run(f"{heads}[1].click()")
    page.settle()
    highest = max(m.rho for m in modules if m.rho is not None)
    assert page.run(first) == next(m.name for m in modules if m.rho == highest)
    # What is undefined comes last either way.
    page.run("document.getElementById('table-box').scrollTop = 1e6")
    page.settle()
    last = page.run("[...document.querySelectorAll('#table tbody .pick')].pop().textContent")
    assert next(m for m in modules if m.name == last).rho is None
    page.run("document.querySelector('#table tbody .pick').focus()")
    before = page.run("document.activeElement.textContent")
    page.press("ArrowDown", 40)
    assert page.run("document.activeElement.className") == "pick"
    assert page.run("document.activeElement.textContent") != before
    # And the heat map.
    page.run("document.querySelector('#heat > div').focus()")
    for key, code in (("Home", 36), ("ArrowRight", 39), ("ArrowDown", 40)):
        page.press(key, code)
    assert "model.layers.1." in text(page, "heat-detail")
    check_quiet(page, path)


@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("which", ["dense", "experts", "one", "undefined", "none", "survival", "sweep"])
def test_fits_its_window(
    chromium: browser.Browser, tmp_path: Path, which: str, width: int, *, dark: bool
) -> None:
    path = tmp_path / "p.html"
    survival = {
        "names": ["a", "b"],
        "types": ["q_proj", "q_proj"],
        "formats": ["FP8 in blocks of 128 x 128"] * 2,
        "merged": [True, False],
        "shares": [0.3, 0.97],
    }
    if which == "sweep":
        candidates = [
            Candidate(f"τ 0.{n} with a long name", {"refusals": n / 10, "accuracy": 1 - n / 20}, pareto=n > 4)
            for n in range(10)
        ]
        candidates.append(Candidate("aligned", {"refusals": 0.9, "accuracy": 0.4}, control=True))
        metrics = [Metric("refusals"), Metric("accuracy"), Metric("loss", maximise=False)]
        write_pieces(path, sweep_page(candidates, metrics, title="A sweep"))
    else:
        modules = {
            "dense": dense(80),
            "experts": experts(24, 8),
            "one": dense(1)[:1],
            "undefined": [module(f"m{n}", "q_proj", f"layers.{n}", None, rho_null=None) for n in range(5)],
            "none": [],
            "survival": dense(2),
        }[which]
        write_page(path, modules, **({"survival": survival} if which == "survival" else {}))
    page = opened(chromium, path, width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark
    page.run("document.getElementById('theme').click()")
    assert page.run("getComputedStyle(document.body).backgroundColor") != background
    # Everything that one can operate has a name.
    unnamed = page.run(
        """[...document.querySelectorAll("input, select, button, [tabindex='0']")]
           .filter(element => !element.closest("[hidden]"))
           .filter(element => !(element.labels?.length || element.ariaLabel || element.textContent.trim()))
           .map(element => element.outerHTML)"""
    )
    assert unnamed == []
    figures = page.run("[...document.querySelectorAll('figcaption b')].map(found => found.textContent)")
    assert [figure.split(".")[0] for figure in figures] == [f"Figure {n + 1}" for n in range(len(figures))]
    check_quiet(page, path)


def test_prints_every_module_of_a_short_table(chromium: browser.Browser, tmp_path: Path) -> None:
    path = write_page(tmp_path / "p.html", dense(40))
    page = opened(chromium, path, dark=True)
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("document.querySelectorAll('#table tbody .pick').length") == 280
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.call("Emulation.setEmulatedMedia", media="")
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("document.querySelectorAll('#table tbody .pick').length") < 100
    check_quiet(page, path)


def test_a_policy_stops_what_would_load_or_run(chromium: browser.Browser, tmp_path: Path) -> None:
    """Were a name to become an element after all, the browser would not follow it."""
    path = write_page(tmp_path / "p.html", dense(1))
    page = opened(chromium, path)
    page.run(
        """document.body.insertAdjacentHTML(
             "beforeend", '<img id="image" src="https://example.org/x.png" onerror="window.hit = 1">')"""
    )
    page.settle()
    assert page.run("window.hit ?? 0") == 0
    assert page.run("document.getElementById('image').naturalWidth") == 0
    assert any("img-src" in problem for problem in page.problems), page.problems
    assert any("script-src" in problem for problem in page.problems), page.problems
