"""A chat template that does not end is stopped and named, whatever kind of loop it is."""

import json
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest

from sstoken.errors import SstokenError
from sstoken.pipeline import api
from sstoken.stages.checkpoints import load_tokenizer
from sstoken.stages.encoding import limits
from tests.pipeline.worlds import make_world
from tests.support import slow_but

SHOWN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
ENDLESS = {
    "nested loops": "{% for a in range(90000) %}" * 4 + "{% endfor %}" * 4 + SHOWN,
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}" + SHOWN
    ),
    "a list that grows while it is walked": (
        "{% set all = [1] %}{% for a in all %}{% if all.append(a) %}{% endif %}{% endfor %}" + SHOWN
    ),
}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such signal")
@pytest.mark.parametrize("kind", slow_but(("nested loops",), ENDLESS))
def test_an_endless_template_is_stopped(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(make_world().base)
    messages = [{"role": "user", "content": "w"}]
    load_tokenizer(model).apply_chat_template(messages, chat_template=SHOWN)  # its imports take long
    monkeypatch.setattr(limits, "MOST_SECONDS", 2.0)
    data, template = tmp_path / "data.jsonl", tmp_path / "t.jinja"
    data.write_text(json.dumps({"prompt": "w1", "completion": "w2"}) + "\n")
    template.write_text(ENDLESS[kind])
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(SstokenError) as caught:
        api.encode(data=str(data), model=model, chat_template=str(template), out=tmp_path / "out")
    line = str(caught.value)
    if kind != "a list that grows while it is walked":  # which the sandbox does not allow in the first place
        assert re.search(r"data\.jsonl line 1: the chat template did not finish in 2 s", line), line
    assert "\n" not in line
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    assert not (tmp_path / "out.partial").exists()


def test_a_regular_expression_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.3)
    with pytest.raises(SstokenError, match=r"^row 3: the chat template"), limits.time_limited("row 3"):
        re.match(r"(a+)+$", "a" * 100 + "b")


GROWING = {
    "a text times a number": ("{{ 'x' * 10**12 }}", "takes more than"),
    "a list times a number": ("{% set a = [1] * 10**12 %}", "takes more than"),
    "a width": ("{{ '{:1000000000000}'.format(3) }}", "takes more than"),
    "a text that doubles": (
        "{% set n = namespace(s='x') %}{% for i in range(64) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "takes more than",
    ),
    "a long output": ("{{ 'w1 ' * 10**7 }}", "30,00"),
    "a long range": ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    "a macro that calls itself": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}", "nested too deep"),
    "deep blocks": ("{% if true %}" * 3000 + "{% endif %}" * 3000, "nested too deep"),
    "deep brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deep"),
    "a long template": ("x" * 2_000_000, "2,000,"),
    "half of a character": ("{{ '\\ud800' }}", "lone surrogate"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "an error of its own": ("{{ [].pop() }}", "template refuses"),
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_template_made_to_harm_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and without the memory that it asks for."""
    monkeypatch.setattr(limits, "MOST_BYTES", 1 << 29)
    template, words = GROWING[kind]
    data, file = tmp_path / "data.jsonl", tmp_path / "t.jinja"
    data.write_text(json.dumps({"prompt": "w1", "completion": "w2"}) + "\n")
    file.write_text(template + SHOWN)
    with pytest.raises(SstokenError) as caught:
        api.encode(
            data=str(data),
            model=str(make_world().base),
            chat_template=str(file),
            out=tmp_path / "out",
            workers=1,
        )
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()
    assert resource.getrlimit(resource.RLIMIT_AS) == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def test_a_tokenizer_that_fails_on_a_text_passes_over_the_row(tmp_path: Path) -> None:
    """Its regular expression takes too long: in Rust, which no signal of ours stops, but a limit of its own."""
    model = tmp_path / "model"
    shutil.copytree(make_world().base, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    endless = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [endless, tokenizer["pre_tokenizer"]]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = [{"prompt": "w1", "completion": "w2"}, {"prompt": "x" * 60, "completion": "w2"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = api.encode(
        data=str(tmp_path / "data.jsonl"), model=str(model), out=tmp_path / "out", on_bad_row="skip"
    )
    assert made.metrics["bad_rows"] == {"tokenizer fails": 1}
