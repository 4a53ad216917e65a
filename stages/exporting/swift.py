"""ms-swift."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from sstoken.labels import labels_from_mask
from sstoken.stages.exporting.base import Facts, JsonLinesTarget
from sstoken.stages.exporting.rows import Rows

PLUGIN = '''"""A template that adds nothing: no start, no end, no turn, so that the tokens of a row are all there is."""

from swift.template import TemplateMeta, register_template

register_template(
    TemplateMeta("token_masked", prefix=[], prompt=["{{QUERY}}"], chat_sep=None, suffix=[], auto_add_bos=False)
)
'''


class Swift(JsonLinesTarget):
    """`messages` with a single assistant message that has `token_ids` and a `loss_scale` for each token.

    A real template would add its turns around the tokens and shift them. Even `dummy` adds the tokenizer's BOS,
    trains an EOS after the last token, and trains a masked EOS that follows trained tokens. So the export ships a
    template that adds nothing.
    """

    name = "swift"
    weights = True
    program = ("masked_template.py", PLUGIN)

    def lines(self, rows: Rows) -> Iterator[bytes]:
        """Yield one object per row."""
        scale = rows.kept.astype(np.float32) if rows.weights is None else rows.weights
        for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
            content = {"token_ids": rows.ids[a:b], "loss_scale": scale[a:b]}
            document = {"messages": [{"role": "assistant", "content": content}]}
            yield orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)

    def seen(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
        """Treat a token with a positive scale as a label."""
        content = row["messages"][0]["content"]
        ids, scale = content["token_ids"], content["loss_scale"]
        return ids, labels_from_mask(ids, scale).tolist(), scale

    def usage(self, facts: Facts) -> str:
        """Show the command."""
        more = " --is_binary_loss_scale false" if facts.weights else ""
        weights = (
            "- Without `--is_binary_loss_scale false` the weights are read as 0 and 1.\n"
            if facts.weights
            else ""
        )
        return f"""```bash
swift sft --model MODEL --dataset data/*.jsonl --split_dataset_ratio 0 \\
    --external_plugins masked_template.py --template token_masked \\
    --max_length {facts.longest}{more} --output_dir ../trained
```

For ms-swift 4. Add `--packing true` to pack.

- `--template token_masked` comes with this folder and adds no token. The model's own template would add its turns
  around the tokens; `dummy` adds a BOS and a trained EOS, and trains a masked EOS that follows trained tokens.
- `--max_length` has to be at least {facts.longest}, the longest row.
{weights}"""
