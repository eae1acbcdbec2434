"""YAML that a person wrote: no field twice, and nothing that unfolds into more than it looks like."""

from __future__ import annotations

import os
import re
from typing import Any

from .documents import DEPTH, RECIPE, Limit, read_text
from .errors import SafemergeError
from .printable import printable

__all__ = ["parse_yaml", "read_yaml"]

# Digits of a whole number; in base 60, which YAML 1.1 has, a few bytes would make numbers without end.
_MOST_DIGITS = 40

# 1e-6, without a point.
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+\Z")


def read_yaml(
    file: str | os.PathLike[str],
    error: type[SafemergeError],
    *,
    limit: Limit = RECIPE,
    subject: str | None = None,
) -> Any:
    """Reads a YAML file; arguments as for documents.read_text, errors also as for parse_yaml."""
    text = read_text(file, error, limit=limit, subject=subject)
    return parse_yaml(text, error, subject=os.fspath(file) if subject is None else subject, limit=limit)


def parse_yaml(text: str, error: type[SafemergeError], *, subject: str, limit: Limit = RECIPE) -> Any:
    """Parses YAML as the safe loader does.

    Args:
        text: The text.
        error: What to raise.
        subject: What messages begin with.
        limit: How many values it may hold, with what aliases stand for counted each time.

    Returns:
        The document: dicts, lists, texts, numbers, booleans, dates, None.

    Raises:
        SafemergeError: Of the class given: it is malformed, a field stands there twice, a tag is unknown or does not
            fit its value, it holds too many values or is nested deeper than DEPTH levels.
    """
    import yaml

    subject = printable(subject)
    try:
        _check_extent(text, limit.items)
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as problem:
        raise error(f"{subject} is not YAML: {_sentence(problem)}") from problem


def _sentence(problem: Exception) -> str:
    return printable(" ".join(str(problem).replace('"<unicode string>", ', "").split()))


def _parser() -> Any:
    """The loader in C, where PyYAML was built with it: twenty times faster."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_extent(text: str, most: int) -> None:
    """Raises YAMLError if a document holds too many values or is too deep; makes none of them.

    An alias counts as often as what it stands for, so that ten lines cannot unfold into a billion values.
    """
    import yaml

    # By open collection: its anchor, the values within so far, and the levels below so far.
    opened: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    sizes: dict[str, tuple[int, int]] = {}

    def add(values: int, levels: int) -> None:
        anchor, so_far, deepest = opened[-1]
        opened[-1] = (anchor, so_far + values, max(deepest, levels))
        if sum(item[1] for item in opened) > most:
            raise yaml.YAMLError(f"it holds more than {most} values, with those that aliases stand for")
        if len(opened) + levels > DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {DEPTH} levels")

    for event in yaml.parse(text, Loader=_parser()):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(
                    f"the alias *{event.anchor} stands for nothing, or for what it is part of"
                )
            add(*sizes[event.anchor])
        elif isinstance(event, yaml.CollectionStartEvent):
            add(1, 0)
            opened.append((event.anchor, 0, 0))
            # An anchor that is used again is another one from here on.
            sizes.pop(event.anchor or "", None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, levels = opened.pop()
            if anchor is not None:
                sizes[anchor] = (values + 1, levels + 1)
            add(values, levels + 1)
        elif isinstance(event, yaml.ScalarEvent):
            add(1, 0)
            if event.anchor is not None:
                sizes[event.anchor] = (1, 0)


def _loader() -> Any:
    """The safe loader, which takes no field twice and no endless number."""
    import yaml

    class Loader(_parser()):  # type: ignore[misc]
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError("a field is named by a list or by fields, not by a text")
                if key.value in seen:
                    raise yaml.YAMLError(f"the field {key.value} stands there twice")
                seen.add(key.value)
            fields: dict[Any, Any] = super().construct_mapping(node, deep)
            return fields

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except yaml.YAMLError:
                raise
            except Exception as problem:
                # `!!int abc`, 2001-99-99, `!!timestamp x`: constructors raise whatever their calls do.
                kind = node.tag.rpartition(":")[2]
                value = node.value if isinstance(node, yaml.ScalarNode) else "what stands there"
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"in line {line}, '{printable(value, 80)}' is no {kind}") from problem

        def construct_whole_number(self, node: yaml.ScalarNode) -> int:
            if len(node.value.lstrip("+-")) > _MOST_DIGITS:
                raise yaml.YAMLError(f"it holds a whole number of more than {_MOST_DIGITS} digits")
            number: int = self.construct_yaml_int(node)
            return number

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_whole_number)
    # A number for people and for YAML 1.2, a text for YAML 1.1, which PyYAML reads.
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    return Loader
