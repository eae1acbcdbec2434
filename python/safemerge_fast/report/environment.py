"""What a report says of the machine and of the programs that took part."""

from __future__ import annotations

import platform
import re
import resource
import sys
from pathlib import Path

from .. import _engine

__all__ = ["peak_memory", "versions"]


def versions() -> dict[str, str]:
    """Versions of what took part: torch is named only if it was imported."""
    found = {"safemerge-fast": _engine.__version__, "python": platform.python_version()}
    for name in ("numpy", "torch"):
        if name in sys.modules:
            found[name] = str(sys.modules[name].__version__)
    return found


def peak_memory() -> int:
    """Largest resident memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        # Unlike ru_maxrss, which starts from the memory that the parent had before exec.
        return int(re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.M)[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
