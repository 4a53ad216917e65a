"""Every selection and weighting method, one file a family.

A method is a `Method`: the signals it reads, a `score` function over flat arrays (numpy or torch), a policy and its
parameters. To add one, write it into the file of its family, or declare it in a package of your own under the entry
point group `sstoken.methods`.
"""

from sstoken.methods.base import Denominator, Input, Method, Params, Statistic
from sstoken.methods.policies import Everything, Outcome, Policy, Top, Weight, Where
from sstoken.methods.registry import METHODS, decide, get_method
from sstoken.methods.tokens import Array, Tokens

__all__ = [
    "METHODS",
    "Array",
    "Denominator",
    "Everything",
    "Input",
    "Method",
    "Outcome",
    "Params",
    "Policy",
    "Statistic",
    "Tokens",
    "Top",
    "Weight",
    "Where",
    "decide",
    "get_method",
]
