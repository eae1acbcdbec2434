"""Formats of quantised tensors, each written down a second time: encoder and decoder in float64, from their formulas.

Nothing of the package takes part. A format turns one matrix (or several, in leading dimensions) into the tensors that a
checkpoint stores for it, and these into numbers again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
Parts = dict[str, Tensor]

BF16 = torch.bfloat16


def _minifloat(exponents: int, mantissas: int, bias: int, top: int) -> Array:
    """Magnitudes of the codes 0, 1, … `top` of a small float."""
    codes = np.arange(top + 1)
    exponent, mantissa = codes >> mantissas, codes & ((1 << mantissas) - 1)
    assert exponent.max() < 1 << exponents
    fraction = mantissa / (1 << mantissas)
    return np.where(
        exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, (exponent - bias).astype(int))
    )


E4M3 = _minifloat(4, 3, 7, 0x7E)
"""Magnitudes of E4M3's codes without the sign; 0x7F is NaN."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
INT4 = np.arange(8.0)


def nearest(magnitudes: Array, table: Array) -> Array:
    """Codes of the nearest magnitudes of a table, the even code where two are as near."""
    clipped = np.minimum(magnitudes, table[-1])
    above = np.clip(np.searchsorted(table, clipped), 1, len(table) - 1)
    below = above - 1
    far, near = table[above] - clipped, clipped - table[below]
    up = (far < near) | ((far == near) & (above % 2 == 0))
    return np.where(up, above, below)


def _spread(scales: Array, shape: tuple[int, ...], rows: int, columns: int) -> Array:
    """One scale for each element."""
    wide = np.repeat(np.repeat(scales, rows, axis=-2), columns, axis=-1)
    return wide[..., : shape[-2], : shape[-1]]


def largest(matrix: Array, rows: int, columns: int) -> Array:
    """The largest magnitude of each block."""
    down, across = -(-matrix.shape[-2] // rows), -(-matrix.shape[-1] // columns)
    padding = [(0, 0)] * (matrix.ndim - 2)
    padding += [(0, down * rows - matrix.shape[-2]), (0, across * columns - matrix.shape[-1])]
    padded = np.pad(np.abs(matrix), padding)
    split = padded.reshape(*matrix.shape[:-2], down, rows, across, columns)
    return np.asarray(split.max(axis=(-3, -1)))


def _fp8(codes: Array, negative: Array) -> Tensor:
    return torch.from_numpy((codes | (negative << 7)).astype(np.uint8)).view(torch.float8_e4m3fn)


def _of_fp8(codes: Tensor) -> Array:
    bits = codes.view(torch.uint8).numpy().astype(int)
    assert ((bits & 0x7F) != 0x7F).all(), "a code is NaN"
    return np.where(bits & 0x80, -1.0, 1.0) * E4M3[bits & 0x7F]


def _nibbles(codes: Array) -> Tensor:
    """Two codes a byte, the low nibble first."""
    return torch.from_numpy((codes[..., ::2] | (codes[..., 1::2] << 4)).astype(np.uint8))


def _of_nibbles(packed: Tensor) -> Array:
    bits = packed.contiguous().view(torch.uint8).numpy().astype(int)
    return np.stack([bits & 15, bits >> 4], axis=-1).reshape(*bits.shape[:-1], -1)


def _of_fp4(packed: Tensor) -> Array:
    codes = _of_nibbles(packed)
    return np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]


def _floor_log2(values: Array) -> Array:
    return np.frexp(values)[1] - 1


@dataclass(frozen=True)
class Form:
    """A format.

    Attributes:
        words: What reports call it; blocks of a matrix are at the end.
        table: Magnitudes of its codes.
        codes: Ending of the tensor of codes in place of the logical name's own ending "weight", or after a bare name.
        scales: Ending of the tensor of scales, likewise.
        scale: How a scale is stored: "f32", "bf16", "e8m0", "u8", "e4m3".
        rows: Rows of a block; 0 for all.
        columns: Columns of a block; 0 for all.
        globals: Ending of the global scale, or "".
        shaped: Whether a tensor states the shape.
    """

    words: str
    table: Any
    codes: str
    scales: str
    scale: str
    rows: int
    columns: int
    globals: str = ""
    shaped: bool = False

    def _names(self, name: str) -> tuple[str, str]:
        stem = name.removesuffix("weight")
        return stem + self.codes, stem + self.scales

    def _block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return self.rows or shape[-2], self.columns or shape[-1]

    def wanted(self, matrix: Array, common: float = 1.0) -> Array:
        """The scales of a matrix's blocks by the format's rule, as they are stored, in float64; less the global one."""
        most = largest(matrix, *self._block(matrix.shape))
        with np.errstate(divide="ignore"):
            if self.scale in ("e8m0", "u8"):
                # Up to 7 is nearest to 6, or halfway.
                exponent = np.ceil(np.log2(most / (7 if self.table is E2M1 else self.table[-1])))
                return np.where(most == 0, 1.0, np.ldexp(1.0, np.clip(exponent, -127, 127).astype(int)))
        scale = np.where(most == 0, 1.0, most / self.table[-1] / common)
        if self.scale == "e4m3":
            return E4M3[np.maximum(nearest(scale, E4M3), 1)]
        kind = {"f32": torch.float32, "bf16": BF16}[self.scale]
        return torch.from_numpy(scale).to(kind).double().numpy()

    def _stored_scales(self, scales: Array) -> Tensor:
        if self.scale == "e4m3":
            return _fp8(nearest(scales, E4M3), np.zeros(scales.shape, dtype=int))
        if self.scale in ("e8m0", "u8"):
            bits = torch.from_numpy((_floor_log2(scales) + 127).astype(np.uint8))
            return bits.view(torch.float8_e8m0fnu) if self.scale == "e8m0" else bits
        return torch.from_numpy(scales).to({"f32": torch.float32, "bf16": BF16}[self.scale])

    def _scales(self, stored: Tensor) -> Array:
        if self.scale == "e4m3":
            return _of_fp8(stored)
        if self.scale in ("e8m0", "u8"):
            return np.ldexp(1.0, stored.view(torch.uint8).numpy().astype(int) - 127)
        return np.asarray(stored.double().numpy())

    def _common(self, name: str, parts: Mapping[str, Tensor]) -> float:
        if not self.globals:
            return 1.0
        value = float(parts[name.removesuffix("weight") + self.globals].double())
        return 1 / value if self.globals == "weight_global_scale" else value

    def factors(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Array:
        """What each element's code is multiplied by."""
        scales = self._scales(parts[self._names(name)[1]])
        if not self.rows and not self.columns:
            scales = scales.reshape(*shape[:-2], 1, 1)
        return _spread(scales, shape, *self._block(shape)) * self._common(name, parts)

    def encode(self, name: str, matrix: Array, *, like: Mapping[str, Tensor] | None = None) -> Parts:
        """The tensors that a matrix is stored as.

        Args:
            name: The matrix' name.
            matrix: Its numbers.
            like: Tensors whose global scale counts, where there are any.
        """
        codes_name, scales_name = self._names(name)
        parts: Parts = {}
        common = 1.0
        if self.globals:
            key = name.removesuffix("weight") + self.globals
            value = np.abs(matrix).max() / (448 * 6)
            stored = 1 / value if self.globals == "weight_global_scale" else value
            parts[key] = torch.tensor([stored], dtype=torch.float32) if like is None else like[key]
            if self.globals == "weight_scale_2":
                parts[key] = parts[key].reshape(())
            common = self._common(name, parts)
        scales = self.wanted(matrix, common)
        factors = _spread(scales, matrix.shape, *self._block(matrix.shape)) * common
        codes = nearest(np.abs(matrix) / factors, self.table)
        negative = np.signbit(matrix).astype(int)
        stored_scales = self._stored_scales(scales)
        if not self.rows and not self.columns:
            stored_scales = stored_scales.reshape(())
        if self.table is E4M3:
            packed = _fp8(codes, negative)
        elif self.table is E2M1:
            packed = _nibbles(codes | (negative << 3))
        else:
            packed = _nibbles(np.where(negative, 8 - codes, 8 + codes)).view(torch.int32)
        if self.codes == "_blocks":
            packed = packed.reshape(*matrix.shape[:-1], matrix.shape[-1] // 32, 16)
        if self.scale == "e8m0" and self.table is E2M1:
            packed = packed.view(torch.int8)
        parts = {codes_name: packed, scales_name: stored_scales, **parts}
        if self.shaped:
            parts[name + "_shape"] = torch.tensor(matrix.shape, dtype=torch.int32)
        return parts

    def numbers(self, name: str, parts: Mapping[str, Tensor]) -> Array:
        """Codes as numbers, without scales."""
        stored = parts[self._names(name)[0]]
        if self.table is E4M3:
            return _of_fp8(stored)
        if self.codes == "_blocks":
            stored = stored.reshape(*stored.shape[:-2], -1)
        return _of_fp4(stored) if self.table is E2M1 else _of_nibbles(stored) - 8.0

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> Array:
        """The numbers of a matrix, in float64."""
        numbers = self.numbers(name, parts)
        return np.asarray(numbers * self.factors(name, parts, numbers.shape))

    def decode_single(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers as float32 arithmetic gives them: the factor rounded, then the product."""
        numbers = self.numbers(name, parts)
        scales = self.factors(name, parts, numbers.shape)
        if self.globals == "weight_global_scale":
            # A quotient of two float32, rounded once.
            stem = name.removesuffix("weight")
            bare = _spread(
                self._scales(parts[stem + self.scales]), numbers.shape, *self._block(numbers.shape)
            )
            scales = bare / float(parts[stem + self.globals].double())
        return torch.from_numpy((numbers * scales.astype(np.float32).astype(np.float64)).astype(np.float32))

    def best(self, name: str, parts: Mapping[str, Tensor], matrix: Array) -> Array:
        """The nearest that the scales of `parts` can say of a matrix."""
        factors = self.factors(name, parts, matrix.shape)
        return np.asarray(
            np.sign(matrix) * self.table[nearest(np.abs(matrix) / factors, self.table)] * factors
        )

    def names(self, name: str) -> list[str]:
        """Names of all that a tensor is stored as, in the order in which `encode` writes them."""
        stem = name.removesuffix("weight")
        others = [stem + self.globals] if self.globals else []
        return [*self._names(name), *others, *([name + "_shape"] if self.shaped else [])]


FORMS = {
    "block fp8": Form("FP8 in blocks of 128 x 128", E4M3, "weight", "weight_scale_inv", "f32", 128, 128),
    "block fp8 e8m0": Form("FP8 in blocks of 128 x 128", E4M3, "weight", "scale", "e8m0", 128, 128),
    "channel fp8": Form("FP8 with a scale a row", E4M3, "weight", "weight_scale", "bf16", 1, 0),
    "tensor fp8": Form("FP8 with a scale a matrix", E4M3, "weight", "weight_scale", "f32", 0, 0),
    "mxfp8": Form("MXFP8", E4M3, "weight", "weight_scale", "u8", 1, 32),
    "gpt-oss": Form("MXFP4", E2M1, "_blocks", "_scales", "u8", 1, 32),
    "mxfp4": Form("MXFP4", E2M1, "weight_packed", "weight_scale", "u8", 1, 32),
    "deepseek fp4": Form("MXFP4", E2M1, "weight", "scale", "e8m0", 1, 32),
    "int4": Form("INT4 (pack-quantized)", INT4, "weight_packed", "weight_scale", "bf16", 1, 32, shaped=True),
    "nvfp4 modelopt": Form("NVFP4", E2M1, "weight", "weight_scale", "e4m3", 1, 16, "weight_scale_2"),
    "nvfp4": Form("NVFP4", E2M1, "weight_packed", "weight_scale", "e4m3", 1, 16, "weight_global_scale"),
}
"""By name, all that are made by tests."""
