"""The demo: what it makes is a real quartet, what it shows is what happened."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from safemerge_fast.cli import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("demo") / "quartet"
    return directory, CliRunner().invoke(main, ["demo", "-o", str(directory)])


def load(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def test_shows_every_module_and_what_became_of_it(demo) -> None:
    directory, result = demo
    assert result.exit_code == 0, result.output
    report = json.loads((directory / "merged" / "safemerge_report.json").read_text())
    analysed = [tensor for tensor in report["tensors"] if tensor.get("analysed")]
    assert len(analysed) == 28
    for tensor in analysed:
        name = tensor["name"].removeprefix("model.").removesuffix(".weight")
        (line,) = [line for line in result.stdout.splitlines() if line.split()[:1] == [name]]
        assert line.split()[1:4] == [
            f"{tensor['rho']:.3f}",
            f"{tensor['rho_null']:.3f}",
            "merged" if tensor.get("merged") else "kept",
        ]
    merged = [tensor for tensor in analysed if tensor.get("merged")]
    assert 5 <= len(merged) <= 14, "a plausible part is merged, the rest is kept"
    assert report["warnings"] == [], "V stands well above the rounding of bfloat16"
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_scores_are_those_the_quartet_was_made_for(demo) -> None:
    """ρ in float64: far below the threshold where the update was pushed out, above it elsewhere."""
    directory, _ = demo
    base, aligned, finetuned = (load(directory / role) for role in ("base", "aligned", "finetuned"))
    report = json.loads((directory / "merged" / "safemerge_report.json").read_text())
    for tensor in report["tensors"]:
        if not tensor.get("analysed"):
            continue
        name = tensor["name"]
        v = aligned[name].double() - base[name].double()
        delta = finetuned[name].double() - aligned[name].double()
        moved = v @ v.T @ delta
        rho = float((moved * delta).sum() / moved.norm() / delta.norm())
        assert tensor["rho_low"] - 1e-5 <= rho <= tensor["rho_high"] + 1e-5
        assert tensor["rho"] == pytest.approx(rho, rel=0.02)
        assert abs(rho - 0.35) > 0.03, f"{name}: a decision that hangs on rounding is a poor example"


def test_transformers_loads_all_five_models(demo) -> None:
    from transformers import LlamaForCausalLM

    directory, _ = demo
    tokens = torch.arange(16).reshape(1, 16)
    logits = {}
    for role in ("base", "aligned", "finetuned", "safe", "merged"):
        model = LlamaForCausalLM.from_pretrained(directory / role, dtype=torch.float32)
        with torch.no_grad():
            logits[role] = model(tokens).logits
        assert torch.isfinite(logits[role]).all()
    assert not torch.equal(logits["merged"], logits["finetuned"])


def test_is_small_and_sharded(demo) -> None:
    directory, _ = demo
    for role in ("base", "aligned", "finetuned", "safe", "merged"):
        assert len(list((directory / role).glob("*.safetensors"))) == 3
    total = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    assert 20_000_000 < total < 100_000_000


def test_refuses_a_directory_that_holds_something(demo) -> None:
    directory, _ = demo
    result = CliRunner().invoke(main, ["demo", "-o", str(directory)])
    assert result.exit_code == 5
    assert result.stderr == f"error: {directory} is not empty; name a new directory with -o\n"


def test_without_a_directory_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = CliRunner().invoke(main, ["demo", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["version"] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_command_leaves_the_collector_of_its_caller_alone(demo) -> None:
    """Objects that were frozen at the exit would be reported as leaks by triton's bindings, a screenful of them."""
    directory, _ = demo
    program = (
        "import atexit, gc\n"
        "from click.testing import CliRunner\n"
        "from safemerge_fast.cli import main\n"
        "before = gc.get_threshold()\n"
        # Registered first, called last.
        "atexit.register(lambda: print(gc.get_freeze_count(), gc.get_threshold() == before))\n"
        f"print(CliRunner().invoke(main, ['inspect', {str(directory / 'base')!r}]).exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n0 True\n"
