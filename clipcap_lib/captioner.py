"""A trained model made ready for writing many captions: a lower precision on request, and on a GPU a captured graph.

`Captioner(model)` is a `decode.Stepper` like the model itself, and writes the same; the model is its plain twin.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcap_lib.config import InputError
from clipcap_lib.gpt import FEW, Cache, FastGPT, packs
from clipcap_lib.graphs import Graph
from clipcap_lib.model import ClipCap

REACH = 32  # a captured step reads a multiple of so many positions: few graphs, and little that is not written yet
BATCH = 32  # images that packed convolutions of more than one are laid out for: as good for 4
PRECISIONS = ("fp32", "bf16")  # "fp32": that of the model's weights, whatever it is


class Captioner:
    """One model as a Stepper. After its weights have changed, make a new one.

    precision "bf16": the image encoder and the GPT's matrix products in bf16, from weights cast once. pack: lay the GPT's
    weights out for the processor, see `gpt.packs`: in fp32 a second copy of them; without, they are the model's own.

    fixed (default: on a GPU): keys and values lie in one memory for all batches, whose address changes only when a batch
    has more rows than any before, and a step has fixed shapes: on a GPU it is captured as a graph and replayed. A `start`
    then ends the states before it. compiled: on a GPU, the GPT's layers are compiled where few images are captioned at once
    (see `Config.compile`).
    """

    def __init__(self, model: ClipCap, precision: str = "fp32", fixed: bool | None = None, compiled: bool = False,
                 pack: bool = True):
        if precision not in PRECISIONS:
            raise InputError(f"unknown precision '{precision}'; choose {' or '.join(PRECISIONS)}")
        self.model, self.precision, self.config, self.tokenizer = model.eval(), precision, model.config, model.tokenizer
        self.start_id, self.end_id, self.pad_id = model.start_id, model.end_id, model.pad_id
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.fixed = model.logit_scale.is_cuda if fixed is None else fixed
        self.gpt = FastGPT(model.gpt, self.dtype, pack=pack and not self.fixed)
        if compiled and self.fixed:
            self.gpt.compile()
        self.cache: Cache | None = None  # only with fixed
        self.few = False  # whether it was last begun for up to FEW images on a GPU
        self.run: Callable[..., Tensor] = self.gpt.fixed_step
        self._graphs: dict[tuple[str, Any], Graph] = {}  # "start" by images, "step" by rows and positions read
        self._captured_on: Tensor | None = None  # their memory

    @cached_property
    def encoder(self) -> ClipCap:
        """What encodes images, made when it is first needed: its image encoder is a copy, as `model`'s was then."""
        # whoever asks may be under autocast, whose rounding would drown what folding must not change
        with torch.autocast(self.model.logit_scale.device.type, enabled=False):
            return _for_inference(self.model, self.dtype)

    def start(self, images: Any) -> tuple[Cache, Tensor]:
        """See decode.Stepper."""
        pixels = self.model.preprocess(images)
        count = len(pixels)
        if not self.fixed or not pixels.is_cuda or count > FEW:
            return self.start_from(self.embed(pixels))
        cache = self._room(count)
        self.few = True
        logits = self._graph(cache, "start", count, lambda pixels: self.gpt.begin(self.embed(pixels), cache)[1], pixels)
        cache.length = self.model.prefix_length + 1  # a replay does not say so
        return cache, logits

    def start_from(self, embedded: Tensor) -> tuple[Cache, Tensor]:
        """The same from what captions begin with, `ClipCap.begin`: (N, P + 1, D)."""
        embedded = embedded.to(self.gpt.embedding.dtype)
        return self.gpt.begin(embedded, self._room(len(embedded)) if self.fixed else None)

    def _room(self, rows: int) -> Cache:
        """The one memory, with room for so many rows."""
        if self.cache is None or self.cache.memory.shape[2] < rows:
            self.cache = Cache(self.gpt, rows)
        self.few = False
        return self.cache

    def _graph(self, cache: Cache, what: str, size: Any, run: Callable[..., Tensor], *inputs: Tensor | int) -> Tensor:
        """`run(*inputs)` by the graph of this name and size, captured when first asked for; all work on one memory."""
        if self._captured_on is not cache.memory:
            self._graphs, self._captured_on = {}, cache.memory
        if (what, size) not in self._graphs:
            self._graphs[what, size] = Graph(run, *inputs)
        return self._graphs[what, size](*inputs)

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S) uint8 -> what captions begin with (N, P + 1, D)."""
        # no cache of cast weights: they are cast already, and a captured graph must not hold what autocast drops
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.dtype is not None, cache_enabled=False):
            found = self.encoder.image_encoder(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            pooled, feature_map = (part.to(self.gpt.embedding.dtype) for part in found)
            return self.encoder.begin_from(self.encoder.prefix_tokens(pooled, feature_map))

    def step(self, state: Cache, tokens: Tensor) -> Tensor:
        """See decode.Stepper."""
        if not self.fixed:
            return self.gpt.step(state, tokens)
        rows = len(tokens)
        # few sizes, so that few graphs are captured: rows beyond those asked for write into memory that nobody reads
        padded = min(1 << (rows - 1).bit_length(), state.memory.shape[2])
        given = F.pad(tokens, (0, padded - rows)) if padded > rows else tokens
        position = state.take()
        if not tokens.is_cuda:
            return self.run(state.memory[:, :, :padded], torch.full((1,), position), given)[:rows]
        reach = min(-(-state.length // REACH) * REACH, self.gpt.positions)  # beyond it nothing is written yet
        memory = state.memory[:, :, :padded, :reach]
        self.few = self.few and padded <= FEW  # nothing is compiled halfway, because a batch has shrunk
        compiled = self.gpt.compiled is not None and self.few
        run = partial(self.run, memory, compiled=compiled)
        return self._graph(state, "step", (padded, reach, compiled), run, position, given)[:rows]

    def reorder(self, state: Cache, rows: Tensor) -> None:
        """See decode.Stepper."""
        state.reorder(rows)


def _for_inference(model: ClipCap, dtype: torch.dtype | None) -> ClipCap:
    """The model with a copy of its encoder: BatchNorm is part of the convolutions, and with a dtype convolutions and linear
    layers are in it. The rest is shared. Under autocast those weights are used as they are, where fp32 ones would be cast
    again for every batch. The heads and what reads the pixels stay as they are: in bf16 they cost more captions than time.
    """
    found = copy.deepcopy(model, {id(part): part for part in (*model.children(), model.tokenizer)})
    found.image_encoder = _norms_folded(model.image_encoder, model.config.image_size)
    backbone = found.image_encoder.backbone
    stem = _stem(backbone) if dtype else None
    if dtype:
        exact = set(backbone.get_submodule(stem).modules()) if stem else set()
        for layer in found.image_encoder.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer not in exact:
                layer.to(dtype)
    if packs(model.logit_scale.device, dtype or model.logit_scale.dtype):
        _pack_convolutions(found.image_encoder)
    if stem:
        _keep_exact(backbone.get_submodule(stem), dtype)
    return found


def _stem(backbone: nn.Module) -> str | None:
    """The name of what reads the pixels: the small part of the backbone that timm says its first convolution is in, or that
    convolution alone.
    """
    first = getattr(backbone, "pretrained_cfg", {}).get("first_conv")
    if not isinstance(first, str):
        return None
    part = first.partition(".")[0]
    size, whole = (sum(p.numel() for p in module.parameters()) for module in (backbone.get_submodule(part), backbone))
    return part if 10 * size < whole else first


def _keep_exact(part: nn.Module, dtype: torch.dtype) -> None:
    """Let it compute in the precision of its weights within autocast, and round only what it gives."""
    forward = part.forward

    def exact(features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return forward(features).to(dtype)

    part.forward = exact


class _PackedConvolution(nn.Module):
    """A convolution whose weights are laid out for oneDNN, see `packs`: one image takes about two thirds of the time.

    oneDNN chooses by the size of its input; told of none it chose on one processor what took nine times as long as no layout
    at all. The sizes are one image and BATCH, whatever comes first: a run that goes on must end with the same bits.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = layer.weight.detach(), layer.bias
        self.settings = layer.padding, layer.stride, layer.dilation, layer.groups
        self.packed: dict[bool, Tensor] = {}  # for one image, and for more

    def forward(self, features: Tensor) -> Tensor:
        features, alone = features.to(self.weight.dtype), len(features) == 1
        if alone not in self.packed:
            size = (1 if alone else BATCH, *features.shape[1:])
            self.packed[alone] = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.settings, size)
        weight = self.packed[alone]
        return torch.ops.mkldnn._convolution_pointwise(features, weight, self.bias, *self.settings, "none", [], "")


def _pack_convolutions(encoder: nn.Module) -> None:
    for parent in list(encoder.modules()):
        for name, layer in list(parent.named_children()):
            # not a kind that pads by itself
            if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                setattr(parent, name, _PackedConvolution(layer))


@torch.no_grad()
def _norms_folded(encoder: nn.Module, size: int) -> nn.Module:
    """A copy in which each convolution does what the BatchNorm right behind it does in evaluation mode: an eighth less time
    on a CPU. Which one that is, a run on an image tells; if the outcome is not the same in the end, the copy is a plain one.
    """
    plain = copy.deepcopy(encoder).eval()
    folded = copy.deepcopy(plain)
    image = torch.randint(256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = image.to(encoder.mean.device)
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors are kept, so that no other gets the address of one
    pairs: dict[nn.Conv2d, nn.BatchNorm2d] = {}

    def convolved(layer: nn.Conv2d, _: Any, output: Tensor) -> None:
        made[id(output)] = layer, output

    def normalised(layer: nn.BatchNorm2d, inputs: tuple[Tensor], _: Any) -> None:
        if id(inputs[0]) in made and layer.running_mean is not None:
            pairs[made[id(inputs[0])][0]] = layer

    hooks = [layer.register_forward_hook(convolved) for layer in folded.modules() if isinstance(layer, nn.Conv2d)]
    hooks += [layer.register_forward_hook(normalised) for layer in folded.modules() if type(layer) is nn.BatchNorm2d]
    expected = folded(image)[1]
    for hook in hooks:
        hook.remove()
    places = {layer: (parent, name) for parent in folded.modules() for name, layer in parent.named_children()}
    for convolution, norm in pairs.items():
        for old, new in ((convolution, nn.utils.fuse_conv_bn_eval(convolution, norm)), (norm, nn.Identity())):
            setattr(*places[old], new)
    error = (folded(image)[1] - expected).norm() / expected.norm()
    return folded if error < 0.01 else plain
