"""Verification: what it finds, and how it names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from safemerge_fast import PlanError, VerificationError, merge, verify


@pytest.fixture(scope="module")
def done(quartet: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """One merge with the default settings, for tests that only look at it."""
    output = tmp_path_factory.mktemp("merge") / "out"
    return output, merge(**quartet, output=output)


def test_verify_names_the_tensor_whose_byte_differs(done, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((output / "model.safetensors.index.json").read_text())
    file = output / index["weight_map"][name]
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[start + 7] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError) as raised:
        verify(output)
    assert f"tensor {name} of {file} differs from the plan at byte {start + 7};" in str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.safetensors"),
        (
            lambda out: shutil.copy(next(out.glob("*.safetensors")), out / "x.safetensors"),
            "x.safetensors is not in",
        ),
        (
            lambda out: (out / "model.safetensors.index.json").unlink(),
            "index.json is missing, but the report lists it",
        ),
        (
            lambda out: (out / "model.safetensors.index.json").write_text("{}"),
            "index.json has 2 bytes, the report says",
        ),
        (lambda out: os.truncate(out / "model-00003-of-00003.safetensors", 999), "model-00003-of-00003"),
    ],
)
def test_verify_refuses_what_loaders_would_trip_over(
    done, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    spoil(output)
    with pytest.raises(VerificationError, match=message):
        verify(output)


def test_verify_refuses_inputs_that_are_not_those_of_the_plan(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    quartet = make_quartet(tmp_path, shards=1)
    merge(**quartet, output=tmp_path / "out")
    file = quartet["safe"] / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"model.norm.weight"', b'"model.nori.weight"'))
    with pytest.raises(PlanError, match="has changed since the plan was made"):
        verify(tmp_path / "out")


def test_verify_a_sample_compares_less(done) -> None:
    report = verify(done[0], sample=0.01)
    assert 0 < report.bytes_checked <= report.bytes_total
