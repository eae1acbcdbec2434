"""What an analysis found, as data: written as JSON, read back, and checked before it is reused. No torch."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..documents import RECORD, parse_json, read_bytes
from ..errors import AnalysisError, OutputError
from . import table
from .score import Score, expect_keys, malformed, read_number, read_score, write_score

if TYPE_CHECKING:
    import pandas
    import polars

    from ..checkpoint.model import Model

__all__ = [
    "DELTA_REFERENCES",
    "ESTIMATORS",
    "VERSION",
    "Scores",
    "describe_source",
    "require_scores_of",
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


@dataclass(frozen=True, slots=True, repr=False)
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
    delta_reference: Literal["aligned", "base"]
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
            **self._head(),
            "modules": {name: write_score(score) for name, score in self.modules.items()},
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def _head(self) -> dict[str, Any]:
        """All but the modules, as JSON can hold it."""
        return {
            "version": self.version,
            "delta_reference": self.delta_reference,
            "device": self.device,
            "seconds": self.seconds,
            "estimator": self.estimator,
            "failure": self.failure,
            "seed": self.seed,
            "sources": {role: dict(source) for role, source in self.sources.items()},
        }

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the scores to a file, which merge takes as `scores`.

        Args:
            file: Its name; one that ends in .parquet is a table (this needs pyarrow or polars), any other is JSON.

        Raises:
            OutputError: It cannot be written.
            AnalysisError: What Parquet needs is not installed.
        """
        if table.names_parquet(path := Path(file)):
            table.write_parquet(path, self._head(), self.modules)
            return
        try:
            path.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Scores:
        """Reads what save wrote; what the file holds counts, not its name.

        Raises:
            AnalysisError: It cannot be read, or any part of it is not as it should be.
        """
        name = os.fspath(file)
        return cls.from_bytes(
            read_bytes(name, AnalysisError, limit=RECORD, subject=f"the scores {name}"), name
        )

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Scores:
        """As load, of a file's bytes; its name is for messages."""
        if table.is_parquet(data):
            document = table.parse_parquet(data, f"the scores {name}")
            try:
                return cls.from_document(document)
            except AnalysisError as error:
                raise AnalysisError(f"{name}: {error}") from error
        try:
            return cls.from_json(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise AnalysisError(f"the scores {name} are not text; write them again with analyze") from error
        except AnalysisError as error:
            raise AnalysisError(f"{name}: {error}") from error

    def to_pandas(self) -> pandas.DataFrame:
        """A table with a row for each module: name, layer, module type, all fields of its score, ratio and z.

        Raises:
            AnalysisError: pandas is not installed.
        """
        return table.to_pandas(self.modules)

    def to_polars(self) -> polars.DataFrame:
        """The same table for polars.

        Raises:
            AnalysisError: polars is not installed.
        """
        return table.to_polars(self.modules)

    def __repr__(self) -> str:
        rhos = [score.rho for score in self.modules.values() if score.rho is not None]
        found = f"ρ {min(rhos):.4g} to {max(rhos):.4g}" if rhos else "no ρ"
        return f"<Scores of {len(self.modules)} modules: {found}, Δ against {self.delta_reference}, {self.estimator}>"

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
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: Any) -> Scores:
        """Reads what JSON holds, or what a table and its metadata come to.

        Raises:
            AnalysisError: Any part of it is not as it should be.
        """
        expect_keys(
            document,
            "scores",
            {"version", "delta_reference", "device", "seconds", "sources", "modules"},
            frozenset({"estimator", "failure", "seed"}),
        )
        version = document["version"]
        if isinstance(version, bool) or version not in (1, VERSION):
            raise malformed("version", f"1 or {VERSION}", version)
        if document["delta_reference"] not in DELTA_REFERENCES:
            raise malformed("delta_reference", "aligned or base", document["delta_reference"])
        if not isinstance(document["device"], str):
            raise malformed("device", "a string", document["device"])
        estimator = document.get("estimator", "exact")
        if estimator not in ESTIMATORS:
            raise malformed("estimator", ", ".join(ESTIMATORS), estimator)
        failure, seed = document.get("failure"), document.get("seed")
        if failure is not None and not 0.0 < read_number("failure", failure) < 1.0:
            raise malformed("failure", "between 0 and 1", failure)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise malformed("seed", "a whole number", seed)
        for part in ("sources", "modules"):
            if not isinstance(document[part], dict):
                raise malformed(part, "an object", document[part])
        return cls(
            modules={name: read_score(name, value) for name, value in document["modules"].items()},
            delta_reference=document["delta_reference"],
            sources={role: _read_source(role, value) for role, value in document["sources"].items()},
            device=document["device"],
            seconds=read_number("seconds", document["seconds"]),
            estimator=estimator,
            failure=failure,
            seed=seed,
        )

    def to_csv(self) -> str:
        """Writes one line per module under a header line; what is undefined or not finite is left empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = table.columns_of(self.modules)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
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


def describe_source(model: Model) -> dict[str, Any]:
    """Says what a model is, for Scores.sources.

    Args:
        model: The model.

    Returns:
        "path"; "files", with size, mtime_ns and header_digest of each; and "sample", a digest of the first row
        of up to 256 tensors, because every fine-tune of a model has the same headers and sizes.
    """
    files = {file: facts.to_dict() for file, facts in model.headers.identity().items()}
    return {"path": model.location, "files": files, "sample": _sample(model)}


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
    import numpy as np

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


def require_scores_of(
    scores: Scores, models: Mapping[str, Model], delta_reference: str, subject: str
) -> None:
    """Refuses scores of other models or of another definition of Δ.

    Args:
        scores: The scores.
        models: The models given, by role.
        delta_reference: What Δ is to be taken against.
        subject: What messages call the scores.

    Raises:
        AnalysisError: They are not of these models.
    """
    if reason := scores.matches(models):
        raise AnalysisError(f"{subject} are not of these models: {reason}; write them again with analyze")
    if scores.delta_reference != delta_reference:
        raise AnalysisError(
            f"{subject} take Δ against the {scores.delta_reference} model, but this merge asks for "
            f"{delta_reference}; pass --delta-reference {scores.delta_reference} or write them again"
        )


def _read_source(role: str, value: Any) -> dict[str, Any]:
    """Reads what describe_source wrote."""
    what = f"source {role}"
    expect_keys(value, what, {"path", "files"}, frozenset({"sample"}))
    if not isinstance(value["files"], dict):
        raise malformed(f"files of {what}", "an object", value["files"])
    for file, facts in value["files"].items():
        expect_keys(
            facts,
            f"{file} of {what}",
            {"size", "mtime_ns", "header_digest"},
            frozenset({"ctime_ns", "inode", "device", "etag", "version"}),
        )
    for text in ("path", "sample"):
        if text in value and not isinstance(value[text], str):
            raise malformed(f"{text} of {what}", "a string", value[text])
    return dict(value)
