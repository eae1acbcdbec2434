"""The passes of a sketch on an accelerator: a module's V and Δ lie there whole, and so the products take no time.

What bounds it is the way there. A chunk is copied into pinned memory while the one before is on its way, and travels
in its own, narrower dtype. The same numbers come out as of the engine's passes (sketch.py), but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import _engine
from .blocks import Matrix, Workspace, open_matrix
from .device import full_float32

if TYPE_CHECKING:
    from ..checkpoint.model import Model
    from ..pairing.module import Module

__all__ = ["TorchMoments", "measure"]

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class TorchMoments:
    """What _engine.SketchMoments holds, in the same form.

    Attributes:
        columns: Columns of Ω, k.
        tests: Columns of G, p.
        grams: (3, k + p, k + p), float64: [Y | P]ᵀ·M·[Y | P] for M = 1, K and K².
        cross: (p, k), float64: QᵀY with Q = KP.
        image: (p, p), float64: RᵀR with R = ΔᵀQ.
        v_squares: ‖V‖².
        delta_squares: ‖Δ‖².
        weight_squares: ‖W_aligned‖².
        inner: ⟨V, Δ⟩.
    """

    columns: int
    tests: int
    grams: bytes
    cross: bytes
    image: bytes
    v_squares: float
    delta_squares: float
    weight_squares: float
    inner: float


def measure(
    models: Mapping[str, Model],
    module: Module,
    drawn: _engine.Columns,
    *,
    look: int,
    columns: int,
    tests: int,
    delta_reference: str,
    device: str,
) -> TorchMoments:
    """Takes a module through the passes.

    Args:
        models: The models by role.
        module: A module of the pairing.
        drawn: The random columns.
        look: Which of them to take.
        columns: Of Ω.
        tests: Of G.
        delta_reference: What Δ is taken against, "aligned" or "base".
        device: Where to compute; 12·d_out·d_in bytes are taken there.
    """
    terms = module.terms
    opened = {
        role: open_matrix(models, role, module.name, terms[role]) for role in ("base", "aligned", "finetuned")
    }
    on = torch.device(device)
    workspace = Workspace(on)
    with full_float32(on):
        weights = {role: _load(matrix, on) for role, matrix in opened.items()}
        weight_squares = workspace.squares(weights["aligned"])
        delta = weights["finetuned"].sub_(weights[delta_reference])
        # Last, since it takes the place of the aligned weights.
        v = weights["aligned"].sub_(weights["base"])
        v_squares, delta_squares, inner = (
            workspace.squares(v),
            workspace.squares(delta),
            workspace.dot(v, delta),
        )
        if module.transposed:
            v, delta = v.T, delta.T
        width, d_in = columns + tests, module.shape[1]
        bytes_of_columns = bytearray(drawn.draw(d_in, look, width))
        factors = torch.frombuffer(bytes_of_columns, dtype=torch.float32).view(d_in, width).to(on)
        y = torch.cat([delta @ factors[:, :columns], v @ factors[:, columns:]], dim=1)
        z = v.T @ y
        # Against underflow of the products of small weights.
        scale = _power_of_two(float(torch.linalg.vector_norm(z)))
        z *= scale
        x = v @ z
        r = delta.T @ x[:, columns:]
        y64, z64, x64, r64 = (part.cpu().double().numpy() for part in (y, z, x, r))
    for matrix in opened.values():
        matrix.release()
    z64, x64, r64 = z64 / scale, x64 / scale, r64 / scale
    grams = np.stack([part.T @ part for part in (y64, z64, x64)])
    return TorchMoments(
        columns=columns,
        tests=tests,
        grams=grams.tobytes(),
        cross=(x64[:, columns:].T @ y64[:, :columns]).tobytes(),
        image=(r64.T @ r64).tobytes(),
        v_squares=v_squares,
        delta_squares=delta_squares,
        weight_squares=weight_squares,
        inner=inner,
    )


def _load(matrix: Matrix, device: torch.device) -> torch.Tensor:
    """Brings a matrix to the device as float32, chunk by chunk of rows, two of them under way at a time."""
    rows, columns = matrix.shape
    out = torch.empty(rows, columns, dtype=torch.float32, device=device)
    step = max(1, _CHUNK_BYTES // (4 * columns))
    every = slice(0, columns)
    pinned: list[torch.Tensor | None] = [None, None]
    sent: list[torch.cuda.Event | None] = [None, None]
    for number, start in enumerate(range(0, rows, step)):
        part = slice(start, min(start + step, rows))
        chunk = matrix.chunk(part, every)
        if device.type == "cuda":
            side = number % 2
            event = sent[side]
            if event is not None:
                event.synchronize()
            memory = pinned[side]
            if memory is None:
                memory = pinned[side] = torch.empty(step, columns, dtype=chunk.dtype, pin_memory=True)
            memory = memory[: chunk.shape[0]]
            memory.copy_(chunk)
            out[part].copy_(memory.to(device, non_blocking=True))
            event = sent[side] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        else:
            out[part].copy_(chunk if device.type == "cpu" else chunk.to(device))
        matrix.release_when_full()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return out


def _power_of_two(size: float) -> float:
    """The power of two that brings a positive size to about 1."""
    exponent = int(np.frexp(size)[1]) if np.isfinite(size) and size > 0.0 else 0
    return float(np.ldexp(1.0, max(-100, min(100, -exponent))))
