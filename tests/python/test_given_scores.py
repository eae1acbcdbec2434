"""Scores as objects, tables and files of three kinds: what they hold, and that a merge takes each of them."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dense import weight_files
from invoke import merge_words, run

from safemerge_fast import (
    AnalysisError,
    MergeConfiguration,
    OutputError,
    PlanError,
    Scores,
    SettingError,
    analyze,
    fold,
    merge,
    preview,
)
from safemerge_fast.analysis import table
from safemerge_fast.analysis.score import SCORE_FIELDS
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.recipes.safemerge.given import given_scores

SETTINGS: dict[str, Any] = {"threshold": 0.5, "alpha": 0.7}


@pytest.fixture(scope="module")
def scores(quartet: dict[str, Path]) -> Scores:
    found = analyze(quartet["base"], quartet["aligned"], quartet["finetuned"])
    names = list(found.modules)
    # Some that are undefined, so that there is something to leave empty.
    odd = replace(
        found.modules[names[0]],
        rho=None,
        rho_low=None,
        rho_high=None,
        columns=0,
        undefined="V is zero",
        v_norm=0.0,
        v_rounding=math.nan,
    )
    return replace(found, modules={**found.modules, names[0]: odd})


@pytest.fixture(scope="module")
def done(quartet: dict[str, Path], scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("done") / "out"
    merge(**quartet, output=output, scores=scores, **SETTINGS)
    return output


def same(one: Scores, other: Scores) -> bool:
    """Equal to the last digit; NaN is as good as NaN."""
    return one.to_json() == other.to_json()


def test_an_object_of_analyze_is_taken(quartet: dict[str, Path], scores: Scores, done: Path) -> None:
    outlook = preview(**quartet, output="elsewhere", scores=scores, **SETTINGS)
    report = json.loads((done / "safemerge_report.json").read_text())
    assert outlook.merged == sum(tensor["merged"] for tensor in report["tensors"]) > 0
    assert report["configuration"]["scores"] is None
    merged = {tensor["name"] for tensor in report["tensors"] if tensor["merged"]}
    assert merged == {name for name, score in scores.modules.items() if score.rho is None or score.rho < 0.5}


def test_an_object_of_other_models_is_refused(
    make_quartet: Callable[..., dict[str, Path]], scores: Scores, tmp_path: Path
) -> None:
    other = make_quartet(tmp_path / "other", seed=1)
    with pytest.raises(AnalysisError, match=r"^the scores given are not of these models"):
        merge(**other, output=tmp_path / "out", scores=scores)
    with pytest.raises(AnalysisError, match=r"^the scores given take Δ against the aligned model"):
        merge(**other, output=tmp_path / "out", scores=replace(scores, sources={}), delta_reference="base")
    with pytest.raises(SettingError, match="scores should be a path"):
        merge(**other, output=tmp_path / "out", scores=[scores])


@pytest.mark.parametrize("name", ["s.json", "s.parquet", "s.PARQUET"])
def test_files_bring_back_what_they_were_given(
    quartet: dict[str, Path], scores: Scores, done: Path, tmp_path: Path, name: str
) -> None:
    scores.save(tmp_path / name)
    assert same(Scores.load(tmp_path / name), scores)
    # By what it holds, whatever it is called.
    renamed = (tmp_path / name).rename(tmp_path / "renamed")
    assert same(Scores.load(str(renamed)), scores)
    merge(**quartet, output=tmp_path / "out", scores=renamed, **SETTINGS)
    assert weight_files(tmp_path / "out") == weight_files(done)


def test_analyze_writes_parquet(quartet: dict[str, Path], tmp_path: Path) -> None:
    import pyarrow.parquet

    file = tmp_path / "s.parquet"
    words = [word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", str(quartet[role]))]
    result = run("analyze", *words, "-o", file)
    assert result.exit_code == 0, result.stderr
    found = pyarrow.parquet.read_table(file)
    assert found.column_names == ["name", *table.DERIVED[:2], *SCORE_FIELDS, *table.DERIVED[2:]]
    assert found.num_rows == 21
    result = run(*merge_words(quartet, tmp_path / "out", "--scores", str(file), "-q"))
    assert result.exit_code == 0, result.stderr


def test_tables_hold_every_number(scores: Scores) -> None:
    pandas = pytest.importorskip("pandas")
    frame = scores.to_pandas()
    csv = pandas.read_csv(io.StringIO(scores.to_csv()))
    assert (
        list(frame.columns)
        == list(csv.columns)
        == ["name", "layer", "module_type", *SCORE_FIELDS, "ratio", "z"]
    )
    for line, (name, score) in zip(frame.to_dict("records"), scores.modules.items(), strict=True):
        assert line["name"] == name
        assert line["layer"] == ".".join(name.split(".")[:3])
        assert line["module_type"] == name.split(".")[-2]
        assert line["columns"] == score.columns
        if score.rho is None:
            assert math.isnan(line["rho"])
            assert math.isnan(line["ratio"])
            assert line["undefined"] == "V is zero"
            continue
        assert (line["rho"], line["rho_low"], line["rho_high"]) == (score.rho, score.rho_low, score.rho_high)
        assert line["ratio"] == score.rho / score.rho_null  # type: ignore[operator]
        assert score.null_sd is None or line["z"] == pytest.approx(
            math.log(score.rho / score.rho_null) / score.null_sd,  # type: ignore[operator]
            rel=1e-12,
        )
    assert frame["rho"].dtype == "float64"
    assert frame["nonfinite"].dtype == "bool"
    assert frame.groupby("module_type")["rho"].count().sum() == len(scores.modules) - 1


def test_polars_has_the_same_table(scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("polars")
    frame = scores.to_polars()
    assert frame.to_dicts() == [
        dict(zip(columns, row, strict=True))
        for columns in [table.columns_of(scores.modules)]
        for row in zip(*columns.values(), strict=True)
    ]
    # Without pyarrow it writes and reads Parquet; each reads what the other wrote.
    scores.save(tmp_path / "arrow.parquet")
    hide(monkeypatch, "pyarrow")
    scores.save(tmp_path / "polars.parquet")
    assert same(Scores.load(tmp_path / "polars.parquet"), scores)
    assert same(Scores.load(tmp_path / "arrow.parquet"), scores)
    monkeypatch.undo()
    assert same(Scores.load(tmp_path / "polars.parquet"), scores)


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    """Lets libraries look as if they were not installed."""
    known = table.find_spec
    monkeypatch.setattr(table, "find_spec", lambda name: None if name in hidden else known(name))


def test_what_is_not_installed_is_said_before_any_work(
    scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores.save(tmp_path / "s.parquet")
    hide(monkeypatch, "pandas", "polars", "pyarrow")
    with pytest.raises(AnalysisError, match="to_pandas needs pandas; install it with pip install pandas"):
        scores.to_pandas()
    with pytest.raises(AnalysisError, match="to_polars needs polars"):
        scores.to_polars()
    for act in (lambda: scores.save(tmp_path / "t.parquet"), lambda: Scores.load(tmp_path / "s.parquet")):
        with pytest.raises(
            AnalysisError, match="Parquet needs pyarrow or polars; install one with pip install"
        ):
            act()
    # The models do not even exist.
    result = run("analyze", "--base", "b", "--aligned", "a", "--finetuned", "f", "-o", tmp_path / "u.parquet")
    assert result.exit_code == 3
    assert result.stderr.startswith("error: Parquet needs pyarrow or polars")


def damaged(scores: Scores, tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "good.parquet"
    scores.save(file)
    good = pyarrow.parquet.read_table(file)

    def written(changed: pyarrow.Table) -> bytes:
        pyarrow.parquet.write_table(changed, tmp_path / "bad.parquet")
        return (tmp_path / "bad.parquet").read_bytes()

    head = json.loads(good.schema.metadata[b"safemerge_fast"])
    rho = good.column_names.index("rho")
    return {
        "cut": (file.read_bytes()[:-20], "cannot be read as Parquet"),
        "magic": (b"PAR1", "cannot be read as Parquet"),
        "bare": (written(good.replace_schema_metadata({})), "it has no metadata of analyze"),
        "no rho": (written(good.drop_columns(["rho"])), "it has no column rho"),
        "text": (
            written(good.set_column(rho, "rho", pyarrow.array(["x"] * good.num_rows))),
            "rho of .* should be a finite number",
        ),
        "twice": (written(pyarrow.concat_tables([good, good])), "names a module twice"),
        "version": (
            written(good.replace_schema_metadata({"safemerge_fast": json.dumps({**head, "version": 9})})),
            "version should be 1 or 2",
        ),
        "list": (written(good.replace_schema_metadata({"safemerge_fast": "[]"})), "are no object"),
        "noise": (b"\xff\xfe\x00", "are not text"),
        "other": (b"{}", "has no 'delta_reference'"),
    }


def test_damaged_files_are_refused_in_a_line(scores: Scores, tmp_path: Path) -> None:
    for name, (data, said) in damaged(scores, tmp_path).items():
        file = tmp_path / "damaged"
        file.write_bytes(data)
        with pytest.raises(AnalysisError, match=said) as raised:
            Scores.load(file)
        assert "\n" not in str(raised.value), name
        assert str(file) in str(raised.value), name


def test_a_file_that_cannot_be_written_is_an_output_error(scores: Scores, tmp_path: Path) -> None:
    for name in ("s.json", "s.parquet"):
        with pytest.raises(OutputError, match="cannot write"):
            scores.save(tmp_path / "none" / name)


def test_a_repr_is_one_short_line(scores: Scores) -> None:
    rhos = [score.rho for score in scores.modules.values() if score.rho is not None]
    assert repr(scores).startswith(
        f"<Scores of 21 modules: ρ {min(rhos):.4g} to {max(rhos):.4g}, Δ against aligned"
    )
    assert len(repr(scores)) < 120
    assert "no ρ" in repr(replace(scores, modules={}))


def test_decisions_that_intervals_do_not_settle_are_said(quartet: dict[str, Path], scores: Scores) -> None:
    name, found = next((name, score) for name, score in scores.modules.items() if score.rho is not None)
    assert found.rho is not None
    wide = replace(found, rho_low=found.rho - 0.1, rho_high=found.rho + 0.1, columns=32)
    given = replace(scores, modules={**scores.modules, name: wide})
    exact = replace(
        scores,
        modules={
            each: replace(score, rho_low=score.rho, rho_high=score.rho)
            for each, score in scores.modules.items()
        },
    )

    def said(given: Scores, threshold: float) -> list[str]:
        # Otherwise they would be measured further.
        outlook = preview(**quartet, output="out", scores=given, threshold=threshold, estimator="sketch")
        return [warning for warning in outlook.warnings if "certified" in warning]

    assert said(exact, found.rho + 0.05) == []
    # Others of them may be open as well, of those that analyze settled for another threshold.
    assert len(said(given, found.rho + 0.05)) == 1
    alone = replace(exact, modules={**exact.modules, name: wide})
    (warning,) = said(alone, found.rho + 0.05)
    assert warning.startswith(f"not certified is that for {name}, whose ρ is only known to lie")
    assert f"from {wide.rho_low:.4g} to {wide.rho_high:.4g}" in warning


# --- reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_a_report_gives_the_scores_of_its_merge(
    quartet: dict[str, Path], scores: Scores, done: Path, tmp_path: Path, whole: bool
) -> None:
    given = done if whole else done / "safemerge_report.json"
    merge(**quartet, output=tmp_path / "out", scores=given, **SETTINGS)
    assert weight_files(tmp_path / "out") == weight_files(done)
    outlook = preview(**quartet, output=tmp_path / "x", scores=given, select="lowest:3", on_undefined="keep")
    assert outlook.merged == 3
    models = {role: open_model(role, path) for role, path in quartet.items()}
    found = given_scores(str(given), models, "aligned")
    assert found.delta_reference == "aligned"
    for name, score in scores.modules.items():
        kept = replace(found.modules[name], rho_null_estimated=score.rho_null_estimated)
        assert repr(kept) == repr(score)


def test_a_report_of_other_weights_is_refused(
    make_quartet: Callable[..., dict[str, Path]], done: Path, tmp_path: Path
) -> None:
    other = make_quartet(tmp_path / "other", seed=1)
    with pytest.raises(AnalysisError, match="are not of these models"):
        merge(**other, output=tmp_path / "out", scores=done)


def test_a_report_without_measurement_or_sources_is_refused(
    quartet: dict[str, Path], done: Path, tmp_path: Path
) -> None:
    document = json.loads((done / "safemerge_report.json").read_text())
    file = tmp_path / "report.json"

    def refused(said: str, **changes: Any) -> None:
        file.write_text(json.dumps({**document, **changes}))
        with pytest.raises(AnalysisError, match=said) as raised:
            merge(**quartet, output=tmp_path / "out", scores=file)
        assert str(file) in str(raised.value)

    inputs = document["inputs"]
    less = {key: value for key, value in inputs["finetuned"].items() if key != "sample"}
    refused(
        "does not say which weights of the finetuned model it measured", inputs={**inputs, "finetuned": less}
    )
    refused("the report of safemerge, which measured nothing", tensors=[])
    refused("is a report that cannot be read", seconds=3)
    refused("delta_reference should be aligned or base", configuration={})
    bad = [{**document["tensors"][0], "analysed": True, "columns": 0, "rho": 0.5, "rho_low": 0.6}]
    refused("the interval of .* should be around rho", tensors=bad)
    # A field too many is a later version's.
    file.write_text(json.dumps({**document, "later": 1}))
    preview(**quartet, output=tmp_path / "x", scores=file)


def test_a_report_of_another_recipe_is_refused(quartet: dict[str, Path], tmp_path: Path) -> None:
    from lora import write_lora

    adapter = write_lora(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (72, 72)}, rank=4, seed=0)
    fold(quartet["aligned"], adapter, output=tmp_path / "folded")
    with pytest.raises(AnalysisError, match="is the report of fold, which measured nothing"):
        merge(**quartet, output=tmp_path / "out", scores=tmp_path / "folded")


def test_previews_take_the_arguments_of_a_merge(quartet: dict[str, Path], scores: Scores) -> None:
    import inspect

    one = preview(*quartet.values(), output="out", scores=scores)
    other = preview(MergeConfiguration(**quartet, output="out", scores=scores))
    assert replace(one, free_bytes=0) == replace(other, free_bytes=0)
    assert inspect.signature(preview) == inspect.signature(merge)
    with pytest.raises(PlanError, match="alpha should be"):
        preview(*quartet.values(), output="out", alpha=2)


def test_help_of_merge_loads_no_library_of_tables() -> None:
    script = (
        "import sys\nfrom safemerge_fast.cli import main\n"
        "try:\n    main(['merge', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'pandas', 'pyarrow', 'polars'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("[]\n")
