"""Every merge method with parameters under which it does all it can, for tests that hold of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodCase:
    """A method, how many models it gets, and its parameters; every operand has the same but for the weight."""

    method: str
    count: int
    has_base: bool
    shared: dict[str, Any] = field(default_factory=dict)
    each: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name for test reports."""
        words = [f"{key}-{value}" for key, value in {**self.shared, **self.each}.items() if key != "weight"]
        return "-".join([self.method, *words, "base" if self.has_base else "nobase"])

    def operands(self) -> list[dict[str, Any]]:
        """The parameters of each operand; weights sum to one."""
        weights = {1: [1.0], 2: [0.75, 0.25], 3: [0.5, 0.375, 0.125]}[self.count]
        return [{**self.each, **({"weight": w} if "weight" in self.each else {})} for w in weights]


WEIGHT = {"weight": 1.0}
SPARSE = {"weight": 1.0, "density": 0.4}
BAND = {**SPARSE, "gamma": 0.1}
RANKED = {**SPARSE, "epsilon": 0.2}
L1 = {"rescale": "l1"}

CASES = [
    MethodCase("linear", 3, False, {}, WEIGHT),
    MethodCase("passthrough", 1, False, {}, {"scale": 1.0}),
    MethodCase("task_arithmetic", 3, True, {}, WEIGHT),
    MethodCase("ties", 3, True, {}, SPARSE),
    MethodCase("ties", 2, True, L1, SPARSE),
    MethodCase("dare_linear", 2, True, {}, SPARSE),
    MethodCase("dare_linear", 2, True, L1, SPARSE),
    MethodCase("dare_ties", 3, True, {"normalize": True}, SPARSE),
    MethodCase("breadcrumbs", 2, True, {}, BAND),
    MethodCase("breadcrumbs_ties", 3, True, L1, BAND),
    MethodCase("della", 3, True, {}, RANKED),
    MethodCase("della_linear", 2, True, L1, RANKED),
    MethodCase("sce", 3, True),
    MethodCase("sce", 3, True, {"select_topk": 0.3}),
    MethodCase("slerp", 1, True, {"t": 0.3}),
    MethodCase("nuslerp", 2, False, {}, WEIGHT),
    MethodCase("nuslerp", 2, True, {}, WEIGHT),
    MethodCase("nuslerp", 2, False, {"nuslerp_flatten": False}, WEIGHT),
    MethodCase("nuslerp", 2, True, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, WEIGHT),
    MethodCase("multislerp", 3, False, {}, WEIGHT),
    MethodCase("multislerp", 3, True, {}, WEIGHT),
    MethodCase("multislerp", 2, False, {"eps": 0.0}, WEIGHT),
    MethodCase("karcher", 3, False),
    MethodCase("karcher", 2, False, {"tol": 0.0}),
    MethodCase("model_stock", 3, True),
    MethodCase("model_stock", 2, True, {"filter_wise": True}),
    MethodCase("nearswap", 1, True, {"t": 0.05}),
]
