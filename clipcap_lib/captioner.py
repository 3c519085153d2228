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

    precision "bf16": the image encoder, but for its first convolutions, and the GPT's matrix products in bf16, from weights
    cast once. pack: lay weights out for the processor, see `gpt.packs`: a second copy of the GPT's (in bf16 two, for one row
    and for more) and up to two of the encoder's, for one image and for more; without, the GPT's are the model's own in fp32.

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
        self.fixed, self.pack = model.logit_scale.is_cuda if fixed is None else fixed, pack
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
            return _for_inference(self.model, self.dtype, self.pack)

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


def _for_inference(model: ClipCap, dtype: torch.dtype | None, pack: bool) -> ClipCap:
    """The model with a copy of its encoder: BatchNorm is part of the convolutions, and with a dtype convolutions and linear
    layers are in it. The rest is shared. Under autocast those weights are used as they are, where fp32 ones would be cast
    again for every batch. The heads and the convolutions that read the pixels stay as they are: in bf16 they cost more
    captions than time.
    """
    found = copy.deepcopy(model, {id(part): part for part in (*model.children(), model.tokenizer)})
    encoder = found.image_encoder = _norms_folded(model.image_encoder, model.config.image_size)
    exact = _first_convolutions(encoder.backbone) if dtype else set()
    if dtype:
        for layer in encoder.float().modules():  # autocast leaves float64 as it is
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer not in exact:
                layer.to(dtype)
    pack = pack and packs(model.logit_scale.device, dtype or model.logit_scale.dtype)
    for parent in list(encoder.modules()):
        for name, layer in list(parent.named_children()):
            if (pack or layer in exact) and _is_plain(layer):
                setattr(parent, name, _Convolution(layer, pack))
    return found


def _is_plain(layer: nn.Module) -> bool:
    """Not a kind of convolution that pads by itself, or makes its weights."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _first_convolutions(backbone: nn.Module) -> set[nn.Module]:
    """The convolutions that read the pixels: all in the part of the backbone (such as "stem") that holds those which timm
    calls the first, or where that part is most of it, those alone. None if timm names none.
    """
    first = (getattr(backbone, "pretrained_cfg", None) or {}).get("first_conv") or ()
    whole, found = sum(p.numel() for p in backbone.parameters()), set()
    parts = dict(backbone.named_modules())
    for name in (first,) if isinstance(first, str) else first:
        part = parts.get(name.partition(".")[0], backbone)
        if 10 * sum(p.numel() for p in part.parameters()) > whole:  # a trunk, such as DenseNet's "features"
            part = parts.get(name, nn.Identity())
        found |= {layer for layer in part.modules() if _is_plain(layer)}
    return found


class _Convolution(nn.Module):
    """A convolution in the precision of its weights, within autocast too. packed: its weights are laid out for oneDNN, see
    `packs`; one image then takes about two thirds of the time.

    oneDNN chooses by the size of its input: told of none, it took nine times as long for one image in bf16 (on an EPYC) as
    with weights that are not laid out. The sizes are one image and BATCH, whatever comes first: a `predict` that goes on
    after a kill must write the same captions.
    """

    def __init__(self, layer: nn.Conv2d, packed: bool):
        super().__init__()
        self.weight, self.bias = layer.weight.detach(), layer.bias
        self.settings = layer.padding, layer.stride, layer.dilation, layer.groups
        self.packed: dict[bool, Tensor] | None = {} if packed else None  # for one image, and for more

    def __deepcopy__(self, memo: Any) -> _Convolution:
        return self  # nothing in it changes, and oneDNN's layouts cannot be copied

    def forward(self, features: Tensor) -> Tensor:
        features, alone = features.to(self.weight.dtype), len(features) == 1
        if self.packed is None:
            padding, stride, dilation, groups = self.settings
            with torch.autocast(features.device.type, enabled=False):
                return F.conv2d(features, self.weight, self.bias, stride, padding, dilation, groups)
        if alone not in self.packed:
            size = (1 if alone else BATCH, *features.shape[1:])
            self.packed[alone] = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.settings, size)
        weight = self.packed[alone]
        return torch.ops.mkldnn._convolution_pointwise(features, weight, self.bias, *self.settings, "none", [], "")


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
