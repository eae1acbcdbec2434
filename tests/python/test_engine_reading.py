"""One reader for analysis and merge: what is read by position is not mapped, and errors are no signals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_safetensors

from safemerge_fast._engine import Block, Checkpoint, Matrix, Plan
from safemerge_fast.analysis.blocks import Composed, Difference, Workspace
from safemerge_fast.analysis.blocks import Matrix as StoredMatrix
from safemerge_fast.checkpoint.model import Model
from safemerge_fast.errors import CheckpointError, PlanError, SafemergeError
from safemerge_fast.pairing.operand import LowRank, Operand, Term

CPU = torch.device("cpu")
SHAPE = (48, 4096)


def gauss(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def model(directory: Path, role: str, backend: str, **tensors: torch.Tensor) -> Model:
    path = directory / f"{role}.safetensors"
    if not path.exists():
        write_safetensors(path, tensors)
    return Model(role, str(path), path, Checkpoint(path, read_backend=backend), {})


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc, which Linux has")
@pytest.mark.parametrize("threads", [1, 4], ids=["engine", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_read_by_position_is_not_mapped(tmp_path: Path, threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, y = gauss(1, *SHAPE).to(dtype), gauss(2, *SHAPE).to(dtype)
    a, b = gauss(3, 4, SHAPE[1]), gauss(4, SHAPE[0], 4)
    found = {}
    for backend in ("mmap", "pread"):
        models = {
            "left": model(tmp_path, "left", backend, w=x),
            "right": model(tmp_path, "right", backend, w=y, a=a, b=b),
        }
        adapted = Operand("right", "w", low_rank=(LowRank("right", "a", "b", 0.5, 4, False),))
        pairs = {
            "plain": StoredMatrix(models["right"], "w"),
            "composed": Composed(
                models, "right", "w", [Term(adapted, 2.0), Term(Operand("left", "w"), -1.0)]
            ),
        }
        for name, subtrahend in pairs.items():
            v = Difference(
                Workspace(CPU, chunk_elements=9000),
                StoredMatrix(models["left"], "w"),
                subtrahend,
                transposed=False,
                minuend_norm=True,
            )
            assert not v.is_zero()
            block = v.block(slice(3, 40), slice(100, 4000), "block").clone()
            found[backend, name] = (block, v.squares, v.minuend_squares)
        assert is_mapped(models["left"].path) == (backend == "mmap")
        del models, pairs, v, subtrahend
    torch.set_num_threads(before)
    left, right = x.float().double(), y.float().double()
    expected = {"plain": left - right, "composed": left - (2 * (right + 0.5 * (b @ a).double()) - left)}
    for name, dense in expected.items():
        assert torch.equal(found["mmap", name][0], found["pread", name][0])
        assert found["mmap", name][1:] == found["pread", name][1:]
        assert torch.allclose(found["pread", name][0].double(), dense[3:40, 100:4000], atol=2e-5)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    # More than is read ahead.
    shape = (512, 4096)
    one = model(tmp_path, "one", "pread", w=gauss(1, *shape))
    other = model(tmp_path, "other", "pread", w=gauss(2, *shape))
    v = Difference(
        Workspace(CPU, chunk_elements=9000),
        StoredMatrix(one, "w"),
        StoredMatrix(other, "w"),
        transposed=False,
    )
    v.block(slice(0, 8), slice(0, 4096), "block")
    os.truncate(one.path, one.path.stat().st_size // 2)
    with pytest.raises(SafemergeError, match=r"one\.safetensors has changed .*shorter"):
        v.block(slice(8, 512), slice(0, 4096), "block")


def test_composed_matrices_are_checked(tmp_path: Path) -> None:
    sources = {"x": model(tmp_path, "x", "auto", w=gauss(1, 4, 6), v=gauss(2, 6), u=gauss(3, 6, 4)).headers}
    term = {"operand": {"source": "x"}, "weight": 2.0}
    matrix = Matrix("w", sources=sources, terms=[term])
    block = Block(24)
    matrix.read(block, (0, 4), (0, 6))
    expected = 2.0 * gauss(1, 4, 6).numpy()
    assert np.array_equal(np.asarray(block).reshape(4, 6), expected)
    assert (matrix.shape, matrix.dtype, matrix.mapped) == ((4, 6), "F32", False)
    with pytest.raises(PlanError, match="columns 2 to 7"):
        matrix.read(block, (0, 4), (2, 7))
    for name, terms, error, complaint in (
        ("w", [], PlanError, "made of nothing"),
        ("w", "[", PlanError, "terms of tensor `w` are wrong"),
        ("w", [{**term, "colour": 1}], PlanError, "colour"),
        ("w", [{**term, "parameters": {"density": 1}}], PlanError, "no other parameter"),
        ("v", [term], PlanError, "not a matrix"),
        ("z", [term], CheckpointError, "no tensor `z`"),
        ("w", [{"operand": {"source": "y"}}], PlanError, "source `y`"),
        ("w", [term, {"operand": {"source": "x", "tensor": "u"}}], PlanError, r"\[4, 6\].*`u`"),
    ):
        with pytest.raises(error, match=complaint):
            Matrix(name, sources=sources, terms=terms)


def test_sources_that_are_given_must_be_those_of_the_plan(tmp_path: Path) -> None:
    headers = model(tmp_path, "x", "auto", w=gauss(1, 4, 6)).headers
    files = {file: identity.to_dict() for file, identity in headers.identity().items()}

    def plan(**change: object) -> Plan:
        stated = {"x": {"path": "/nowhere", "files": {**files, **change}}}
        document = {
            "version": 2,
            "sources": stated,
            "operations": [{"copy": {"source": "x"}}],
            "shards": [{"file": "out.safetensors", "tensors": [{"name": "w", "operation": 0}]}],
        }
        return Plan(json.dumps(document).encode(), sources={"x": headers, "unused": headers})

    # What is open is not looked for again.
    assert plan().bytes_read == 96
    (file,) = files
    for field, value, complaint in (
        ("size", 3, "its size differs"),
        ("mtime_ns", 3, "it was modified"),
        ("header_digest", "00", "its header differs"),
    ):
        with pytest.raises(PlanError, match=complaint):
            plan(**{file: {**files[file], field: value}})
    with pytest.raises(PlanError, match=r"other\.safetensors.*no file of that checkpoint"):
        plan(**{"other.safetensors": files[file]})
    os.utime(tmp_path / "x.safetensors", ns=(1, 1))
    with pytest.raises(PlanError, match="it was modified"):
        plan()
