"""Reads YAML as configurations need it: small, shallow, each key once; the rest is refused with its line number.

Uses PyYAML with a custom loader. ruamel.yaml also refuses duplicate keys, but neither library limits depth, or size
with aliases counted, and ruamel.yaml reads YAML 1.2, in which `yes` and `1e-5` mean something else.
"""

import reprlib
from typing import Any

import yaml

from sstoken.errors import UsageError

_MOST_BYTES = 1 << 18
_MOST_LEVELS = 20
_MOST_NODES = 10_000
"""Each alias counts as much as its target."""
_HINTS = {
    "'\\t'": "; indent with spaces",
    "mapping values are not allowed": "; put a value that holds ': ' in quotes, and indent keys alike",
    "'%'": "; put a value that begins with % in quotes",
    "'@'": "; put a value that begins with @ in quotes",
    "'`'": "; put a value that begins with ` in quotes",
    "undefined alias": "; put a value that begins with * in quotes",
    "<document start>": "; name a configuration, whose sections are out, encode, anchor, score, select",
}
"""What to do, by what PyYAML reports."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlevel = 3


def short(value: object) -> str:
    """`repr`, shortened to fit an error message."""
    return _short.repr(value)


def read_yaml(text: str | bytes, where: str) -> Any:
    """Parse a YAML text; bytes are UTF-8. Errors begin with `where`.

    Raises:
        UsageError: not YAML, or larger than a configuration may be.
    """
    if len(text) > _MOST_BYTES:
        raise UsageError(f"{where}: {len(text):,} bytes; a configuration has at most {_MOST_BYTES:,}")
    try:
        return yaml.load(text if isinstance(text, str) else text.decode(), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = error.problem or error.context
        hint = next((told for marks, told in _HINTS.items() if marks in str(what)), "")
        raise UsageError(f"{where}: not valid YAML ({place}{what}){hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{where}: not a YAML text in UTF-8 ({' '.join(str(error).split())}); save it as UTF-8"
        ) from error


class _Loader(yaml.SafeLoader):
    """Refuses exploding aliases, and duplicate keys, of which YAML would silently take the last."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self._level > _MOST_LEVELS:
            raise _error(f"more than {_MOST_LEVELS} levels deep", mark)
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        if node is None:
            return node
        if id(node) not in self._sizes:
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                parts = node.value
            elif isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            if node.end_mark is None or any(id(part) not in self._sizes for part in parts):
                raise _error("an alias inside its own target", mark)
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        if self._sizes[id(node)] > _MOST_NODES:
            raise _error(f"more than {_MOST_NODES:,} values, aliases counted", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if node.id != "mapping":  # `!!map [a]`
            return super().construct_mapping(node, deep)  # which refuses it
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key that is a list or a mapping", key.start_mark)
            if key.value in seen:
                raise _error(f"the key {short(key.value)} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # whatever PyYAML's constructors run into: an impossible date, `!!int _`
            raise _error(f"an impossible value: {short(str(error))}", node.start_mark) from error


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=mark)
