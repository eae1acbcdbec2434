"""The report as an HTML file, as a parser sees it: what it holds, and that no name gets out of its place."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from invoke import merge_words, run
from pages import HOSTILE, Parsed, dense, experts, module, names_of, sequence, write_page

from safemerge_fast import merge
from safemerge_fast.decision import Rule
from safemerge_fast.errors import OutputError
from safemerge_fast.report.html.columns import ModuleColumns, front_coded
from safemerge_fast.report.html.page import write_pieces
from safemerge_fast.report.html.sweep import Candidate, Metric, sweep_page
from safemerge_fast.report.order import natural, ordered_types
from safemerge_fast.report.report import HTML_FILE


def parsed(path: Path) -> Parsed:
    return Parsed(path.read_bytes().decode("utf-8"))


def words(quartet: dict[str, Path], *more: str | Path) -> list[str | Path]:
    roles = [word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", quartet[role])]
    return ["analyze", *roles, *more]


@pytest.fixture(scope="module")
def written(quartet, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Parsed]:
    directory = tmp_path_factory.mktemp("analysis")
    scores, page = directory / "s.json", directory / "report.html"
    result = run(*words(quartet, "-o", scores, "--html", page, "--tau", "0.5"))
    assert result.exit_code == 0, result.stderr
    assert f"wrote {page}" in result.stderr
    return json.loads(scores.read_text()), parsed(page)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    modules = [module(name, name, name, 0.3) for name in HOSTILE]
    path = tmp_path_factory.mktemp("hostile") / "p.html"
    return parsed(write_page(path, modules, title=HOSTILE[0], warnings=HOSTILE, notes=HOSTILE))


class TestAnalysis:
    def test_holds_the_scores(self, written: tuple[dict, Parsed]) -> None:
        scores, page = written
        modules = page.data["modules"]
        assert names_of(modules) == list(scores["modules"])
        assert modules["count"] == len(scores["modules"]) > 0
        for place, score in enumerate(scores["modules"].values()):
            assert modules["rho"][place] == score["rho"]
            assert modules["rho_null"][place] == score["rho_null"]
            for field in ("v_norm", "delta_norm", "weight_norm", "v_rounding", "cos_v_delta", "rho_low"):
                assert modules[field][place] == pytest.approx(score[field], rel=1e-5)
            assert modules["columns"][place] == score["columns"]
            assert modules["merged"][place] == (score["rho"] < 0.5)

    def test_says_where_it_comes_from(self, written: tuple[dict, Parsed], quartet) -> None:
        scores, page = written
        data = page.data
        assert [role["role"] for role in data["roles"]] == ["base", "aligned", "finetuned"]
        assert [role["model"] for role in data["roles"]] == [
            str(quartet[role]) for role in ("base", "aligned", "finetuned")
        ]
        assert [role["sample"] for role in data["roles"]] == [
            source["sample"] for source in scores["sources"].values()
        ]
        facts = dict(data["facts"])
        assert facts["Device"] == scores["device"]
        assert facts["Estimator"] == scores["estimator"]
        assert data["rule"]["threshold"] == 0.5
        assert f"--finetuned {quartet['finetuned']}" in data["command"][0]
        assert "s.json" in data["command"][0]

    def test_a_plot_in_html_is_the_report(self, quartet, tmp_path: Path) -> None:
        assert run(*words(quartet, "--plot", tmp_path / "p.html")).exit_code == 0
        assert parsed(tmp_path / "p.html").data["kind"] == "analysis"
        both = run(*words(quartet, "--plot", tmp_path / "p.html", "--html", tmp_path / "q.html"))
        assert both.exit_code == 2
        assert "give one of them" in both.stderr

    def test_finds_out_before_the_work_that_it_cannot_write(self, tmp_path: Path) -> None:
        result = run(
            "analyze",
            "--base",
            "b",
            "--aligned",
            "a",
            "--finetuned",
            "f",
            "--html",
            tmp_path / "no" / "p.html",
        )
        assert result.exit_code == 5


class TestMerge:
    def test_lies_in_the_output_and_is_verified(self, quartet, tmp_path: Path) -> None:
        output = tmp_path / "out"
        assert run(*merge_words(quartet, output)).exit_code == 0
        assert run("verify", output).exit_code == 0
        page = output / HTML_FILE
        page.write_bytes(page.read_bytes().replace(b"Merge of", b"Merge on", 1))
        result = run("verify", output)
        assert result.exit_code != 0
        assert HTML_FILE in result.stderr
        # It is ours for --overwrite, too.
        assert run(*merge_words(quartet, output, "--overwrite")).exit_code == 0
        assert run("verify", output).exit_code == 0

    def test_holds_what_the_report_says(self, quartet, tmp_path: Path) -> None:
        report = merge(**quartet, output=tmp_path / "out", threshold=0.4)
        found = parsed(tmp_path / "out" / HTML_FILE)
        data = found.data
        modules = [m for tensor in report.tensors if tensor.analysed for m in tensor.module_reports()]
        assert names_of(data["modules"]) == [m.name for m in modules]
        assert data["modules"]["merged"] == [int(m.merged) for m in modules]
        assert data["modules"]["reason"] == [m.reason for m in modules]
        assert sequence(data["modules"], "types", "type") == [m.module_type for m in modules]
        assert sequence(data["modules"], "layers", "layer") == [m.layer for m in modules]
        assert data["rule"] == {
            "select": "threshold",
            "threshold": 0.4,
            "granularity": "module",
            "onUndefined": "merge",
            "perType": False,
        }
        # It is published with the weights: no path of this machine.
        assert str(tmp_path) not in json.dumps(data)
        assert str(quartet["base"].parent) not in json.dumps(data)
        assert "--threshold 0.4" in data["repeat"]
        assert "--threshold" not in " ".join(data["command"])
        assert data["command"][1] == "--output out-2"
        squares = [(m.delta_norm or 0) ** 2 for m in modules]
        share = sum(s for s, m in zip(squares, modules, strict=True) if m.merged) / sum(squares)
        assert f"{share:.1%}" in (tmp_path / "out" / HTML_FILE).read_text()


class TestSafety:
    def test_names_stay_names(self, hostile: Parsed, tmp_path: Path) -> None:
        harmless = parsed(write_page(tmp_path / "p.html", [module("a", "b", "c", 0.3)]))
        assert hostile.tags == harmless.tags
        assert hostile.handlers == harmless.handlers == []
        modules = hostile.data["modules"]
        assert names_of(modules) == HOSTILE
        assert sequence(modules, "types", "type") == HOSTILE
        assert sequence(modules, "layers", "layer") == HOSTILE
        assert hostile.data["warnings"] == HOSTILE
        assert hostile.parts["title"] == HOSTILE[0]

    def test_loads_nothing_and_runs_its_own_script_only(self, hostile: Parsed) -> None:
        policy = dict(part.strip().split(" ", 1) for part in hostile.policy.split(";"))
        assert policy["default-src"] == "'none'"
        for directive, part in (("script-src", "script"), ("style-src", "style")):
            digest = base64.b64encode(hashlib.sha256(hostile.parts[part].encode()).digest()).decode()
            assert policy[directive] == f"'sha256-{digest}'"
        assert set(policy) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
        assert policy["img-src"] == "data:"

    def test_no_script_reads_text_as_markup(self, hostile: Parsed) -> None:
        script = hostile.parts["script"]
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
            assert word not in script
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", script)

    def test_says_that_it_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="cannot write"):
            write_pieces(tmp_path, [b"x"])


class TestColumns:
    def test_front_coding_counts_as_javascript_does(self) -> None:
        names = ["a😀b", "a😀c", "a", "", "ab", "ab"]
        shared, rest = front_coded(names)
        assert list(shared) == [0, 1, 1, 0, 0, 2]
        before, found = "", []
        for count, tail in zip(shared, rest, strict=True):
            units = before.encode("utf-16-le")[: 2 * count].decode("utf-16-le")
            found.append(before := units + tail)
        assert found == names

    def test_what_a_rule_compares_is_exact(self, tmp_path: Path) -> None:
        found = dense(5)
        modules = parsed(write_page(tmp_path / "p.html", found)).data["modules"]
        assert modules["rho"] == [m.rho for m in found]
        assert modules["rho_null"] == [m.rho_null for m in found]
        for z, m in zip(modules["z"], found, strict=True):
            assert m.rho is not None
            assert m.rho_null is not None
            assert m.null_sd is not None
            assert z == math.log(m.rho / m.rho_null) / m.null_sd

    def test_undefined_numbers_are_null(self, tmp_path: Path) -> None:
        none = dict.fromkeys(
            ("rho_null", "v_norm", "delta_norm", "v_rounding", "cos_v_delta", "columns", "null_sd")
        )
        page = parsed(write_page(tmp_path / "p.html", [module("a", "t", None, None, **none)]))
        modules = page.data["modules"]
        assert modules["rho"] == modules["z"] == modules["rho_low"] == modules["v_norm"] == [None]
        assert modules["layer"] == [-1]
        assert ModuleColumns([module("a", "t", None, None, **none)]).share_of_update() is None

    def test_a_mixture_is_a_hundred_bytes_a_module(self) -> None:
        """A hundred thousand modules are a page of twenty megabytes, not of a hundred."""
        columns = ModuleColumns(experts(4, 64))
        assert sum(map(len, columns.pieces())) < 220 * len(columns)

    def test_layers_and_types_stand_in_their_order(self) -> None:
        names = ["layers.10", "layers.9", "layers.100", "a.2.layers.1", "layers"]
        assert sorted(names, key=natural) == ["a.2.layers.1", "layers", "layers.9", "layers.10", "layers.100"]
        types = ["down_proj", "experts.up_proj", "other", "k_proj", "q_proj", "experts.gate_proj"]
        assert ordered_types(types) == [
            "q_proj",
            "k_proj",
            "down_proj",
            "other",
            "experts.gate_proj",
            "experts.up_proj",
        ]


def test_a_sweep_is_told_as_it_is(tmp_path: Path) -> None:
    candidates = [
        Candidate(
            "τ 0.35", {"refusals": 0.9, "loss": math.nan}, {"alpha": 0.8}, pareto=True, command="merge"
        ),
        Candidate(HOSTILE[0], {"refusals": 0.5, "loss": 2.0}, control=True),
        Candidate("broken", {}, problem="the judge ended with status 1"),
    ]
    metrics = [Metric("refusals"), Metric("loss", maximise=False)]
    write_pieces(tmp_path / "s.html", sweep_page(candidates, metrics, title="A sweep", notes=["a note"]))
    page = parsed(tmp_path / "s.html")
    sweep = page.data["sweep"]
    assert sweep["metrics"] == [
        {"name": "refusals", "maximise": True},
        {"name": "loss", "maximise": False},
    ]
    assert [candidate["values"] for candidate in sweep["candidates"]] == [
        [0.9, None],
        [0.5, 2.0],
        [None, None],
    ]
    assert sweep["candidates"][0]["settings"] == {"alpha": "0.8"}
    assert sweep["candidates"][1]["name"] == HOSTILE[0]
    assert page.data["modules"] is None
    assert page.handlers == []


@pytest.mark.parametrize("select", ["lowest:3", "fraction:0.5"])
def test_the_page_begins_with_the_rule_of_the_merge(quartet, tmp_path: Path, select: str) -> None:
    merge(**quartet, output=tmp_path / "out", select=select, granularity="layer")
    rule = parsed(tmp_path / "out" / HTML_FILE).data["rule"]
    assert (rule["select"], rule["granularity"]) == (select, "layer")
    assert Rule(select=select).select == rule["select"]
