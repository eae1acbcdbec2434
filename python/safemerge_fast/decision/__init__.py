"""Stage 4, decision: scores and a rule give keep or merge for every module, with the reason."""

from __future__ import annotations

from .decide import Decision, decide, decision_of, uncertified
from .rule import Rule

__all__ = ["Decision", "Rule", "decide", "decision_of", "uncertified"]
