"""Which part of the image a word comes from, by five methods, for generated or given captions.

    attention    what a head reads from, at the step that chose the character: the weights of the plain-softmax twin
    rollout      attention followed through all layers, residual connections included (Abnar and Zuidema 2020)
    Grad-CAM     channels of the encoder's last feature map, weighted by their gradient (Selvaraju et al. 2017)
    HiResCAM     the same gradient cell by cell (Draelos and Carin 2020): what more of a cell's own features would add
    occlusion    what the word loses when a part of the image is covered (Zeiler and Fergus 2014): slow, looks at no weight

Grad-CAM, HiResCAM and occlusion need no image tokens but the pooled one, and so work for the original's architecture.
Attention weights are not explanations: they say where a head reads from, not what would change the word. `localisation`
checks all five where the truth is known.

Maps (.., h, w) lie over the image: their squares fill it evenly. Those of the feature map's cells are finer than it, because
its cells are not centred where such squares are: see `cell_centres`. Models are put into evaluation mode.

T generated tokens ([SEP] last), P prefix tokens, (H, W) the encoder's feature map, S spans of tokens that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipcap_lib import decode
from clipcap_lib.config import InputError
from clipcap_lib.data import pad
from clipcap_lib.model import ClipCap, ImageEncoder
from clipcap_lib.tokenizer import encode

Span = tuple[int, int]  # tokens [first, end) of the caption: a word of several characters
FINER = 4  # squares of a map beside each other for a cell of the feature map
_CENTRES: WeakKeyDictionary[ImageEncoder, tuple[np.ndarray, np.ndarray]] = WeakKeyDictionary()


@contextmanager
def plain_attention(model: ClipCap) -> Iterator[ClipCap]:
    """Inside, attention is an explicit softmax whose weights can be read; outside, the fused kernel."""
    before = model.gpt.config._attn_implementation
    model.gpt.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.gpt.set_attn_implementation(before)


# -- where a cell lies ------------------------------------------------------------------------------------------------


def cell_centres(model: ClipCap) -> tuple[np.ndarray, np.ndarray]:
    """Where in the image the feature map's cells look: centres of its rows (H,) and columns (W,), in pixels from the corner.

    Convolutions with padding and stride centre cell i at i strides and not in the middle of its share of the image: half a
    stride off. Measured once an encoder: the centre of the squared gradient of the middle cell at the pixels; the others
    lie strides apart.
    """
    encoder, side = model.image_encoder, model.config.image_size
    if model.grid_size is None:
        raise InputError(f"encoder {model.config.encoder} has no feature map to lay over the image; occlusion() needs none")
    if encoder not in _CENTRES:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            noise = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0)).to(encoder.mean)
            feature_map = encoder.backbone.forward_features(noise.requires_grad_())
            height, width = model.grid_size
            cell = feature_map[:, :, height // 2, width // 2].float()
            gradient = torch.autograd.grad(cell.square().sum(), noise)[0].float().square().sum(dim=(0, 1))  # (side, side)
        gradient = gradient + gradient.mT  # images are square, and so is what a cell sees; weights by chance are less so
        share = gradient.sum(dim=0) / gradient.sum()
        centre = float((share * (torch.arange(side, device=share.device) + 0.5)).sum())
        stride = encoder.backbone.feature_info[-1]["reduction"]
        _CENTRES[encoder] = tuple(centre + stride * (np.arange(size) - size // 2) for size in model.grid_size)
    return _CENTRES[encoder]


def over_image(model: ClipCap, cells: np.ndarray) -> np.ndarray:
    """Values of the feature map's cells (.., H, W) -> a map (.., FINER * H, FINER * W) over the image, linear in between."""
    side, factors = model.config.image_size, []
    for size, centres in zip(model.grid_size, cell_centres(model), strict=True):
        squares = (np.arange(FINER * size) + 0.5) * side / (FINER * size)
        factors.append(np.stack([np.interp(squares, centres, one) for one in np.eye(size)], axis=1))  # (FINER * size, size)
    rows, columns = factors
    return (rows @ np.asarray(cells) @ columns.T).astype(np.float32)


# -- attention weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionAttention:
    """A caption of T tokens ([SEP] last) and what each looked at.

    weights (T, layers, heads, P + T): row t is the distribution, at the step that chose words[t], over the P prefix
    tokens and the text so far ([CLS] first). rolled (T, P + T): the same for attention rollout. probabilities (T,): of
    each token at its step. model: whose caption it is, or whose it might be.
    """

    words: tuple[str, ...]
    tokens: tuple[int, ...]  # without [SEP]
    weights: np.ndarray
    rolled: np.ndarray
    probabilities: np.ndarray
    model: ClipCap

    @property
    def prefix_length(self) -> int:
        """P, the number of image tokens."""
        return self.model.prefix_length

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """(H, W) of the image tokens; None if there is but the pooled one."""
        return self.model.grid_size if self.model.grid_head is not None else None

    def image_share(self) -> np.ndarray:
        """The share of attention that goes to the image: (T, layers, heads), 0 to 1."""
        return self.weights[..., :self.prefix_length].sum(-1)

    def maps(self) -> np.ndarray:
        """Attention to the image: (T, layers, heads, h, w). Raises InputError for pooled image tokens."""
        return self._over_cells(self.weights)

    def rollout_maps(self) -> np.ndarray:
        """Attention rollout to the image: (T, h, w). Raises InputError for pooled image tokens."""
        return self._over_cells(self.rolled)

    def _over_cells(self, weights: np.ndarray) -> np.ndarray:
        if self.grid_size is None:
            raise InputError("this model has one pooled image token and so no attention map; image_share() says how much "
                             "it is looked at, grad_cam() and occlusion() where; or train with image_tokens='grid'")
        cells = weights[..., 1:self.prefix_length].reshape(*weights.shape[:-1], *self.grid_size)
        return over_image(self.model, cells)


@torch.inference_mode()
def caption_attention(model: ClipCap, image: Image.Image, tokens: Sequence[int] | None = None,
                      max_length: int = 30) -> CaptionAttention:
    """Caption `image` greedily (or take `tokens`, [CLS] and [SEP] left out), and read the attention at every step.

    Without dropout and with a causal mask, one pass over the whole caption gives the weights of every step. Raises
    InputError for an ensemble, or more tokens than the model's context holds.
    """
    _check(model, tokens or ())
    pixels = model.preprocess([image])
    if tokens is None:
        suppress = sorted({model.pad_id, model.start_id, model.tokenizer.unk_token_id})
        tokens = decode.greedy(model, pixels, max_length, suppress)[0].tokens
    targets = [*tokens, model.end_id]
    ids = torch.tensor([[model.start_id, *tokens]], device=pixels.device)  # (1, T)
    embedded = torch.cat([model.prefix(pixels), model.gpt.transformer.wte(ids)], dim=1)
    with plain_attention(model):
        result = model.gpt(inputs_embeds=embedded, use_cache=False, output_attentions=True)
    stacked = torch.stack(result.attentions)[:, 0].float()  # (layers, heads, P + T, P + T)
    weights = stacked[:, :, model.prefix_length:].permute(2, 0, 1, 3)  # (T, layers, heads, P + T)
    probabilities = result.logits[0, model.prefix_length:].float().softmax(-1)[range(len(targets)), targets]
    return CaptionAttention(tuple(model.tokenizer.convert_ids_to_tokens(targets)), tuple(tokens), weights.cpu().numpy(),
                            rollout(stacked)[model.prefix_length:].cpu().numpy(), probabilities.cpu().numpy(), model)


def rollout(weights: Tensor) -> Tensor:
    """Attention rollout: weights (layers, heads, L, L) -> (L, L), rows sum to one.

    Heads are averaged, half of each layer is its residual connection, and layers are multiplied, first to last (Abnar
    and Zuidema 2020, https://arxiv.org/abs/2005.00928, section 3).
    """
    layers = 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(weights.shape[-1], device=weights.device)
    rolled = layers[0]
    for layer in layers[1:]:
        rolled = layer @ rolled
    return rolled


# -- gradients --------------------------------------------------------------------------------------------------------


def grad_cam(model: ClipCap, image: Image.Image, tokens: Sequence[int], spans: Sequence[Span] | None = None,
             by_cell: bool = False) -> np.ndarray:
    """Grad-CAM of the log-probability of each span of a caption on the encoder's last feature map -> (S, h, w), >= 0.

    tokens: the caption without [CLS] and [SEP]; spans: by default every token and [SEP] by itself. by_cell: HiResCAM, in
    nats to first order. It says little where a norm stands behind the cells, as in `grid_head`: larger features of a cell
    then change nothing, other ones would. Only what speaks for the word is kept (ReLU), as in the papers.
    """
    _check(model, tokens)
    return _word_cams(model, image, tokens, _spans(tokens, spans))[by_cell]


def _word_cams(model: ClipCap, image: Image.Image, tokens: Sequence[int],
               spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Grad-CAM and HiResCAM of each span, from the same gradients."""

    def score(feature_map: Tensor) -> Tensor:  # (S, C, H, W): a copy for each span, so that one backward pass does all
        prefix = model.prefix_tokens(model.image_encoder.pool(feature_map), feature_map)
        summed = _token_scores(model, prefix, tokens)  # (S, T)
        return torch.stack([summed[row, first:end].sum() for row, (first, end) in enumerate(spans)])

    return _cams(model, image, len(spans), score)


@torch.inference_mode(False)
def similarity_grad_cam(model: ClipCap, image: Image.Image, captions: Sequence[str], by_cell: bool = False) -> np.ndarray:
    """Grad-CAM of the cosine similarity of an image and each of S captions -> (S, h, w), >= 0. See `grad_cam`."""
    _check(model)
    if not captions:
        raise InputError("there is no caption to map; give at least one")
    with torch.no_grad():
        ids = pad(encode(model.tokenizer, list(captions), model.config.context), model.pad_id)
        texts = model.encode_text(ids.to(model.logit_scale.device))  # (S, D)

    def score(feature_map: Tensor) -> Tensor:
        pooled = model.image_head(model.image_encoder.pool(feature_map))
        return (F.normalize(pooled, dim=-1) * texts).sum(-1)

    return _cams(model, image, len(texts), score)[by_cell]


@torch.inference_mode(False)
@torch.enable_grad()
def _cams(model: ClipCap, image: Image.Image, copies: int,
          score: Callable[[Tensor], Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """score: feature maps (S, C, H, W) -> (S,), each of its own map -> Grad-CAM and HiResCAM, each (S, h, w)."""
    cell_centres(model)  # it says so where there is no feature map
    with torch.no_grad():
        feature_map = model.image_encoder(model.preprocess([image]))[1]
    feature_map = feature_map.expand(copies, -1, -1, -1).clone().requires_grad_()
    by_cell, = torch.autograd.grad(score(feature_map).sum(), feature_map)
    by_channel = by_cell.mean(dim=(2, 3), keepdim=True)  # Grad-CAM: one weight a channel
    return tuple(over_image(model, (gradient * feature_map).float().sum(dim=1).relu().detach().cpu().numpy())
                 for gradient in (by_channel, by_cell))


# -- occlusion --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def occlusion(model: ClipCap, image: Image.Image, tokens: Sequence[int], spans: Sequence[Span] | None = None,
              steps: int = 6, patch: float = 1 / 3) -> np.ndarray:
    """What each span's log-probability loses when a square of the image is covered -> (S, steps, steps), in nats.

    The square is `patch` of the side wide and filled with the backbone's mean colour; it moves in steps x steps places
    whose centres fill the image. Negative: the word is more probable without that part.
    """
    _check(model, tokens)
    spans, pixels = _spans(tokens, spans), model.preprocess([image])  # (1, 3, side, side)
    side, half = pixels.shape[-1], patch * pixels.shape[-1] / 2
    edges = [(max(0, round(c - half)), min(side, round(c + half))) for c in (np.arange(steps) + 0.5) * side / steps]
    covered = pixels.repeat(1 + steps**2, 1, 1, 1)  # the first stays whole
    grey = model.image_encoder.mean[0].round().to(pixels.dtype)  # (3, 1, 1): zero after normalisation
    for place, (top, left) in enumerate(np.ndindex(steps, steps), start=1):
        covered[place, :, slice(*edges[top]), slice(*edges[left])] = grey
    scores = torch.cat([_token_scores(model, model.prefix(part), tokens) for part in covered.split(64)])  # (1 + places, T)
    by_span = torch.stack([scores[:, first:end].sum(dim=1) for first, end in spans])  # (S, 1 + places)
    return (by_span[:, :1] - by_span[:, 1:]).reshape(len(spans), steps, steps).float().cpu().numpy()


# -- all of them ------------------------------------------------------------------------------------------------------

METHODS = ("attention", "rollout", "Grad-CAM", "HiResCAM", "occlusion")


def word_maps(model: ClipCap, image: Image.Image, tokens: Sequence[int], spans: Sequence[Span] | None = None,
              methods: Sequence[str] = METHODS) -> dict[str, np.ndarray]:
    """Maps of each span of a caption by each method that the model allows -> {method: (S, h, w)}.

    "attention" is that of the last layer, averaged over heads and over the span's characters. Models with one pooled
    image token have no maps of attention and rollout. Raises InputError for an unknown method.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise InputError(f"unknown method {', '.join(unknown)}; known are {', '.join(METHODS)}")
    _check(model, tokens)
    spans, maps = _spans(tokens, spans), {}
    if model.grid_head is not None and {"attention", "rollout"} & set(methods):
        found = caption_attention(model, image, tokens)
        for name, by_token in (("attention", found.maps()[:, -1].mean(axis=1)), ("rollout", found.rollout_maps())):
            maps[name] = np.stack([by_token[first:end].mean(axis=0) for first, end in spans])
    if model.grid_size and {"Grad-CAM", "HiResCAM"} & set(methods):
        maps["Grad-CAM"], maps["HiResCAM"] = _word_cams(model, image, tokens, spans)
    maps["occlusion"] = occlusion(model, image, tokens, spans) if "occlusion" in methods else None
    return {name: maps[name] for name in methods if maps.get(name) is not None}


def _check(model: ClipCap, tokens: Sequence[int] = ()) -> None:
    """Put the model into evaluation mode. InputError: it is an ensemble, or its context is too short for the tokens."""
    if not isinstance(model, ClipCap):
        raise InputError(f"maps are of one model, and this is of {type(model).__name__}; give one of its members")
    if len(tokens) >= model.config.context:
        raise InputError(f"{len(tokens)} characters and [CLS] do not fit into the model's context of {model.config.context}")
    model.eval()


def _spans(tokens: Sequence[int], spans: Sequence[Span] | None) -> list[Span]:
    """The spans, or every token and [SEP] by itself. InputError: there is none, or one is empty or leaves the caption."""
    spans = [(i, i + 1) for i in range(len(tokens) + 1)] if spans is None else list(spans)
    if not spans:
        raise InputError("there are no words to map; an empty caption has [SEP] only, the span (0, 1)")
    if wrong := [span for span in spans if not 0 <= span[0] < span[1] <= len(tokens) + 1]:
        raise InputError(f"the span {wrong[0]} is empty or leaves the caption of {len(tokens)} characters and [SEP]")
    return spans


def _token_scores(model: ClipCap, prefix: Tensor, tokens: Sequence[int]) -> Tensor:
    """prefix (N, P, D) -> log-probabilities (N, T) of the caption's tokens and [SEP], each after those before it."""
    targets = torch.tensor([*tokens, model.end_id], device=prefix.device)
    ids = torch.tensor([model.start_id, *tokens], device=prefix.device).expand(len(prefix), -1)
    logits = model.caption_logits(prefix, ids).float()  # (N, T, V)
    return logits.log_softmax(dim=-1).gather(2, targets.expand(len(prefix), -1)[..., None])[..., 0]
