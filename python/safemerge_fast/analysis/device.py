"""Chooses the device that scores are computed on, and keeps its float32 products exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..errors import AnalysisError

__all__ = ["full_float32", "resolve_device"]


def resolve_device(spec: str) -> torch.device:
    """Turns the user's choice into a device that is there.

    Args:
        spec: "auto", "cpu", "cuda", "cuda:N" or "mps". "auto" is CUDA where there is one, else the CPU; MPS
            is taken only when asked for.

    Returns:
        The device.

    Raises:
        AnalysisError: The choice is none of these, or this machine or this build of torch does not have it.
    """
    kind, _, index = spec.partition(":")
    if spec == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if spec == "cpu":
        return torch.device("cpu")
    if spec == "mps":
        if not torch.backends.mps.is_available():
            raise AnalysisError("device mps is not available to torch on this machine; use --device cpu")
        return torch.device("mps")
    if kind == "cuda" and (spec == "cuda" or index.isdecimal()):
        if not torch.cuda.is_available():
            raise AnalysisError(
                f"device {spec} is not available to torch on this machine; use --device cpu, "
                f"or install a torch with CUDA and a driver for it"
            )
        if index and int(index) >= torch.cuda.device_count():
            raise AnalysisError(
                f"device {spec} does not exist; torch sees {torch.cuda.device_count()} CUDA devices, "
                f"numbered from 0"
            )
        return torch.device(spec)
    raise AnalysisError(f"device should be auto, cpu, cuda, cuda:N or mps, not {spec!r}")


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Makes float32 products use all 24 bits, whatever was set for training, and restores that afterwards.

    TF32 on CUDA and bfloat16 products on CPUs that have them would cost three digits.
    """
    autocast = nullcontext() if device.type == "mps" else torch.autocast(device.type, enabled=False)
    with torch.no_grad(), autocast:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later
            mkldnn: Any = torch.backends.mkldnn
            backends: tuple[Any, ...] = (torch.backends.cuda.matmul, mkldnn.matmul)
            before = [backend.fp32_precision for backend in backends]
            try:
                for backend in backends:
                    backend.fp32_precision = "ieee"
                yield
            finally:
                for backend, precision in zip(backends, before, strict=True):
                    backend.fp32_precision = precision
        else:
            precision = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(precision)
