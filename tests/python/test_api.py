"""The Python API: previews, settings and public names."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from dense import is_projection, load

import safemerge_fast
from safemerge_fast import MergeConfiguration, PlanError, Report, SettingError, analyze, merge, preview


def test_preview_counts_what_the_merge_then_does(quartet: dict[str, Path], tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(analyze(quartet["base"], quartet["aligned"], quartet["finetuned"]).to_json())
    roles = {role: str(path) for role, path in quartet.items()}
    known = preview(MergeConfiguration(**roles, output=str(tmp_path / "out"), scores=str(scores)))
    unknown = preview(MergeConfiguration(**roles, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    report = merge(**quartet, output=tmp_path / "out", scores=scores)
    assert known.merged == report.merged
    assert known.counts == report.counts
    assert known.bytes_read == report.bytes_read
    assert known.bytes_written == unknown.bytes_written == report.bytes_written
    assert unknown.merged is None
    assert unknown.bytes_read > report.bytes_read
    assert unknown.bytes_analysed == 3 * sum(
        tensor.nbytes for name, tensor in load(quartet["finetuned"]).items() if is_projection(name)
    )
    refused = preview(MergeConfiguration(**roles, output=str(tmp_path / "out")))
    assert any("not empty" in note for note in refused.notes)
    inside = preview(MergeConfiguration(**roles, output=str(quartet["safe"] / "out")))
    assert any(f"overlaps the input {quartet['safe']}" in note for note in inside.notes)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alpha": 1.5}, "alpha should be a finite number from 0 to 1"),
        ({"alpha": math.nan}, "alpha should be a finite number from 0 to 1"),
        ({"method": "karcher"}, "method should be one of linear, "),
        ({"dtype": "int8"}, "dtype should be one of auto, bfloat16"),
        ({"delta_reference": "safe"}, "delta_reference should be"),
        ({"threshold": 1.5}, "threshold should be a finite number from 0 to 1"),
        ({"threshold": -0.1}, "threshold should be a finite number from 0 to 1"),
        ({"threads": 0}, "threads should be a whole number from 1 to 4096"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"include": "("}, "not a regular expression"),
        ({"max_shard_size": "big"}, "should be like 5GB"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message) as raised:
        merge("b", "a", "f", output=tmp_path / "out", **setting)
    assert isinstance(raised.value, PlanError)
    assert isinstance(raised.value, ValueError)
    assert raised.value.exit_code == 2


EARLIER_NAMES = {
    "MergeReport": "Report",
    "FoldReport": "Report",
    "MergekitReport": "Report",
    "MergeConfiguration": "SafemergeSettings",
    "FoldConfiguration": "FoldSettings",
}
"""Names that earlier versions had for what is one class now."""


def test_every_public_name_is_there_and_in_the_right_module() -> None:
    for name in safemerge_fast.__all__:
        value = getattr(safemerge_fast, name)
        assert value.__module__.startswith("safemerge_fast")
        assert value.__name__ == EARLIER_NAMES.get(name, name)
    for earlier, name in EARLIER_NAMES.items():
        assert not hasattr(safemerge_fast, name) or getattr(safemerge_fast, earlier) is Report
    assert safemerge_fast.__version__ == safemerge_fast._engine.__version__
    with pytest.raises(AttributeError):
        _ = safemerge_fast.nothing_of_this_name


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    script = (
        "import sys, safemerge_fast; print(sorted({'torch', 'numpy', 'rich', 'click'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
