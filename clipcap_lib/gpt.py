"""transformers' GPT-2 as decoding needs it: one token at a time, keys and values in memory that stays where it is.

In every step transformers makes masks, joins tensors and looks up hooks; a step here is the matrix products, the norms and
the attention. The weights are those of a `GPT2LMHeadModel`, which is the plain twin: tests hold that both agree.
R rows (hypotheses), N lines of memory, T tokens, L positions, H heads, D the width, V the vocabulary.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcap_lib.config import InputError


@contextmanager
def _without(package: str) -> Iterator[None]:
    """As if the package were not installed, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None
    try:
        yield
    finally:
        del sys.modules[package]


# transformers imports scikit-learn for assisted generation, which nothing here uses: a seventh of a command's start
with _without("sklearn"):
    from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["CAUSAL", "Cache", "FastGPT", "GPT2Config", "GPT2LMHeadModel"]

# transformers' "sdpa", without a function that makes masks under its name: at every call that one would look through the
# positions for packed sequences, for which a GPU's host must wait. Rows here are causal, or bring a mask (N, 1, T, T). A
# mask of pads (N, T) is not looked at: pads stand on the right, behind all that counts.
CAUSAL = "clipcap_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)

ROOM = 32  # positions that a cache begins with, and grows by: reading and moving rows far apart takes longer
SHARE = 24  # most rows that share memory: each reads past what the others wrote
ROWS = 160  # rows that packed weights are laid out for: fp32 for 32, 5 to 32 rows take up to 1.7 times as long (AVX-512)
WIDE = 384  # from this width on a packed product in fp32 saves more than its call costs
FEW = 8  # images or rows whose kernels a GPU runs faster than a host launches them


class Cache:
    """Keys and values of R rows: memory (layers, 2, N, S, H, D / H), N lines of S slots. Each row has `length` positions.

    Fixed (by default, with a slot for each position of the model), every row has a line, and rows are moved within the
    memory, so that a step that was captured or compiled for it never reads another. Only more rows bring new memory.

    With fewer slots it grows. On a CPU, rows that went on from the same one then share its line: what stood there before
    they parted is kept once, each step writes one slot a row, and `seen` (N, rows a line, slots written) tells which slots
    belong to which row. To reorder the beams of an image moves nothing.
    """

    def __init__(self, gpt: FastGPT, rows: int, slots: int | None = None):
        self.gpt, self.length, self.seen = gpt, 0, None
        self.shares = slots is not None and gpt.embedding.device.type == "cpu"
        self.memory = self._room(rows, slots or gpt.positions)

    def _room(self, lines: int, slots: int) -> Tensor:
        """New memory (layers, 2, lines, slots, H, D / H)."""
        gpt = self.gpt
        with torch.inference_mode(False):  # a state may outlive the mode that it was begun in
            # zeros: a masked step reads what is not written yet, and 0 times NaN would be NaN
            return torch.zeros(len(gpt.blocks), 2, lines, slots, gpt.heads, gpt.width // gpt.heads, dtype=gpt.dtype,
                               device=gpt.embedding.device)

    @property
    def together(self) -> int:
        """How many rows share a line."""
        return 1 if self.seen is None else self.seen.shape[1]

    @property
    def written(self) -> int:
        """Slots of a line that are written."""
        return self.length if self.seen is None else self.seen.shape[2]

    def take(self) -> int:
        """The next position, which is filled from now on. Raises InputError if there is none."""
        if self.length == self.gpt.positions:
            raise InputError(f"the model has {self.length} positions, and all are written; choose a smaller max_length")
        count, written = self.together, self.written
        if written + count > self.memory.shape[3]:
            lines = self.memory.shape[2] if self.seen is None else len(self.seen)  # others have left
            larger = self._room(lines, written + count * ROOM)
            larger[:, :, :, :written] = self.memory[:, :, :lines, :written]
            self.memory = larger
        if self.seen is not None:
            own = torch.eye(count, dtype=torch.bool).expand(len(self.seen), -1, -1)
            self.seen = torch.cat([self.seen, own], 2)
        self.length += 1
        return self.length - 1

    def mask(self) -> Tensor | None:
        """What is added to the scores of attention, (N, H, rows a line, slots written); None if rows share nothing."""
        if self.seen is None:
            return None
        return torch.where(self.seen, 0.0, float("-inf")).to(self.gpt.dtype)[:, None].expand(-1, self.gpt.heads, -1, -1)

    def reorder(self, rows: Tensor) -> None:
        """Make row r what row rows[r] was; rows (R',) may repeat or drop rows."""
        if self.shares:
            lines, counts = (rows // self.together).unique_consecutive(return_counts=True)
            count = int(counts[0])
            if count <= SHARE and bool((counts == count).all()):
                self._share(lines, (rows % self.together).view(-1, count))
                return
        if self.seen is None:
            self._move(rows)
        else:
            line, slots = rows // self.together, self.seen.flatten(0, 1)[rows].nonzero()[:, 1].view(len(rows), -1)
            parted = self._room(len(rows), self.length + ROOM)
            parted[:, :, :, :self.length] = self.memory[:, :, line[:, None], slots]
            self.memory, self.seen = parted, None

    def _share(self, lines: Tensor, kept: Tensor) -> None:
        """Keep these lines (N',), and of the rows of each these (N', rows a line)."""
        seen = self.seen
        self._move(lines)
        if seen is not None:
            self.seen = seen[lines[:, None], kept]
        elif kept.shape[1] > 1:
            self.seen = torch.ones(*kept.shape, self.length, dtype=torch.bool)

    def _move(self, lines: Tensor) -> None:
        """Make line i what line lines[i] was."""
        used = self.memory[:, :, :, :self.written]
        if len(lines) > self.memory.shape[2]:
            larger = self._room(len(lines), self.memory.shape[3])
            larger[:, :, :, :self.written] = used.index_select(2, lines)
            self.memory = larger
        elif lines.is_cuda:
            used[:, :, :len(lines)] = used.index_select(2, lines)
        else:  # most stay where they are; on a GPU it would take longer to ask which
            moved = (lines != torch.arange(len(lines))).nonzero().squeeze(-1)
            if len(moved):
                for layer in used:
                    layer.index_copy_(1, moved, layer.index_select(1, lines[moved]))


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this kind are worth a layout of oneDNN's own, on a CPU.

    bf16, where oneDNN has products in bf16: PyTorch has it lay them out anew for every product, which for one image or row
    takes as long as the product. fp32, where PyTorch's products are MKL's and the processor is AMD's: on an EPYC with two
    threads MKL took 1.3 times as long as oneDNN for one row of 768, 2 times for 5 or 32 and 1.2 times for 160; with one
    thread less for one or two rows, more for others. Convolutions are oneDNN's anyhow, and are packed where linear layers
    are. The operators are those that torch.compile freezes weights with; the public modules, torch.utils.mkldnn, are
    TorchScript.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (dtype is torch.float32 and torch.backends.mkl.is_available()
            and "AMD" in torch.cpu.get_capabilities().get("cpu_name", ""))


class _ProductsOfPyTorch:
    """Within it, linear layers are not oneDNN's, which for one row in bf16 takes 1.4 to 1.9 times as long as a product that
    reads each weight once, in the order in which they lie (128 to 1,024 wide, an EPYC with AVX512-BF16 and two threads; with
    one 1.1 to 1.6). The switch is the process's: other threads go past oneDNN meanwhile, until the last is out.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.enabled = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1 and not torch.backends.flags_frozen():
                self.enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and not torch.backends.flags_frozen():
                torch.backends.mkldnn.enabled = self.enabled


_PRODUCTS_OF_PYTORCH = _ProductsOfPyTorch()


def _pack(weight: Tensor) -> Tensor:
    """(outputs, inputs) as oneDNN lays it out, for `torch.ops.mkldnn._linear_pointwise`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


class FastGPT:
    """The weights of a GPT-2, by reference, or cast once to `dtype`: then the residual stream, the norms and the last layer
    keep the model's own precision, and only the matrix products between them have the lower one.

    pack: copy weights into oneDNN's layout where `packs` says that it is worth it; `fixed_step` can then not be compiled.
    """

    def __init__(self, gpt: GPT2LMHeadModel, dtype: torch.dtype | None = None, pack: bool = False):
        transformer, config = gpt.transformer, gpt.config
        self.embedding, self.position_embedding = transformer.wte.weight, transformer.wpe.weight
        self.positions, self.width, self.heads = config.n_positions, config.n_embd, config.n_head
        self.epsilon, self.dtype = config.layer_norm_epsilon, dtype or self.embedding.dtype
        self.last_norm = (transformer.ln_f.weight, transformer.ln_f.bias)
        device = self.embedding.device
        self.packed = pack and packs(device, self.dtype) and (self.dtype is torch.bfloat16 or self.width >= WIDE)
        self.streams = self.packed and self.dtype is torch.bfloat16
        self.last = _pack(self.embedding) if pack and packs(device, self.embedding.dtype) else None  # the last layer, packed
        self.blocks = []
        for block in transformer.h:
            norms = [(norm.weight, norm.bias) for norm in (block.ln_1, block.ln_2)]
            layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            products = [(part.bias.detach().to(self.dtype), part.weight.detach().to(self.dtype)) for part in layers]
            if self.streams:
                products = [(bias, _pack(weight.mT), weight.mT.contiguous()) for bias, weight in products]
            elif self.packed:
                products = [(bias, _pack(weight.mT)) for bias, weight in products]
            self.blocks.append((*norms, *products))
        self.compiled: Callable[..., Tensor] | None = None

    def compile(self) -> None:
        """Make compiled layers ready for `fixed_step`: a third fewer kernels, for seconds at each new shape."""
        self.compiled = torch.compile(self._layer, dynamic=False)

    def __deepcopy__(self, memo: Any) -> FastGPT:
        return self  # the weights are no part of a state that is copied

    @torch.no_grad()
    def begin(self, embedded: Tensor, cache: Cache | None = None) -> tuple[Cache, Tensor]:
        """What captions begin with, embedded (R, T, D) without positions -> their cache, next-token logits (R, V).

        cache: one to be used again, if it has room; what it holds is lost.
        """
        rows, count, _ = embedded.shape
        if cache is None or rows > cache.memory.shape[2]:
            cache = Cache(self, rows, count + ROOM)
        cache.length, cache.seen = count, None
        hidden = self._layers(embedded + self.position_embedding[:count], cache.memory[:, :, :rows], 0)
        return cache, self._logits(hidden[:, -1])

    @torch.no_grad()
    def step(self, cache: Cache, tokens: Tensor) -> Tensor:
        """One token a row, tokens (R,) -> next-token logits (R, V)."""
        position = cache.take()
        hidden = (self.embedding[tokens] + self.position_embedding[position]).view(-1, cache.together, self.width)
        memory, place = cache.memory[:, :, :len(hidden)], cache.written - cache.together
        return self._logits(self._layers(hidden, memory, place, cache.mask()).flatten(0, 1))

    @torch.no_grad()
    def fixed_step(self, memory: Tensor, position: Tensor, tokens: Tensor, compiled: bool = False) -> Tensor:
        """`step` of fixed shapes for every length: reads all L of its memory and masks those after `position` (1,).

        memory (layers, 2, R, L, H, D / H). It can be captured as a CUDA graph, and compiled without a break. compiled: by
        layers that `compile` made ready.
        """
        hidden = self.embedding[tokens] + self.position_embedding[position]
        there = torch.arange(memory.shape[3], device=tokens.device) <= position
        # what is added to the scores: attention kernels would make it of booleans again in each layer
        mask = torch.where(there, 0.0, float("-inf")).to(self.dtype).expand(len(tokens), self.heads, 1, -1)
        return self._logits(self._layers(hidden[:, None], memory, position, mask, self.compiled if compiled else None)[:, 0])

    def _layers(self, hidden: Tensor, memory: Tensor, place: int | Tensor, mask: Tensor | None = None,
                layer: Callable[..., Tensor] | None = None) -> Tensor:
        """Embedded tokens (N, T, D) -> the same behind all layers. Keys and values are written from slot `place` on."""
        shape, layer = hidden.shape, layer or self._layer
        hidden = hidden.reshape(-1, self.width)
        with _PRODUCTS_OF_PYTORCH if self.streams and len(hidden) == 1 else nullcontext():
            for block, kept in zip(self.blocks, memory.unbind(0), strict=True):
                hidden = layer(hidden, shape[0], kept, place, mask, block)
        return hidden.view(shape)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(R, D) behind all layers -> next-token logits (R, V)."""
        hidden = self._norm(hidden, self.last_norm)
        if self.last is None:
            return F.linear(hidden, self.embedding)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.last, None, "none", [], "")

    def _layer(self, hidden: Tensor, lines: int, kept: Tensor, place: int | Tensor, mask: Tensor | None,
               block: tuple[tuple[Tensor, ...], ...]) -> Tensor:
        """hidden (N * T, D) and the layer's memory (2, N, S, H, D / H) -> hidden."""
        norm_1, norm_2, attention, attention_out, inner, outer = block
        joined = self._product(self._norm(hidden, norm_1), attention)
        joined = joined.view(lines, -1, 3, self.heads, self.width // self.heads)
        count = joined.shape[1]
        new = joined[:, :, 1:].movedim(2, 0)  # keys and values (2, N, T, H, D / H)
        if isinstance(place, int):
            kept = kept[:, :, :place + count]
            kept[:, :, place:] = new
        else:
            kept.index_copy_(2, place, new)
        keys, values = kept.transpose(2, 3)
        read = F.scaled_dot_product_attention(joined[:, :, 0].transpose(1, 2), keys, values, attn_mask=mask,
                                              is_causal=count > 1 and mask is None)  # (N, H, T, D / H)
        hidden = hidden + self._product(read.transpose(1, 2).reshape(-1, self.width), attention_out)
        return hidden + self._product(self._product(self._norm(hidden, norm_2), inner, gelu=True), outer)

    def _norm(self, hidden: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(hidden, (self.width,), *norm, self.epsilon)

    def _product(self, hidden: Tensor, layer: tuple[Tensor, ...], gelu: bool = False) -> Tensor:
        bias, weight, *streamed = layer
        hidden = hidden.to(self.dtype)
        if streamed and len(hidden) == 1:
            product = F.linear(hidden, *streamed, bias)
        elif self.packed:
            activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, *activation)
        else:
            product = torch.addmm(bias, hidden, weight)
        return F.gelu(product, approximate="tanh") if gelu else product
