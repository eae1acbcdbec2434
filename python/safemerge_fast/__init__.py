"""Repairs the safety of fine-tuned language models by merging weights: SafeMERGE, streamed from disk to disk.

The public API is what __all__ lists. Importing the package loads neither torch nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._engine import __version__ as __version__
    from .analysis.scores import Score as Score
    from .analysis.scores import Scores as Scores
