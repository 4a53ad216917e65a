"""Labels come from the keep mask in one place."""

import ast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sstoken.labels import IGNORED_LABEL, labels_from_mask
from tests.support import ROOT

TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans(), st.floats(0, 1)), max_size=20)


@given(tokens=TOKENS, skip_first=st.booleans())
@settings(deadline=None)
def test_a_label_is_the_kept_token_itself(tokens: list[tuple[int, bool, float]], skip_first: bool) -> None:
    ids = [i for i, _, _ in tokens]
    for keep in ([kept for _, kept, _ in tokens], [weight for _, _, weight in tokens]):
        expected = [i if k > 0 else -100 for i, k in zip(ids, keep, strict=True)]
        if skip_first:
            expected[:1] = [-100] * len(expected[:1])
        found = labels_from_mask(ids, keep, skip_first=skip_first)
        assert found.dtype == np.int32
        assert found.tolist() == expected


def test_no_other_place_derives_labels_from_a_mask() -> None:
    """A choice between a token and the ignored label is made in `sstoken/labels.py` alone."""
    names = {"IGNORED_LABEL", "IGNORED"}

    def is_ignored(node: ast.AST) -> bool:
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            return node.operand.value == -IGNORED_LABEL
        return (isinstance(node, ast.Name) and node.id in names) or (
            isinstance(node, ast.Attribute) and node.attr in names
        )

    for folder in ("stages", "pipeline"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                choices = [node.orelse] if isinstance(node, ast.IfExp) else []
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "where":
                    choices += node.args[1:]
                assert not any(map(is_ignored, choices)), f"{path}:{getattr(node, 'lineno', 0)}"
