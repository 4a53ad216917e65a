"""Labels: what a trainer learns at each token. Every label in this project is derived here, from a keep mask."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

IGNORED_LABEL = -100
"""The label of a token that is not trained on, in every trainer."""


def labels_from_mask(ids: ArrayLike, keep: ArrayLike, *, skip_first: bool = False) -> NDArray[np.int32]:
    """Return each token's own id where it is kept, -100 elsewhere; labels are not shifted.

    Args:
        ids: token ids, [T].
        keep: keep mask or weights, [T]; a token is kept if its value is above 0.
        skip_first: never train on token 0, which nothing predicts.
    """
    labels = np.where(np.asarray(keep) > 0, np.asarray(ids), IGNORED_LABEL).astype(np.int32)
    if skip_first:
        labels[:1] = IGNORED_LABEL
    return labels
