"""YAML as configurations have it: small, shallow, each key once; anything else is refused at its line, at once.

PyYAML with a loader of our own, not ruamel.yaml, which also refuses a key that is there twice: neither library limits
depth and size with aliases counted, and ruamel.yaml reads YAML 1.2, to which `yes` and `1e-5` mean something else.
"""

import reprlib
from typing import Any

import yaml

from sstoken.errors import UsageError

_MOST_BYTES = 1 << 18
_MOST_LEVELS = 20
_MOST_NODES = 10_000
"""With each alias counted as what it stands for."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlevel = 3


def short(value: object) -> str:
    """`repr`, cut to what fits an error's line."""
    return _short.repr(value)


def read_yaml(text: str | bytes, where: str) -> Any:
    """The value of a YAML text.

    Args:
        text: bytes have to be UTF-8.
        where: what an error begins with.

    Raises:
        UsageError: not YAML, or more than a configuration can hold.
    """
    if len(text) > _MOST_BYTES:
        raise UsageError(f"{where}: {len(text):,} bytes; a configuration has at most {_MOST_BYTES:,}")
    try:
        return yaml.load(text if isinstance(text, str) else text.decode(), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = error.problem or error.context
        hint = "; indent with spaces" if "'\\t'" in str(what) else ""
        raise UsageError(f"{where}: not valid YAML ({place}{what}){hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: not a YAML text in UTF-8 ({' '.join(str(error).split())})") from error


class _Loader(yaml.SafeLoader):
    """Refuses what grows or repeats: aliases of aliases; a key twice, of which YAML takes the last without a word."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self._level > _MOST_LEVELS:
            raise _error(f"more than {_MOST_LEVELS} levels, one in the other", mark)
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
                raise _error("an alias within what it stands for", mark)
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        if self._sizes[id(node)] > _MOST_NODES:
            raise _error(f"more than {_MOST_NODES:,} values, aliases counted", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key that is a list or a mapping", key.start_mark)
            if key.value in seen:
                raise _error(f"the key {short(key.value)} stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            OverflowError,
            TypeError,
            AttributeError,
        ) as error:  # such as a date
            raise _error(f"a value that cannot be: {short(str(error))}", node.start_mark) from error


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=mark)
