"""The losses: symmetric contrastive (stage one) and caption negative log-likelihood (stage two)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def similarity(image: Tensor, text: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Scaled cosine similarity. image (I, D) and text (T, D), unit norm -> (I, T)."""
    return scale * image @ text.mT


def same_caption(ids: Tensor) -> Tensor:
    """Which pairs of a batch have word-for-word the same caption. ids (N, T), padded -> (N, N) bool."""
    return (ids[:, None] == ids[None]).all(dim=-1)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, duplicates: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy over the (N, N) scaled cosine similarities, as in CLIP (Radford et al. 2021, figure 3).

    image and text (N, D), unit norm, row n of one belongs to row n of the other -> scalar, in nats. Pairs marked in
    `duplicates` (N, N) are left out of the denominators (the diagonal stays): an identical caption is no negative.
    """
    logits = similarity(image, text, scale).float()
    if duplicates is not None:
        others = duplicates & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(others, float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2


def caption_loss(logits: Tensor, targets: Tensor, pad_id: int, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of a caption: summed over its tokens, averaged over the batch's captions; pads are free.

    logits (N, T, V) where logits[:, t] predicts targets[:, t]; targets (N, T) -> scalar, in nats a caption.
    """
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=pad_id,
                            label_smoothing=label_smoothing, reduction="sum")
    return total / len(targets)
