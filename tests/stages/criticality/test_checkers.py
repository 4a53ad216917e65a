"""What counts as a right answer."""

import pickle

import pytest

from sstoken.errors import UsageError
from sstoken.stages.criticality.checkers import Checker, CheckerError, exact, final_number


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("He has 48/2=24.\n#### 72", "#### 72", True),
        ("#### 72.0", "so\n#### 72", True),
        ("#### $1,072 dollars", "#### 1072", True),
        ("#### 1 #### 72 apples, not 3", "#### 72", True),
        ("I think it is 72.", "#### 72", True),
        ("10-5 is 5", "#### 5", True),
        ("it is -5", "#### -5", True),
        ("it is .5", "#### 0.5", True),
        ("#### ", "#### 72", False),
        ("72 ####", "#### 72", False),
        ("#### 73", "#### 72", False),
        ("", "#### 72", False),
        ("72", "no number", False),
        ("no number", "no number", False),
    ],
)
def test_final_number(answer, reference, right):
    assert final_number(answer, reference) is right


def test_exact():
    assert exact(" a b\n", "a b")
    assert not exact("a  b", "a b")


def test_a_checker_of_ones_own_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "own_checker_of_test.py").write_text(
        "import numpy as np\n"
        "def check(answer, reference): return np.bool_(answer[0] == reference[0])\n"
        "def odd(answer, reference): return 'yes'\n"
        "def fails(answer, reference): raise KeyError(answer)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    checker = Checker("own_checker_of_test:check")
    assert checker("ab", "ac")
    assert not pickle.loads(pickle.dumps(checker))("b", "a")
    assert checker.source == tmp_path / "own_checker_of_test.py"
    with pytest.raises(CheckerError, match="returned 'yes'; legal: True or False"):
        Checker("own_checker_of_test:odd")("a", "a")
    with pytest.raises(CheckerError, match="raised KeyError: 'some text'"):
        Checker("own_checker_of_test:fails")("some text", "a")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gsm9k", "not known; legal: final-number, exact, or MODULE:FUNCTION"),
        ("no_such_module:check", "does not import .ModuleNotFoundError"),
        ("json:no_such_function", "does not import .AttributeError"),
        ("json:decoder", "is module, not a function"),
    ],
)
def test_a_checker_that_is_not_there_is_one_line(name, says):
    with pytest.raises(UsageError, match=says) as error:
        Checker(name)
    assert "\n" not in str(error.value)
