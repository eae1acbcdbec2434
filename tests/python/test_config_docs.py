"""docs/config.md: its examples run, and its table of parameters is the engine's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from invoke import run
from lora import write_lora

from safemerge_fast.recipes.mergekit.methods import Parameter, known_methods

TEXT = (Path(__file__).parents[2] / "docs" / "config.md").read_text()
EXAMPLES = dict(re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(
    make_quartet: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_quartet(tmp_path / "quartet", layers=4)
    write_lora(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (72, 72)}, rank=2, seed=0)
    Path(name).write_text(EXAMPLES[name])
    result = run("run", name, "-o", "out")
    assert result.exit_code == 0, result.stderr
    # A filter or a value that decides nothing would be a fault of the example.
    assert "decides nothing" not in result.stderr
    assert run("verify", "out").exit_code == 0


def test_every_yaml_block_is_an_example() -> None:
    assert len(EXAMPLES) == TEXT.count("```yaml")
    assert {"ties.yml", "stacked.yml"} <= EXAMPLES.keys()


def test_the_table_of_methods() -> None:
    bases = {"none": "no", "optional": "optional", "required": "yes"}
    for method in known_methods().values():
        cells = [
            ", ".join(
                shown(parameter) for parameter in method.parameters.values() if parameter.scope == scope
            )
            for scope in ("operand", "shared")
        ]
        assert f"| `{method.name}` | {bases[method.base]} | {cells[0]} | {cells[1]} |\n" in TEXT
    assert (
        f"one of {len(known_methods())} methods"
        in (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    )


def shown(parameter: Parameter) -> str:
    default = parameter.default
    if default is None:
        return f"`{parameter.name}`"
    if isinstance(default, bool):
        return f"`{parameter.name}` {str(default).lower()}"
    return (
        f"`{parameter.name}` {default:g}" if isinstance(default, float) else f"`{parameter.name}` {default}"
    )
