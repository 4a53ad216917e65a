"""The registry of signals: what `score` can measure for each token, with name, unit and range.

A signal is a per-token measurement of one checkpoint. Its name is its column in a scores folder, and the name by which
a method asks for it. To add one, enter it in `SIGNALS`. What follows from the logits that predict the token is computed
from its entry (`Signal.of_row`); anything else, and what has a faster way, is computed in `sstoken.measure`.

Some names take an argument after `@`: `attention@-1` (a decoder layer), `kl@base` (another checkpoint).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from sstoken.errors import UsageError, did_you_mean

Need = Literal["distribution", "attention", "second pass", "second checkpoint", "generation"]
"""What a signal is computed from: the distribution that predicts the token; a layer's attention weights; another pass
over the data; a second checkpoint; text that the checkpoint generates (the verb `critical`)."""


@dataclass(frozen=True)
class Signal:
    """One per-token measurement."""

    name: str
    """Its column, argument included: `loss`, `attention@-1`."""
    unit: str
    """`nats`, `probability`, `tokens`, ..."""
    meaning: str
    """One line for the table of signals."""
    low: float
    high: float
    """The range, both ends included."""
    needs: Need
    dtype: Literal["float32", "int32"] = "float32"
    takes: Literal["layer", "checkpoint", "draw"] | None = None
    """What the argument after `@` is; None: the name takes none."""
    bare: bool = True
    """Whether the name works without an argument."""
    may_be_constant: bool = False
    """Whether one value on every token is nothing unusual."""
    from_second: bool = False
    """An example's first response token has no value: null in its column."""
    of_row: Callable[[Any, Any], Any] | None = None
    """`of_row(log_p, targets)` returns the signal of N tokens, [N]. It gets tensors: the log-probabilities [N, V], in
    nats, of the distributions that predict them, and their ids [N]. None: measured otherwise."""
    argument: str | None = None
    """What the name has after `@`."""

    @property
    def partial(self) -> bool:
        """Whether tokens may be null because a budget left them unmeasured."""
        return self.needs == "generation"

    @property
    def base(self) -> str:
        """The name without its argument."""
        return self.name.partition("@")[0]

    @property
    def form(self) -> str:
        """How the name is written: `loss`, `kl@CHECKPOINT`, `attention[@LAYER]`."""
        argument = f"@{(self.takes or '').upper()}"
        return self.base + (f"[{argument}]" if self.bare and self.takes else argument if self.takes else "")

    @property
    def layer(self) -> int | None:
        """The requested decoder layer, negative from the end; None: no particular one."""
        return int(self.argument) if self.takes == "layer" and self.argument is not None else None


def _varentropy(log_p: Any, targets: Any) -> Any:
    p = log_p.exp()
    entropy = -(p * log_p).sum(1, keepdim=True)
    return (p * (log_p + entropy) ** 2).sum(1)


_PROMPT = "share of attention on the prompt, mean over heads, in the row"
_INF = math.inf
_SIGNALS = (
    Signal("loss", "nats", "-log p(token)", 0, _INF, "distribution"),
    Signal("entropy", "nats", "entropy of the distribution that predicts the token", 0, _INF, "distribution"),
    Signal("entropy_top20", "nats", "entropy of the 20 most likely tokens, their probabilities made to sum to 1",
           0, math.log(20) + 1e-6, "distribution"),
    Signal("rank", "tokens", "how many tokens are strictly likelier; 0: the most likely",
           0, _INF, "distribution", "int32"),
    Signal("ties", "tokens", "how many other tokens are exactly as likely",
           0, _INF, "distribution", "int32", may_be_constant=True),
    Signal("mass_above", "probability", "probability of all strictly likelier tokens together", 0, 1, "distribution"),
    Signal("max_prob", "probability", "probability of the most likely token", 0, 1, "distribution"),
    Signal("sum_p2", "probability", "sum of squared probabilities", 0, 1, "distribution"),
    Signal("expected_rank", "tokens", "sum of rank times probability, ranks from 1", 1, _INF, "distribution"),
    Signal("varentropy", "nats squared", "variance of -log p under the distribution that predicts the token",
           0, _INF, "distribution", of_row=_varentropy),
    Signal("entropy_at", "nats", "entropy of the distribution at the token's position, which predicts the next token",
           0, _INF, "distribution"),
    Signal("attention", "probability", f"{_PROMPT} of the token", 0, 1, "attention", takes="layer"),
    Signal("attention_predicting", "probability", f"{_PROMPT} that predicts the token",
           0, 1, "attention", takes="layer"),
    Signal("loss_unconditional", "nats", "-log p(token) of the response alone, without its prompt",
           0, _INF, "second pass", from_second=True),
    Signal("pmi_noisy", "nats", "loss minus loss_unconditional, with noise on the embeddings (draw ARG of T-SHIRT's)",
           -_INF, _INF, "second pass", takes="draw", bare=False, from_second=True),
    Signal("kl", "nats", "KL(this checkpoint || ARG)",
           0, _INF, "second checkpoint", takes="checkpoint", bare=False),
    Signal("reverse_kl", "nats", "KL(ARG || this checkpoint)",
           0, _INF, "second checkpoint", takes="checkpoint", bare=False),
    Signal("kl_at", "nats", "KL(this checkpoint || ARG) at the token's position, which predicts the next token",
           0, _INF, "second checkpoint", takes="checkpoint", bare=False),
    Signal("critical", "0 or 1", "1: without the token, every greedy continuation ends wrong; null: not tried",
           0, 1, "generation", may_be_constant=True),
)  # fmt: skip

SIGNALS: dict[str, Signal] = {signal.name: signal for signal in _SIGNALS}
"""By name without argument."""
ATTENTION = "attention"
LOSS = "loss"


def get_signal(name: str) -> Signal:
    """Look up a signal by name, argument included.

    Raises:
        UsageError: unknown name or illegal argument; lists the legal ones.
    """
    base, separator, argument = name.partition("@")
    signal = SIGNALS.get(base)
    if signal is None:
        legal = ", ".join(s.form for s in SIGNALS.values())
        raise UsageError(f"signal {name!r} is not known; legal: {legal}{did_you_mean(base, SIGNALS)}")
    if not separator:
        if not signal.bare:
            raise UsageError(f"signal {name!r} needs a {signal.takes}: {signal.form}")
        return signal
    if signal.takes is None:
        raise UsageError(f"signal {name!r}: {base} takes nothing after '@'; write {base}")
    if not _legal(signal, argument):
        example = {"layer": "-1", "draw": "1", "checkpoint": "base"}[signal.takes]
        raise UsageError(
            f"signal {name!r}: {argument!r} is not a {signal.takes}; write it as in {base}@{example}"
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
    """Look up several signals; each is returned once, in the order of the registry.

    Raises:
        UsageError: see `get_signal`.
    """
    order = list(SIGNALS)
    found = {name: get_signal(name) for name in names}
    return sorted(found.values(), key=lambda s: (order.index(s.base), s.layer or 0, s.argument or ""))


def is_signal(name: str) -> bool:
    """Whether `name` is a legal signal name (and so a signal's column)."""
    try:
        get_signal(name)
    except UsageError:
        return False
    return True
