"""A chat template that does not end is stopped and named, whatever kind of loop it is."""

import json
import re
import signal
from pathlib import Path

import pytest

from sstoken.errors import SstokenError
from sstoken.pipeline import api
from sstoken.stages.checkpoints import load_tokenizer
from sstoken.stages.encoding import time_limit
from tests.pipeline.worlds import make_world

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
@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_template_is_stopped(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(make_world().base)
    messages = [{"role": "user", "content": "w"}]
    load_tokenizer(model).apply_chat_template(messages, chat_template=SHOWN)  # its imports take long
    monkeypatch.setattr(time_limit, "MOST_SECONDS", 2.0)
    data, template = tmp_path / "data.jsonl", tmp_path / "t.jinja"
    data.write_text(json.dumps({"prompt": "w1", "completion": "w2"}) + "\n")
    template.write_text(ENDLESS[kind])
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(SstokenError) as caught:
        api.encode(data=str(data), model=model, chat_template=str(template), out=tmp_path / "out")
    line = str(caught.value)
    if kind != "a list that grows while it is walked":  # which the sandbox does not allow in the first place
        assert re.search(r"data\.jsonl line 1: the chat template did not come to an end in 2 s", line), line
    assert "\n" not in line
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    assert not (tmp_path / "out.partial").exists()


def test_a_regular_expression_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "MOST_SECONDS", 0.3)
    with pytest.raises(SstokenError, match=r"^row 3: the chat template"), time_limit.limited("row 3"):
        re.match(r"(a+)+$", "a" * 100 + "b")
