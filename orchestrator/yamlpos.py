"""YAML that remembers where every value stood, so that an error can name its line and column.

Only what a configuration needs: mappings with text keys, lists, and the scalars of YAML 1.2's core schema.
YAML 1.1's surprises (``no`` as false, ``52:54:00:12:34:56`` as a base-60 number, ``012`` as ten, dates) stay text
or plain decimals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

Path = tuple[str | int, ...]
MAX_NODES = 20_000  # aliases may repeat nodes exponentially ("billion laughs")
MAX_DEPTH = 32

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_STANDARD = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Position:
    """Line and column, both from 1."""

    line: int
    column: int


class YamlError(ValueError):
    """The text is not YAML, or not YAML that a configuration may use."""

    def __init__(self, position: Position, message: str) -> None:
        super().__init__(message)
        self.position = position
        self.message = message


@dataclass
class Document:
    """Plain Python data, and where each part of it began. A mapping's entry is found at its key."""

    data: object
    positions: dict[Path, Position]

    def position(self, path: Path) -> Position:
        """Where ``path`` is, or the nearest thing around it that exists."""
        while path not in self.positions and path:
            path = path[:-1]
        return self.positions.get(path, Position(1, 1))


def parse(text: str) -> Document:
    """Parses one document. Errors: YamlError."""
    loader_class = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        loader = loader_class(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)
        raise YamlError(where, f"not valid YAML: {e.problem or e.context}") from None
    except yaml.YAMLError as e:  # characters that YAML does not allow
        raise YamlError(Position(1, 1), f"not valid YAML: {str(e).splitlines()[0]}") from None
    builder = _Builder()
    data = None if node is None else builder.build(node, (), _at(node))
    return Document(data, builder.positions)


def _at(node: yaml.Node) -> Position:
    return Position(node.start_mark.line + 1, node.start_mark.column + 1)


class _Builder:
    def __init__(self) -> None:
        self.positions: dict[Path, Position] = {}
        self.nodes = 0

    def build(self, node: yaml.Node, path: Path, position: Position) -> object:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:  # an alias to its own parent is infinitely deep
            raise YamlError(_at(node), "too large or too deeply nested")
        self.positions[path] = position
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != _STANDARD + "seq":
                raise YamlError(_at(node), f"the tag {node.tag} is not supported here")
            return [self.build(item, (*path, i), _at(item)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        if node.tag != _STANDARD + "map":
            raise YamlError(_at(node), f"the tag {node.tag} is not supported here")
        result: dict[str, object] = {}
        first: dict[str, Position] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(_at(key_node), "a key must be plain text")
            key = key_node.value
            if key in result:
                raise YamlError(_at(key_node), f"the key '{key}' is there twice (first in line {first[key].line})")
            first[key] = _at(key_node)
            result[key] = self.build(value_node, (*path, key), _at(key_node))
        return result


def _scalar(node: yaml.ScalarNode) -> object:
    text: str = node.value
    if node.style in ("'", '"', "|", ">"):
        return text
    kind = node.tag.removeprefix(_STANDARD)
    if kind not in {"null", "bool", "int", "float", "str", "timestamp", "value", "merge"}:
        raise YamlError(_at(node), f"the tag {node.tag} is not supported here")
    if text in {"", "~", "null", "Null", "NULL"}:
        return None
    if text in {"true", "True", "TRUE"}:
        return True
    if text in {"false", "False", "FALSE"}:
        return False
    if _INT.fullmatch(text):
        if len(text) > 30:
            raise YamlError(_at(node), "a number that long makes no sense here")
        return int(text, 0) if text[:2] in {"0x", "0o"} else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
