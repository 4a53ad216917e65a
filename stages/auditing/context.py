"""What every check is given besides the example."""

from dataclasses import dataclass, field

from sstoken.stages.auditing.findings import Collector
from sstoken.stages.auditing.shape import Shape
from sstoken.stages.auditing.vocabulary import Vocabulary


@dataclass
class Context:
    """One audit: the tokenizer, the marks of its template, and where findings go."""

    found: Collector
    vocabulary: Vocabulary | None = None
    """None: no tokenizer is known, and texts are not checked."""
    shape: Shape = field(default_factory=Shape)
