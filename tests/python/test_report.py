"""The report: round trip, counts, table, plot."""

from __future__ import annotations

import io
import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from safemerge_fast import AnalysisError, OutputError, Report, SafemergeError, merge
from safemerge_fast._engine import file_digest
from safemerge_fast.analysis.score import Score
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.documents import write_document
from safemerge_fast.pairing.row import Row
from safemerge_fast.pairing.rows import pair
from safemerge_fast.recipes import recipes
from safemerge_fast.recipes.run import read_report
from safemerge_fast.report.plot import write_plot
from safemerge_fast.report.tensors import TensorReport, count_modules, module_table
from safemerge_fast.settings import Settings


def tensor(
    number: int, module_type: str, *, analysed: bool, merged: bool, rho: float | None = None
) -> TensorReport:
    return TensorReport(
        name=f"t{number}",
        file="model.safetensors",
        dtype="BF16",
        shape=(2, 2),
        module_type=module_type,
        layer=None,
        analysed=analysed,
        merged=merged,
        copied=not merged,
        reason="",
        operation="",
        rho=rho if analysed else None,
        rho_null=None if rho is None or not analysed else rho / 2,
    )


tensors = st.lists(
    st.builds(
        tensor,
        st.integers(),
        st.sampled_from(["q_proj", "norm", "up_proj"]),
        analysed=st.booleans(),
        merged=st.booleans(),
        rho=st.none() | st.floats(min_value=0, max_value=1),
    ),
    max_size=20,
)


@pytest.fixture(scope="module")
def report(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    return merge(**quartet, output=tmp_path_factory.mktemp("report") / "out")


def settings_of(recipe: str, values: Mapping[str, Any]) -> Settings:
    return recipes()[recipe].settings.from_dict(values)


class TestJson:
    def test_reads_back_what_it_wrote(self, report: Report) -> None:
        text = report.to_json()
        again = Report.from_json(text, settings_of)
        assert again == report
        assert again.to_json() == text
        assert again.configuration == report.configuration
        assert list(again.tensors) == list(report.tensors)

    def test_lies_in_the_output(self, report: Report) -> None:
        output = Path(report.output)
        assert read_report(output) == report
        assert (output / "safemerge_report.json").read_text() == report.to_json()

    def test_lists_every_file_with_its_size_and_digest(self, report: Report) -> None:
        output = Path(report.output)
        sizes = {path.name: path.stat().st_size for path in output.iterdir()}
        del sizes["safemerge_report.json"]
        assert {file.name: file.bytes for file in report.files} == sizes
        for file in report.files:
            # Weights are compared with the plan instead.
            assert (file.digest is None) == file.name.endswith(".safetensors")
            assert file.digest is None or file.digest == file_digest(output / file.name)

    def test_states_the_counts_for_readers_of_the_file(self, report: Report) -> None:
        document = json.loads(report.to_json())
        merged = Counter(entry["module_type"] for entry in document["tensors"] if entry.get("merged"))
        assert {
            entry["module_type"]: entry["merged"] for entry in document["counts"] if entry["merged"]
        } == merged
        assert sum(merged.values()) == report.merged > 0

    def test_has_no_nan(self, report: Report) -> None:
        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        json.loads(report.to_json(), parse_constant=refuse)

    @pytest.mark.parametrize("spoil", ["version", "tensors", "configuration", "inputs"])
    def test_refuses_what_is_not_a_report(self, report: Report, spoil: str) -> None:
        document = json.loads(report.to_json())
        del document[spoil]
        with pytest.raises(SafemergeError, match="not a report"):
            Report.from_json(json.dumps(document), settings_of)

    @pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1, "tensors": [{}]}'])
    def test_refuses_other_json(self, text: str) -> None:
        with pytest.raises(SafemergeError, match="not a report"):
            Report.from_json(text, settings_of)

    def test_refuses_another_version(self, report: Report) -> None:
        document = json.loads(report.to_json()) | {"version": 99}
        with pytest.raises(SafemergeError, match="version 99"):
            Report.from_json(json.dumps(document), settings_of)


class TestDocument:
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )

    @given(value=values, levels=st.integers(min_value=0, max_value=4))
    def test_json_reads_what_it_writes(self, value: object, levels: int) -> None:
        assert json.loads(write_document(value, levels=levels)) == value

    def test_breaks_lines_at_the_outer_levels_only(self) -> None:
        text = write_document({"a": [{"b": [1, 2]}, {}], "ρ": []}, levels=2)
        assert text == '{\n  "a": [\n    {"b": [1, 2]},\n    {}\n  ],\n  "ρ": []\n}\n'

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_refuses_what_json_cannot_say(self, number: float) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_document({"a": [number]}, levels=2)


class TestCounts:
    @given(found=tensors)
    def test_are_those_of_counting_by_hand(self, found: list[TensorReport]) -> None:
        counts = {count.module_type: count for count in count_modules(found)}
        assert list(counts) == list(dict.fromkeys(t.module_type for t in found))
        for module_type, count in counts.items():
            group = [t for t in found if t.module_type == module_type]
            assert count.tensors == len(group) == count.merged + count.kept
            assert count.analysed == len([t for t in group if t.analysed])
            assert count.merged == len([t for t in group if t.merged])
            known = [t.rho for t in group if t.rho is not None]
            assert count.median_rho == (statistics.median(known) if known else None)

    @given(found=tensors)
    def test_the_table_s_columns_add_up(self, found: list[TensorReport]) -> None:
        table = module_table(count_modules(found))
        for column, total in (
            ("analysed", sum(t.analysed for t in found)),
            ("merged", sum(t.merged for t in found)),
            ("kept", sum(not t.merged for t in found)),
        ):
            cells = next(c for c in table.columns if c.header == column)
            assert sum(map(int, cells.cells)) == total == int(cells.footer)

    def test_the_table_fits_eighty_columns(self, report: Report) -> None:
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(report.table())
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 80
        for count in report.counts:
            assert (count.module_type in text) == bool(count.analysed or count.merged)
        assert "…" not in text


@pytest.fixture(scope="module")
def rows(quartet: dict[str, Path]):
    return pair({role: open_model(role, path) for role, path in quartet.items()}).rows


@pytest.fixture(scope="module")
def scores(rows) -> dict[str, Score]:
    analysed = [row for row in rows if row.analysed]
    scores = {
        row.name: Score(0.1 + 0.04 * n, 0.3, 1.5, 2.5, 10.0, 0.01, None) for n, row in enumerate(analysed)
    }
    scores[analysed[-1].name] = Score(None, None, 0.0, 2.5, 10.0, math.nan, "V is zero")
    return scores


class TestPlot:
    def test_png(self, rows, scores: dict[str, Score], tmp_path: Path) -> None:
        from PIL import Image

        write_plot(tmp_path / "p.png", rows, scores, threshold=0.35)
        with Image.open(tmp_path / "p.png") as image:
            assert image.format == "PNG"
            assert min(image.size) > 500

    def test_svg_is_the_same_every_time(self, rows, scores: dict[str, Score], tmp_path: Path) -> None:
        for name in ("a.svg", "b.svg"):
            write_plot(tmp_path / name, rows, scores, threshold=0.35)
        assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()

    def test_shows_each_type_by_layer_with_interval_chance_and_decision(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Layers stand in the order of their numbers; what is below τ is told apart from the rest."""
        figure_module = pytest.importorskip("matplotlib.figure")
        drawn: list[Any] = []
        monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
        modules = [
            Row(
                name=f"model.layers.{layer}.{kind}.weight",
                file="f",
                dtype="BF16",
                shape=(2, 2),
                names={},
                module_type=kind,
                layer=f"model.layers.{layer}",
                analysed=True,
                transposed=False,
                reason="projection",
            )
            for layer in (0, 1, 10, 11, 2)
            for kind in ("v_proj", "q_proj")
        ]
        scores = {
            row.name: Score(
                0.1 + 0.05 * place, 0.5, 1.0, 1.0, 1.0, 0.0, None, rho_low=0.05 * place, rho_high=0.9
            )
            for place, row in enumerate(modules)
        }
        write_plot(tmp_path / "p.png", modules, scores, threshold=0.35)
        (figure,) = drawn
        q, v = (panel for panel in figure.axes if panel.axison)
        assert q.get_title(loc="left").startswith("q_proj   2 of 5")
        assert v.get_title(loc="left").startswith("v_proj   3 of 5")
        assert [label.get_text() for label in v.get_xticklabels()] == ["0", "1", "2", "10", "11"]
        points = {
            round(line.get_xdata()[0]): (line.get_ydata()[0], line.get_color())
            for line in v.lines
            if line.get_marker() in ("o", "s")
        }
        by_layer = {layer: scores[f"model.layers.{layer}.v_proj.weight"] for layer in (0, 1, 2, 10, 11)}
        assert [points[place][0] for place in range(5)] == [score.rho for score in by_layer.values()]
        colours = {(score.rho or 0) < 0.35: points[place][1] for place, score in enumerate(by_layer.values())}
        assert len(set(colours.values())) == 2
        intervals = {tuple(path.vertices[:, 1]) for lines in v.collections for path in lines.get_paths()}
        for score in by_layer.values():
            assert (score.rho_low, score.rho_high) in intervals
        assert any(list(line.get_ydata()) == [0.5] * 5 for line in v.lines)

    def test_refuses_other_extensions_and_missing_directories(
        self, rows, scores: dict[str, Score], tmp_path: Path
    ) -> None:
        with pytest.raises(OutputError, match=r"\.png or \.svg"):
            write_plot(tmp_path / "p.pdf", rows, scores, threshold=0.35)
        with pytest.raises(OutputError, match="does not exist"):
            write_plot(tmp_path / "no" / "p.png", rows, scores, threshold=0.35)

    def test_says_how_to_get_matplotlib(
        self, rows, scores: dict[str, Score], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("safemerge_fast.report.plot.find_spec", lambda name: None)
        with pytest.raises(AnalysisError, match=r"pip install safemerge-fast\[plot\]"):
            write_plot(tmp_path / "p.png", rows, scores, threshold=0.35)
