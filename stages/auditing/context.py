"""What the checks know besides the example."""

from dataclasses import dataclass, field

from sstoken.stages.auditing.findings import Collector
from sstoken.stages.auditing.shape import Shape
from sstoken.stages.auditing.vocabulary import Vocabulary


@dataclass
class Context:
    """One audit: the tokenizer, the marks of its template, and where findings go."""

    found: Collector
    vocabulary: Vocabulary | None = None
    """None: no tokenizer is known, and texts are not looked at."""
    shape: Shape = field(default_factory=Shape)
    raw: bool = False
    """The rows were encoded just now from conversations."""
