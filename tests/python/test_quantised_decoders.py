"""The decoders of these tests and the engine's, against each other and against those of torch and transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from quantised_formats import E2M1, E4M3, FORMS, Array, nearest

from safemerge_fast._engine import Block, Checkpoint, Matrix

NAMES = [name for name in FORMS if name != "gpt-oss"]


def matrix(rows: int, columns: int, seed: int = 0) -> Array:
    """Numbers of many sizes, with a block of zeros and rows of very small and very large ones."""
    generator = np.random.default_rng(seed)
    numbers = generator.normal(size=(rows, columns)) * np.exp2(generator.integers(-8, 4, (rows, 1)))
    numbers[:1, :32] = 0
    numbers[-1] *= 2.0**-20
    return np.asarray(numbers)


def read(path: Path, name: str, rows: int, columns: int, left: int = 0) -> Array:
    found = Matrix.stored(Checkpoint(path), name)
    block = Block(rows * (columns - left))
    found.read(block, (0, rows), (left, columns))
    return np.asarray(block).reshape(rows, columns - left).copy()


def test_codes_are_those_of_torch() -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert np.array_equal(codes.double().numpy(), E4M3)
    numbers = np.abs(matrix(50, 64).ravel())
    rounded = torch.from_numpy(np.minimum(numbers, 448)).to(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(E4M3[nearest(numbers, E4M3)], rounded)
    # Halfway between two, the even code is taken.
    assert nearest(np.array([0.25, 0.75, 1.25, 2.5, 3.5, 5.0]), E2M1).tolist() == [0, 2, 2, 4, 6, 6]


@pytest.mark.parametrize("shape", [(96, 320), (200, 384), (1, 64), (130, 32)])
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_reads_what_the_formula_says(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    form, key = FORMS[name], "m.weight"
    parts = form.encode(key, matrix(*shape))
    write_checkpoint(tmp_path, parts, shards=2)
    found = read(tmp_path, key, *shape)
    assert np.array_equal(found, form.decode_single(key, parts).numpy())
    exact = form.decode(key, parts)
    assert np.all(np.abs(found - exact) <= 2.0**-22 * np.abs(exact))
    if shape[1] > 40:
        # A window that begins within a group, and within a byte.
        assert np.array_equal(read(tmp_path, key, *shape, left=37), found[:, 37:])


@pytest.mark.parametrize("name", ["block fp8", "block fp8 e8m0", "channel fp8", "mxfp8", "deepseek fp4"])
def test_transformers_decodes_the_same(name: str) -> None:
    """Its loader finds the size of blocks by division, so that they must divide the matrix."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    form, key = FORMS[name], "m.weight"
    parts = form.encode(key, matrix(256, 384))
    codes, scales = (parts[part] for part in form.names(key)[:2])
    loader = Fp8Dequantize(SimpleNamespace())
    found = loader._dequantize_one(codes, scales, output_dtype=torch.float32)
    assert torch.equal(found, form.decode_single(key, parts))


def test_transformers_decodes_blocks_of_mxfp4_the_other_way_round() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    form, key = FORMS["gpt-oss"], "m.experts.gate_up_proj"
    numbers = np.stack([matrix(64, 96, seed) for seed in range(3)])
    parts = form.encode(key, numbers)
    codes, scales = (parts[part] for part in form.names(key))
    found = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
    assert torch.equal(found, form.decode_single(key, parts).transpose(-1, -2))


@pytest.mark.parametrize("name", list(FORMS))
def test_encoding_is_as_near_as_the_scales_allow(name: str) -> None:
    form = FORMS[name]
    key = "m.experts.gate_up_proj" if name == "gpt-oss" else "m.weight"
    numbers = matrix(130, 320)
    parts = form.encode(key, numbers)
    assert list(parts) == form.names(key)
    decoded = form.decode(key, parts)
    assert np.array_equal(decoded, form.best(key, parts, numbers))
    assert np.linalg.norm(decoded - numbers) < 0.15 * np.linalg.norm(numbers)
