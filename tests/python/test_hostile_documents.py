"""Small files: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_fast import CheckpointError, PlanError
from safemerge_fast.documents import (
    CONFIGURATION,
    Limit,
    parse_json,
    read_bytes,
    read_bytes_if_there,
    read_json,
    read_text,
    require_regular,
)
from safemerge_fast.yaml_documents import parse_yaml, read_yaml

# Beside other work on the machine any call may take long.
relaxed = settings(deadline=None)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**39), 10**39)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), inner)
    ),
    max_leaves=20,
)


def refusal(parse: Callable[..., object], text: bytes | str) -> str:
    """What is said of a text; nothing if it is read."""
    try:
        parse(text, PlanError, subject="x")
    except PlanError as error:
        return str(error)
    return ""


@relaxed
@given(plain)
def test_reads_what_json_writes(document: object) -> None:
    for ascii_only in (True, False):
        text = json.dumps(document, ensure_ascii=ascii_only)
        assert parse_json(text, PlanError, subject="x") == document
        assert parse_json(text.encode(), PlanError, subject="x", nonfinite=True) == document


@relaxed
@given(
    st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_bytes_are_a_document_or_one_sentence(data: bytes) -> None:
    message = refusal(parse_json, data)
    if message:
        assert message.startswith("x cannot be read as JSON: ")
        assert message.isprintable()
    else:
        json.loads(data)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 65 + "]" * 65, "deeper than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "deeper than 64 levels"),
        ("[" * 400_000, "deeper than 64 levels"),
        ("9" * 41, "more than 40 digits"),
        ("-" + "9" * 41, "more than 40 digits"),
        ("[" + "9" * 10**6 + "]", "more than 40 digits"),
        ("1e999", "too large"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "NaN, Infinity"),
        ('"\\ud800"', "surrogates"),
        ("\ufeff{}", "BOM"),
        ("{} x", "Extra data"),
        ("", "Expecting value"),
        ("[" + "1," * CONFIGURATION.items + "1]", "more than 500000 values"),
    ],
)
def test_what_is_refused(text: str, reason: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_json(text, PlanError, subject="x", limit=CONFIGURATION)
    assert str(caught.value).startswith("x cannot be read as JSON: ")
    assert reason in str(caught.value)


def test_what_is_at_the_limit_is_read() -> None:
    assert parse_json("[" * 64 + "]" * 64, PlanError, subject="x")
    assert parse_json("9" * 40, PlanError, subject="x") == 10**40 - 1
    # What tokenizers write for a length without limit.
    assert parse_json(json.dumps(int(1e30)), PlanError, subject="x") == int(1e30)
    assert parse_json("[Infinity, -Infinity, 1e999]", PlanError, subject="x", nonfinite=True) == [
        float("inf"),
        float("-inf"),
        float("inf"),
    ]
    assert parse_json('"\\ud83d\\ude00"', PlanError, subject="x", nonfinite=True) == "😀"


@pytest.fixture
def odd_files(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / name for name in ("pipe", "folder", "loop", "socket", "beyond")}
    os.mkfifo(files["pipe"])
    files["folder"].mkdir()
    files["loop"].symlink_to(files["loop"])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(files["socket"])) if len(str(files["socket"])) < 100 else files["socket"].mkdir()
    files["beyond"] = tmp_path / "no" / "file"
    files["device"] = Path("/dev/zero")
    files["null"] = Path("/dev/null")
    return files


def test_only_regular_files_are_read(odd_files: dict[str, Path], tmp_path: Path) -> None:
    opened = len(os.listdir("/proc/self/fd"))
    for name, file in odd_files.items():
        for read in (read_bytes, read_text, read_json, read_yaml, require_regular):
            with pytest.raises(CheckpointError) as caught:
                read(file, CheckpointError)
            assert str(file) in str(caught.value), name
            assert str(caught.value).isprintable()
    assert len(os.listdir("/proc/self/fd")) == opened
    assert read_bytes_if_there(tmp_path / "nothing", CheckpointError) is None
    assert read_json(tmp_path / "nothing", CheckpointError, optional=True) is None
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_json(tmp_path / "nothing", CheckpointError)


def test_sizes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    assert read_bytes(file, PlanError, limit=Limit(10, 1)) == b"x" * 10
    with pytest.raises(PlanError, match=r"role: f has 10 bytes, and at most 9 are read"):
        read_bytes(file, PlanError, limit=Limit(9, 1), subject="role: f")
    # Files of /proc have no size before they are read.
    with pytest.raises(PlanError, match="at most 5 are read"):
        read_bytes("/proc/self/status", PlanError, limit=Limit(5, 1))


def test_paths_are_named_printably(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a\\x1b\[31m\\n"):
        read_text(tmp_path / "a\x1b[31m\n", PlanError)


# --- YAML -----------------------------------------------------------------------------------------

fields = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.text("abc: -#'\"\n{}[]&*!|>%@", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcd", min_size=1), inner, max_size=4)
    ),
    max_leaves=20,
)


@relaxed
@given(fields, st.booleans())
def test_reads_what_yaml_writes(document: object, flow: bool) -> None:
    text = yaml.safe_dump(document, default_flow_style=flow)
    assert parse_yaml(text, PlanError, subject="x") == document


@relaxed
@given(st.text("ab: -#'\"\n{}[]&*!|>%@?,<0129.~", max_size=40) | st.text(max_size=40))
def test_any_text_is_yaml_or_one_sentence(text: str) -> None:
    message = refusal(parse_yaml, text)
    assert not message or message.startswith("x is not YAML: ")
    assert message.isprintable()


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb(9), "more than 10000 values"),
        ("a: &a [*a]", "stands for nothing"),
        ("a: *b", "alias"),
        ("[" * 100 + "]" * 100, "deeper than 64 levels"),
        ("- " * 5000 + "x", "deeper than 64 levels"),
        ("\n".join(f"f{n}: {n}" for n in range(60_000)), "more than 10000 values"),
        ("a: 1\na: 2", "the field a stands there twice"),
        ("a: !!int abc", "'abc' is no int"),
        ("\na: !!float abc", "in line 2, 'abc' is no float"),
        ("a: !!timestamp abc", "'abc' is no timestamp"),
        ("a: !!bool perhaps", "'perhaps' is no bool"),
        ("a: 2001-99-99", "'2001-99-99' is no timestamp"),
        ("a: !!python/name:os.system x", "python/name"),
        ("a: 1" + ":59" * 50, "more than 40 digits"),
        ("a: " + "9" * 41, "more than 40 digits"),
        ("? [1]\n: 2", "a field is named by a list"),
        ("a: \x1b[31m", "control characters"),
        ("--- a\n--- b", "single document"),
        ("<<: 3", "merg"),
    ],
)
def test_yaml_that_is_refused(text: str, reason: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_yaml(text, PlanError, subject="x")
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


def test_aliases_that_unfold_into_little_are_read() -> None:
    lines = [
        "shared: &s {density: 0.5}",
        "models:",
        "- {model: a, parameters: *s}",
        "- model: b",
        "  parameters:",
        "    <<: *s",
        "    weight: 2",
    ]
    text = "\n".join(lines)
    assert parse_yaml(text, PlanError, subject="x") == {
        "shared": {"density": 0.5},
        "models": [
            {"model": "a", "parameters": {"density": 0.5}},
            {"model": "b", "parameters": {"density": 0.5, "weight": 2}},
        ],
    }
    assert parse_yaml(bomb(3), PlanError, subject="x")["a2"][9][9] == ["x"] * 10
