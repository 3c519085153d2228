"""Which of several captions of an image to take: the one a CLIP finds nearest, or the one that most others agree with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from clipcap_lib.captions import segment
from clipcap_lib.cider import DocumentFrequency, cider_d
from clipcap_lib.data import pad
from clipcap_lib.model import ClipCap
from clipcap_lib.tokenizer import encode

Said = Sequence[tuple[str, float]]  # captions of an image with scores


@torch.inference_mode()
def rerank(judge: ClipCap, images: Any, found: Sequence[Said]) -> list[list[tuple[str, float]]]:
    """Captions of B images, each image's sorted by its cosine similarity to them, which becomes their score."""
    image = judge.eval().encode_image(judge.preprocess(images))  # (B, D)
    texts = [text for said in found for text, _ in said]
    owner = torch.tensor([number for number, said in enumerate(found) for _ in said], device=image.device)
    ids = pad(encode(judge.tokenizer, texts, judge.config.context), judge.pad_id).to(image.device)
    similarities = iter((judge.encode_text(ids) * image[owner]).sum(-1).tolist())
    return [_best_first([(text, next(similarities)) for text, _ in said]) for said in found]


def consensus(lists: Sequence[Sequence[Said]], frequency: DocumentFrequency, segmentation: str,
              weights: Sequence[float] | None = None) -> list[list[tuple[str, float]]]:
    """Minimum Bayes risk over the union of one or several models' lists: members x images x captions.

    A caption's score is its expected CIDEr-D (0 to 10) if the truth were one of the union's, each as probable as it was
    written often: beams of a list count the same, whatever their probability; samples count each time they were drawn, which
    is Monte Carlo's estimate. frequency: of the references of a whole training split, segmented in the same way. weights:
    of the models' lists (default: equal).
    """
    result = []
    for image in zip(*lists, strict=True):
        votes = dict.fromkeys((text for said in image for text, _ in said), 0.0)
        for said, weight in zip(image, weights or [1.0] * len(image), strict=True):
            for text, _ in said:
                votes[text] += weight
        union, shares = list(votes), np.array(list(votes.values())) / sum(votes.values())
        tokens = dict(zip(union, segment(union, segmentation), strict=True))
        values = cider_d([tokens[a] for a in union for _ in union], [[tokens[b]] for _ in union for b in union], frequency)
        expected = values.reshape(len(union), len(union)) @ shares
        result.append(_best_first(list(zip(union, expected.tolist(), strict=True))))
    return result


def _best_first(said: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(said, key=lambda pair: -pair[1])  # stable: among equals the one that was there first
