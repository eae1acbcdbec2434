"""What the user asked for: one frozen record whose fields are the flags of `merge`, checked at once."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...decision import Rule
from ...errors import PlanError
from ...settings import (
    COMPATIBILITIES,
    OUTPUT_FORMATS,
    check_dtype,
    check_read_backend,
    check_sizes,
    check_threads,
)

__all__ = ["MergeConfiguration"]

# These change how the work is done, or whether it may start, but not one byte of the weights.
_NOT_SHOWN = frozenset(
    {"resume", "overwrite", "threads", "memory_budget", "read_backend", "scores", "device"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfiguration:
    """A merge, as asked for. `merge` documents each field.

    Raises:
        AnalysisError: A field of the rule is out of range.
        PlanError: Another field is.
    """

    base: str
    aligned: str
    finetuned: str
    safe: str | None = None
    output: str
    threshold: float = 0.35
    alpha: float = 0.8
    method: str = "linear"
    density: float | None = None
    seed: int | None = None
    parameters: str | None = None
    select: str = "threshold"
    granularity: str = "module"
    delta_reference: str = "aligned"
    include: str | None = None
    exclude: str | None = None
    others: str = "keep"
    on_undefined: str = "merge"
    device: str = "auto"
    dtype: str = "auto"
    output_format: str = "auto"
    adapter_rank: int | None = None
    compat: str | None = None
    max_shard_size: int | str | None = None
    threads: int | None = None
    memory_budget: int | str | None = None
    read_backend: str = "auto"
    scores: str | None = None
    resume: bool = False
    overwrite: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        for role in ("base", "aligned", "finetuned", "safe", "output", "scores"):
            value = getattr(self, role)
            if value is not None:
                object.__setattr__(self, role, os.fspath(value))
        check_sizes(self)
        if not 0.0 <= self.alpha <= 1.0:
            raise PlanError(f"alpha should lie between 0 and 1, not at {self.alpha}")
        check_dtype(self.dtype)
        if self.delta_reference not in ("aligned", "base"):
            raise PlanError(f"delta_reference should be aligned or base, not {self.delta_reference!r}")
        check_threads(self.threads)
        check_read_backend(self.read_backend)
        self._check_output_format()
        if self.resume and self.overwrite:
            raise PlanError("resume continues an output and overwrite starts it anew; give one of them")
        for name in ("include", "exclude"):
            pattern = getattr(self, name)
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise PlanError(f"{name} {pattern!r} is not a regular expression: {error}") from error
        self.rule()

    def _check_output_format(self) -> None:
        if self.output_format not in OUTPUT_FORMATS:
            raise PlanError(
                f"output_format should be {', '.join(OUTPUT_FORMATS)}, not {self.output_format!r}"
            )
        if self.compat is not None and self.compat not in COMPATIBILITIES:
            raise PlanError(f"compat should be {' or '.join(COMPATIBILITIES)}, not {self.compat!r}")
        if self.adapter_rank is not None and self.adapter_rank < 1:
            raise PlanError(f"adapter_rank should be at least 1, not {self.adapter_rank}")
        if self.output_format == "adapter" and self.method != "linear":
            raise PlanError(
                f"an adapter holds sums of products, which {self.method} does not make; leave the method linear or "
                f"pass --output-format checkpoint"
            )
        if self.adapter_rank is not None and self.compat is not None:
            raise PlanError("adapter_rank truncates, and compat reproduces what PEFT makes; give one of them")

    def rule(self) -> Rule:
        """The rule of the decision."""
        return Rule(
            threshold=self.threshold,
            select=self.select,
            granularity=self.granularity,
            on_undefined=self.on_undefined,
            others=self.others,
        )

    def roles(self) -> dict[str, str]:
        """What was given for each role, in the order of checkpoint.ROLES; "safe" may be missing."""
        given = {role: getattr(self, role) for role in ("base", "aligned", "finetuned", "safe")}
        return {role: spec for role, spec in given.items() if spec is not None}

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as JSON can hold them."""
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """The fields that decide the output's weights, by name, as far as they are set."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in _NOT_SHOWN and value is not None
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MergeConfiguration:
        """Reads what to_dict wrote.

        Raises:
            PlanError: A field is unknown, missing or out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise PlanError(f"a merge has no setting {unknown[0]!r}")
        if missing := sorted({"base", "aligned", "finetuned", "output"} - values.keys()):
            raise PlanError(f"the merge does not say its {missing[0]}")
        return cls(**values)

    def command(self) -> str:
        """The command line that makes the same weights: roles, output, and what differs from the defaults."""
        words = ["safemerge-fast", "merge"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _NOT_SHOWN or value is None or value == field.default:
                continue
            words.append(f"--{field.name.replace('_', '-')}")
            if value is not True:
                words.append(str(value))
        return shlex.join(words)
