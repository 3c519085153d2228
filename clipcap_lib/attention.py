"""What the GPT attends to while it writes: the weights of its plain-softmax twin, word by word.

Attention weights are not explanations: they say where a head reads from, not what would change the word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from clipcap_lib import decode
from clipcap_lib.config import InputError
from clipcap_lib.model import ClipCap


@contextmanager
def plain_attention(model: ClipCap) -> Iterator[ClipCap]:
    """Inside, attention is an explicit softmax whose weights can be read; outside, the fused kernel."""
    before = model.gpt.config._attn_implementation
    model.gpt.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.gpt.set_attn_implementation(before)


@dataclass(frozen=True)
class CaptionAttention:
    """A generated caption of T words ([SEP] last) and what each looked at.

    weights (T, layers, heads, P + T): row t is the distribution, at the step that chose words[t], over the P prefix
    tokens and the text so far ([CLS] first). probabilities (T,): of each word at its step.
    """

    words: tuple[str, ...]
    weights: np.ndarray
    probabilities: np.ndarray
    prefix_length: int
    grid_size: tuple[int, int] | None

    def image_share(self) -> np.ndarray:
        """The share of attention that goes to the image: (T, layers, heads), 0 to 1."""
        return self.weights[..., :self.prefix_length].sum(-1)

    def maps(self) -> np.ndarray:
        """Attention to the grid's cells: (T, layers, heads, H, W). Raises InputError for pooled image tokens."""
        if self.grid_size is None:
            raise InputError("this model has one pooled image token and so no attention map; image_share() says how much "
                             "it is looked at; train with image_tokens='grid' for maps")
        return self.weights[..., 1:self.prefix_length].reshape(*self.weights.shape[:3], *self.grid_size)


@torch.inference_mode()
def caption_attention(model: ClipCap, image: Image.Image, tokens: Sequence[int] | None = None,
                      max_length: int = 30) -> CaptionAttention:
    """Caption `image` greedily (or take `tokens`), and read the attention at every step in one pass.

    Without dropout and with a causal mask, one pass over the whole caption gives the weights of every step.
    """
    model.eval()
    pixels = model.preprocess([image])
    if tokens is None:
        suppress = sorted({model.pad_id, model.start_id, model.tokenizer.unk_token_id})
        tokens = decode.greedy(model, pixels, max_length, suppress)[0].tokens
    targets = [*tokens, model.end_id]
    ids = torch.tensor([[model.start_id, *tokens]], device=pixels.device)  # (1, T)
    embedded = torch.cat([model.prefix(pixels), model.gpt.transformer.wte(ids)], dim=1)
    with plain_attention(model):
        result = model.gpt(inputs_embeds=embedded, use_cache=False, output_attentions=True)
    stacked = torch.stack(result.attentions)[:, 0]  # (layers, heads, P + T, P + T)
    weights = stacked[:, :, model.prefix_length:].permute(2, 0, 1, 3)  # (T, layers, heads, P + T)
    probabilities = result.logits[0, model.prefix_length:].softmax(-1)[range(len(targets)), targets]
    return CaptionAttention(tuple(model.tokenizer.convert_ids_to_tokens(targets)), weights.float().cpu().numpy(),
                            probabilities.float().cpu().numpy(), model.prefix_length,
                            model.grid_size if model.grid_head is not None else None)
