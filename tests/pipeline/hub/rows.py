"""The rows of a dataset, as they were masked and as a client loads them."""

import pyarrow as pa

from sstoken.stages import tables

LOAD = """
import sys
import pyarrow as pa
from datasets import load_dataset

name, revision, folder = sys.argv[1:]
for streaming in (False, True):
    dataset = load_dataset(name, split="train", revision=revision, streaming=streaming)
    rows = list(dataset.with_format("arrow").iter(batch_size=7))
    table = pa.concat_tables(rows)
    with pa.OSFile(f"{folder}/{streaming}.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    print(dataset.features == load_dataset(name, split="train", revision=revision).features)
"""


def masked_table(folder, names=None):
    parts = [tables.read_table(part, names) for part in tables.parts(folder)]
    return pa.concat_tables(parts).replace_schema_metadata(None)


def loaded(client, name, folder, revision="main"):
    """What `datasets` gives for a published dataset, read at once and streamed."""
    done = client.python(LOAD, name, revision, folder)
    assert done.code == 0, done.code
    assert done.out.split() == ["True", "True"]
    assert "malformed" not in done.err
    for streaming in (False, True):
        with pa.ipc.open_file(str(folder / f"{streaming}.arrow")) as file:
            yield file.read_all().replace_schema_metadata(None)


def identical(first, second):
    """The same rows to the last bit: equal Arrow data, floats compared by their bytes."""
    first, second = first.combine_chunks(), second.combine_chunks()
    assert first.schema.names == second.schema.names
    for name in first.schema.names:
        a, b = first[name].combine_chunks(), second[name].combine_chunks()
        assert a.equals(b), name
        if pa.types.is_list(a.type) and pa.types.is_floating(a.type.value_type):
            bits = [c.flatten().fill_null(0).view(pa.int32()) for c in (a, b)]
            assert bits[0].equals(bits[1]), name
    return True
