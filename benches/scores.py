"""Writes scores for models that nobody analysed, so that the merge alone is timed.

python benches/scores.py BASE ALIGNED FINETUNED -o SCORES [--rho RHO]

ρ is drawn evenly from 0 to 1, so that the default threshold merges about a third of the modules; or it is RHO.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from safemerge_fast.analysis.score import Score
from safemerge_fast.analysis.scores import Scores, describe_source
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.pairing.rows import pair


def main() -> None:
    """Writes the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rho", type=float)
    options = parser.parse_args()
    roles = dict(zip(("base", "aligned", "finetuned"), options.models, strict=True))
    models = {role: open_model(role, path) for role, path in roles.items()}
    draw = random.Random(0)
    modules = {
        row.name: Score(
            rho=draw.random() if options.rho is None else options.rho,
            rho_null=0.7,
            v_norm=1.0,
            delta_norm=1.0,
            weight_norm=100.0,
            v_rounding=0.0,
            undefined=None,
            cos_v_delta=0.0,
        )
        for row in pair(models).rows
        if row.analysed
    }
    sources = {role: describe_source(model) for role, model in models.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(Scores(modules, "aligned", sources, "none", 0.0).to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
