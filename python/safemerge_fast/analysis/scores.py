"""What the analysis found, as data: written as JSON, read back, and checked before it is reused. No torch."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ..documents import RECORD, parse_json, read_text
from ..errors import AnalysisError

if TYPE_CHECKING:
    from ..checkpoint.model import Model

__all__ = [
    "DELTA_REFERENCES",
    "ESTIMATORS",
    "VERSION",
    "Score",
    "Scores",
    "Undefined",
    "describe_source",
    "read_score",
    "read_scores",
    "signed_cosine",
    "write_score",
]

VERSION = 2
"""Version of the JSON that Scores.to_json writes; 1, which had no intervals, is read as well."""

DELTA_REFERENCES = ("aligned", "base")
"""The models that Δ can be taken against."""

ESTIMATORS = ("auto", "sketch", "exact")
"""How ρ can be measured."""

# How much of a model its sample looks at: the first row of at most this many tensors, at most this many bytes
# each.
_SAMPLED_TENSORS = 256
_SAMPLED_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Score:
    """How far one module's update lies in the safety subspace.

    With V = W_aligned - W_base and Δ = W_finetuned - W_reference, both (d_out, d_in); all norms are Frobenius
    norms.

    Attributes:
        rho: ρ = cos(V Vᵀ Δ, Δ), from 0 to 1, or its estimate; None where it is undefined.
        rho_null: The ρ expected of a random update, from V alone: ‖V‖² / (√d_out ‖V Vᵀ‖); None where
            undefined.
        v_norm: ‖V‖.
        delta_norm: ‖Δ‖.
        weight_norm: ‖W_aligned‖.
        v_rounding: Relative error of V that the rounding of both checkpoints to their dtypes predicts; NaN if
            V is 0.
        undefined: Why there is no ρ: "V is zero", "Δ is zero" or "non-finite values in <role> tensor <name>";
            None where there is one.
        rho_null_estimated: Whether rho_null is an estimate, good to a few percent, because computing it would have
            taken longer than ρ.
        nonfinite: Whether there is no ρ because a model holds NaN or infinity.
        cos_v_delta: ⟨V, Δ⟩ / (‖V‖ ‖Δ‖), from -1 to 1; None where it is undefined, and in scores of early versions.
        rho_low: Lower end of the interval that holds ρ, but for the analysis' failure probability; ρ where it is exact.
        rho_high: Upper end of it.
        columns: Random columns that ρ was estimated from; 0 where it is exact.
        null_sd: Standard deviation of log ρ over random rotations of Δ, good to about 40 %; None where undefined, and in
            scores of early versions.
    """

    rho: float | None
    rho_null: float | None
    v_norm: float
    delta_norm: float
    weight_norm: float
    v_rounding: float
    undefined: str | None
    rho_null_estimated: bool = False
    nonfinite: bool = False
    cos_v_delta: float | None = None
    rho_low: float | None = None
    rho_high: float | None = None
    columns: int = 0
    null_sd: float | None = None

    def __post_init__(self) -> None:
        if self.rho_low is None:
            object.__setattr__(self, "rho_low", self.rho)
        if self.rho_high is None:
            object.__setattr__(self, "rho_high", self.rho)

    @property
    def ratio(self) -> float | None:
        """ρ/ρ_null: 1 is what chance gives, whatever the module's shape; None where either is undefined."""
        return None if self.rho is None or not self.rho_null else self.rho / self.rho_null

    @property
    def z(self) -> float | None:
        """(log ρ - log ρ_null) / null_sd: how far ρ is from chance, in standard deviations of chance."""
        if not self.ratio or not self.null_sd:
            return None
        return math.log(self.ratio) / self.null_sd


@dataclass(frozen=True, slots=True)
class Undefined:
    """Why a module has no ρ.

    Attributes:
        reason: In words, as Score.undefined has it.
        nonfinite: Whether it is that a model holds NaN or infinity.
    """

    reason: str
    nonfinite: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one analysis and what they were computed from.

    Attributes:
        modules: Scores by module name (the fine-tuned model's tensor, or one expert of it), in file order.
        delta_reference: The model that Δ was taken against, "aligned" or "base".
        sources: For each role what describe_source says of it.
        device: Where the scores were computed, as torch names it.
        seconds: How long that took.
        estimator: How ρ was measured: "exact", "sketch", or "auto", which is either.
        failure: Probability that any interval of the run misses; None where all scores are exact.
        seed: Of the random columns; None likewise.
        version: Version of the format, VERSION.
    """

    modules: Mapping[str, Score]
    delta_reference: str
    sources: Mapping[str, Mapping[str, Any]]
    device: str
    seconds: float
    estimator: str = "exact"
    failure: float | None = None
    seed: int | None = None
    version: int = VERSION

    def to_json(self) -> str:
        """Writes the scores as JSON that from_json reads; numbers that are not finite become null."""
        document = {
            "version": self.version,
            "delta_reference": self.delta_reference,
            "device": self.device,
            "seconds": self.seconds,
            "estimator": self.estimator,
            "failure": self.failure,
            "seed": self.seed,
            "sources": {role: dict(source) for role, source in self.sources.items()},
            "modules": {name: write_score(score) for name, score in self.modules.items()},
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Reads what to_json wrote.

        Raises:
            AnalysisError: The text is not JSON, is of another version, or any part of it is not as it should
                be.
        """
        try:
            document = parse_json(text, AnalysisError, subject="the scores", limit=RECORD)
        except AnalysisError as error:
            raise AnalysisError(f"{error}; write them again with analyze") from error
        _expect_keys(
            document,
            "scores",
            {"version", "delta_reference", "device", "seconds", "sources", "modules"},
            frozenset({"estimator", "failure", "seed"}),
        )
        version = document["version"]
        if isinstance(version, bool) or version not in (1, VERSION):
            raise _malformed("version", f"1 or {VERSION}", version)
        if document["delta_reference"] not in DELTA_REFERENCES:
            raise _malformed("delta_reference", "aligned or base", document["delta_reference"])
        if not isinstance(document["device"], str):
            raise _malformed("device", "a string", document["device"])
        estimator = document.get("estimator", "exact")
        if estimator not in ESTIMATORS:
            raise _malformed("estimator", ", ".join(ESTIMATORS), estimator)
        failure, seed = document.get("failure"), document.get("seed")
        if failure is not None and not 0.0 < _read_number("failure", failure) < 1.0:
            raise _malformed("failure", "between 0 and 1", failure)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise _malformed("seed", "a whole number", seed)
        for part in ("sources", "modules"):
            if not isinstance(document[part], dict):
                raise _malformed(part, "an object", document[part])
        return cls(
            modules={name: read_score(name, value) for name, value in document["modules"].items()},
            delta_reference=document["delta_reference"],
            sources={role: _read_source(role, value) for role, value in document["sources"].items()},
            device=document["device"],
            seconds=_read_number("seconds", document["seconds"]),
            estimator=estimator,
            failure=failure,
            seed=seed,
        )

    def to_csv(self) -> str:
        """Writes one line per module under a header line; what is undefined or not finite is left empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", *_SCORE_FIELDS])
        for name, score in self.modules.items():
            writer.writerow([name, *(_finite(getattr(score, field)) for field in _SCORE_FIELDS)])
        return text.getvalue()

    def matches(self, models: Mapping[str, Model]) -> str | None:
        """Compares the models that the scores were computed from with those given.

        Paths and modification times may differ: a copy of a checkpoint is the same checkpoint. Header digests
        and sizes may not, and neither may the sample of the data, which tells two fine-tunes of one model
        apart.

        Args:
            models: The models given, by role. Roles that the scores know nothing of are not looked at.

        Returns:
            None if the scores belong to these models, else the reason why not, in words.
        """
        for role, source in self.sources.items():
            model = models.get(role)
            if model is None:
                continue
            expected = {
                file: (facts["size"], facts["header_digest"]) for file, facts in source["files"].items()
            }
            found = {
                file: (facts.size, facts.header_digest) for file, facts in model.headers.identity().items()
            }
            for file in sorted(expected.keys() | found.keys()):
                if file not in found:
                    return f"{role} was scored with {file}, which {model.path} does not have"
                if file not in expected:
                    return f"{role} was scored without {file}, which {model.path} has"
                if expected[file] != found[file]:
                    return (
                        f"{file} in {model.path} has another size or header than the {role} that was scored"
                    )
            if "sample" in source and source["sample"] != _sample(model):
                return f"{model.path} has other weights than the {role} that was scored ({source['path']})"
        return None


def signed_cosine(inner: float, left_norm: float, right_norm: float) -> float | None:
    """The cosine of two matrices by their inner product and norms, kept within -1 to 1 against rounding.

    None where float32 did not hold the inner product, or a norm is zero.
    """
    scale = left_norm * right_norm
    if not (math.isfinite(inner) and math.isfinite(scale) and scale > 0.0):
        return None
    return max(-1.0, min(1.0, inner / scale))


def describe_source(model: Model) -> dict[str, Any]:
    """Says what a model is, for Scores.sources.

    Args:
        model: The model.

    Returns:
        "path"; "files", with size, mtime_ns and header_digest of each; and "sample", a digest of the first row
        of up to 256 tensors, because every fine-tune of a model has the same headers and sizes.
    """
    files = {file: facts.to_dict() for file, facts in model.headers.identity().items()}
    return {"path": str(model.path), "files": files, "sample": _sample(model)}


_ADAPTER_SETTINGS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "trainable_token_indices",
)


def _sample(model: Model) -> str:
    """Digests the beginning of stored tensors spread evenly over the model's names."""
    tensors = sorted(
        (tensor for tensor in model.headers.stored_tensors if tensor.shape and tensor.nbytes),
        key=lambda tensor: tensor.name,
    )
    step = max(1, math.ceil(len(tensors) / _SAMPLED_TENSORS))
    digest = hashlib.blake2b(digest_size=16)
    # An adapter's update depends on its configuration as much as on its factors.
    settings = {key: model.config[key] for key in _ADAPTER_SETTINGS if key in model.config}
    if "peft_type" in model.config:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors[::step]:
        row = np.asarray(model.headers.rows(tensor.name, 0, 1, stored=True))
        digest.update(tensor.name.encode() + b"\0" + row[:_SAMPLED_BYTES].tobytes())
        # Touching one page maps its neighbours too; over hundreds of tensors that would add up.
        model.headers.release(tensor.name, stored=True)
    return digest.hexdigest()


_SCORE_FIELDS = tuple(field.name for field in fields(Score))


def _finite(value: float | str | None) -> float | str | None:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _malformed(what: str, expected: str, found: object) -> AnalysisError:
    return AnalysisError(
        f"in the scores, {what} should be {expected}, not {found!r}; write them again with analyze"
    )


def _expect_keys(value: object, what: str, keys: set[str], optional: frozenset[str] = frozenset()) -> None:
    if not isinstance(value, dict):
        raise _malformed(what, "an object", value)
    if missing := sorted(keys - value.keys()):
        raise AnalysisError(f"in the scores, {what} has no {missing[0]!r}; write them again with analyze")
    if unknown := sorted(value.keys() - keys - optional):
        raise AnalysisError(
            f"in the scores, {what} has an unknown {unknown[0]!r}; write them again with analyze"
        )


def _read_number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _malformed(what, "a finite number", value)
    return float(value)


# What scores of early versions do not have: flags, a cosine, intervals.
_FLAGS = frozenset({"rho_null_estimated", "nonfinite"})
_OPTIONAL_FIELDS = _FLAGS | {"cos_v_delta", "rho_low", "rho_high", "columns", "null_sd"}


def write_score(score: Score) -> dict[str, Any]:
    """A score as JSON can hold it."""
    return {field: _finite(getattr(score, field)) for field in _SCORE_FIELDS}


def read_score(name: str, value: Any) -> Score:
    """Reads what write_score wrote; a null norm was not finite.

    Raises:
        AnalysisError: Any part of it is not as it should be.
    """
    _expect_keys(value, name, set(_SCORE_FIELDS) - _OPTIONAL_FIELDS, _OPTIONAL_FIELDS)
    numbers = {
        field: None if value[field] is None else _read_number(f"{field} of {name}", value[field])
        for field in _SCORE_FIELDS
        if field != "undefined" and field not in _OPTIONAL_FIELDS
    }
    undefined = value["undefined"]
    # What early versions said of values that are not finite.
    known_flags = {"nonfinite": isinstance(undefined, str) and undefined.startswith("non-finite values")}
    flags = {field: value.get(field, known_flags.get(field, False)) for field in _FLAGS}
    for field, flag in flags.items():
        if not isinstance(flag, bool):
            raise _malformed(f"{field} of {name}", "true or false", flag)
    if undefined is not None and not isinstance(undefined, str):
        raise _malformed(f"undefined of {name}", "a string or null", undefined)
    if (numbers["rho"] is None) == (undefined is None):
        raise AnalysisError(
            f"in the scores, {name} should have either rho or undefined; write them again with analyze"
        )

    low, high, null_sd = (
        None if value.get(field) is None else _read_number(f"{field} of {name}", value[field])
        for field in ("rho_low", "rho_high", "null_sd")
    )
    columns = value.get("columns", 0)
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 0:
        raise _malformed(f"columns of {name}", "a whole number", columns)
    rho = numbers["rho"]
    if rho is not None and not (rho if low is None else low) <= rho <= (rho if high is None else high):
        raise _malformed(f"the interval of {name}", "around rho", (low, high))

    def known(field: str) -> float:
        number = numbers[field]
        return math.nan if number is None else number

    return Score(
        rho=rho,
        rho_null=numbers["rho_null"],
        v_norm=known("v_norm"),
        delta_norm=known("delta_norm"),
        weight_norm=known("weight_norm"),
        v_rounding=known("v_rounding"),
        undefined=undefined,
        rho_null_estimated=flags["rho_null_estimated"],
        nonfinite=flags["nonfinite"],
        cos_v_delta=_read_cosine(f"cos_v_delta of {name}", value.get("cos_v_delta")),
        rho_low=low,
        rho_high=high,
        columns=columns,
        null_sd=null_sd,
    )


def _read_cosine(what: str, value: object) -> float | None:
    number = None if value is None else _read_number(what, value)
    if number is not None and abs(number) > 1.0:
        raise _malformed(what, "from -1 to 1", number)
    return number


def read_scores(file: str, models: Mapping[str, Model], delta_reference: str) -> Scores:
    """Reads scores and refuses those of other models or of another definition of Δ.

    Args:
        file: What Scores.to_json was written to.
        models: The models given, by role.
        delta_reference: What Δ is to be taken against.

    Raises:
        AnalysisError: They cannot be read, or are not of these models.
    """
    text = read_text(file, AnalysisError, limit=RECORD, subject=f"the scores {file}")
    try:
        scores = Scores.from_json(text)
    except AnalysisError as error:
        raise AnalysisError(f"{file}: {error}") from error
    if reason := scores.matches(models):
        raise AnalysisError(
            f"the scores {file} are not of these models: {reason}; write them again with analyze"
        )
    if scores.delta_reference != delta_reference:
        raise AnalysisError(
            f"the scores {file} take Δ against the {scores.delta_reference} model, but this merge asks for "
            f"{delta_reference}; pass --delta-reference {scores.delta_reference} or write them again"
        )
    return scores


def _read_source(role: str, value: Any) -> dict[str, Any]:
    """Reads what describe_source wrote."""
    what = f"source {role}"
    _expect_keys(value, what, {"path", "files"}, frozenset({"sample"}))
    if not isinstance(value["files"], dict):
        raise _malformed(f"files of {what}", "an object", value["files"])
    for file, facts in value["files"].items():
        _expect_keys(
            facts,
            f"{file} of {what}",
            {"size", "mtime_ns", "header_digest"},
            frozenset({"ctime_ns", "inode", "device"}),
        )
    for text in ("path", "sample"):
        if text in value and not isinstance(value[text], str):
            raise _malformed(f"{text} of {what}", "a string", value[text])
    return dict(value)
