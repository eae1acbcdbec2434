"""Blocks of differences, as the analysis reads them, against torch in float64."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_safetensors
from torch import Tensor

from safemerge_fast._engine import Block, Checkpoint
from safemerge_fast._engine import Matrix as EngineMatrix
from safemerge_fast.analysis.blocks import Difference, Matrix, Workspace
from safemerge_fast.checkpoint.model import Model
from safemerge_fast.errors import CheckpointError, PlanError

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
CPU = torch.device("cpu")
SHAPE = (37, 1301)


def gauss(seed: int, dtype: torch.dtype, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model(directory: Path, role: str, tensor: Tensor, *, padded: bool = True) -> Model:
    path = directory / f"{role}.safetensors"
    write_safetensors(path, {"before": torch.ones(3, dtype=torch.uint8), "w": tensor}, padded=padded)
    return Model(role, str(path), path, Checkpoint(path), {})


def difference(
    directory: Path,
    left: Tensor,
    right: Tensor,
    workspace: Workspace,
    *,
    transposed: bool = False,
    padded: bool = True,
) -> Difference:
    minuend, subtrahend = (
        Matrix(model(directory, role, tensor, padded=padded), "w")
        for role, tensor in (("left", left), ("right", right))
    )
    return Difference(workspace, minuend, subtrahend, transposed=transposed, minuend_norm=True)


@pytest.fixture(autouse=True)
def usual_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What reads, by the number of torch's threads, and how many digits its sums have.
@pytest.mark.parametrize(("threads", "digits"), [(1, 1e-12), (3, 1e-6)], ids=["engine", "torch"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("left", DTYPES, ids=str)
@pytest.mark.parametrize("right", DTYPES, ids=str)
def test_blocks_and_norms(
    tmp_path: Path,
    left: torch.dtype,
    right: torch.dtype,
    padded: bool,
    transposed: bool,
    threads: int,
    digits: float,
) -> None:
    torch.set_num_threads(threads)
    x, y = gauss(1, left), gauss(2, right)
    exact = x.float().double() - y.float().double()
    minuend = x.float().double()
    if transposed:
        exact, minuend = exact.T, minuend.T
    whole = tuple(slice(0, size) for size in exact.shape)
    part = tuple(slice(size // 3, size - 5) for size in exact.shape)
    for rows, columns in (whole, part, (whole[0], part[1]), (part[0], whole[1])):
        # Chunks of few rows and of whole blocks.
        for chunk_elements in (3000, 1 << 20):
            workspace = Workspace(CPU, chunk_elements=chunk_elements)
            v = difference(tmp_path, x, y, workspace, transposed=transposed, padded=padded)
            found = v.block(rows, columns, "block")
            assert torch.equal(found, exact[rows, columns].float())
            assert v.squares == pytest.approx(float(found.double().square().sum()), rel=digits)
            expected = float(minuend[rows, columns].square().sum())
            assert v.minuend_squares == pytest.approx(expected, rel=digits)
            v.block(rows, columns, "block", norms=False)
            assert v.minuend_squares == pytest.approx(expected, rel=digits)


def test_a_block_is_of_the_buffer_and_only_that_is_overwritten(tmp_path: Path) -> None:
    workspace = Workspace(CPU)
    x, y = gauss(1, torch.float32), gauss(2, torch.float32)
    v = difference(tmp_path, x, y, workspace)
    every = slice(0, SHAPE[1])
    first = v.block(slice(0, 20), every, "one")
    second = v.block(slice(20, 37), every, "other")
    assert torch.equal(torch.cat([first, second]), x - y)
    again = v.block(slice(1, 4), every, "one")
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(first[:3], (x - y)[1:4])
    assert torch.equal(first[3:], (x - y)[3:20])


def test_pages_are_given_back_within_a_large_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safemerge_fast.analysis.blocks._RELEASE_BYTES", 1 << 20)
    shape = (64, 8192)  # 2 MiB
    x, y = gauss(1, torch.float32, shape), gauss(2, torch.float32, shape)
    v = difference(tmp_path, x, y, Workspace(CPU, chunk_elements=8192))
    released: list[str] = []
    monkeypatch.setattr(
        Matrix, "release", lambda self: released.append(self.role) or setattr(self, "_touched", 0)
    )
    v.block(slice(0, 64), slice(0, 8192), "block")
    assert released == ["left", "right"] * 2
    released.clear()
    # Of narrow segments, 256 KiB in all, what lies around them is mapped as well.
    v.block(slice(0, 64), slice(0, 1024), "block")
    assert released == ["left", "right"] * 4


def test_arrays_keep_a_block_alive_and_are_aligned() -> None:
    for elements in (0, 1, 1000, 100_000):
        array = np.asarray(Block(elements))
        tensor = torch.from_numpy(array)
        assert (array.dtype, array.shape) == (np.float32, (elements,))
        assert elements == 0 or tensor.data_ptr() % 64 == 0
        del array
        gc.collect()
        tensor.fill_(3.0)
        assert float(tensor.sum()) == 3.0 * elements


def test_a_block_refuses_what_does_not_fit(tmp_path: Path) -> None:
    a = EngineMatrix.stored(model(tmp_path, "a", gauss(1, torch.float32, (4, 6))).headers, "w")
    b = EngineMatrix.stored(model(tmp_path, "b", gauss(2, torch.float32, (6, 4))).headers, "w")
    assert (a.shape, b.shape) == ((4, 6), (6, 4))
    block = Block(24)
    array = np.asarray(block)
    assert len(block) == 24
    with pytest.raises(PlanError, match=r"`w` and `w` have the shapes \(4, 6\) and \(6, 4\)"):
        block.read_difference(a, b, (0, 4), (0, 6))
    for rows, columns, offset, complaint in (
        ((0, 5), (0, 6), 0, "rows 0 to 5 of tensor `w` were asked for, it has 4"),
        ((3, 2), (0, 6), 0, "rows 3 to 2"),
        ((0, 4), (2, 7), 0, "columns 2 to 7"),
        ((0, 4), (0, 6), 1, "24 elements does not fit into 23"),
        ((0, 1), (0, 1), 25, "1 elements does not fit into 0"),
    ):
        with pytest.raises(PlanError, match=complaint):
            block.read_difference(a, a, rows, columns, offset=offset)
    with pytest.raises(OverflowError):
        block.read_difference(a, a, (-1, 4), (0, 6))
    assert not array.any()
    with pytest.raises(MemoryError):
        Block(1 << 61)


def test_a_matrix_is_2d_and_of_floats(tmp_path: Path) -> None:
    headers = model(tmp_path, "a", gauss(1, torch.float32, (4, 6))).headers
    with pytest.raises(PlanError, match=r"`before`.*not a matrix of floats"):
        EngineMatrix.stored(headers, "before")
    with pytest.raises(CheckpointError, match="no tensor `x`"):
        EngineMatrix.stored(headers, "x")


def test_threads_with_workspaces_of_their_own_read_the_same(tmp_path: Path) -> None:
    x, y = gauss(1, torch.bfloat16, (600, 900)), gauss(2, torch.bfloat16, (600, 900))
    models = [model(tmp_path, role, tensor) for role, tensor in (("left", x), ("right", y))]
    wrong: list[int] = []

    def read(number: int) -> None:
        v = Difference(
            Workspace(CPU, chunk_elements=9000), *(Matrix(one, "w") for one in models), transposed=False
        )
        for start in range(0, 600, 60):
            found = v.block(slice(start, start + 60), slice(0, 900), "block")
            if not torch.equal(found, (x.float() - y.float())[start : start + 60]):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
