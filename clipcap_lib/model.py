"""The joint model, whole: an image encoder, a GPT that first reads and then writes, and the heads between them.

N images, T text tokens, P prefix tokens, D the width of the GPT and of the joint space, V the vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clipcap_lib import decode
from clipcap_lib.config import InputError, ModelConfig, from_dict, on_one_line, to_dict
from clipcap_lib.data import to_pixels
from clipcap_lib.gpt import CAUSAL, Cache, FastGPT, GPT2Config, GPT2LMHeadModel
from clipcap_lib.tokenizer import load_tokenizer

MOST_LOGIT_SCALE = math.log(100)
TIED = "gpt.lm_head.weight"  # the output layer shares the embedding's tensor: it is not saved, and tied again
_CARD = """---
{{ card_data }}
---

# A Chinese image captioner

An image encoder and a GPT that were first trained to find each other (CLIP); then the same GPT learned to write captions.

```python
>>> from clipcap_lib.model import ClipCap
>>> model = ClipCap.from_pretrained("this folder, or its name on the hub")
>>> model.caption([image])  # PIL images in, Chinese captions out
```

`config.json` holds the model's shapes, and for a trained checkpoint the settings, seed and data that made it. Captions
may be wrong about what an image shows; what the weights were trained on decides what they can name.
"""


class ImageEncoder(nn.Module):
    """A timm backbone without its classifier, fed with uint8 pixels and normalised by its own data config."""

    # measured for the encoder of every preset: 1.1 to 1.7 times as fast on two cores, 1.7 times (compiled 1.3) on an H200
    memory_format = torch.channels_last

    def __init__(self, config: ModelConfig):
        super().__init__()
        try:
            self.backbone = timm.create_model(config.encoder, pretrained=False, num_classes=0, **config.encoder_options)
        except Exception as error:  # timm raises what its models do
            raise InputError(f"encoder {config.encoder}, encoder_options {dict(config.encoder_options)}: timm cannot make "
                             f"it ({on_one_line(error)})") from error
        self.width: int = self.backbone.num_features
        data = timm.data.resolve_model_data_config(self.backbone)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("deviation", torch.tensor(data["std"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.compiled: tuple[int, Callable[[Tensor], Tensor]] | None = None  # see `compile_for`

    def compile_for(self, images: int) -> None:
        """torch.compile for training batches of this many images. All others, such as an epoch's last, run as they are."""
        self.compiled = images, torch.compile(self.backbone.forward_features, dynamic=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, 3, S, S) uint8 -> pooled (N, C), the output before the classifier; feature map (N, C, H, W)."""
        pixels = (images.to(self.mean.dtype) - self.mean) / self.deviation
        pixels = pixels.contiguous(memory_format=self.memory_format)
        compiled = self.training and self.compiled and self.compiled[0] == len(images)
        feature_map = self.compiled[1](pixels) if compiled else self.backbone.forward_features(pixels)
        return self.pool(feature_map), feature_map

    def pool(self, feature_map: Tensor) -> Tensor:
        """feature map (N, C, H, W) -> pooled (N, C), the output before the classifier."""
        return self.backbone.forward_head(feature_map, pre_logits=True)


class ProjectionHead(nn.Module):
    """Linear -> GELU -> Linear, residual, dropout, LayerNorm: (..., C) -> (..., D)."""

    def __init__(self, width_in: int, width_out: int, dropout: float):
        super().__init__()
        self.project = nn.Linear(width_in, width_out)
        self.mix = nn.Linear(width_out, width_out)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width_out)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.project(features)
        return self.norm(projected + self.dropout(self.mix(F.gelu(projected))))


class ClipCap(nn.Module, PyTorchModelHubMixin, library_name="clipcap_lib", pipeline_tag="image-to-text", language=["zh"],
              license="mit", tags=["image-captioning"], model_card_template=_CARD):
    """CLIP and captioner in one: `encode_image` / `encode_text` for stage one, `caption_logits` for stage two.

    It is a `decode.Stepper`, and `caption()` goes from images to text. Never fetches weights: only `from_pretrained` may,
    and only if it is given the name of a hub repository instead of a folder.
    """

    def __init__(self, config: ModelConfig | Mapping[str, Any], tokenizer: Any = None):
        super().__init__()
        self.config = config if isinstance(config, ModelConfig) else from_dict(ModelConfig, config)
        self.tokenizer = tokenizer  # only `caption()` needs it
        self.start_id, self.end_id, self.pad_id = self.config.start_id, self.config.end_id, self.config.pad_id
        self.image_encoder = ImageEncoder(self.config)
        self.grid_size = self._measure_grid()  # (H, W) of the feature map; None: a transformer, which has none
        self.prefix_length = 1 + (math.prod(self.grid_size) if self.config.image_tokens == "grid" else 0)  # P
        dropout, width = self.config.dropout, self.config.width
        self.gpt = GPT2LMHeadModel(GPT2Config(
            vocab_size=self.config.vocab_size, n_positions=self.prefix_length + self.config.context, n_embd=width,
            n_layer=self.config.layers, n_head=self.config.heads, resid_pdrop=dropout, embd_pdrop=dropout,
            attn_pdrop=dropout, initializer_range=self.config.initializer_range, bos_token_id=self.start_id,
            eos_token_id=self.end_id, attn_implementation=CAUSAL,  # no pad id: transformers would look for it each step
            activation_function="gelu_pytorch_tanh"))  # GPT-2's gelu_new in one kernel: a sixth less time on a CPU
        self.image_head = ProjectionHead(self.image_encoder.width, width, dropout)
        self.text_head = ProjectionHead(width, width, dropout)
        self.grid_head = ProjectionHead(self.image_encoder.width, width, dropout) if self.prefix_length > 1 else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of 1 / temperature, as in CLIP

    @torch.no_grad()
    def _measure_grid(self) -> tuple[int, int] | None:
        training = self.image_encoder.training
        blank = torch.zeros(1, 3, self.config.image_size, self.config.image_size, dtype=torch.uint8)
        try:
            pooled, feature_map = self.image_encoder.eval()(blank)
        except (AssertionError, RuntimeError) as error:  # a transformer, which takes images of one size
            raise InputError(f"encoder {self.config.encoder}: cannot read images of image_size {self.config.image_size} "
                             f"({on_one_line(error)}); a transformer of timm's takes encoder_options "
                             f"{{'img_size': {self.config.image_size}}}") from error
        self.image_encoder.train(training)
        width = self.image_encoder.width
        if pooled.shape[1] == width and feature_map.ndim == 4 and feature_map.shape[1] == width:
            return tuple(feature_map.shape[2:])
        if pooled.shape[1] != width or self.config.image_tokens == "grid":
            raise InputError(f"encoder {self.config.encoder}: no feature map (N, C, H, W) that is pooled to C numbers; "
                             "choose a convolutional network of timm's such as res2next50, resnet18d or convnext_atto, or, "
                             "for a transformer, image_tokens 'pooled'")
        return None

    # -- stage one: both encoders into the joint space ---------------------------------------------------------------

    def encode_image(self, images: Tensor) -> Tensor:
        """images (N, 3, S, S) uint8 -> unit-norm embeddings (N, D)."""
        return F.normalize(self.image_head(self.image_encoder(images)[0]), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (N, T), `[CLS] .. [SEP]` padded on the right -> unit-norm embeddings (N, D).

        The representation is the hidden state at the end token, looked up by id: its id is not the largest. Pads follow
        it, and attention is causal, so they need no mask. Positions begin at P, as they do behind an image.
        """
        hidden = self.gpt.transformer(input_ids=ids, position_ids=self._positions(ids.shape[1]), use_cache=False)[0]
        end = (ids == self.end_id).int().argmax(dim=1)  # the first [SEP]
        return F.normalize(self.text_head(hidden[torch.arange(len(ids), device=ids.device), end]), dim=-1)

    def scale(self) -> Tensor:
        """The factor on cosine similarities: exp of the learned logarithm, at most 100 as in CLIP.

        Training cuts the weight itself after every step, as CLIP's does: beyond the limit it would have no gradient, and
        never come back.
        """
        return self.logit_scale.clamp(max=MOST_LOGIT_SCALE).exp()

    # -- stage two: the same GPT writes ------------------------------------------------------------------------------

    def prefix(self, images: Tensor) -> Tensor:
        """images (N, 3, S, S) uint8 -> prefix tokens (N, P, D): the projected embedding, then the grid's cells if any."""
        return self.prefix_tokens(*self.image_encoder(images))

    def prefix_tokens(self, pooled: Tensor, feature_map: Tensor) -> Tensor:
        """What the encoder gives, pooled (N, C) and feature map (N, C, H, W) -> prefix tokens (N, P, D)."""
        tokens = self.image_head(pooled)[:, None]  # (N, 1, D)
        if self.grid_head is None:
            return tokens
        return torch.cat([tokens, self.grid_head(feature_map.flatten(2).mT)], dim=1)  # (N, 1 + H * W, D)

    def caption_logits(self, prefix: Tensor, ids: Tensor) -> Tensor:
        """prefix (N, P, D) and ids (N * C, T) -> logits (N * C, T, V): logits[:, t] predicts the token after ids[:, t].

        Rows n * C .. of ids are the C captions of image n. Positions run from 0 over the prefix, so that text token t has
        P + t.
        """
        captions = len(ids) // len(prefix)
        if captions > 1 and self.prefix_length > ids.shape[1]:
            return self._packed_logits(prefix, ids, captions)
        prefix = prefix.repeat_interleave(captions, dim=0)
        embedded = torch.cat([prefix, self.gpt.transformer.wte(ids).to(prefix.dtype)], dim=1)
        hidden = self.gpt.transformer(inputs_embeds=embedded, use_cache=False)[0]
        return self.gpt.lm_head(hidden[:, self.prefix_length:])

    def _packed_logits(self, prefix: Tensor, ids: Tensor, captions: int) -> Tensor:
        """The same with the C captions behind one copy of a long prefix: with 37 prefix tokens, a third less work.

        A caption sees the prefix and itself, not the captions beside it, and each has the positions P, P + 1, ..
        """
        (images, prefix_length), length = prefix.shape[:2], ids.shape[1]
        text = self.gpt.transformer.wte(ids).to(prefix.dtype).view(images, captions * length, -1)
        embedded = torch.cat([prefix, text], dim=1)  # (N, P + C * T, D)
        place = torch.arange(embedded.shape[1], device=ids.device)
        caption = torch.where(place < prefix_length, -1, (place - prefix_length) // length)  # -1 is the prefix
        sees = (place[:, None] >= place) & ((caption == -1) | (caption[:, None] == caption))
        mask = torch.zeros(sees.shape, dtype=embedded.dtype, device=ids.device)
        mask = mask.masked_fill(~sees, torch.finfo(embedded.dtype).min)[None, None]  # (1, 1, L, L), added to the scores
        positions = torch.cat([place[:prefix_length], self._positions(length)[0].repeat(captions)])[None]
        hidden = self.gpt.transformer(inputs_embeds=embedded, attention_mask=mask, position_ids=positions,
                                      use_cache=False)[0]
        return self.gpt.lm_head(hidden[:, prefix_length:].reshape(images * captions, length, -1))

    def language_logits(self, ids: Tensor) -> Tensor:
        """ids (N, T) -> logits (N, T, V) without an image: the language-model warm-up."""
        return self.gpt(input_ids=ids, position_ids=self._positions(ids.shape[1]), use_cache=False).logits

    def _positions(self, length: int) -> Tensor:
        """(1, T): positions of text tokens, P and up, in both stages."""
        return torch.arange(self.prefix_length, self.prefix_length + length, device=self.logit_scale.device)[None]

    # -- decoding: a Stepper -----------------------------------------------------------------------------------------

    def begin(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S) uint8 -> prefix and start token, embedded without positions: (N, P + 1, D)."""
        return self.begin_from(self.prefix(pixels))

    def begin_from(self, prefix: Tensor) -> Tensor:
        """prefix (N, P, D) -> the same with the start token behind it: (N, P + 1, D)."""
        begin = torch.full((len(prefix), 1), self.start_id, device=prefix.device)
        return torch.cat([prefix, self.gpt.transformer.wte(begin).to(prefix.dtype)], dim=1)

    def start(self, images: Tensor | Sequence[Image.Image]) -> tuple[Cache, Tensor]:
        """PIL images, or pixels (N, 3, S, S) uint8 -> key-value cache, next-token logits (N, V). See decode.Stepper."""
        return FastGPT(self.gpt).begin(self.begin(self.preprocess(images)))

    def step(self, state: Cache, tokens: Tensor) -> Tensor:
        """tokens (R,) -> next-token logits (R, V). See decode.Stepper."""
        return state.gpt.step(state, tokens)

    def reorder(self, state: Cache, rows: Tensor) -> None:
        """See decode.Stepper."""
        state.reorder(rows)

    def preprocess(self, images: Tensor | Sequence[Image.Image | Mapping[int, Image.Image]]) -> Tensor:
        """PIL images of any size -> pixels (N, 3, S, S) uint8 on the model's device; pixels pass through.

        For models of several sizes an image may be {S: image as it is read for that size}.
        """
        if isinstance(images, Tensor):
            if images.dtype.is_floating_point:
                raise InputError(f"pixels are {images.dtype}; give them as uint8, from 0 to 255")
        else:
            size, kinds = self.config.image_size, [type(one) for one in images]
            if wrong := [kind.__name__ for kind in kinds if not issubclass(kind, (Image.Image, Mapping))]:
                raise InputError(f"an image is a {wrong[0]}; give PIL images, such as PIL.Image.open(path)")
            images = torch.stack([to_pixels(one[size] if isinstance(one, Mapping) else one, size) for one in images])
        return images.to(self.logit_scale.device)

    def caption(self, images: Sequence[Image.Image], beam_size: int = 1, max_length: int = 30, batch_size: int = 32,
                **options: Any) -> list[str]:
        """Captions of PIL images, by greedy decoding unless told otherwise. Puts the model into evaluation mode.

        options: further ones of `decode.Options`. max_length is cut to the positions that the model has for text. Memory
        does not grow with the number of images, only with batch_size. Raises InputError on what is no image, wrong options
        and weights that give no numbers.
        """
        chosen = decode.Options(beam_size, min(max_length, self.config.context), **options)
        if isinstance(images, Image.Image) or not hasattr(images, "__len__"):
            raise InputError(f"images are a {type(images).__name__}; give a list of PIL images")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        parts = (range(len(images))[first:first + batch_size] for first in range(0, len(images), batch_size))
        return [found[0][0] for part in parts for found in decode.captions(
            self.eval(), self.tokenizer, images[part.start:part.stop], chosen, part)]

    # -- folders: the mixin's `from_pretrained`, with sentences for what fails, and what it and `save_pretrained` call --

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> ClipCap:
        """A checkpoint of `train`, a folder of `save_pretrained`, or the name of a hub repository -> the model in evaluation
        mode. options: those of PyTorchModelHubMixin, and map_location, the device. Raises InputError on a folder that is not
        there or holds no whole model.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir() and (folder.exists() or folder.is_absolute() or len(folder.parts) != 2):
            raise InputError(f"{folder}: no such folder, and no name of a hub repository, which is such as user/model; give "
                             "the folder of a checkpoint, such as runs/miniature/caption/model1/best")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        except Exception as error:  # not there, not JSON, no such entry, weights that do not fit, or safetensors' own kinds
            if not folder.is_dir():
                raise  # of the hub, or the network
            raise InputError(f"{folder}: holds no whole model ({type(error).__name__}: {on_one_line(error)}); give the "
                             "folder of a checkpoint, such as runs/miniature/caption/model1/best") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, cache_dir: str | None, force_download: bool,
                         local_files_only: bool, token: str | bool | None, map_location: str = "cpu",
                         strict: bool = True, **_: Any) -> ClipCap:
        """A checkpoint of `train` or a folder of `save_pretrained` -> the model in evaluation mode."""
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(snapshot_download(
                model_id, revision=revision, cache_dir=cache_dir, force_download=force_download, token=token,
                local_files_only=local_files_only, allow_patterns=["*.json", "model.safetensors"]))
        shapes = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
        weights = load_file(folder / "model.safetensors")
        model = cls(shapes, load_tokenizer(folder))
        weights[TIED] = weights["gpt.transformer.wte.weight"]
        model.load_state_dict(weights, strict=strict)
        return model.to(map_location).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items() if name != TIED},
                  save_directory / "model.safetensors")
        (save_directory / "config.json").write_text(json.dumps({"model": to_dict(self.config)}, indent=1), encoding="utf-8")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each part."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
