"""Reads what imports what: Python by its syntax tree, Rust by the paths that its files name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Module = tuple[str, ...]
Graph = Mapping[Module, set[Module]]

# Comments, strings (raw ones too), characters; what is left of Rust is code.
_NOT_CODE = re.compile(
    r"""//[^\n]*|/\*.*?\*/|b?r(?P<hashes>\#*)".*?"(?P=hashes)|b?"(?:\\.|[^"\\])*"|b?'(?:\\[^']+|[^'\\])'""",
    re.DOTALL,
)


def modules_of(root: Path, suffix: str, index: str) -> dict[Module, Path]:
    """Files by module path; those named `index` are their folder's module."""
    found: dict[Module, Path] = {}
    for file in sorted(root.rglob(f"*{suffix}")):
        module = file.relative_to(root).with_suffix("").parts
        found[module[:-1] if module[-1] == index else module] = file
    return found


def python_imports(root: Path) -> Graph:
    """Imports within a package, wherever they stand: in functions and for type checkers too."""
    modules = modules_of(root, ".py", "__init__")
    return {
        module: {
            target
            for name in _python_names(ast.parse(file.read_text(encoding="utf-8")), root.name, module, file)
            if (target := _longest(name, modules)) != module and target != ()
        }
        for module, file in modules.items()
    }


def _python_names(tree: ast.Module, package: str, module: Module, file: Path) -> Iterator[Module]:
    here = module if file.name == "__init__.py" else module[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            words = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                words = (*here[: len(here) - node.level + 1], *words)
            elif words[:1] == (package,):
                words = words[1:]
            else:
                continue
            yield from ((*words, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                words = tuple(alias.name.split("."))
                if words[0] == package:
                    yield words[1:]


def rust_imports(root: Path) -> Graph:
    """Paths within a crate: those that begin with crate or super, and those into modules that a file declares.

    A re-exported name counts as its own module's, and re-exporting it as no import.
    """
    modules = modules_of(root, ".rs", "mod")
    modules[()] = modules.pop(("lib",))
    codes = {module: _code(file.read_text(encoding="utf-8")) for module, file in modules.items()}
    exports: dict[Module, Module] = {}
    for module, code in codes.items():
        for statement in re.findall(r"\bpub(?:\([^)]*\))? use ([^;]+);", code):
            for path in _expanded(statement):
                if (*module, path[0]) in modules:
                    exports[(*module, path[-1])] = (*module, *path)
    graph: dict[Module, set[Module]] = {}
    for module, code in codes.items():
        targets = set()
        for path in _rust_paths(code, module, modules):
            while (known := _longest(path, exports)) != ():
                path = (*exports[known], *path[len(known) :])
            targets.add(_longest(path, modules))
        graph[module] = targets - {module, ()}
    return graph


def _code(text: str) -> str:
    return _NOT_CODE.sub(" ", text)


def _rust_paths(code: str, module: Module, modules: Iterable[Module]) -> Iterator[Module]:
    code = re.sub(r"\bpub\(in [^)]*\)", " ", code)
    inner = [
        (found.start(), _end_of_block(code, found.end())) for found in re.finditer(r"\bmod [\w$]+ \{", code)
    ]
    for found in re.finditer(r"(?<![\w:$])(\$?crate|super)::", code):
        up = 1 + sum(start < found.start() < end for start, end in inner)
        for path in _expanded(_tree(code, found.end())):
            if found[1] != "super":
                yield path
                continue
            # Each module that stands within the file is one step up.
            steps = 1
            while path[:1] == ("super",):
                path, steps = path[1:], steps + 1
            if steps >= up:
                yield (*module[: len(module) - (steps - up + 1)], *path)
    code = re.sub(r"\bpub(?:\([^)]*\))? use [^;]+;", " ", code)
    for child in (found for found in modules if len(found) == len(module) + 1 and found[:-1] == module):
        for found in re.finditer(rf"(?<![\w:$]){child[-1]}::", code):
            yield from ((*child, *path) for path in _expanded(_tree(code, found.end())))


def _end_of_block(code: str, start: int) -> int:
    depth = 1
    for place in range(start, len(code)):
        depth += {"{": 1, "}": -1}.get(code[place], 0)
        if depth == 0:
            return place
    return len(code)


def _tree(code: str, start: int) -> str:
    """The rest of a path: names, or a tree of them in braces."""
    name = re.compile(r"(?:\w+::)*(?:\w+)?").match(code, start)
    assert name is not None
    end = name.end()
    if code[end : end + 1] == "{":
        end = _end_of_block(code, end + 1) + 1
    return code[start:end]


def _expanded(tree: str) -> list[Module]:
    """`a::{b, c::d as e}` is (a, b) and (a, c, d)."""
    tree = tree.strip()
    head, brace, rest = tree.partition("{")
    prefix = tuple(word for word in re.sub(r"\s+as\s+\w+", "", head).split("::") if word.strip())
    if not brace:
        return [tuple(word.strip() for word in prefix if word.strip() != "self")]
    inside = rest.rpartition("}")[0]
    parts, depth, last = [], 0, 0
    for place, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inside[last:place])
            last = place + 1
    parts.append(inside[last:])
    return [(*prefix, *path) for part in parts if part.strip() for path in _expanded(part)]


def _longest(path: Module, known: Iterable[Module]) -> Module:
    """The longest beginning of a path that is known; () if none is."""
    return next((path[:end] for end in range(len(path), 0, -1) if path[:end] in known), ())


def backward(graph: Graph, stages: Iterable[str]) -> list[str]:
    """Imports that lead to a later stage than their own, and modules that belong to none.

    Args:
        graph: What imports what.
        stages: Beginnings of dotted module names, in order; the first that fits counts.
    """
    order = {tuple(stage.split(".")): place for place, stage in enumerate(stages)}

    def stage(module: Module) -> int | None:
        return order.get(_longest(module, order))

    wrong = []
    for module, targets in graph.items():
        if module == ():
            continue
        if (own := stage(module)) is None:
            wrong.append(f"{'.'.join(module)} belongs to no stage")
            continue
        for target in sorted(targets):
            if (other := stage(target)) is not None and other > own:
                wrong.append(f"{'.'.join(module)} imports {'.'.join(target)}, which is a later stage")
    return wrong


def rings(graph: Graph) -> list[str]:
    """Modules that import each other, directly or by way of others."""
    found = []
    left = dict(graph)
    reached = {module: _reached(graph, module) for module in graph}
    while left:
        module = next(iter(left))
        ring = [other for other in left if other in reached[module] and module in reached[other]]
        if ring:
            found.append(" <-> ".join(sorted(".".join(other) or "the root" for other in ring)))
        for other in [module, *ring]:
            left.pop(other, None)
    return found


def _reached(graph: Graph, start: Module) -> set[Module]:
    seen: set[Module] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen
