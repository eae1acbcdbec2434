"""The house is built in storeys: a stage imports earlier stages only, in Python and in Rust."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import imports
import pytest

from safemerge_fast import _engine
from safemerge_fast.recipes import recipes

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "python" / "safemerge_fast"
RUST = ROOT / "rust"

PYTHON_STAGES = (
    "errors",
    "printable",
    "addresses",
    "sizes",
    "progress",
    "documents",
    "patterns",
    "yaml_documents",
    "interruption",
    "declaration",
    "settings",
    "checkpoint",
    "pairing",
    "analysis",
    "decision",
    "plan",
    "execution",
    "report",
    "recipes",
    "sweeps",
    "quick_judge",
    "demo",
    "api",
    "cli",
    "__main__",
)
RUST_STAGES = (
    "error",
    "dtype",
    "code",
    "checkpoint",
    "kernels",
    "methods",
    "plan",
    "writer",
    "merge",
    "difference",
    "sketch",
    "bindings",
)
MOST_LINES = 450


def sources() -> list[Path]:
    return [*PYTHON.rglob("*.py"), *RUST.rglob("*.rs")]


def test_python_stages_import_earlier_stages_only() -> None:
    graph = imports.python_imports(PYTHON)
    assert ("plan", "plan") in graph[("execution", "local")], "imports are seen"
    assert imports.backward(graph, PYTHON_STAGES) == []


def test_python_modules_import_each_other_in_no_ring() -> None:
    assert imports.rings(imports.python_imports(PYTHON)) == []


def test_rust_stages_use_earlier_stages_only() -> None:
    graph = imports.rust_imports(RUST)
    assert ("checkpoint", "reader") in graph[("plan", "plan")], "re-exported names are seen"
    assert imports.backward(graph, RUST_STAGES) == []


def test_rust_modules_use_each_other_in_no_ring() -> None:
    assert imports.rings(imports.rust_imports(RUST)) == []


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("from ..plan import plan", "plan.plan"),
        ("def f():\n    from ..plan.plan import Plan", "plan.plan"),
        ("if TYPE_CHECKING:\n    import house.plan.plan", "plan.plan"),
        ("from house.plan import NAME", "plan"),
        ("from ..errors import X", None),
    ],
)
def test_an_import_that_runs_back_is_found(tmp_path: Path, text: str, target: str | None) -> None:
    files = {
        "errors": "",
        "analysis/__init__": "",
        "analysis/work": text,
        "plan/__init__": "from . import plan",
        "plan/plan": "from ..analysis import work",
    }
    write(tmp_path / "house", files, ".py")
    graph = imports.python_imports(tmp_path / "house")
    found = imports.backward(graph, ("errors", "analysis", "plan"))
    assert found == ([f"analysis.work imports {target}, which is a later stage"] if target else [])
    assert bool(imports.rings(graph)) == bool(target)


@pytest.mark.parametrize(
    ("code", "targets"),
    [
        ("use crate::{Error, plan::{self, schema}};", {"error", "plan", "plan.schema"}),
        ("use super::layout::Layout; // use super::resolve::X;", {"plan.layout"}),
        ("use super::Plan;", {"plan.plan"}),
        ("mod inner { use super::super::schema; use super::X; }", {"plan.schema"}),
        ('const TEXT: &str = "crate::plan::plan";', set()),
        ("fn f() -> crate::Result<()> { crate::plan::schema::g('\"') }", {"error", "plan.schema"}),
    ],
)
def test_paths_of_rust_are_read(tmp_path: Path, code: str, targets: set[str]) -> None:
    files = {
        "lib": "pub mod error; mod plan; pub use error::{Error, Result};",
        "error": "",
        "plan/mod": "mod plan; mod schema; mod layout; mod work; pub use plan::Plan;",
        "plan/plan": "",
        "plan/schema": "",
        "plan/layout": "",
        "plan/work": code,
    }
    write(tmp_path, files, ".rs")
    graph = imports.rust_imports(tmp_path)
    assert {".".join(target) for target in graph[("plan", "work")]} == targets
    assert graph[("plan",)] == set(), "declaring and re-exporting is no import"


def write(root: Path, files: dict[str, str], suffix: str) -> None:
    for name, text in files.items():
        file = root / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_files_can_be_read_in_one_sitting() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in sources()
        if (lines := file.read_text(encoding="utf-8").count("\n")) > MOST_LINES
    }
    assert long == {}


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [path for path in (*PYTHON.rglob("*"), *RUST.rglob("*")) if path.stem in drawers] == []


def test_python_knows_no_name_of_a_method() -> None:
    """Which methods there are, and what they take, is the engine's to say.

    A literal that is a name is found, and one that mentions a name which is no word of the language.
    """
    names = {method.name for method in _engine.methods()}
    mentioned = re.compile(rf"(?<![\w-])(?:{'|'.join(names - {'linear', 'ties'})})(?![\w-])")
    found = []
    for file in PYTHON.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documentation = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        found += [
            f"{file.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in documentation
            and (node.value in names or mentioned.search(node.value))
        ]
    assert found == []


@pytest.mark.parametrize("name", list(recipes()))
def test_each_recipe_is_documented(name: str) -> None:
    documentation = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert re.search(rf"^## .*\b{re.escape(name)}$", documentation, re.MULTILINE)
