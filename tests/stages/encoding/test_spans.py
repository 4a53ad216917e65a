"""Where turns start and end, straight from their finder: one small template for each way in which it decides."""

import re
from typing import Any

import pytest

from sstoken.stages.encoding.messages import LOST, UNCERTAIN, BadRow, Conversation
from sstoken.stages.encoding.spans import SpecialTokens, Turn, TurnFinder, _shared
from sstoken.stages.encoding.templates import ChatTemplate
from sstoken.stages.encoding.tracing import OTHER_HEADER, SPLIT

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


def make(template: str, control=("<end>",), stops=("<end>",), special=("<end>",)) -> TurnFinder:
    tokens = SpecialTokens({}, frozenset(control), frozenset(special), frozenset(stops))
    return TurnFinder(ChatTemplate(template, {}), tokens)


def talk(*contents: str, **last: Any) -> Conversation:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    messages[-1] |= last
    return Conversation(messages)


def find(finder: TurnFinder, conversation: Conversation, index: int) -> tuple[str, Turn]:
    """The text of a turn, and where it is."""
    found = finder.trace(conversation)
    turn = finder.turn(found, conversation, index)
    return found.text[turn.start : turn.stop], turn


def refused(finder: TurnFinder, conversation: Conversation, index: int) -> tuple[str, str]:
    """Why a turn is not found."""
    with pytest.raises(BadRow) as raised:
        find(finder, conversation, index)
    return raised.value.reason, raised.value.detail


def test_a_turn_says_where_its_parts_are() -> None:
    finder, conversation = make(PLAIN + PROMPT), talk("hello", " there ", "my", "friend")
    text = "<user>hello<end><assistant> there <end><user>my<end><assistant>friend<end>"
    assert finder.trace(conversation).text == text
    said, turn = find(finder, conversation, 1)
    assert said == " there <end>"
    start = text.index(" there ")
    assert turn == Turn(1, start + 1, start + 6, start, start + 12, True)
    said, turn = find(finder, conversation, 3)
    assert (said, turn.message, turn.closed) == ("friend<end>", 3, True)


def test_the_rendering_may_be_given() -> None:
    finder, conversation = make(PLAIN), talk("hello", "there")
    text = finder.template.render(conversation)
    given = finder.trace(conversation, text)
    assert given.text is text
    assert (given.owners == finder.trace(conversation).owners).all()


def test_the_prompt_is_what_inference_shows() -> None:
    finder = make(PLAIN + PROMPT)
    found = finder.prompt(talk("hello", "there", "my", "friend"), 3)
    assert found.text == "<user>hello<end><assistant>there<end><user>my<end><assistant>"


# A turn without letters or digits


def test_marks_alone_are_found_by_a_word_in_their_place() -> None:
    said, turn = find(make(PLAIN + PROMPT), talk("hello", " {} ", "my", "friend"), 1)
    assert said == " {} <end>"
    assert turn.closed


@pytest.mark.parametrize(
    "hidden", [{"reasoning_content": "so"}, {"tool_calls": [{"function": {"name": "add", "arguments": {}}}]}]
)
def test_marks_beside_something_that_is_not_printed_are_uncertain(hidden: dict[str, Any]) -> None:
    why = refused(make(PLAIN), talk("hello", "{}", **hidden), 1)
    assert why == (UNCERTAIN, "turn 2 cannot be told from what the chat template prints")


@pytest.mark.parametrize(
    "printed",
    [
        "",  # nothing of it
        "{{ m.content }}-{{ m.content }}",  # twice
        "{{ m.content | length }}:{{ m.content }}",  # something before it that depends on it
        "{{ m.content }}:{{ m.content | length }}",  # and after it
    ],
)
def test_marks_that_are_printed_in_another_way_than_a_word(printed: str) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}<a>" + printed
    why = refused(make(template + "<end>{% endif %}{% endfor %}"), talk("hello", "{}"), 1)
    assert why == (UNCERTAIN, "the chat template prints turn 2 in another way than a word")


def test_marks_that_the_template_cuts_are_lost() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('{', '') }}<end>{% endfor %}"
    assert refused(make(template), talk("hello", "{}"), 1) == (LOST, "content of turn 2")


# Where the header ends


def test_a_repeated_turn_is_refused() -> None:
    template = PLAIN + "{{ messages[-1].content }}"
    assert refused(make(template), talk("hello", "there"), 1) == (SPLIT, "it prints turn 2 more than once")


def test_another_opening_than_the_generation_prompt_is_refused_and_shown() -> None:
    opening, prompt = "o" * 70 + ":", "p" * 70 + ":"
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        + opening
        + "{{ m.content }}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}"
        + prompt
        + "{% endif %}"
    )
    reason, detail = refused(make(template), talk("hello", "there"), 1)
    assert reason == OTHER_HEADER
    assert detail == (
        f"the chat template opens turn 2 with {opening[-60:]!r}, its generation prompt is {prompt[-60:]!r}"
    )


@pytest.mark.parametrize(
    ("opening", "prompt", "said"),
    [
        ("<a>", "<a>", "there<end>"),  # alike
        ("<a>\nwell ", "<a>", "\nwell there<end>"),  # the prompt is shorter
        ("<a>", "<a><think>", "there<end>"),  # it is longer
        ("<a><plain>", "<a><think>", "<plain>there<end>"),  # they part ways after a tag
        ("<a>answer ", "<a>ant ", "answer there<end>"),  # within a word, which is not split
    ],
)
def test_a_response_starts_where_generation_would(opening: str, prompt: str, said: str) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}" + opening +
        "{{ m.content }}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )  # fmt: skip
    assert find(make(template), talk("hello", "there", "my", "friend"), 1)[0] == said


@pytest.mark.parametrize(
    ("opening", "said"),
    [
        ("<a>", "there<end>"),
        ("Answer: ", "there<end>"),
        (" ", " there<end>"),
        ("", "there<end>"),
        ("{{ '\\n' }}", "there<end>"),
        ("X ", "there<end>"),
    ],
)
def test_without_a_generation_prompt_a_blank_before_the_answer_is_its_own(opening: str, said: str) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}" + opening +
        "{{ m.content }}{% endif %}<end>{% endfor %}"
    )  # fmt: skip
    assert find(make(template), talk("hello", "there"), 1)[0] == said


def test_a_generation_prompt_that_changes_what_stands_before_it() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<a><x>{% endif %}{{ m.content }}"
        "{{ '<finished>' if loop.last and not add_generation_prompt else '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}<a><y>{% endif %}"
    )
    finder = make(template, stops=("<end>", "<finished>"))
    assert find(finder, talk("hello", "there"), 1)[0] == "<x>there<finished>"


def test_a_template_that_prints_no_plain_answer_shows_no_header() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if m.role == 'user' else m.reasoning_content }}"
        "{% endfor %}"
    )
    why = refused(make(template), talk("hello", "", reasoning_content="so"), 1)
    assert why == (UNCERTAIN, "the chat template prints no generation prompt and no plain answer")


def test_headers_are_remembered_by_what_decides_them() -> None:
    """Roles, tools and reasoning each change the generation prompt, and not the opening of a turn."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<a>so {{ m.reasoning_content or '' }}{% endif %}"
        "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<a>"
        "{% if tools or messages[-1].role == 'tool' or messages[0].role == 'system' "
        "or messages | selectattr('reasoning_content') | list %}so {% endif %}{% endif %}"
    )
    asked, said = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}
    system = {"role": "system", "content": "kind"}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    finder = make(template)
    for _ in range(2):
        assert find(finder, Conversation([asked, said]), 1)[0] == "so there<end>"
        assert find(finder, Conversation([asked, said], [tool]), 1)[0] == "there<end>"
        assert find(finder, Conversation([system, asked, said]), 2)[0] == "there<end>"
        result = {"role": "tool", "content": "four"}
        assert find(finder, Conversation([asked, said, result, said]), 3)[0] == "there<end>"
        assert find(finder, Conversation([asked, said, asked, said]), 3)[0] == "so there<end>"
        thinking = [asked, said | {"reasoning_content": "hm"}, asked, said]
        assert find(finder, Conversation(thinking), 3)[0] == "there<end>"


@pytest.mark.parametrize(
    ("left", "right", "shared"),
    [
        ("<a><b>", "<a><c>", 3),
        ("one two", "one ten", 4),
        ("[INST]x", "[INST]y", 6),
        ("word", "work", 0),
        ("<a>", "<b>", 0),
        ("one", "one two", 3),
        ("one two", "one", 3),
        ("", "one", 0),
    ],
)
def test_what_two_texts_share_splits_no_tag_and_no_word(left: str, right: str, shared: int) -> None:
    assert _shared(left, right) == shared


# Where a turn ends


def test_without_a_token_a_turn_ends_where_the_conversation_that_stops_there_does() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    finder = make(template, control=(), stops=(), special=())
    contents = ("hello", "there!", "my", "friend!")
    for length, index in ((2, 1), (3, 1), (4, 1), (4, 3)):
        said, turn = find(finder, talk(*contents[:length]), index)
        assert said == contents[index]
        assert not turn.closed


def test_a_control_token_at_the_end_closes_a_turn_though_it_never_stops_generation() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<sep>\n{% endfor %}"
    said, turn = find(make(template, control=("<sep>",), stops=(), special=()), talk("hello", "there"), 1)
    assert said == "there<sep>"
    assert turn.closed
    said, turn = find(make(template, control=(" ", ""), stops=(), special=()), talk("hello", "there"), 1)
    assert said == "there<sep>"
    assert not turn.closed


def test_whitespace_is_no_token_that_stops_generation() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n!<end>{% endfor %}"
    assert find(make(template, stops=("\n", "", "<end>")), talk("hello", "there"), 1)[0] == "there\n!<end>"


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("<sep><end>", "<sep><end>"),  # directly after another
        ("<sep>\n<end>", "<sep>\n<end>"),  # after whitespace, for it stops generation
        ("<sep>\n<sep>", "<sep>"),  # which this one does not
        ("<end>\n<end>", "<end>"),  # one that stops generation ends it
        ("<sep><end>\n<end>", "<sep><end>"),
        ("<sep><sep>\n<end>", "<sep><sep>\n<end>"),
        ("<end><end>", "<end><end>"),
        ("<end><sep>\n<end>", "<end>"),
        ("<sep>. <end>", "<sep>"),  # text in between
        ("\n<end>", "\n<end>"),
    ],
)
def test_what_closes_a_turn(after: str, said: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + after + "{% endfor %}"
    finder = make(template, control=("<sep>", "<end>"), special=("<sep>", "<end>", "<user>"))
    text, turn = find(finder, talk("hello", "there"), 1)
    assert text == "there" + said
    assert turn.closed


def test_of_tokens_that_start_alike_the_longest_counts() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e><e>2{% endfor %}"
    tokens = ("<e>", "<e><e>2", "<e><e>")
    for stops in (tokens, ()):
        finder = make(template, control=tokens, special=tokens, stops=stops)
        assert find(finder, talk("hello", "there", "my", "friend"), 1)[0] == "there<e><e>2"


def test_a_token_that_opens_the_next_turn_does_not_close_one() -> None:
    """`<next>` stands after answers alone, so it may belong to either; `<end>` stands after questions, too."""
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<next>{% else %}<end>{% endif %}"
        "{% endfor %}"
    )
    finder = make(template, control=("<next>", "<end>"), special=("<next>", "<end>"), stops=())
    assert find(finder, talk("hello", "there"), 1)[0] == "there<next>"
    assert finder._after_probe() == {"<next>"}
    both = make(PLAIN, special=("<end>", "<user>"), stops=())
    assert both._after_probe() == {"<end>"}
    opening = make(
        "{% for m in messages %}{% if m.role == 'user' %}<next>{% endif %}{{ m.content }}{% if loop.last %}<end>"
        "{% endif %}{% endfor %}",
        special=("<next>", "<end>"),
        stops=(),
    )
    assert opening._after_probe() == {"<end>"}


@pytest.mark.parametrize(
    "refuses",
    [
        "messages | length > 2",  # more than a question and an answer
        "messages[0].role != 'system'",
        "messages[0].role != 'system' or messages | length > 3",
        "messages[0].role == 'system'",
    ],
)
def test_the_end_is_learned_from_what_a_template_takes(refuses: str) -> None:
    template = "{% if " + refuses + " %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    finder = make(template, stops=(), special=("<end>",))
    messages = talk("hello", "there", "my", "friend").messages
    if "!= 'system'" in refuses:
        messages = [{"role": "system", "content": "kind"}, *messages]
    assert finder._after_probe() == {"<end>"}
    short = Conversation(messages[:3] if "system' or" in refuses or "!=" in refuses else messages[:2])
    assert find(finder, short, len(short.messages) - 1)[0] == "there<end>"


@pytest.mark.parametrize(("system", "longest"), [(False, 2), (True, 3)])
def test_the_end_is_learned_from_a_single_answer(system: bool, longest: int) -> None:
    template = (
        "{% if messages | length > LONGEST or (messages[0].role == 'system') != SYSTEM %}{{ raise_exception('no') }}"
        "{% endif %}{% for m in messages %}{{ m.content }}{{ '<next>' if m.role == 'assistant' else '<end>' }}"
        "{% endfor %}"
    ).replace("LONGEST", str(longest)).replace("SYSTEM", str(system))  # fmt: skip
    assert make(template, special=("<next>", "<end>"), stops=())._after_probe() == {"<next>"}


@pytest.mark.parametrize("system", [False, True])
def test_earlier_turns_may_end_in_another_way_than_the_last(system: bool) -> None:
    template = (
        "{% if (messages[0].role == 'system') != SYSTEM %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}"
        "{% if m.role not in ('system', 'user', 'assistant') or not m.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}\n{{ '<end>' if loop.last else '<mid>' }}{% endfor %}"
    ).replace("SYSTEM", str(system))
    assert make(template, special=("<mid>", "<end>"), stops=())._after_probe() == {"<mid>", "<end>"}


def test_a_template_that_takes_nothing_shows_no_token() -> None:
    finder = make("{{ raise_exception('no') }}", stops=())
    assert finder._after_probe() == set()
    assert finder._closers is None


def test_an_end_that_nothing_shows_is_uncertain() -> None:
    template = (
        "{% if messages | length == 2 and '.' in messages[1].content %}{{ raise_exception('too short') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    finder = make(template, control=(), stops=(), special=())
    reason, detail = refused(finder, talk("hello", "there.", "my", "friend"), 1)
    assert reason == UNCERTAIN
    assert re.fullmatch(r"nothing shows where turn 2 ends \(.*too short.*\)", detail)
