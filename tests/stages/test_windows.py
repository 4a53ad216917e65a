"""Windows of sequences that are longer than the model takes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sstoken.stages.windows import windows


@given(st.lists(st.integers(2, 40), max_size=6), st.integers(2, 12), st.data())
@settings(deadline=None)
def test_each_response_token_is_measured_once_after_enough_context(lengths, longest, data):
    stride = data.draw(st.integers(1, longest - 1))
    sequences = [np.arange(n, dtype=np.int32) for n in lengths]
    masks = [
        np.array([False, *data.draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))])
        for n in lengths
    ]
    found = windows(sequences, masks, longest, stride)
    for example, (ids, mask) in enumerate(zip(sequences, masks, strict=True)):
        own = [i for i, of in enumerate(found.examples) if of == example]
        measured = np.concatenate([found.sequences[i][found.masks[i]] for i in own])
        assert measured.tolist() == ids[mask].tolist()
        assert sum(found.fresh[i] for i in own) == ids.size
        assert not any(found.masks[i][0] for i in own)
        for i in own:
            assert found.sequences[i].size <= longest
            assert not found.masks[i][: -found.fresh[i]].any()
        for i in own[1:]:
            assert found.sequences[i].size == longest
            assert found.fresh[i] <= stride
    assert found.cut == sum(n > longest for n in lengths)
    assert found.examples == sorted(found.examples)


def test_nothing_is_cut_without_a_stride_or_a_limit():
    ids, mask = np.arange(20, dtype=np.int32), np.arange(20) > 3
    for longest, stride in ((8, None), (None, 4), (20, 4)):
        found = windows([ids], [mask], longest, stride)
        assert [piece.tolist() for piece in found.sequences] == [ids.tolist()]
        assert found.cut == 0
