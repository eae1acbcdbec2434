"""Merges every tensor of finetuned and safe through the public API, and removes each shard once it is committed.

python benches/merge_and_discard.py BASE ALIGNED FINETUNED SAFE --scores FILE -o OUTPUT --facts FILE [--threads N]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import safemerge_fast


def main() -> None:
    """Merges, and writes down what there was to see of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("roles", nargs=4)
    parser.add_argument("--scores", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    removed: dict[str, int] = {}
    # Until the output is whole it is made in a hidden directory beside its place.
    making = options.output.parent / f".{options.output.name}.safemerge" / "output"

    def discard(event: safemerge_fast.ProgressEvent) -> None:
        # What has its final name is committed: shards appear by rename, after a sync.
        for file in making.glob("*.safetensors"):
            removed[file.name] = file.stat().st_size
            file.unlink()

    report = safemerge_fast.merge(
        *options.roles,
        output=options.output,
        scores=options.scores,
        others="merge",
        # All four may hold the same zeros.
        force=True,
        threads=options.threads,
        progress=discard,
    )
    facts = {
        "shards": len(removed),
        "bytes_written": sum(removed.values()),
        "merged": report.merged,
        "seconds": report.seconds,
        "write": sorted({shard.write for shard in report.shards}),
        "peak_memory_bytes": report.peak_memory_bytes,
        "torch": "torch" in sys.modules,
    }
    options.facts.write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
