"""What a method is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from sstoken.errors import UsageError
from sstoken.methods.policies import Everything, Outcome, Policy, Top, Weight
from sstoken.methods.tokens import Array, Tokens

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
    """The parameters of a method: its fields, each with type, range, default and a docstring."""

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
    """A number that a method asks of all tokens of its scope."""

    values: Callable[[Tokens, Any], Array]
    """`values(tokens, params)`: [N], or [E]: one an example."""
    quantile: Callable[[Any], float] | None = None
    """`quantile(params)` in [0, 1], interpolated between neighbours; None: the mean."""


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
    """`score(tokens, params) -> [N]`: what the policy judges by; numpy or torch, as the tokens are."""
    policy: Policy
    params: type[Params] = Params
    scopes: tuple[Scope, ...] = ("token",)
    """What it can take together, the default first. `token`: it judges each token alone."""
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    """What it asks of the whole scope; `score` finds it in `tokens.statistics`."""
    evidence: str = "-"
    """A, T, F, S or -: how its formula is known (see `EVIDENCE`)."""
    in_loop: bool = True
    """Whether it can run in a training loop."""
    ignores: tuple[str, ...] = ()
    """Options of other methods that it takes and does not use, so that a sweep over methods needs one line."""
    aliases: tuple[str, ...] = ()
    denominator: Denominator | None = None
    """What the authors' loss is a mean over; None: the kept tokens, or, of soft weights, all response tokens."""

    def __post_init__(self) -> None:
        wrong = [i for i in self.inputs if not Input(i).role or not Input(i).signal]
        if wrong:
            raise UsageError(
                f"method {self.name!r}: input {wrong[0]!r} is not role.signal, such as current.loss"
            )
        if self.evidence not in EVIDENCE or not self.scopes or set(self.scopes) - set(get_args(Scope)):
            raise UsageError(
                f"method {self.name!r}: evidence is one of {', '.join(EVIDENCE)}; scopes of {Scope}"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        """The checkpoints' roles, in the order in which its inputs name them."""
        named = [Input(i).role for i in self.inputs]
        compared = [Input(i).signal.partition("@")[2] for i in self.inputs if "kl@" in i]
        return tuple(dict.fromkeys([*named, *compared]))

    @property
    def scope(self) -> Scope:
        """The default scope."""
        return self.scopes[0]

    @property
    def selective(self) -> bool:
        """False: it keeps every token with weight 1."""
        return not isinstance(self.policy, Everything)

    @property
    def weighted(self) -> bool:
        """Whether it gives weights."""
        return isinstance(self.policy, Weight) or (
            isinstance(self.policy, Top) and self.policy.negative is not None
        )

    @property
    def cost(self) -> str:
        """What measuring its signals takes."""
        names = {role: "one forward pass of the " + role + " checkpoint" for role in self.roles}
        if list(names) == ["history", "current"]:
            return "one forward pass of the history and one of the current checkpoint"
        return ", ".join(names.values()) or "none"

    def check_scope(self, scope: str | None) -> Scope:
        """The scope asked for, or the default.

        Raises:
            UsageError: it cannot take that together.
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
        """Its parameters from values or from text.

        Raises:
            UsageError: one that it does not have, or a value out of range; one line.
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
        """Scores [N] and what they lead to, where all tokens of the scope are at hand.

        Args:
            tokens: whose `units` are those of the scope.
            params: of this method's class.
        """
        tokens = tokens.with_(statistics=local_statistics(self, tokens, params))
        scores = self.score(tokens, params)
        return scores, self.policy.apply(scores, tokens, params)


def local_statistics(method: Method, tokens: Tokens, params: Any) -> dict[str, Array]:
    """A method's statistics over these tokens taken as the whole scope; each a number (a tensor of none)."""
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
    """`float`, `int`, `bool`, `str`, or the legal words joined by `|`."""
    annotation = params.model_fields[name].annotation
    words = [str(word) for word in get_args(annotation) if word is not type(None)]
    return getattr(annotation, "__name__", "") if not words else "|".join(words)


def legal(params: type[Params], name: str) -> str:
    """The range of a parameter, as `0 < rho <= 1`."""
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
