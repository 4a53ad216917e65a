"""`Method` and what it is made of: its parameters, inputs and statistics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from sstoken.errors import UsageError
from sstoken.methods.policies import Everything, Outcome, Policy, Top, Weight
from sstoken.methods.tokens import Array, Tokens
from sstoken.signals import SIGNALS

Scope = Literal["token", "turn", "sample", "global"]
Denominator = Literal["kept", "response"]
EVIDENCE = {
    "A": "the authors' published code was run",
    "T": "someone else's published code was run",
    "F": "the formula was read",
    "S": "second-hand",
    "-": "this project's own, or a baseline",
}


class Params(BaseModel):
    """Base class of a method's parameters; each field has a type, a range, a default and a docstring."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class Input(str):
    """A signal that a method reads, as `role.signal`: `history.loss`, `current.kl@history`."""

    @property
    def role(self) -> str:
        """The checkpoint's role."""
        return self.partition(".")[0]

    @property
    def signal(self) -> str:
        """The signal's name; `kl@ROLE` compares with the checkpoint of that role."""
        return self.partition(".")[2]


@dataclass(frozen=True)
class Statistic:
    """A number computed from all tokens of the scope, before the method scores them."""

    values: Callable[[Tokens, Any], Array]
    """`values(tokens, params)`: [N], or [E] with one value per example."""
    quantile: Callable[[Any], float] | None = None
    """`quantile(params)` in [0, 1]: the number is that quantile, interpolated between neighbours; None: the mean."""


@dataclass(frozen=True)
class Method:
    """One way to select or weight tokens."""

    name: str
    """In kebab case, after its paper."""
    family: str
    inputs: tuple[str, ...]
    """The signals it reads, each as `role.signal`."""
    formula: str
    source: str
    score: Callable[[Tokens, Any], Array]
    """`score(tokens, params) -> [N]`: what the policy decides by; numpy or torch, like the tokens."""
    policy: Policy
    params: type[Params] = Params
    scopes: tuple[Scope, ...] = ("token",)
    """Legal scopes, the default first. `token`: each token is judged alone."""
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    """By name; `score` finds their values in `tokens.statistics`."""
    evidence: str = "-"
    """A, T, F, S or -: how its formula is known (see `EVIDENCE`)."""
    in_loop: bool = True
    """Whether its rule can be applied in a training loop; see `runs_in_loop` for its signals."""
    ignores: tuple[str, ...] = ()
    """Options of other methods that it accepts and ignores, so that one sweep can cover several methods."""
    aliases: tuple[str, ...] = ()
    denominator: Denominator | None = None
    """What the authors' loss is averaged over; None: the kept tokens, or all response tokens with soft weights."""

    def __post_init__(self) -> None:
        wrong = [i for i in self.inputs if not Input(i).role or not Input(i).signal]
        if wrong:
            raise UsageError(
                f"method {self.name!r}: input {wrong[0]!r} is not role.signal, such as current.loss"
            )
        scopes = get_args(Scope)
        if self.evidence not in EVIDENCE or not self.scopes or set(self.scopes) - set(scopes):
            raise UsageError(
                f"method {self.name!r}: evidence is one of {', '.join(EVIDENCE)}; scopes of {', '.join(scopes)}"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        """The checkpoints' roles, in the order in which its inputs name them."""
        named = [Input(i).role for i in self.inputs]
        compared = [Input(i).signal.partition("@")[2] for i in self.inputs if _takes_checkpoint(Input(i))]
        return tuple(dict.fromkeys([*named, *compared]))

    @property
    def runs_in_loop(self) -> bool:
        """Whether a training step measures what it needs of the model in training, with some kind of history."""
        live = [Input(i).signal for i in self.inputs if Input(i).role == "current"]
        known = {signal: SIGNALS.get(signal.partition("@")[0]) for signal in live}
        return self.in_loop and all(
            found is not None
            and (found.needs in ("distribution", "second checkpoint") or name == found.name == "attention")
            for name, found in known.items()
        )

    @property
    def scope(self) -> Scope:
        """The default scope."""
        return self.scopes[0]

    @property
    def selective(self) -> bool:
        """Whether it may drop or weight tokens; False: it keeps every token with weight 1."""
        return not isinstance(self.policy, Everything)

    @property
    def weighted(self) -> bool:
        """Whether it writes weights."""
        return isinstance(self.policy, Weight) or (
            isinstance(self.policy, Top) and self.policy.negative is not None
        )

    @property
    def cost(self) -> str:
        """The forward passes that measuring its signals takes, in words."""
        names = {role: "one forward pass of the " + role + " checkpoint" for role in self.roles}
        if list(names) == ["history", "current"]:
            return "one forward pass of the history and one of the current checkpoint"
        return ", ".join(names.values()) or "none"

    def check_scope(self, scope: str | None) -> Scope:
        """Return the requested scope, or the default for None.

        Raises:
            UsageError: this method does not support it.
        """
        if scope is None or "scope" in self.ignores:
            return self.scopes[0]
        for legal in self.scopes:
            if legal == scope:
                return legal
        legal_scopes = "judges each token alone; leave scope out"
        if self.scopes != ("token",):
            legal_scopes = f"takes scope {', '.join(self.scopes)}"
        raise UsageError(f"scope is {scope!r}, and method {self.name!r} {legal_scopes}")

    def read_params(self, given: Mapping[str, Any]) -> Params:
        """Build its parameters from values or from text.

        Raises:
            UsageError: an unknown parameter, or a value out of range.
        """
        used = {name: value for name, value in given.items() if name not in self.ignores}
        fields = self.params.model_fields
        for name in used:
            if name not in fields:
                has = f"it has {', '.join(fields)}" if fields else "it has none"
                raise UsageError(f"method {self.name!r} has no parameter {name!r}; {has}")
        try:
            return self.params.model_validate(used)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else self.name
            if name not in fields:
                raise UsageError(
                    f"method {self.name!r}: {first['msg'].removeprefix('Value error, ')}"
                ) from None
            about = (fields[name].description or "").split("\n")[0].rstrip(".")
            about = f" ({about[:1].lower()}{about[1:]})" if about else ""
            raise UsageError(
                f"{name} is {first['input']}; legal is {legal(self.params, name)}{about}"
            ) from None

    def decide(self, tokens: Tokens, params: Any) -> tuple[Array, Outcome]:
        """Score tokens that make up the whole scope, and decide about them; returns the scores [N] and the outcome."""
        tokens = tokens.with_(statistics=local_statistics(self, tokens, params))
        scores = self.score(tokens, params)
        return scores, self.policy.apply(scores, tokens, params)


def _takes_checkpoint(given: Input) -> bool:
    signal = SIGNALS.get(given.signal.partition("@")[0])
    return signal is not None and signal.takes == "checkpoint"


def local_statistics(method: Method, tokens: Tokens, params: Any) -> dict[str, Array]:
    """Compute a method's statistics, each a scalar, over tokens that make up the whole scope."""
    xp, found = tokens.xp, {}
    for name, statistic in method.statistics.items():
        values = statistic.values(tokens, params)
        if not len(values):
            found[name] = 0.0
        elif statistic.quantile is None:
            found[name] = values.mean()
        else:
            found[name] = xp.quantile(values, statistic.quantile(params))
    return found


def parameter_type(params: type[Params], name: str) -> str:
    """Return the type for the table of methods: `float`, `int`, `bool`, `str`, or the legal words joined by `|`."""
    annotation = params.model_fields[name].annotation
    words = [str(word) for word in get_args(annotation) if word is not type(None)]
    return getattr(annotation, "__name__", "") if not words else "|".join(words)


def legal(params: type[Params], name: str) -> str:
    """Return the range of a parameter, such as `0 < rho <= 1`."""
    low, high = "", ""
    for bound in params.model_fields[name].metadata:
        for attribute, sign in (("gt", "<"), ("ge", "<=")):
            if (value := getattr(bound, attribute, None)) is not None:
                low = f"{value} {sign} "
        for attribute, sign in (("lt", "<"), ("le", "<=")):
            if (value := getattr(bound, attribute, None)) is not None:
                high = f" {sign} {value}"
    if not low and not high:
        kind = parameter_type(params, name)
        return kind.replace("|", ", ") if "|" in kind else f"any {kind}"
    return f"{low}{name}{high}"
