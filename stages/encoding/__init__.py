"""The modules of `encode`, in the order in which a row passes through them.

- Reading rows: `sources` (files, folders, the Hub), then one format each: `row_files`, `archives`, `arrow_rows`,
  `json_values`.
- Parsing a row into messages: `layouts` (which column plays which role), `turns`, `content_parts`, `tool_calls`,
  `marks` (turns marked as not trained on), `preference`, `unused_text`, `column_names`; `conversations` combines
  them.
- Rendering to text: `templates` (a chat template), `rendering` (text and response spans), `spans` (where turns begin
  and end), `tracing`, `altering`, `pieces` (text that the template dropped), `scaffolds` (shapes seen before).
- Encoding to tokens: `chat` (ids and response mask), `shards` (writes one shard), `token_stats`, `limits`
  (of time and memory).
"""
