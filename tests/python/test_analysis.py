"""ρ against the dense formula in float64, for every form, dtype, layout and degenerate case."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_safetensors
from torch import Tensor

from safemerge_fast.analysis import analyze_rows
from safemerge_fast.analysis.blocks import Matrix, Workspace
from safemerge_fast.analysis.cosine import score_module
from safemerge_fast.analysis.device import full_float32, resolve_device
from safemerge_fast.analysis.rounding import v_rounding
from safemerge_fast.analysis.score import Score
from safemerge_fast.checkpoint.model import Model, open_model
from safemerge_fast.errors import AnalysisError
from safemerge_fast.pairing.module import whole
from safemerge_fast.pairing.rows import Row, pair

Triple = tuple[Tensor, Tensor, Tensor]
CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

# Blocks, panels, strips and chunks that are small and divide nothing.
SMALL = {"block_elements": 300, "block_columns": 29, "chunk_elements": 1100, "operation_flops": 5e4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are small, and a second thread that waits for a busy core would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dense(v: Tensor, delta: Tensor) -> tuple[float, float]:
    """ρ and ρ_null by their definitions, in float64 with the whole d_out × d_out matrix C."""
    v64, delta64 = v.double().numpy(), delta.double().numpy()
    c = v64 @ v64.T / np.linalg.norm(v64)
    image = c @ delta64
    rho = np.vdot(image, delta64) / (np.linalg.norm(image) * np.linalg.norm(delta64))
    rho_null = np.trace(c) / (math.sqrt(v64.shape[0]) * np.linalg.norm(c))
    return float(rho), float(rho_null)


def gauss(shape: tuple[int, int], seed: int = 0) -> Triple:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = 0.02 * draw()
    aligned = base + 0.004 * draw()
    return base, aligned, aligned + 0.002 * draw() + 0.2 * (aligned - base)


def low_rank(shape: tuple[int, int], seed: int = 0) -> Triple:
    base, _, _ = gauss(shape, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    left = torch.randn(shape[0], 3, generator=generator, dtype=torch.float64)
    right = torch.randn(3, shape[1], generator=generator, dtype=torch.float64)
    update = torch.randn(shape[0], 2, generator=generator, dtype=torch.float64) @ right[:2]
    return base, base + 0.01 * left @ right, base + 0.01 * left @ right + 0.01 * update


def spiky(shape: tuple[int, int], seed: int = 0) -> Triple:
    """Singular values of V fall as 1/i."""
    base, aligned, finetuned = gauss(shape, seed)
    u, _, vh = torch.linalg.svd(aligned - base, full_matrices=False)
    values = 1.0 / torch.arange(1, u.shape[1] + 1, dtype=torch.float64)
    v = 0.3 * (u * values) @ vh
    return base, base + v, base + v + (finetuned - aligned)


def write(directory: Path, triple: Triple, *, padded: bool = True) -> dict[str, Model]:
    directory.mkdir(exist_ok=True)
    models = {}
    for role, tensor in zip(("base", "aligned", "finetuned"), triple, strict=True):
        path = directory / f"{role}.safetensors"
        write_safetensors(path, {"before": torch.ones(8, dtype=torch.uint8), "w": tensor}, padded=padded)
        models[role] = open_model(role, path)
    return models


def row(*, transposed: bool = False) -> Row:
    names = {role: "w" for role in ("base", "aligned", "finetuned")}
    return Row(
        name="w",
        file="model.safetensors",
        dtype="F32",
        shape=(0, 0),
        names=names,
        module_type="w",
        layer=None,
        analysed=True,
        transposed=transposed,
        reason="projection",
    )


def score(
    directory: Path, triple: Triple, *, reference: str = "aligned", transposed: bool = False, padded: bool = True,
    device: torch.device = CPU, **limits: float,
) -> Score:  # fmt: skip
    workspace = Workspace(device, **limits)  # type: ignore[arg-type]
    models = write(directory, triple, padded=padded)
    return score_module(
        models, whole(row(transposed=transposed)), delta_reference=reference, workspace=workspace
    )


def rounded(triple: Triple, dtype: torch.dtype) -> Triple:
    base, aligned, finetuned = (tensor.to(dtype) for tensor in triple)
    return base, aligned, finetuned


def check(found: Score, triple: Triple, *, reference: str = "aligned", tolerance: float = 1e-6) -> None:
    base, aligned, finetuned = (tensor.double() for tensor in triple)
    v, delta = aligned - base, finetuned - (aligned if reference == "aligned" else base)
    rho, rho_null = dense(v, delta)
    assert found.undefined is None
    assert found.rho == pytest.approx(rho, abs=tolerance)
    assert found.rho_null == pytest.approx(rho_null, abs=tolerance)
    assert found.v_norm == pytest.approx(float(v.norm()), rel=1e-6)
    assert found.delta_norm == pytest.approx(float(delta.norm()), rel=1e-6)
    assert found.weight_norm == pytest.approx(float(aligned.norm()), rel=1e-6)
    assert found.cos_v_delta == pytest.approx(float((v * delta).sum() / (v.norm() * delta.norm())), abs=1e-6)


SHAPES = [(60, 145), (145, 60), (90, 90), (1, 70), (70, 1), (1, 1), (2, 300)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("limits", [{}, SMALL], ids=["whole", "blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rho_is_the_dense_one(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype, limits: dict[str, float]
) -> None:
    for make in (gauss, low_rank, spiky):
        triple = rounded(make(shape), dtype)
        for reference in ("aligned", "base"):
            check(score(tmp_path, triple, reference=reference, **limits), triple, reference=reference)


@pytest.mark.parametrize("shape", [(600, 1400), (1400, 600), (800, 800)], ids=str)
def test_rho_is_the_dense_one_with_the_usual_limits_exceeded(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Several blocks, chunks, strips and panels of sizes that occur."""
    limits = {"block_elements": 50_000, "block_columns": 250, "operation_flops": 1e8}
    for make in (gauss, low_rank):
        triple = rounded(make(shape), torch.bfloat16)
        check(score(tmp_path, triple, **limits), triple)


@pytest.mark.parametrize("shape", [(150, 400), (400, 150)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_that_avoids_the_subspace_keeps_five_digits(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """The worst case of the float32 products: nearly all of Δ is orthogonal to V's few directions."""
    base, aligned, _ = low_rank(shape)
    u, _, _ = torch.linalg.svd(aligned - base, full_matrices=False)
    generator = torch.Generator().manual_seed(5)
    delta = 0.002 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    inside = u[:, :3] @ (u[:, :3].T @ delta)
    triple = rounded((base, aligned, aligned + delta - inside + 1e-3 * delta), dtype)
    check(score(tmp_path, triple), triple, tolerance=1e-5)


@pytest.mark.parametrize("limits", [{}, SMALL], ids=["whole", "blocks"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_module_stored_as_in_out_is_its_transpose(
    tmp_path: Path, shape: tuple[int, int], limits: dict[str, float]
) -> None:
    triple = rounded(gauss(shape), torch.bfloat16)
    base, aligned, finetuned = (tensor.T.contiguous() for tensor in triple)
    check(score(tmp_path, (base, aligned, finetuned), transposed=True, **limits), triple)


@pytest.mark.parametrize("limits", [{}, SMALL], ids=["whole", "blocks"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_misaligned_data_and_mixed_dtypes(
    tmp_path: Path, dtype: torch.dtype, limits: dict[str, float]
) -> None:
    base, aligned, finetuned = rounded(gauss((60, 145)), dtype)
    triple = (base.bfloat16(), aligned, finetuned.float())
    check(score(tmp_path, triple, padded=False, **limits), triple, tolerance=3e-6)


def test_no_view_of_misaligned_data_is_made(tmp_path: Path) -> None:
    """Processors that this suite does not run on trap such loads."""
    triple = rounded(gauss((6, 14)), torch.float32)
    for padded, read in ((True, "in place"), (False, "as a copy")):
        models = write(tmp_path / read, triple, padded=padded)
        part = Matrix(models["base"], "w").chunk(slice(1, 4), slice(2, 9))
        assert part.data_ptr() % 4 == 0
        assert torch.equal(part, triple[0][1:4, 2:9])
        assert part.is_contiguous() == (read == "as a copy")


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_very_small_and_very_large_weights(tmp_path: Path, scale: float) -> None:
    """Fourth powers of them leave float32's range, the scores do not."""
    for shape in ((60, 145), (145, 60)):
        base, aligned, finetuned = (scale * tensor for tensor in gauss(shape))
        triple = rounded((base, aligned, finetuned), torch.float32)
        check(score(tmp_path, triple), triple)


@pytest.mark.parametrize("limits", [{}, SMALL], ids=["whole", "blocks"])
@pytest.mark.parametrize("shape", [(60, 145), (145, 60)], ids=str)
def test_zero_v_and_zero_delta_are_undefined(
    tmp_path: Path, shape: tuple[int, int], limits: dict[str, float]
) -> None:
    base, aligned, finetuned = rounded(gauss(shape), torch.bfloat16)
    no_v = score(tmp_path, (base, base, finetuned), **limits)
    assert (no_v.rho, no_v.rho_null, no_v.undefined, no_v.v_norm) == (None, None, "V is zero", 0.0)
    assert no_v.delta_norm == pytest.approx(float((finetuned.double() - base.double()).norm()), rel=1e-6)
    assert math.isnan(no_v.v_rounding)
    assert no_v.cos_v_delta is None
    no_delta = score(tmp_path, (base, aligned, aligned), **limits)
    assert (no_delta.rho, no_delta.undefined, no_delta.delta_norm) == (None, "Δ is zero", 0.0)
    assert no_delta.v_norm == pytest.approx(float((aligned.double() - base.double()).norm()), rel=1e-6)
    assert no_delta.weight_norm == pytest.approx(float(aligned.double().norm()), rel=1e-6)
    assert score(tmp_path, (base, aligned, aligned), reference="base", **limits).undefined is None
    assert score(tmp_path, (base, base.float(), finetuned), **limits).undefined == "V is zero"


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=str)
def test_an_update_wholly_outside_the_subspace_has_rho_zero(tmp_path: Path, shape: tuple[int, int]) -> None:
    base = torch.zeros(shape)
    aligned, delta = base.clone(), base.clone()
    aligned[0] = 1.0
    delta[1:] = 1.0
    found = score(tmp_path, (base, aligned, aligned + delta))
    assert (found.rho, found.undefined) == (0.0, None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("place", "role"), [(0, "base"), (1, "aligned"), (2, "finetuned")])
@pytest.mark.parametrize("shape", [(60, 145), (145, 60)], ids=str)
def test_values_that_are_not_finite_are_named(
    tmp_path: Path, shape: tuple[int, int], place: int, role: str, value: float
) -> None:
    triple = rounded(gauss(shape), torch.float16)
    triple[place][-1, -1] = value
    found = score(tmp_path, triple, **SMALL)
    assert found.rho is None
    assert found.undefined == f"non-finite values in {role} tensor w"


def test_rounding_of_v_comes_from_the_dtypes(tmp_path: Path) -> None:
    base, aligned, finetuned = gauss((60, 145))
    found = score(tmp_path, (base.float(), aligned.bfloat16(), finetuned.bfloat16()))
    assert found.v_rounding == v_rounding("F32", "BF16", found.weight_norm, found.v_norm)
    assert found.v_rounding == pytest.approx(0.00153 * found.weight_norm / found.v_norm, rel=0.01)


def test_rows_of_a_quartet(quartet: dict[str, Path]) -> None:
    """The whole way from files: even layers' updates lie in V's column space, odd layers' do not."""
    models = {role: open_model(role, path) for role, path in quartet.items()}
    rows = pair(models).rows
    scores = dict(analyze_rows(models, rows, device="cpu"))
    assert sorted(scores) == sorted(row.name for row in rows if row.analysed)
    assert all((found.rho or 0) > 0.85 for name, found in scores.items() if ".1." not in name)
    assert all((found.rho or 1) < 0.35 for name, found in scores.items() if ".1." in name)
    from safetensors import safe_open

    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.k_proj.weight"):
        tensors = []
        for role in ("base", "aligned", "finetuned"):
            with safe_open(quartet[role] / models[role].headers.tensor(name).file, "pt") as file:
                tensors.append(file.get_tensor(name))
        check(scores[name], (tensors[0], tensors[1], tensors[2]))


def test_refuses_wrong_arguments_before_it_reads(quartet: dict[str, Path]) -> None:
    models = {role: open_model(role, path) for role, path in quartet.items()}
    rows = pair(models).rows
    with pytest.raises(AnalysisError, match="delta reference should be aligned or base, not 'safe'"):
        analyze_rows(models, rows, delta_reference="safe")
    with pytest.raises(AnalysisError, match="needs the base model"):
        analyze_rows({role: models[role] for role in ("aligned", "finetuned")}, rows)
    with pytest.raises(AnalysisError, match="device should be"):
        analyze_rows(models, rows, device="gpu")


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for spec in ("", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "CPU"):
        with pytest.raises(AnalysisError, match="device should be auto, cpu, cuda, cuda:N or mps"):
            resolve_device(spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_a_device_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(AnalysisError, match=r"device cuda:1 is not available.*--device cpu"):
        resolve_device("cuda:1")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="torch sees MPS")
def test_mps_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(AnalysisError, match="device mps is not available"):
        resolve_device("mps")


def test_products_are_full_float32_whatever_was_set_for_training(tmp_path: Path) -> None:
    triple = rounded(gauss((200, 300)), torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = score(tmp_path, triple)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(ZeroDivisionError), full_float32(CPU):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    check(found, triple)


@CUDA
@pytest.mark.parametrize("shape", [(300, 700), (700, 300)], ids=str)
def test_cuda_gives_the_same(tmp_path: Path, shape: tuple[int, int]) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        for dtype in DTYPES:
            triple = rounded(gauss(shape), dtype)
            found = score(
                tmp_path, triple, device=torch.device("cuda"), block_elements=20_000, block_columns=64
            )
            check(found, triple)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_pages_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading in columns releases as it goes, and nothing is left mapped at the end."""
    models = write(tmp_path, rounded(gauss((512, 4096)), torch.float32))
    released: list[str] = []

    release = Matrix.release

    def counting(self: Matrix) -> None:
        released.append(self.role)
        release(self)

    monkeypatch.setattr(Matrix, "release", counting)
    monkeypatch.setattr("safemerge_fast.analysis.blocks._RELEASE_BYTES", 1 << 20)
    score_module(models, whole(row()), workspace=Workspace(CPU))
    assert all(released.count(role) > 8 for role in models)
    assert set(released[-4:]) == {"base", "aligned", "finetuned"}


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("limits", [{}, SMALL])
def test_the_spread_of_chance_is_that_of_rotations(
    tmp_path: Path, shape: tuple[int, int], limits: dict[str, float]
) -> None:
    triple = spiky(shape)
    found = score(tmp_path, triple, **limits)
    base, aligned, finetuned = (tensor.numpy() for tensor in triple)
    v, delta = aligned - base, finetuned - aligned
    k = v @ v.T
    rng = np.random.default_rng(0)
    logs = []
    for _ in range(1500):
        q, r = np.linalg.qr(rng.standard_normal((shape[0], shape[0])))
        turned = (q * np.sign(np.diag(r))) @ delta
        moved = k @ turned
        logs.append(math.log(np.vdot(moved, turned) / (np.linalg.norm(moved) * np.linalg.norm(turned))))
    assert found.null_sd == pytest.approx(np.std(logs), rel=0.2)
