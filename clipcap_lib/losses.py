"""The losses: symmetric contrastive (stage one), caption negative log-likelihood (stage two), self-critical (optional)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clipcap_lib.processes import gather


def similarity(image: Tensor, text: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Scaled cosine similarity. image (I, D) and text (T, D), unit norm -> (I, T)."""
    return scale * image @ text.mT


def own_captions(images: Tensor, captions: Tensor) -> Tensor:
    """Which captions of a batch belong to which of its images, (N, N) bool: no such pair is a negative.

    images (N,) says by number whose caption row n is, captions (N,) which caption, equal where it is the same word for word.
    Entry (m, n): the caption of row n is the one of row m, or another one of row m's image, or the same words as such a one.
    """
    same_image = images[:, None] == images[None]
    same_words = captions[:, None] == captions[None]
    return same_image.float() @ same_words.float() > 0


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, duplicates: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy over the (N, N) scaled cosine similarities, as in CLIP (Radford et al. 2021, figure 3).

    image and text (N, D), unit norm, row n of one belongs to row n of the other -> scalar, in nats. Pairs marked in
    `duplicates` (N, N) are left out of the denominators (the diagonal stays). With several processes each gives `gather`ed
    rows: every one computes the loss of all pairs, which is cheap beside the encoders.
    """
    precision = torch.promote_types(image.dtype, torch.float32)
    with torch.autocast(image.device.type, enabled=False):  # bf16 has 8 bits: at a scale of 100, steps of half a nat
        logits = similarity(image.to(precision), text.to(precision), scale)
    if duplicates is not None:
        others = duplicates & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(others, float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2


def joint_contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, images: Tensor, captions: Tensor,
                           mask: bool = True) -> Tensor:
    """The contrastive loss of all processes' pairs, each a negative of all others -> the same scalar in every process.

    image and text (N, D) of this process; images and captions (N,) as in `own_captions`, whose pairs are left out with
    `mask`. Without, only a row that is there twice is no negative of itself: where processes do not divide a batch.
    """
    images, captions = gather(images), gather(captions)
    twice = (images[:, None] == images[None]) & (captions[:, None] == captions[None])
    duplicates = own_captions(images, captions) if mask else twice
    return contrastive_loss(gather(image), gather(text), scale, duplicates)


def in_chunks(encode: Callable[[Tensor], Tensor], inputs: Tensor, size: int, model: nn.Module) -> Tensor:
    """`encode(inputs)`, computed `size` rows at a time and keeping none of their activations: gradient caching.

    Gao et al. 2021 (arXiv 2101.06983): encode all chunks, keep the embeddings alone, take the loss and its gradient by
    them, then encode each chunk again and let its part of that gradient flow on. That is what checkpointing every chunk
    does. The second time a chunk meets the same dropout, and BatchNorm's running statistics stay as they are: they were
    updated the first time. In training mode the batch statistics that normalise are each chunk's own, so that the result
    equals that of one large batch only where BatchNorm is in evaluation mode. (Several processes likewise: each one's own.)
    """
    if not size or size >= len(inputs):
        return encode(inputs)
    return torch.cat([checkpoint(encode, chunk, use_reentrant=False, preserve_rng_state=True,
                                 context_fn=lambda: (nullcontext(), running_statistics_kept(model)))
                      for chunk in inputs.split(size)])


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Within it BatchNorm normalises as before, but leaves its running statistics alone."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None  # takes in 0 times the new statistics, and counts nothing
    try:
        yield
    finally:
        for layer, momentum, count in kept:
            layer.momentum, layer.num_batches_tracked = momentum, count


def caption_loss(logits: Tensor, targets: Tensor, pad_id: int, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of a caption: summed over its tokens, averaged over the batch's captions; pads are free.

    logits (N, T, V) where logits[:, t] predicts targets[:, t]; targets (N, T) -> scalar, in nats a caption.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad_id, label_smoothing=label_smoothing,
                            reduction="sum")
    return total / len(targets)


def self_critical_loss(log_probabilities: Tensor, lengths: Tensor, rewards: Tensor) -> Tensor:
    """REINFORCE with a leave-one-out baseline: captions that earn more than their image's others become more probable.

    log_probabilities (N, K, T), in nats, of the tokens of K sampled captions of each of N images, [SEP] included where it
    was written; lengths (N, K), how many of them count; rewards (N, K) -> scalar: minus advantage times log-probability,
    a mean over tokens. The advantage of a sample is its reward less the mean of its image's K - 1 others (Luo 2020, arXiv
    2003.09971; Rennie et al. 2017, arXiv 1612.00563, took the greedy caption's reward). Gradients flow to
    log_probabilities alone.
    """
    samples = rewards.shape[1]
    advantage = (rewards - rewards.mean(dim=1, keepdim=True)) * (samples / (samples - 1))  # reward - mean of the others
    counts = torch.arange(log_probabilities.shape[-1], device=lengths.device) < lengths[..., None]
    summed = (log_probabilities * counts).sum(dim=-1)
    return -(advantage.detach() * summed).sum() / lengths.sum()
