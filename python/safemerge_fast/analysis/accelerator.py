"""Whether an analysis may run on something else than the CPU, found out without loading torch, which takes a second."""

from __future__ import annotations

from pathlib import Path

__all__ = ["device_name", "runs_on_cpu"]

# What the drivers of NVIDIA, of AMD and of WSL show.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def runs_on_cpu(spec: str) -> bool:
    """Whether a choice of device certainly comes to the CPU.

    Args:
        spec: What device.resolve_device takes.
    """
    return spec == "cpu" or (spec == "auto" and not any(map(_exists, _DRIVERS)))


def device_name(spec: str) -> str:
    """The device that a choice comes to, as torch names it.

    Raises:
        AnalysisError: It is none, or is not there.
    """
    if runs_on_cpu(spec):
        return "cpu"
    from .device import resolve_device

    return str(resolve_device(spec))


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return True
