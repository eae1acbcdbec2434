"""The plan: layout over files, operations per tensor, and what the engine says of the result."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from safemerge_fast import PairingError, PlanError, _engine
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.decision import Decision
from safemerge_fast.pairing.rows import Row, pair
from safemerge_fast.plan.shards import (
    Blend,
    Shard,
    compose,
    index_document,
    lay_out,
    output_dtype,
    plan_document,
    plan_shard,
    tensor_bytes,
)
from safemerge_fast.recipes.safemerge.blend import safemerge
from safemerge_fast.sizes import format_size, parse_size


def row(name: str, file: str = "model.safetensors", dtype: str = "BF16", shape=(4, 2), names=None) -> Row:
    return Row(
        name=name,
        file=file,
        dtype=dtype,
        shape=shape,
        names=names or {"finetuned": name, "safe": name},
        module_type="q_proj",
        layer=None,
        analysed=True,
        transposed=False,
        reason="projection",
    )


def files(shards: list[Shard]) -> list[str]:
    return [shard.file for shard in shards]


class TestLayout:
    def test_keeps_the_shards_of_the_finetuned_model(self) -> None:
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        rows = [row("a", names[0]), row("b", names[0]), row("c", names[1])]
        shards = lay_out(rows)
        assert files(shards) == names
        assert [[r.name for r in shard.rows] for shard in shards] == [["a", "b"], ["c"]]

    @pytest.mark.parametrize(
        "file", ["model.safetensors", "model.fp16.safetensors", "model-00001-of-00001.safetensors"]
    )
    def test_a_single_file_gets_the_one_name_that_needs_no_index(self, file: str) -> None:
        assert files(lay_out([row("a", file), row("b", file)])) == ["model.safetensors"]

    @pytest.mark.parametrize(
        "names",
        [
            ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"),
            ("model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors"),
            ("a.safetensors", "model-00002-of-00002.safetensors"),
        ],
    )
    def test_other_names_become_standard_ones(self, names: tuple[str, str]) -> None:
        shards = lay_out([row("a", names[0]), row("b", names[1])])
        assert files(shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert [shard.rows[0].name for shard in shards] == ["a", "b"]

    @given(
        lengths=st.lists(st.integers(min_value=0, max_value=40), min_size=1, max_size=30),
        limit=st.integers(min_value=1, max_value=100),
    )
    def test_max_shard_size_fills_files_greedily_in_order(self, lengths: list[int], limit: int) -> None:
        rows = [row(f"t{number}", dtype="U8", shape=(length,)) for number, length in enumerate(lengths)]
        shards = lay_out(rows, max_shard_size=limit)
        assert [r for shard in shards for r in shard.rows] == rows
        sizes = [[math.prod(r.shape) for r in shard.rows] for shard in shards]
        for number, size in enumerate(sizes):
            assert size, "no file is empty"
            assert sum(size) <= limit or len(size) == 1 or sum(size[1:]) == 0
            if number + 1 < len(sizes):
                assert sum(size) + sizes[number + 1][0] > limit, "the next tensor would have fitted"
        count = len(shards)
        expected = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        assert files(shards) == (expected if count > 1 else ["model.safetensors"])

    def test_max_shard_size_counts_output_bytes(self) -> None:
        rows = [row("a"), row("b")]  # 16 bytes each as BF16, 32 as F32
        assert len(lay_out(rows, max_shard_size=32)) == 1
        assert len(lay_out(rows, max_shard_size=32, dtype="float32")) == 2


class TestDtype:
    @pytest.mark.parametrize(
        ("stored", "asked", "expected"),
        [
            ("BF16", "auto", "BF16"),
            ("BF16", "float32", "F32"),
            ("F64", "float16", "F16"),
            ("F32", "bfloat16", "BF16"),
            ("I64", "float16", "I64"),
            ("BOOL", "bfloat16", "BOOL"),
        ],
    )
    def test_only_float_tensors_change(self, stored: str, asked: str, expected: str) -> None:
        assert output_dtype(row("a", dtype=stored), asked) == expected

    @pytest.mark.parametrize("dtype", ["BOOL", "U8", "I16", "F16", "BF16", "I32", "F32", "I64", "F64"])
    def test_bytes_are_those_of_torch(self, dtype: str) -> None:
        torch_dtype = {
            "BOOL": torch.bool,
            "U8": torch.uint8,
            "I16": torch.int16,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "I32": torch.int32,
            "F32": torch.float32,
            "I64": torch.int64,
            "F64": torch.float64,
        }[dtype]
        assert (
            tensor_bytes(row("a", dtype=dtype, shape=(3, 5)), "auto")
            == torch.empty(3, 5, dtype=torch_dtype).nbytes
        )


class TestOperations:
    BLEND = Blend("linear", {"normalize": False}, {"finetuned": 0.75, "safe": 0.25})

    def test_says_copy_and_merge_by_each_role_s_own_name(self) -> None:
        rows = (row("kept"), row("changed", names={"finetuned": "changed", "safe": "prefix.changed"}))
        decisions = {"kept": Decision(False, ""), "changed": Decision(True, "")}
        planned = plan_shard(Shard("model.safetensors", rows), decisions, self.BLEND)
        assert planned == {
            "file": "model.safetensors",
            "metadata": {"format": "pt"},
            "tensors": [
                {
                    "name": "kept",
                    "dtype": "BF16",
                    "shape": [4, 2],
                    "copy": {"source": "finetuned", "tensor": "kept"},
                },
                {
                    "name": "changed",
                    "dtype": "BF16",
                    "shape": [4, 2],
                    "merge": {
                        "method": "linear",
                        "parameters": {"normalize": False},
                        "operands": [
                            {"operand": {"source": "finetuned", "tensor": "changed"}, "weight": 0.75},
                            {"operand": {"source": "safe", "tensor": "prefix.changed"}, "weight": 0.25},
                        ],
                    },
                },
            ],
        }

    def test_refuses_to_merge_with_a_tensor_that_is_not_there(self) -> None:
        lonely = row("lonely", names={"finetuned": "lonely"})
        with pytest.raises(PairingError, match=r"lonely .*the safe model has no tensor"):
            plan_shard(Shard("f", (lonely,)), {"lonely": Decision(True, "")}, self.BLEND)

    @given(alpha=st.floats(min_value=0.0, max_value=1.0))
    def test_safemerge_is_the_paper_s_sum_without_the_aligned_model(self, alpha: float) -> None:
        weights = safemerge(alpha, safe_role="safe").weights
        aligned, finetuned, safe = 0.3, -1.7, 0.9
        paper = aligned + alpha * (finetuned - aligned) + (1 - alpha) * (safe - aligned)
        assert list(weights) == ["finetuned", "safe"]
        assert weights["finetuned"] * finetuned + weights["safe"] * safe == pytest.approx(paper, abs=1e-15)

    def test_describes_itself(self) -> None:
        blend = safemerge(0.8, safe_role="aligned")
        both = row("w", names={"finetuned": "w", "aligned": "w"})
        merged, kept = (compose(both, Decision(merge, ""), blend).describe() for merge in (True, False))
        assert (merged, kept) == ("linear: 0.8 finetuned + 0.2 aligned", "copy: finetuned")


class TestDocument:
    def plan(self, quartet: dict[str, Path]) -> tuple[dict, list[dict]]:
        models = {role: open_model(role, path) for role, path in quartet.items()}
        rows = pair(models).rows
        decisions = {r.name: Decision(r.analysed, "") for r in rows}
        blend = safemerge(0.5, safe_role="safe")
        shards = [plan_shard(shard, decisions, blend) for shard in lay_out(rows)]
        return models, shards

    def test_the_engine_accepts_it(self, quartet: dict[str, Path]) -> None:
        models, shards = self.plan(quartet)
        plan = _engine.Plan(json.dumps(plan_document(models, shards)))
        assert plan.shards == [shard["file"] for shard in shards]
        merged = {t["name"] for shard in shards for t in shard["tensors"] if "merge" in t}
        tensors = models["finetuned"].headers.tensors
        assert plan.bytes_read == sum(t.nbytes * (2 if t.name in merged else 1) for t in tensors)

    def test_one_shard_alone_is_the_same_work_as_within_the_whole(self, quartet: dict[str, Path]) -> None:
        models, shards = self.plan(quartet)
        whole = _engine.Plan(json.dumps(plan_document(models, shards)))
        for shard in shards:
            alone = _engine.Plan(json.dumps(plan_document(models, [shard])))
            assert alone.shard_digest(shard["file"]) == whole.shard_digest(shard["file"])

    def test_lists_only_files_that_are_read(self, quartet: dict[str, Path]) -> None:
        models, shards = self.plan(quartet)
        sources = plan_document(models, shards[:1])["sources"]
        assert set(sources) == {"finetuned", "safe"}
        file = shards[0]["file"]
        for role, source in sources.items():
            assert source["path"] == str(quartet[role])
            assert set(source["files"]) == {file}
            assert source["files"][file]["size"] == (quartet[role] / file).stat().st_size

    def test_index_says_what_torch_counts(self, quartet: dict[str, Path]) -> None:
        _, shards = self.plan(quartet)
        loaded = {shard["file"]: load_file(quartet["finetuned"] / shard["file"]) for shard in shards}
        tensors = [tensor for content in loaded.values() for tensor in content.values()]
        index = index_document(shards)
        assert index["metadata"] == {
            "total_parameters": sum(tensor.numel() for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        }
        assert index["weight_map"] == {name: file for file, content in loaded.items() for name in content}


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("5GB", 5 * 10**9),
            ("500 MB", 5 * 10**8),
            ("1.5kb", 1500),
            ("4GiB", 2**32),
            ("2Mi", 2**21),
            ("3T", 3 * 10**12),
            ("1024", 1024),
            (7, 7),
            ("12B", 12),
        ],
    )
    def test_reads(self, text: str | int, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5XB", "5GBs", "1e9", "nan", "5 iB", "0.1"])
    def test_refuses(self, text: str) -> None:
        with pytest.raises(PlanError, match="should be like 5GB"):
            parse_size(text)

    @pytest.mark.parametrize(
        ("size", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_960, "1.0 MB"),
            (16_400_000_000, "16.4 GB"),
            (2 * 10**15, "2000.0 TB"),
        ],
    )
    def test_writes(self, size: int, text: str) -> None:
        assert format_size(size) == text
