"""Tokenizers that differ in tokens that no example has do not lock checkpoints out."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sstoken.errors import SstokenError
from sstoken.stages import joins, tables
from sstoken.stages.anchor import Anchor
from sstoken.stages.checkpoints import tokenizer_fingerprint
from sstoken.stages.score import Score
from sstoken.stages.vocabularies import check_vocabulary
from tests import factories
from tests.stages.context import make_context


def with_pad(model):
    """As trainers leave it: one token more, in the tokenizer and in the embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(model)
    larger = AutoModelForCausalLM.from_pretrained(model)
    larger.resize_token_embeddings(len(tokenizer))
    larger.save_pretrained(model)
    return model


def tokens_of(model, folder, rows):
    """Tokens as encode writes them with the tokenizer of `model`."""
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(folder / "tokenizer")
    facts = {"fingerprint": tokenizer_fingerprint(tokenizer), "name": "made-with"}
    records = [
        {"example_id": f"row-{i}", "input_ids": ids, "response_mask": [j > 0 for j in range(len(ids))]}
        for i, ids in enumerate(rows)
    ]
    for part, record in enumerate(records):
        table = pa.Table.from_pylist([record], schema=tables.TOKENS)
        about = {"tokenizer": facts, joins.TOKENS: joins.tokens_fingerprint(table)}
        tables.write_part(folder / tables.part_name(part), table, about)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "base": factories.save_model(folder / "base"),
        "tuned": with_pad(factories.save_model(folder / "tuned")),
    }


def score(model, tokens, out):
    stage = Score(checkpoint=str(model), device="cpu")
    stage.run(make_context(out, {"tokens": tokens}))
    return pa.concat_tables([pq.read_table(p) for p in tables.parts(out)])["loss"].to_pylist()


@pytest.mark.parametrize("encoder", ["base", "tuned"])
def test_a_token_more_that_no_example_has_locks_nobody_out(encoder, models, tmp_path):
    tokens = tokens_of(models[encoder], tmp_path / "tokens", [[1, 2, 3, 4], [127, 5, 0]])
    for name, model in models.items():
        assert all(x is not None for row in score(model, tokens, tmp_path / name) for x in row[1:])


def test_a_used_id_that_the_checkpoint_lacks_is_refused_with_its_example(models, tmp_path):
    tokens = tokens_of(models["tuned"], tmp_path / "tokens", [[1, 2, 3], [4, 5, 128]])
    with pytest.raises(
        SstokenError,
        match=r"base: .* id 128 is '<pad>' there and nothing here, and example 'row-1' has it \(1 of 6",
    ):
        score(models["base"], tokens, tmp_path / "scores")


@pytest.mark.parametrize("used", [True, False])
def test_an_id_with_another_meaning_counts_where_it_is_used(used, models, tmp_path):
    other = factories.save_model(tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())).replace('"w7"', '"renamed"'))
    tokens = tokens_of(models["base"], tmp_path / "tokens", [[1, 2], [3, 7 if used else 8]])
    own = AutoTokenizer.from_pretrained(other)
    if not used:
        check_vocabulary("other", own, tokens)
        return
    with pytest.raises(
        SstokenError, match=r"id 7 is 'w7' there and 'renamed' here, and example 'row-1' has it"
    ):
        check_vocabulary("other", own, tokens)


def test_training_pads_with_what_the_model_can_embed(models, tmp_path):
    """Encoded with the tuned model's tokenizer, whose `<pad>` the base has no row for."""
    tokens = tokens_of(models["tuned"], tmp_path / "tokens", [[1, 2, 3, 4, 5, 6], [7, 8]])
    Anchor(model=str(models["base"]), max_steps=1, batch_size=2).run(
        make_context(tmp_path / "history", {"tokens": tokens})
    )
    kept = AutoTokenizer.from_pretrained(tmp_path / "history" / "step-1")
    assert len(kept) == factories.VOCABULARY
    score(tmp_path / "history" / "step-1", tokens, tmp_path / "scores")


def without(field):
    def change(model):
        file = model / "tokenizer_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != field}))

    return change


@pytest.mark.parametrize("change", [without("eos_token"), lambda m: (m / "tokenizer_config.json").unlink()])
@pytest.mark.parametrize("same", [True, False])
def test_a_tokenizer_unfit_to_encode_with_still_tells_its_vocabulary(same, change, models, tmp_path):
    tuned = factories.save_model(tmp_path / "tuned")
    change(tuned)
    if not same:
        file = tuned / "tokenizer.json"
        file.write_text(file.read_text().replace('"w2"', '"renamed"'))
    tokens = tokens_of(models["base"], tmp_path / "tokens", [[1, 2, 3, 4], [5, 6]])
    if same:
        score(tuned, tokens, tmp_path / "scores")
        Anchor(model=str(tuned), max_steps=1, batch_size=2).run(
            make_context(tmp_path / "history", {"tokens": tokens})
        )
        assert AutoTokenizer.from_pretrained(tmp_path / "history" / "step-1").eos_token == "</s>"
        return
    for run in (
        lambda: score(tuned, tokens, tmp_path / "scores"),
        lambda: Anchor(model=str(tuned), max_steps=1).run(make_context(tmp_path / "h", {"tokens": tokens})),
    ):
        with pytest.raises(SstokenError, match="id 2 is 'w2' there and 'renamed' here"):
            run()
