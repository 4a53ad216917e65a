"""These tests run vLLM itself: `make test-vllm` has it in an environment of its own."""

from importlib.util import find_spec

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("vllm") is None:
        for item in items:
            if item.path.parent.name == "vllm":
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-vllm"))
