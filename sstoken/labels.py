"""Labels: what a trainer learns at each token. This is the one place that derives them from a keep mask."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

IGNORED_LABEL = -100
"""The label of a token that is not learned, in every trainer."""


def labels_from_mask(ids: ArrayLike, keep: ArrayLike, *, skip_first: bool = False) -> NDArray[np.int32]:
    """Return each token's own id where it is kept, -100 elsewhere; labels are not shifted.

    Args:
        ids: token ids, [T].
        keep: what is positive (True, a weight above 0) is kept, [T].
        skip_first: never learn token 0, which nothing predicts.
    """
    labels = np.where(np.asarray(keep) > 0, np.asarray(ids), IGNORED_LABEL).astype(np.int32)
    if skip_first:
        labels[:1] = IGNORED_LABEL
    return labels
