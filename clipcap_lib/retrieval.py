"""How well images and texts find each other: ranks and recall@k of a matrix of similarities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipcap_lib.config import InputError


def retrieval_ranks(similarity: np.ndarray, image_of_text: np.ndarray) -> dict[str, np.ndarray]:
    """The rank of what belongs together, 1 is best: {"image->text": (I,), "text->image": (T,)}.

    similarity (I, T) of I images and T texts; image_of_text (T,) the row of each text's image. An image counts as found
    when any of its texts is among the first k. Ties count against the model: a constant similarity finds nothing.
    Raises InputError for shapes that do not fit, values that are not finite, or an image without a text.
    """
    similarity, image_of_text = np.asarray(similarity), np.asarray(image_of_text)
    if similarity.ndim != 2 or image_of_text.shape != similarity.shape[1:] or not similarity.size:
        raise InputError(f"similarity {similarity.shape} must be (images, texts) and image_of_text "
                         f"{image_of_text.shape} (texts,)")
    if not np.isfinite(similarity).all():
        raise InputError("similarity has values that are not finite; the embeddings are broken")
    images, texts = similarity.shape
    if not np.array_equal(np.unique(image_of_text), np.arange(images)):
        raise InputError(f"image_of_text must name each of the {images} images at least once, and no other")
    own = similarity[image_of_text, np.arange(texts)]  # (T,)
    best = np.full(images, -np.inf)
    np.maximum.at(best, image_of_text, own)
    as_good = similarity >= best[:, None]
    as_good[image_of_text, np.arange(texts)] = False  # an image's further texts do not stand in its way
    # a text's own image is among those as good as it: 1 is best
    return {"image->text": 1 + as_good.sum(axis=1), "text->image": (similarity >= own).sum(axis=0)}


def recall_at_k(similarity: np.ndarray, image_of_text: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at each k in percent, and median ranks, both ways. See `retrieval_ranks`."""
    result = {}
    for way, ranks in retrieval_ranks(similarity, image_of_text).items():
        result.update({f"{way} R@{k}": 100 * float(np.mean(ranks <= k)) for k in ks})
        result[f"{way} median rank"] = float(np.median(ranks))
    return result
