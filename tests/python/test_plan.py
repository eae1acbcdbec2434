"""The plan: layout over files, operations per tensor, and what the engine says of the result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import operations
from safetensors.torch import load_file

from safemerge_fast import PairingError, PlanError, _engine
from safemerge_fast.checkpoint.model import Model, open_model
from safemerge_fast.decision import Decision
from safemerge_fast.pairing.rows import Row, pair
from safemerge_fast.plan.blend import Blend
from safemerge_fast.plan.layout import Shard, lay_out, output_dtype, tensor_bytes
from safemerge_fast.plan.plan import Plan, build_plan
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
    KEEP, MERGE = Decision(False, ""), Decision(True, "")

    def plan(self, rows: Sequence[Row], merged: set[str], **options: Any) -> dict[str, Any]:
        """The plan of one file, of models that no file is read of."""
        models: Any = {
            role: SimpleNamespace(headers=SimpleNamespace(path=f"/{role}", identity=dict))
            for role in ("finetuned", "safe", "base")
        }
        plan = build_plan(
            models,
            [Shard("model.safetensors", tuple(rows))],
            lambda row: self.BLEND.compose(row, self.MERGE if row.name in merged else self.KEEP),
            anchor="finetuned",
            **options,
        )
        return json.loads(plan.to_json())

    def test_says_copy_and_merge_by_each_role_s_own_name(self) -> None:
        rows = (row("kept"), row("changed", names={"finetuned": "changed", "safe": "prefix.changed"}))
        assert self.plan(rows, {"changed"}) == {
            "version": 2,
            "sources": {role: {"path": f"/{role}", "files": {}} for role in ("finetuned", "safe")},
            "operations": [
                {"copy": {"source": "finetuned"}},
                {
                    "merge": {
                        "method": "linear",
                        "parameters": {"normalize": False},
                        "operands": [
                            {"operand": {"source": "finetuned"}, "weight": 0.75},
                            {"operand": {"source": "safe", "tensor": "prefix.changed"}, "weight": 0.25},
                        ],
                    }
                },
            ],
            "shards": [
                {
                    "file": "model.safetensors",
                    "metadata": {"format": "pt"},
                    "tensors": [{"name": "kept", "operation": 0}, {"name": "changed", "operation": 1}],
                }
            ],
        }

    def test_tensors_that_are_alike_share_an_operation(self) -> None:
        planned = self.plan([row(name) for name in "abcdef"], {"b", "e"})
        numbers = [tensor["operation"] for tensor in planned["shards"][0]["tensors"]]
        assert len(planned["operations"]) == 2
        assert numbers == [0, 1, 0, 0, 1, 0]

    def test_states_dtype_and_shape_where_the_finetuned_model_does_not(self) -> None:
        (tensor,) = self.plan([row("a")], {"a"}, dtype="float32")["shards"][0]["tensors"]
        assert tensor == {"name": "a", "operation": 0, "dtype": "F32", "shape": [4, 2]}
        (tensor,) = self.plan([row("a", dtype="F32")], {"a"}, dtype="float32")["shards"][0]["tensors"]
        assert tensor == {"name": "a", "operation": 0}

    @pytest.mark.parametrize("missing", ["safe", "finetuned"])
    def test_refuses_to_merge_with_a_tensor_that_is_not_there(self, missing: str) -> None:
        names = {role: "lonely" for role in ("finetuned", "safe") if role != missing}
        with pytest.raises(PairingError, match=rf"lonely .*the {missing} model has no tensor"):
            self.BLEND.compose(row("lonely", names=names), self.MERGE)

    @given(alpha=st.floats(min_value=0.0, max_value=1.0))
    def test_safemerge_is_the_paper_s_sum_without_the_aligned_model(self, alpha: float) -> None:
        weights = safemerge(alpha, safe_role="safe", method="linear").weights
        aligned, finetuned, safe = 0.3, -1.7, 0.9
        paper = aligned + alpha * (finetuned - aligned) + (1 - alpha) * (safe - aligned)
        assert list(weights) == ["finetuned", "safe"]
        assert weights["finetuned"] * finetuned + weights["safe"] * safe == pytest.approx(paper, abs=1e-15)

    def test_describes_itself(self) -> None:
        blend = safemerge(0.8, safe_role="aligned", method="linear")
        both = row("w", names={"finetuned": "w", "aligned": "w"})
        merged, kept = (blend.compose(both, Decision(merge, "")).describe() for merge in (True, False))
        assert (merged, kept) == ("linear: 0.8 finetuned + 0.2 aligned", "copy: finetuned")


class TestDocument:
    def plan(
        self, quartet: dict[str, Path], *, only: int | None = None, **options: Any
    ) -> tuple[Mapping[str, Model], Plan]:
        """A plan that merges all that is analysed; of one of its files only, if a number is given."""
        models = {role: open_model(role, path) for role, path in quartet.items()}
        blend = safemerge(0.5, safe_role="safe", method="linear")
        layout = lay_out(pair(models).rows, **options)
        plan = build_plan(
            models,
            layout if only is None else [layout[only]],
            lambda row: blend.compose(row, Decision(row.analysed, "")),
            anchor="finetuned",
        )
        return models, plan

    def test_the_engine_accepts_it(self, quartet: dict[str, Path]) -> None:
        models, made = self.plan(quartet)
        plan = _engine.Plan(made.to_json())
        assert plan.shards == made.files
        document = json.loads(made.to_json())
        merged = {name for name, operation in operations(document).items() if "merge" in operation}
        tensors = models["finetuned"].headers.tensors
        assert {name for name in merged if not name.endswith("_proj.weight")} == set()
        assert len(merged) == 21
        assert plan.bytes_read == sum(t.nbytes * (2 if t.name in merged else 1) for t in tensors)

    def test_one_shard_alone_is_the_same_work_as_within_the_whole(self, quartet: dict[str, Path]) -> None:
        _, made = self.plan(quartet)
        whole = _engine.Plan(made.to_json())
        assert len(made.files) == 3
        for number, file in enumerate(made.files):
            alone = _engine.Plan(self.plan(quartet, only=number)[1].to_json())
            assert alone.shards == [file]
            assert alone.shard_digest(file) == whole.shard_digest(file)

    def test_lists_only_models_that_are_read(self, quartet: dict[str, Path]) -> None:
        sources = json.loads(self.plan(quartet)[1].to_json())["sources"]
        assert set(sources) == {"finetuned", "safe"}
        for role, source in sources.items():
            assert source["path"] == str(quartet[role])
            assert {file: facts["size"] for file, facts in source["files"].items()} == {
                path.name: path.stat().st_size for path in quartet[role].glob("*.safetensors")
            }

    def test_pieces_and_slices_are_parts_of_the_whole(self, quartet: dict[str, Path]) -> None:
        _, made = self.plan(quartet, max_shard_size=50_000)
        assert b"".join(made.pieces()) == made.to_json()
        every = list(made.tensors())
        assert made.count == len(every)
        for start, stop in ((0, 0), (0, 1), (3, 9), (5, 32), (7, made.count), (made.count, None), (4, None)):
            assert list(made.tensors(start, stop)) == every[start:stop]

    def test_index_says_what_torch_counts(self, quartet: dict[str, Path]) -> None:
        _, made = self.plan(quartet)
        loaded = {file: load_file(quartet["finetuned"] / file) for file in made.files}
        tensors = [tensor for content in loaded.values() for tensor in content.values()]
        index = json.loads(b"".join(made.index_pieces()))
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
