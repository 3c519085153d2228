"""Weights from elsewhere to begin with: ImageNet's for the image encoder, a Chinese GPT-2's for the GPT.

`Config.image_weights` and `Config.gpt_weights` say which; `ClipCap` itself never fetches any. What was asked for and cannot
be had stops the run: training from random weights instead would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from clipcap_lib.config import Config, InputError, on_one_line
from clipcap_lib.files import digest
from clipcap_lib.model import ClipCap
from clipcap_lib.tokenizer import SPECIAL_TOKENS, build_tokenizer, load_tokenizer, vocabulary_of

RANDOM = "random"


def identity(source: str) -> str:
    """Changes with the content of a local file or folder of weights; of anything else, its name."""
    path = Path(source)
    if source in (RANDOM, "timm") or not path.exists():
        return source
    files = sorted(one for one in path.iterdir() if one.suffix in (".json", ".txt", ".safetensors", ".bin")
                   ) if path.is_dir() else [path]
    return digest(files)


def training_tokenizer(config: Config, data: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a run trains with: the prepared data's, or one with the ids of the pretrained GPT's own.

    Captions are read by character in both; characters that the GPT's vocabulary lacks are [UNK].
    """
    if config.gpt_weights == RANDOM:
        return load_tokenizer(data / "tokenizer")
    theirs = _had(lambda: AutoTokenizer.from_pretrained(config.gpt_weights), config.gpt_weights, "gpt", "tokenizer")
    missing = [token for token in SPECIAL_TOKENS if token not in theirs.get_vocab()]
    if missing:
        raise InputError(f"{config.gpt_weights}: its tokenizer has no {' '.join(missing)}; a GPT that reads by character "
                         f"has them, as the Chinese ones with BERT's vocabulary do")
    known = theirs.get_vocab()
    lower_case = theirs.tokenize("A") == theirs.tokenize("a") and "A" not in known
    characters = set(vocabulary_of(load_tokenizer(data / "tokenizer"))) - set(SPECIAL_TOKENS)
    lacking = [one for one in characters if one not in known]
    if len(lacking) > 0.9 * len(characters):  # a folder without its vocabulary, which transformers does not mind
        raise InputError(f"{config.gpt_weights}: its tokenizer knows {len(characters) - len(lacking)} of the "
                         f"{len(characters)} characters of the prepared captions; give a GPT that reads Chinese by "
                         "character, with all of its vocabulary (vocab.txt)")
    return build_tokenizer(vocabulary_of(theirs), lower_case)


def load_pretrained(model: ClipCap, config: Config) -> None:
    """Put the pretrained weights that the settings ask for into a new model. Raises InputError if they do not fit."""
    if config.image_weights != RANDOM:
        _load_image_encoder(model, config.image_weights)
    if config.gpt_weights != RANDOM:
        _load_gpt(model, config.gpt_weights)


def _load_image_encoder(model: ClipCap, source: str) -> None:
    """A file (safetensors, or PyTorch's, read without unpickling objects), or what timm has under the backbone's name."""
    name, options = model.config.encoder, dict(model.config.encoder_options)
    if source != "timm":
        if not Path(source).is_file():
            raise InputError(f"{source}: no such file of image weights; give one, 'timm' to fetch timm's, or 'random'")
        held = _had(lambda: timm.models.load_state_dict(source), source, "image", "weights")
        # timm leaves what a file lacks at random, and only logs it
        lacks = sorted(key for key in model.image_encoder.backbone.state_dict().keys() - held.keys()
                       if not key.endswith("num_batches_tracked"))
        if lacks:
            raise InputError(f"{source}: these are not weights of {name}{' with these options' if options else ''}: "
                             f"{len(lacks)} are missing, such as {lacks[0]}")
        options["pretrained_cfg_overlay"] = dict(file=source)
    made = _had(lambda: timm.create_model(name, pretrained=True, num_classes=0, **options), source, "image",
                f"{name} weights")
    model.image_encoder.backbone.load_state_dict(made.state_dict())


def _load_gpt(model: ClipCap, source: str) -> None:
    """A transformers GPT-2 of the model's shape. Text keeps its rows of the position table, moved behind the image.

    Text token t has position P + t here and had t there: their row t becomes row P + t. Rows 0 .. P - 1 are of image
    tokens, which the GPT has never met: they stay as random as the heads that make those tokens.
    """
    ours = model.gpt.config
    theirs = _had(lambda: AutoConfig.from_pretrained(source), source, "gpt", "configuration")
    if getattr(theirs, "activation_function", None) == "gelu_new":  # the same function, in several kernels
        theirs.activation_function = "gelu_pytorch_tanh"
    if getattr(theirs, "n_inner", None) == 4 * getattr(theirs, "n_embd", 0):  # the same as none given
        theirs.n_inner = None
    names = ("model_type", "n_layer", "n_embd", "n_head", "n_inner", "activation_function", "layer_norm_epsilon",
             "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
    differ = [f"{name} {getattr(theirs, name, None)} instead of {getattr(ours, name)}" for name in names
              if getattr(theirs, name, None) != getattr(ours, name)]
    if theirs.vocab_size < ours.vocab_size or getattr(theirs, "n_positions", 0) < model.config.context:
        differ.append(f"room for {theirs.vocab_size} tokens and {getattr(theirs, 'n_positions', 0)} positions instead of "
                      f"{ours.vocab_size} and {model.config.context}")
    if differ:
        raise InputError(f"{source}: this GPT does not fit the preset's: {'; '.join(differ)}")
    gpt, told = _had(lambda: GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True), source,
                     "gpt", "weights")
    # transformers leaves what a file lacks at random, and only logs it
    if lacks := sorted(set(told["missing_keys"]) - {"lm_head.weight"}):
        raise InputError(f"{source}: these are not weights of a GPT-2 of {theirs.n_layer} layers: {len(lacks)} are missing, "
                         f"such as {lacks[0]}")
    weights = gpt.transformer.state_dict()
    words, positions = weights["wte.weight"][:ours.vocab_size], model.gpt.transformer.wpe.weight.detach().clone()
    first = model.prefix_length  # P
    positions[first:] = weights["wpe.weight"][:model.config.context]
    model.gpt.transformer.load_state_dict({**weights, "wte.weight": words, "wpe.weight": positions})


def _had(get: Callable[[], Any], source: str, option: str, what: str) -> Any:
    """What `get` gives. Raises InputError if it cannot be had, for whatever reason its library names."""
    try:
        return get()
    except Exception as error:  # hub, network, file and format errors of three libraries
        raise InputError(f"{source}: the pretrained {what} cannot be had ({on_one_line(error)}). Give a local copy with "
                         f"--{option}-weights, or ask for random weights with --{option}-weights random") from error
