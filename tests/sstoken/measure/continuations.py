"""What a greedy continuation has to be, token by token."""

import torch

TIE = 1e-4


@torch.no_grad()
def logits(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def check_continuation(model, start, said, *, at_its_end, stop, limit):
    """Token by token, each the likeliest but for ties; and it ends where it has to."""
    ids = said.ids.tolist()
    assert not stop & set(ids)
    assert len(ids) <= limit
    if at_its_end:
        assert not ids
        assert said.ended
        return
    predictions = logits(model, [*start, *ids])[len(start) - 1 :]
    for prediction, token in zip(predictions, ids, strict=False):
        assert prediction.max() - prediction[token] < TIE
    if said.ended:
        best = predictions[len(ids)][list(stop)].max()
        assert predictions[len(ids)].max() - best < TIE
    else:
        assert len(ids) == limit
