"""The registry of signals: what `score` can measure of a token, under which name, in which unit.

A signal is a per-token measurement of one checkpoint; its name is its column in a scores folder and what a method asks
for. To add one, enter it in `SIGNALS` and compute it in `sstoken.measure` (`distribution.py`, if one distribution is
all that it needs).

Some names take an argument after `@`: `attention@-1` (a decoder layer), `kl@base` (another checkpoint).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from sstoken.errors import UsageError

Need = Literal["distribution", "attention", "second look", "second checkpoint", "generation"]
"""What a signal is computed from: the distribution that predicts the token; attention weights of a layer; another pass
over the data; another checkpoint beside the first; what the checkpoint generates (the verb `critical`)."""


@dataclass(frozen=True)
class Signal:
    """One per-token measurement."""

    name: str
    """Its column, argument included: `loss`, `attention@-1`."""
    unit: str
    """`nats`, `probability`, `tokens`, ..."""
    meaning: str
    """One line."""
    low: float
    high: float
    """Range, both ends legal."""
    needs: Need
    dtype: Literal["float32", "int32"] = "float32"
    takes: Literal["layer", "checkpoint", "draw"] | None = None
    """What stands after `@`."""
    bare: bool = True
    """Whether the name works without an argument."""
    from_second: bool = False
    """An example's first response token has none: null in its column."""
    argument: str | None = None

    @property
    def partial(self) -> bool:
        """Whether it may be null where it was not measured, within a budget."""
        return self.needs == "generation"

    @property
    def base(self) -> str:
        """The name without its argument."""
        return self.name.partition("@")[0]

    @property
    def layer(self) -> int | None:
        """The decoder layer asked for, negative from the end; None: none in particular."""
        return int(self.argument) if self.takes == "layer" and self.argument is not None else None


def _signals() -> list[Signal]:
    inf, nats, share, count = math.inf, "nats", "probability", "tokens"
    one: Need = "distribution"
    other: Need = "second checkpoint"
    layer: Need = "attention"
    again: Need = "second look"
    prompt = "share of attention on the prompt, mean over heads, in the row"
    return [
        Signal("loss", nats, "-log p(token)", 0, inf, one),
        Signal("entropy", nats, "entropy of the distribution that predicts the token", 0, inf, one),
        Signal(
            "entropy_top20",
            nats,
            "entropy of the 20 most likely tokens, their probabilities made to sum to 1",
            0,
            math.log(20) + 1e-6,
            one,
        ),
        Signal("rank", count, "how many tokens are strictly likelier; 0: the most likely", 0, inf, one, "int32"),
        Signal("ties", count, "how many other tokens are exactly as likely", 0, inf, one, "int32"),
        Signal("mass_above", share, "probability of all strictly likelier tokens together", 0, 1, one),
        Signal("max_prob", share, "probability of the most likely token", 0, 1, one),
        Signal("sum_p2", share, "sum of squared probabilities", 0, 1, one),
        Signal("expected_rank", count, "sum of rank times probability, ranks from 1", 1, inf, one),
        Signal(
            "entropy_at",
            nats,
            "entropy of the distribution at the token's position, which predicts the next token",
            0,
            inf,
            one,
        ),
        Signal("attention", share, f"{prompt} of the token", 0, 1, layer, takes="layer"),
        Signal(
            "attention_predicting", share, f"{prompt} that predicts the token", 0, 1, layer, takes="layer"
        ),
        Signal(
            "loss_unconditional",
            nats,
            "-log p(token) of the response alone, without its prompt",
            0,
            inf,
            again,
            from_second=True,
        ),
        Signal(
            "pmi_noisy",
            nats,
            "loss minus loss_unconditional, with noise on the embeddings (draw ARG of T-SHIRT's)",
            -inf,
            inf,
            again,
            takes="draw",
            bare=False,
            from_second=True,
        ),
        Signal("kl", nats, "KL(this checkpoint || ARG)", 0, inf, other, takes="checkpoint", bare=False),
        Signal("reverse_kl", nats, "KL(ARG || this checkpoint)", 0, inf, other, takes="checkpoint", bare=False),
        Signal(
            "kl_at",
            nats,
            "KL(this checkpoint || ARG) at the token's position, which predicts the next token",
            0,
            inf,
            other,
            takes="checkpoint",
            bare=False,
        ),
        Signal(
            "critical",
            "0 or 1",
            "1: without the token, every greedy continuation ends wrong; null: not tried",
            0,
            1,
            "generation",
        ),
    ]  # fmt: skip


SIGNALS: dict[str, Signal] = {signal.name: signal for signal in _signals()}
"""By name, without argument."""
ATTENTION = "attention"
LOSS = "loss"


def get_signal(name: str) -> Signal:
    """The signal of that name, argument included.

    Raises:
        UsageError: there is none, or its argument is not legal; lists what is.
    """
    base, separator, argument = name.partition("@")
    signal = SIGNALS.get(base)
    if signal is None:
        legal = ", ".join(s.name + (f"[@{s.takes.upper()}]" if s.takes else "") for s in SIGNALS.values())
        raise UsageError(f"signal {name!r} is not known; legal: {legal}")
    if not separator:
        if not signal.bare:
            raise UsageError(f"signal {name!r} needs a {signal.takes}: {base}@{(signal.takes or '').upper()}")
        return signal
    if signal.takes is None:
        raise UsageError(f"signal {name!r}: {base} takes nothing after '@'; write {base}")
    if not _legal(signal, argument):
        example = {"layer": "-1", "draw": "1", "checkpoint": "base"}[signal.takes]
        raise UsageError(
            f"signal {name!r}: {argument!r} is not a {signal.takes}; legal is such as {base}@{example}"
        )
    meaning = signal.meaning.replace("ARG", argument)
    if signal.takes == "layer":
        meaning += f", layer {argument}"
    return replace(signal, name=name, argument=argument, meaning=meaning)


def _legal(signal: Signal, argument: str) -> bool:
    if signal.takes == "layer":
        digits = argument.removeprefix("-")
        return digits.isascii() and digits.isdigit() and str(int(argument)) == argument
    if signal.takes == "draw":
        return argument.isascii() and argument.isdigit() and str(int(argument)) == argument != "0"
    return bool(argument) and "/" not in argument


def get_signals(names: Iterable[str]) -> list[Signal]:
    """The signals of those names, each once, in the order of the registry.

    Raises:
        UsageError: see `get_signal`.
    """
    order = list(SIGNALS)
    found = {name: get_signal(name) for name in names}
    return sorted(found.values(), key=lambda s: (order.index(s.base), s.layer or 0, s.argument or ""))


def is_signal(name: str) -> bool:
    """Whether a column of that name holds a signal."""
    try:
        get_signal(name)
    except UsageError:
        return False
    return True
