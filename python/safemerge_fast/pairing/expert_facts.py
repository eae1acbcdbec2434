"""What a configuration says of a model's experts, however deep in it that stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["HALVES", "ExpertFacts", "Spelling", "Split"]

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_SIZES = ("hidden_size", "d_model", "n_embd", "hidden_dim")

HALVES = frozenset(
    """
    afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 diffusion_gemma dots1 dots3_note ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4
    gemma4_unified glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 hy_v4_vl inkling inkling2 inkling2_loop jamba
    jetmoe kimi_linear kolibri1 laguna lara_mini lfm2_moe llama4 longcat_flash mellum mimo_v2_flash minimax
    minimax_m2 minimax_m3_vl mistral4 mistral_large4 mixtral muse_spark olmoe openai_privacy_filter phimoe
    qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp solar_open step3p5 step3p7
    unlimited_ocr zaya
    """.split()  # noqa: SIM905, a list would be as long as the file
)
"""Families whose fused experts transformers 5 computes with: the first half of the outputs is the gate."""
# Families in which gate and up alternate.
_ALTERNATING = frozenset({"gpt_oss"})
_ALTERNATING_LEAVES = frozenset({"w13_weight", "shared_w13_weight"})

# Families whose stacked experts are (in, out); only asked where shapes say nothing.
_TRANSPOSED = frozenset({"aria", "gpt_oss", "llama4", "openai_privacy_filter"})

# Families that store them as (in, out) and write them as (out, in), or the other way round.
_EITHER = frozenset({"qwen3_vl_moe"})


@dataclass(frozen=True, slots=True)
class Spelling:
    """What the tensors of single experts are called.

    Attributes:
        gate: The gate's matrix.
        up: The other one that takes the input.
        down: The one that gives the output.
        block: What holds the experts, where transformers calls it "mlp" once they are stacked.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str = "mlp"


_MIXTRAL = Spelling("w1", "w3", "w2", "block_sparse_moe")
_SPELLINGS = {
    "mixtral": _MIXTRAL,
    "minimax": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "lfm2_moe": Spelling("w1", "w3", "w2"),
    "deepseek_v4": Spelling("w1", "w3", "w2", "ffn"),
    "dbrx": Spelling("w1", "v1", "w2"),
}

_DEEPEST = 8


class Split:
    """Where gate and up lie in a matrix of both."""

    HALVES = "halves"
    ALTERNATING = "alternating"


@dataclass(frozen=True)
class ExpertFacts:
    """A configuration, asked about experts.

    Attributes:
        config: What config.json holds.
    """

    config: Mapping[str, Any]

    @cached_property
    def count(self) -> int | None:
        """How many experts a layer has."""
        return next((count for _, count in self._counted()), None)

    @cached_property
    def hidden_size(self) -> int | None:
        """The size of what experts take and give: said beside their number, or in a part around that."""
        path = next((path for path, _ in self._counted()), [self.config])
        for part in reversed(path):
            for name in _SIZES:
                if (size := _positive(part.get(name))) is not None:
                    return size
        return None

    @property
    def is_transposed(self) -> bool | None:
        """Whether the family stores stacked experts as (in, out); None if that is not known of it."""
        if self._families & _TRANSPOSED:
            return True
        if self._families & _EITHER:
            return None
        return False if self._families & HALVES else None

    def split(self, leaf: str) -> str | None:
        """Where gate and up lie in a tensor of that name; None if that is not known of the family."""
        if leaf in _ALTERNATING_LEAVES or self._families & _ALTERNATING:
            return Split.ALTERNATING
        return Split.HALVES if self._families & HALVES else None

    @property
    def spelling(self) -> Spelling:
        """What the tensors of single experts are called."""
        found = (_SPELLINGS[family] for family in sorted(self._families) if family in _SPELLINGS)
        return next(found, Spelling())

    @cached_property
    def _families(self) -> frozenset[str]:
        types = (part.get("model_type") for path in _parts(self.config, []) for part in path[-1:])
        return frozenset(kind.removesuffix("_text") for kind in types if isinstance(kind, str))

    def _counted(self) -> Iterator[tuple[list[Mapping[str, Any]], int]]:
        """The parts that say how many experts there are, with those around them."""
        for path in _parts(self.config, []):
            for name in _COUNTS:
                if (count := _positive(path[-1].get(name))) is not None:
                    yield path, count


def _parts(part: Mapping[str, Any], around: list[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """A configuration and all that are nested in it, each with those around it."""
    path = [*around, part]
    yield path
    if len(path) < _DEEPEST:
        for value in part.values():
            if isinstance(value, Mapping):
                yield from _parts(value, path)


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
