"""Fuzz one target; called by `tests.fuzz.fuzz` with its name and libFuzzer's options."""

import sys

import atheris

with atheris.instrument_imports(include=["sstoken"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    name = sys.argv.pop(1)
    TARGETS[name](b"")  # what it imports takes longer than an input may
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
