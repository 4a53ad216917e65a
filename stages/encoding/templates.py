"""A chat template: its source, the form in which it expects conversations, and rendering with it."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, UsageError, reason
from sstoken.stages.encoding.limits import MOST_BYTES, memory_limited
from sstoken.stages.encoding.messages import REASONING, BadRow, Conversation, Message
from sstoken.stages.storage import expanded

PLAIN_CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['tool_calls'] is defined -%}"
    "{{- raise_exception('tool calls need a chat template; pass one with --chat-template') -}}"
    "{%- endif -%}"
    "{%- set text = (m['content'] or '') | trim -%}"
    "{%- if m['role'] == 'assistant' -%}"
    "{{- 'Assistant: ' -}}{%- generation -%}{{- text + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- elif m['role'] == 'user' -%}{{- 'User: ' + text + '\\n' -}}"
    "{%- elif m['role'] == 'tool' -%}{{- 'Tool: ' + text + '\\n' -}}"
    "{%- else -%}{{- text + '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
"""For tokenizers without a chat template: the system text and a blank line, then `User: ...` and
`Assistant: ...` lines, where EOS closes an assistant turn. Starts with BOS if the tokenizer itself adds one."""

TEMPLATE_DATE = date(2024, 7, 26)
"""Some templates print today's date; they get this one, so that a run gives the same tokens on any day."""
FROM_TRL = "trl:"
"""`trl:NAME` names a chat template that an installed TRL ships."""
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_LONGEST = 1_000_000
"""Characters of a template; real ones have up to 20,000."""
_MOST_CHARS, _MOST_TIMES = 10_000_000, 10
"""Characters of a rendered conversation above which it may have at most so many times those of its messages."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_WORDS = ("Wqxone", "Wqxtwo")
"""Words that no template prints by itself."""

Span = tuple[int, int]
"""Start and stop (exclusive) in characters."""


@dataclass(frozen=True)
class Dialect:
    """The form in which a template expects conversations."""

    parts: bool = False
    """Contents as lists of typed parts instead of strings."""
    arguments_as_text: bool = False
    """Tool-call arguments as JSON text instead of an object."""
    empty_content: str | None = ""
    """The content of a turn that only calls tools."""
    tools_in_system: bool = False
    """Put tool definitions as JSON at the end of the system prompt: the template prints calls but no
    definitions."""


class ChatTemplate:
    """A chat template, with the special tokens of its tokenizer (`bos_token` and the like, by name).

    Raises:
        SstokenError: the text is too long for a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        if len(source) > _LONGEST:
            raise SstokenError(
                f"chat template: {len(source):,} characters; it can have {_LONGEST:,}, name another one with "
                "--chat-template"
            )
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._dated = _TODAY.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), source)

    @property
    def marks_responses(self) -> bool:
        """Whether the template marks the assistant's words with `{% generation %}`."""
        return _MARKER.search(self.source) is not None

    @cached_property
    def protected(self) -> re.Pattern[str]:
        """The markup that the template may look for in a content, such as `</think>`."""
        strings = [value[1:-1] for value in self._lexed["string"]]
        markup = [s.strip() for s in strings if re.search(r"[<>\[\]{}|/#]", s) and re.search(r"\w", s)]
        return re.compile(any_of(s for s in {*markup, "<think>", "</think>"} if len(s) > 1))

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """Render a conversation, optionally followed by the generation prompt.

        Raises:
            BadRow: the template refuses the conversation.
            SstokenError: the template is not valid Jinja.
        """
        return self._rendered(conversation, self._dialect(conversation), prompt=prompt)[0]

    def render_marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Like `render`; also return the character spans that the template marks as generated."""
        return self._rendered(conversation, self._dialect(conversation), marked=True)

    def _dialect(self, conversation: Conversation) -> Dialect:
        """Return the form this conversation must take; detected once by trial."""
        dialect = self._plain_dialect
        if any(m.get("tool_calls") for m in conversation.messages):
            dialect = self._dialect_for_calls or dialect
        return replace(dialect, tools_in_system=self.tools_in_system) if conversation.tools else dialect

    @cached_property
    def _plain_dialect(self) -> Dialect:
        asked, said = _WORDS
        conversation = Conversation([_message("user", asked), _message("assistant", said)])
        forms = Dialect(), Dialect(parts=True)
        return next((form for form in forms if self._prints(conversation, form, _WORDS)), forms[0])

    @cached_property
    def _dialect_for_calls(self) -> Dialect | None:
        """The form for conversations with calls; None if the template does not print them completely."""
        name, value = _WORDS
        function = {"name": name, "arguments": {"key": value}}
        call = {"id": "callabcde", "type": "function", "function": function}
        conversation = Conversation(
            [_message("user", "Hello"), _message("assistant", "") | {"tool_calls": [call]}]
        )
        for empty in ("", None):
            for as_text in (False, True):
                dialect = replace(self._plain_dialect, arguments_as_text=as_text, empty_content=empty)
                # A dictionary as Python prints it is not JSON, and doubly quoted text is not an object.
                if self._prints(conversation, dialect, _WORDS, ["{'key'", '\\"key\\"']):
                    return dialect
        return None

    @cached_property
    def prints_speakers(self) -> bool:
        """Whether the template prints the names of users and assistants (a message's `name`)."""
        asked, said = _WORDS
        conversation = Conversation(
            [_message("user", "Hello") | {"name": asked}, _message("assistant", "Hello") | {"name": said}]
        )
        return self._prints(conversation, self._plain_dialect, _WORDS)

    @property
    def tools_in_system(self) -> bool:
        """Whether tools go into the system prompt: the template prints calls and ignores definitions."""
        return self._dialect_for_calls is not None and "tools" not in self._lexed["name"]

    @cached_property
    def _lexed(self) -> dict[str, set[str]]:
        """The names and strings in the template's code."""
        import jinja2

        found: dict[str, set[str]] = {"name": set(), "string": set()}
        try:
            for _, kind, value in jinja2.Environment().lex(self._dated):
                if kind in found:
                    found[kind].add(value)
        except jinja2.TemplateSyntaxError:  # rendering reports it
            pass
        return found

    def _prints(
        self, conversation: Conversation, dialect: Dialect, words: Iterable[str], without: Iterable[str] = ()
    ) -> bool:
        try:
            text = self._rendered(conversation, dialect)[0]
        except BadRow:
            return False
        return all(word in text for word in words) and not any(word in text for word in without)

    def _rendered(
        self, conversation: Conversation, dialect: Dialect, *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        if conversation.tools and dialect.tools_in_system:
            conversation = _with_tools_in_system(conversation)
        try:
            with memory_limited():
                texts, spans = render_jinja_template(
                    conversations=[[_adapted(message, dialect) for message in conversation.messages]],
                    tools=conversation.tools,
                    chat_template=self._dated,
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=prompt,
                    **self._special_tokens,
                )
        except jinja2.TemplateSyntaxError as error:
            raise SstokenError(
                f"chat template: not valid Jinja (line {error.lineno}: {error.message})"
            ) from error
        except MemoryError:
            raise SstokenError(
                f"chat template: rendering a conversation takes more than {MOST_BYTES >> 30} GiB; fix what multiplies "
                "text in it, or name another one with --chat-template"
            ) from None
        except RecursionError:
            raise SstokenError(
                "chat template: nested too deep, or a macro that calls itself; name another one with --chat-template"
            ) from None
        except ImportError:
            raise  # of an old Jinja
        except Exception as error:  # the template's own code raises what it likes
            raise BadRow("template refuses", reason(error)) from error
        _check_rendered(texts[0], conversation)
        return texts[0], [(start, end) for start, end in spans[0]] if marked else []


def any_of(texts: Iterable[str]) -> str:
    """Return a pattern that matches any of the texts, the longest first."""
    return "|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text))))


def _check_rendered(text: str, conversation: Conversation) -> None:
    """Refuse an output that is no text, or out of all proportion."""
    if len(text) > _MOST_CHARS and len(text) > _MOST_TIMES * len(repr(conversation.messages)):
        raise BadRow("template refuses", f"it makes {len(text):,} characters of this conversation")
    if not text.isascii() and _SURROGATES.search(text):
        raise BadRow("template refuses", "it writes half of a character (a lone surrogate)")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _adapted(message: Message, dialect: Dialect) -> Message:
    """Convert a message to the template's form, with reasoning under every name that templates know."""
    adapted = dict(message)
    calls = adapted.get("tool_calls")
    if calls and not adapted.get("content"):
        adapted["content"] = dialect.empty_content
    if dialect.parts and isinstance(adapted.get("content"), str):
        adapted["content"] = [{"type": "text", "text": adapted["content"]}]
    if calls and dialect.arguments_as_text:
        adapted["tool_calls"] = [_with_text_arguments(call) for call in calls]
    if reasoning := adapted.get("reasoning_content"):
        adapted |= dict.fromkeys(REASONING, reasoning)
    return adapted


def _with_tools_in_system(conversation: Conversation) -> Conversation:
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools or ())
    messages = list(conversation.messages)
    if not messages or messages[0]["role"] != "system":
        messages.insert(0, _message("system", ""))
    content = f"{messages[0]['content']}\n\n# Tools\n\n{tools}".lstrip()
    return replace(conversation, messages=[messages[0] | {"content": content}, *messages[1:]], tools=None)


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": function}


def template_file(given: str) -> Path:
    """Return the file that `--chat-template` names: a Jinja file, or `trl:NAME`.

    Raises:
        UsageError: the file does not exist, or TRL is not installed or has no template of that name.
    """
    if given.startswith(FROM_TRL):
        folder, name = trl_templates(), given.removeprefix(FROM_TRL)
        if folder is None:
            raise UsageError(f"chat_template {given!r}: TRL is not installed; pip install trl")
        path = folder / f"{name}.jinja"
        if "/" in name or not path.is_file():
            there = ", ".join(sorted(p.stem for p in folder.glob("*.jinja")))
            raise UsageError(f"chat_template {given!r}: the installed TRL has {there}")
        return path
    path = expanded(given)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise UsageError(f"chat_template {given!r}: {problem}; name a Jinja file, or trl:NAME")
    return path


def read_template(given: str) -> str:
    """Read the file that `--chat-template` names; raises as `template_file`, and if it is not UTF-8."""
    try:
        return template_file(given).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"chat_template {given!r}: not UTF-8; name a Jinja file") from error


@cache
def training_variant(source: str) -> str | None:
    """Return the name (`trl:NAME`) of TRL's training variant of a template; None if it has none."""
    folder = trl_templates()
    for path in sorted(folder.glob("*.jinja")) if folder else ():
        if path.stem.endswith("_training") or path.read_text(encoding="utf-8").strip() != source.strip():
            continue
        if path.with_name(f"{path.stem}_training.jinja").is_file():
            return f"{FROM_TRL}{path.stem}_training"
    return None


def trl_templates() -> Path | None:
    """Find TRL's folder of chat templates without importing TRL."""
    spec = find_spec("trl")
    for place in (spec and spec.submodule_search_locations) or ():
        if (folder := Path(place) / "chat_templates").is_dir():
            return folder
    return None
