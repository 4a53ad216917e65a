"""What `encode` is made of, in the order in which a row goes through it.

- A row: `sources` (where rows come from), `rowfiles`, `archives`, `arrow_rows`, `json_values` (one format each).
- What it says: `layouts` (which column is what), `turns`, `parts`, `calls` (its messages), `marks` (what is not
  trained), `preference`, `leftovers`, `column_names` (what is no part of it); `conversations` puts these together.
- As text: `templates` (a chat template), `rendering` (text and responses), `spans` (where turns begin and end),
  `tracing`, `altering`, `pieces` (which text the template lost), `scaffolds` (what is known from earlier rows).
- As tokens: `chat` (ids and mask), `shards` (a file of them), `token_stats`, `time_limit`.
"""
