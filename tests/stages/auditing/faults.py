"""Datasets with one fault each: the third of six rows has it, unless it is the dataset's."""

from collections.abc import Callable
from typing import Any

from tests.stages.auditing import datasets
from tests.stages.auditing.datasets import Row, spans

THIRD = 2
Make = Callable[[], list[Row]]
FAULTS: dict[str, list[tuple[str, Make]]] = {}
"""By kind: the tokenizer and the rows."""


def fault(kind: str, tokenizer: str = "chatml") -> Callable[[Callable[[list[Row]], Any]], Make]:
    """Declare a fault: the function changes sound rows in place, or returns others."""

    def decorate(change: Callable[[list[Row]], Any]) -> Make:
        def make() -> list[Row]:
            rows = datasets.sound(getattr(datasets, tokenizer)(), 6, 2)
            return change(rows) or rows

        FAULTS.setdefault(kind, []).append((tokenizer, make))
        return make

    return decorate


def third(rows: list[Row]) -> tuple[list[int], list[int]]:
    return rows[THIRD]["input_ids"], rows[THIRD]["labels"]


def insert(rows: list[Row], at: int, token: int, label: int) -> None:
    ids, labels = third(rows)
    ids.insert(at, token)
    labels.insert(at, label)


def only_mask(rows: list[Row], name: str = "loss_mask") -> None:
    for row in rows:
        row[name] = [int(label != -100) for label in row.pop("labels")]


def token(name: str, tokenizer: str = "chatml") -> int:
    found = getattr(datasets, tokenizer)().convert_tokens_to_ids(name)
    assert isinstance(found, int)
    return found


@fault("unreadable-row")
def words(rows: list[Row]) -> None:
    rows[THIRD]["input_ids"] = "not a list"


@fault("unreadable-row")
def texts(rows: list[Row]) -> None:
    rows[THIRD]["labels"] = ["a"] * len(rows[THIRD]["input_ids"])


@fault("null-row")
def null(rows: list[Row]) -> None:
    rows[THIRD]["labels"] = None


@fault("null-row")
def null_ids(rows: list[Row]) -> None:
    rows[THIRD]["input_ids"] = None


@fault("null-token")
def null_within(rows: list[Row]) -> None:
    third(rows)[1][3] = None  # type: ignore[call-overload]


@fault("empty-row")
def empty(rows: list[Row]) -> None:
    rows[THIRD] = {"input_ids": [], "labels": []}


@fault("nested-row")
def batch_of_one(rows: list[Row]) -> None:
    rows[THIRD] = {name: [value] for name, value in rows[THIRD].items()}


@fault("lengths-differ")
def shorter_labels(rows: list[Row]) -> None:
    rows[THIRD]["labels"].pop()


@fault("lengths-differ")
def mask_of_the_answer_alone(rows: list[Row]) -> None:
    only_mask(rows)
    rows[THIRD]["loss_mask"] = [m for m in rows[THIRD]["loss_mask"] if m]


@fault("id-out-of-vocabulary")
def foreign_id(rows: list[Row]) -> None:
    third(rows)[0][4] = 70_000


@fault("id-out-of-vocabulary")
def negative_id(rows: list[Row]) -> None:
    third(rows)[0][4] = -1


@fault("bad-label")
def minus_one(rows: list[Row]) -> None:
    labels = third(rows)[1]
    labels[:] = [-1 if label == -100 else label for label in labels]


@fault("labels-not-inputs")
def other_labels(rows: list[Row]) -> None:
    ids, labels = third(rows)
    labels[:] = [label if label == -100 else (label * 7 + 11) % 200 for label in labels]


@fault("labels-shifted")
def shifted_already(rows: list[Row]) -> None:
    labels = third(rows)[1]
    labels[:] = [*labels[1:], -100]


@fault("labels-shifted")
def shifted_twice(rows: list[Row]) -> None:
    labels = third(rows)[1]
    labels[:] = [*labels[2:], -100, -100]


@fault("labels-shifted")
def shifted_back(rows: list[Row]) -> None:
    labels = third(rows)[1]
    labels[:] = [-100, *labels[:-1]]


@fault("bad-mask-value")
def negative_mask(rows: list[Row]) -> None:
    only_mask(rows)
    rows[THIRD]["loss_mask"][1] = -1


@fault("masks-disagree")
def two_opinions(rows: list[Row]) -> None:
    for row in rows:
        row["assistant_masks"] = [int(label != -100) for label in row["labels"]]
    mask = rows[THIRD]["assistant_masks"]
    mask[:] = [1 - m for m in mask]


@fault("bad-positions")
def positions_from_one(rows: list[Row]) -> None:
    for row in rows:
        row["position_ids"] = list(range(len(row["input_ids"])))
    rows[THIRD]["position_ids"] = [p + 1 for p in rows[THIRD]["position_ids"]]


@fault("bad-positions")
def lengths_of_others(rows: list[Row]) -> None:
    for row in rows:
        row["seq_lengths"] = [len(row["input_ids"])]
    rows[THIRD]["seq_lengths"] = [5, 5]


@fault("nothing-trained")
def all_ignored(rows: list[Row]) -> None:
    labels = third(rows)[1]
    labels[:] = [-100] * len(labels)


@fault("everything-trained")
def all_trained(rows: list[Row]) -> None:
    ids, labels = third(rows)
    labels[:] = ids


@fault("everything-trained")
def all_trained_by_mask(rows: list[Row]) -> None:
    only_mask(rows, "assistant_masks")
    mask = rows[THIRD]["assistant_masks"]
    mask[:] = [1] * len(mask)


@fault("prompt-trained")
def question_trained(rows: list[Row]) -> None:
    ids, labels = third(rows)
    labels[5:9] = ids[5:9]


@fault("prompt-trained", "mistral")
def question_trained_mistral(rows: list[Row]) -> None:
    ids, labels = third(rows)
    labels[10:12] = ids[10:12]


@fault("prompt-trained", "llama3")
def result_trained(rows: list[Row]) -> None:
    """The template prints roles as they are, and no calls."""
    talk = datasets.talk(2, 2)
    talk[2]["role"] = "tool"
    rows[THIRD] = datasets.sound_row(datasets.llama3(), talk)
    ids, labels = third(rows)
    _, stop = next(spans(labels))
    labels[stop + 20 : stop + 24] = ids[stop + 20 : stop + 24]


@fault("prompt-trained")
def system_prompt_between_turns_trained(rows: list[Row]) -> None:
    talk = datasets.talk(2, 2)
    talk.insert(2, {"role": "system", "content": "Answer in one word from now on."})
    rows[THIRD] = datasets.sound_row(datasets.chatml(), talk)
    ids, labels = third(rows)
    _, stop = next(spans(labels))
    labels[stop + 20 : stop + 24] = ids[stop + 20 : stop + 24]


@fault("generation-prompt-trained", "thinking")
def header_trained_before_reasoning(rows: list[Row]) -> None:
    ids, labels = third(rows)
    opened = ids.index(token("<think>", "thinking"))
    start, _ = next(spans(labels))
    labels[opened - 1 : start] = ids[opened - 1 : start]


@fault("generation-prompt-trained")
def header_trained(rows: list[Row]) -> None:
    ids, labels = third(rows)
    start, _ = next(spans(labels))
    header = max(i for i in range(start) if ids[i] == token("<|im_start|>"))
    labels[header:start] = ids[header:start]


@fault("generation-prompt-trained", "llama3")
def header_trained_llama(rows: list[Row]) -> None:
    ids, labels = third(rows)
    start, _ = next(spans(labels))
    labels[start - 2 : start] = ids[start - 2 : start]


@fault("mask-shifted")
def mask_one_too_early(rows: list[Row]) -> None:
    only_mask(rows)
    mask = rows[THIRD]["loss_mask"]
    mask[:] = [*mask[1:], 0]


@fault("answer-start-not-trained")
def start_left_out(rows: list[Row]) -> None:
    _, labels = third(rows)
    start, _ = next(spans(labels))
    labels[start] = -100


@fault("answer-start-not-trained")
def special_start_left_out(rows: list[Row]) -> None:
    start, _ = next(spans(third(rows)[1]))
    insert(rows, start, token("<|odd|>"), -100)


@fault("turns-not-found")
def other_template(rows: list[Row]) -> None:
    rows[THIRD] = datasets.sound_row(datasets.chatml(), datasets.talk(2))
    ids, labels = third(rows)
    kept = [i for i, t in enumerate(ids) if t != token("<|im_start|>")]
    rows[THIRD] = {"input_ids": [ids[i] for i in kept], "labels": [labels[i] for i in kept]}


@fault("end-not-trained")
def end_ignored(rows: list[Row]) -> None:
    _, labels = third(rows)
    _, stop = next(spans(labels))
    labels[stop - 1] = -100


@fault("end-not-trained", "glm4")
def end_in_the_next_header(rows: list[Row]) -> None:
    for row in rows:  # as it is meant: the next <|user|> is trained
        for _, stop in [s for s in spans(row["labels"]) if s[1] < len(row["input_ids"])]:
            row["labels"][stop - 1] = row["input_ids"][stop - 1]
    _, labels = third(rows)
    _, stop = next(spans(labels))
    labels[stop - 1] = -100


@fault("end-missing")
def no_end(rows: list[Row]) -> None:
    ids, labels = third(rows)
    _, stop = next(spans(labels))
    del ids[stop - 1], labels[stop - 1]


def ended_by_the_next_header(rows: list[Row]) -> None:
    """As a template for training has it: the token that would open the next turn ends every answer."""
    end = token("<|user|>", "glm4")
    for row in rows:
        row["input_ids"].append(end)
        row["labels"].append(end)


@fault("end-missing", "glm4")
def no_end_where_others_have_one(rows: list[Row]) -> None:
    ended_by_the_next_header(rows)
    for values in third(rows):
        values.pop()


@fault("end-doubled", "glm4")
def ended_twice_by_the_next_header(rows: list[Row]) -> None:
    ended_by_the_next_header(rows)
    insert(rows, len(third(rows)[0]), token("<|user|>", "glm4"), token("<|user|>", "glm4"))


@fault("end-doubled", "llama3")
def ended_twice(rows: list[Row]) -> None:
    insert(rows, len(third(rows)[0]), token("<|eot_id|>", "llama3"), token("<|eot_id|>", "llama3"))


@fault("end-inside")
def stop_in_the_text(rows: list[Row]) -> None:
    start, _ = next(spans(third(rows)[1]))
    insert(rows, start + 4, token("<|im_end|>"), token("<|im_end|>"))


@fault("bos-missing", "llama3")
def no_bos(rows: list[Row]) -> None:
    ids, labels = third(rows)
    del ids[0], labels[0]


@fault("bos-doubled", "llama3")
def two_bos(rows: list[Row]) -> None:
    insert(rows, 0, token("<|begin_of_text|>", "llama3"), -100)


@fault("bos-inside", "llama3")
def bos_of_the_answer(rows: list[Row]) -> None:
    start, _ = next(spans(third(rows)[1]))
    insert(rows, start, token("<|begin_of_text|>", "llama3"), -100)


@fault("padding-trained")
def trained_padding(rows: list[Row]) -> None:
    pad = token("<|pad|>")
    for _ in range(4):
        insert(rows, len(third(rows)[0]), pad, pad)


@fault("padding-trained")
def hidden_and_trained(rows: list[Row]) -> None:
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    ids, labels = third(rows)
    labels[-1] = ids[-1]
    rows[THIRD]["attention_mask"][-1] = 0


@fault("padding-trained", "mistral")
def trained_eos_as_padding(rows: list[Row]) -> None:
    end = token("</s>", "mistral")
    for _ in range(5):
        insert(rows, len(third(rows)[0]), end, end)


def visible_to_all(rows: list[Row]) -> None:
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])


@fault("padding-trained")
def trained_padding_on_the_left(rows: list[Row]) -> None:
    pad = token("<|pad|>")
    for _ in range(4):
        insert(rows, 0, pad, pad)
    visible_to_all(rows)


@fault("padding-trained", "llama3")
def trained_eos_as_padding_on_the_left(rows: list[Row]) -> None:
    end = token("<|eot_id|>", "llama3")
    for _ in range(4):
        insert(rows, 0, end, end)


@fault("padding-trained", "qwen")
def one_pad_behind_the_end(rows: list[Row]) -> None:
    """The pad token stops generation too, and the template ends answers with another one."""
    pad = token("<|endoftext|>", "qwen")
    insert(rows, len(third(rows)[0]), pad, pad)
    visible_to_all(rows)


@fault("end-missing", "llama3")
def no_end_and_eos_as_padding(rows: list[Row]) -> None:
    """Only what the attention mask shows counts as an end."""
    ids, labels = third(rows)
    del ids[-1], labels[-1]
    visible_to_all(rows)
    for row in rows:
        pads = 200 - len(row["input_ids"])
        row["input_ids"] += [token("<|eot_id|>", "llama3")] * pads
        row["labels"] += [-100] * pads
        row["attention_mask"] += [0] * pads


@fault("generation-prompt-trained", "llama3")
def last_token_of_the_header(rows: list[Row]) -> None:
    """With EOS as padding: the mask is not shifted, for the answer's end is trained."""
    ids, labels = third(rows)
    start, _ = list(spans(labels))[-1]
    labels[start - 1] = ids[start - 1]
    for row in rows:
        pads = 200 - len(row["input_ids"])
        row["input_ids"] += [token("<|eot_id|>", "llama3")] * pads
        row["labels"] += [-100] * pads


@fault("special-token-trained")
def odd_token(rows: list[Row]) -> None:
    start, _ = next(spans(third(rows)[1]))
    insert(rows, start + 3, token("<|odd|>"), token("<|odd|>"))


@fault("packed-start-trained")
def documents_run_together(rows: list[Row]) -> None:
    a, b = rows[THIRD], rows[THIRD + 1]
    lengths = [len(a["input_ids"]), len(b["input_ids"])]
    b["labels"][0] = b["input_ids"][0]
    packed = {name: a[name] + b[name] for name in ("input_ids", "labels")}
    rows[THIRD : THIRD + 2] = [packed]
    for row in rows:
        row["seq_lengths"] = [len(row["input_ids"])]
    rows[THIRD]["seq_lengths"] = lengths


@fault("duplicate-rows")
def copied_row(rows: list[Row]) -> None:
    rows[THIRD] = rows[0]


@fault("duplicate-answers")
def copied_answer(rows: list[Row]) -> None:
    talk = datasets.talk(2)
    talk[1]["content"] = datasets.talk(0, 2)[1]["content"]
    rows[THIRD] = datasets.sound_row(datasets.chatml(), talk)


@fault("near-duplicate-answers")
def nearly_copied_answer(rows: list[Row]) -> None:
    long = " ".join(f"{word} and more of it" for word in datasets.WORDS)
    for number, end in ((0, "."), (THIRD, "!")):
        talk = datasets.talk(number)
        talk[1]["content"] = long + end
        rows[number] = datasets.sound_row(datasets.chatml(), talk)


@fault("one-token-answers")
def short_answer(rows: list[Row]) -> None:
    talk = datasets.talk(2)
    talk[1]["content"] = "7"
    rows[THIRD] = datasets.sound_row(datasets.chatml(), talk)


@fault("answers-in-another-script")
def other_script(rows: list[Row]) -> None:
    talk = datasets.talk(2)
    talk[1]["content"] = "Это ответ на другом языке, чем вопрос."
    rows[THIRD] = datasets.sound_row(datasets.chatml(), talk)


@fault("reasoning-not-trained")
def thought_left_out(rows: list[Row]) -> None:
    talk = datasets.talk(2)
    talk[1]["content"] = "<think>\nFirst I think about it.\n</think>\n\n" + talk[1]["content"]
    rows[THIRD] = row = datasets.sound_row(datasets.chatml(), talk)
    start, _ = next(spans(row["labels"]))
    text = datasets.chatml().convert_ids_to_tokens(row["input_ids"])
    closed = max(i for i, piece in enumerate(text) if piece == ">")
    row["labels"][start : closed + 1] = [-100] * (closed + 1 - start)


@fault("reasoning-not-trained")
def thought_left_out_between_its_marks(rows: list[Row]) -> None:
    talk = datasets.talk(2)
    talk[1]["content"] = "<think>\nFirst I think about it.\n</think>\n\n" + talk[1]["content"]
    rows[THIRD] = row = datasets.sound_row(datasets.chatml(), talk)
    start, _ = next(spans(row["labels"]))
    first, last = len("<think>\n"), len("<think>\nFirst I think about it.")
    row["labels"][start + first : start + last] = [-100] * (last - first)


@fault("tool-call-not-trained")
def call_left_out(rows: list[Row]) -> None:
    talk = datasets.talk(2)
    talk[1]["content"] = 'Let me look.<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call>'
    rows[THIRD] = row = datasets.sound_row(datasets.chatml(), talk)
    start, stop = next(spans(row["labels"]))
    said = len("Let me look.")
    row["labels"][start + said : stop - 1] = [-100] * (stop - 1 - start - said)


@fault("end-not-a-stop-token", "llama3_base")
def base_tokenizer(rows: list[Row]) -> list[Row]:
    """An instruct template on a tokenizer whose EOS is another token: every row ends in what stops nothing."""
    return rows[:1]


@fault("answer-truncated")
def cut_at_a_length(rows: list[Row]) -> None:
    ids, labels = third(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    room = 64 * -(-longest // 64)
    talk = datasets.talk(2)
    talk[1]["content"] += " and so on, " * 40
    rows[THIRD] = {
        name: values[:room] for name, values in datasets.sound_row(datasets.chatml(), talk).items()
    }


@fault("unknown-token-trained", "mistral_unknown")
def unknown_word(rows: list[Row]) -> None:
    start, _ = next(spans(third(rows)[1]))
    unknown = token("<unk>", "mistral_unknown")
    insert(rows, start + 3, unknown, unknown)


@fault("end-in-next-header-alone", "glm4")
def one_turn_each(rows: list[Row]) -> list[Row]:
    return [datasets.sound_row(datasets.glm4(), datasets.talk(0))]
