"""The parts of `critical`: checkers of answers, and the judge that replaces tokens."""
