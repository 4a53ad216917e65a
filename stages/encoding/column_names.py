"""Infer from a column's name what it holds."""

import re
from functools import lru_cache
from typing import Literal


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_METADATA = _words(
    """
    id ids idx index uuid uid guid hash md5 sha sha1 sha256 fingerprint url urls uri link links href
    source sources src dataset datasets origin provenance category categories type types kind class score
    scores rating ratings rank ranks reward rewards label labels tag tags keyword keywords topic topics
    subtopic domain domains subject subjects task tasks skill skills language languages lang
    locale license licence citation copyright author authors annotator annotators model models engine
    generator version split subset config configs configuration configurations
    date time timestamp datetime created updated year month day
    count counts num number length len size tokens turn turns difficulty level grade quality status state
    country city title titles name names filename file files path paths email meta metadata info extra
    moderation toxicity toxic redacted flag flags avatar views likes upvotes note notes comment comments
    annotation annotations usage parameters params kwargs settings header headers ip role intent choice format
    formats schema rubric
    """
)
"""Last words of names of metadata columns."""
_METADATA_FIRST = _words(
    """
    original meta metadata quality openai detoxify llama num is has final gold ground expected reference correct
    """
)
"""First words of names of metadata columns."""
_CONVERSATION = _words(
    """
    system prompt prompts context contexts passage passages document documents doc docs background
    preamble persona personas scenario instruction instructions history histories query question questions
    input inputs answer answers response responses output outputs completion completions reply message
    messages conversation conversations dialog dialogs dialogue dialogues chat chats utterance utterances
    tools functions thought thoughts thinking reasoning rationale rationales cot scratchpad evidence
    evidences knowledge facts paragraph paragraphs article options choices examples demonstrations
    solution refusal user assistant developer recipient
    """
)
"""Words in names of columns that hold text of a conversation."""
_MEDIA = _words(
    """
    image images img imgs picture pictures photo photos video videos audio audios pixel frames media
    """
)
_MEDIA_FORMS = _words(
    """
    path paths url urls uri file files name names bytes data values base64 list input inputs
    """
)
_TOOLS = _words("tool tools function functions api apis")
_ROLES = {
    "reasoning": _words("reasoning thinking thought thoughts cot rationale rationales scratchpad"),
    "tools": _TOOLS,
    "history": _words(
        "history histories dialog dialogs dialogue dialogues conversation conversations chat chats"
    ),
    "system": _words("system preamble persona personas instruction instructions developer"),
}
"""The roles that a column may play, by the words in its name."""
_NAME_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@lru_cache(maxsize=4096)
def kind_of_name(name: str) -> Literal["metadata", "conversation", "unknown"]:
    """Classify a column by its name: metadata about the row, text of a conversation, or unknown."""
    words = words_of(name)
    if not words:
        return "unknown"
    if words[-1] in _METADATA or words[0] in _METADATA_FIRST:
        return "unknown" if _TOOLS.intersection(words) else "metadata"  # `tool_schema` may define tools
    return "conversation" if _CONVERSATION.intersection(words) else "unknown"


@lru_cache(maxsize=4096)
def is_media(name: str) -> bool:
    """Return whether a column of that name holds images, video or audio, or paths to them."""
    words = set(words_of(name))
    return bool(words & _MEDIA) and words <= _MEDIA | _MEDIA_FORMS


def likely_roles(name: str) -> list[str]:
    """Return the roles that a column of that name could play, likeliest first."""
    words = words_of(name)
    found = [role for role, marks in _ROLES.items() if marks.intersection(words)]
    return [*found, *(role for role in ("context", "input", "system") if role not in found)]


@lru_cache(maxsize=4096)
def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case: `lastTurn_only` is last, turn, only."""
    return [word.lower() for word in _NAME_PARTS.findall(name)]
