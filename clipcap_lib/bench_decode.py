"""Decoding, one image or a batch at a time, beside the original's loop, transformers' `generate` and the limit."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from clipcap_lib import decode, optimisation
from clipcap_lib.bench_train import random_model
from clipcap_lib.captioner import Captioner
from clipcap_lib.config import Config
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.graphs import Graph
from clipcap_lib.model import ClipCap
from clipcap_lib.timing import Report, Rows, Variant, measure


def measure_decode(config: Config, tiny: bool, report: Report) -> Rows:
    """Captions of a forced length, from uint8 images in the host's memory on: every variant writes as many characters.

    bf16 only where the hardware computes in it: elsewhere it is emulated, and says nothing.
    """
    model, pixels = random_model(config)
    model.eval()
    length, batch = (4, 4) if tiny else (20, 256 if torch.cuda.is_available() else 32)
    one, many = pixels(1).cpu(), pixels(batch).cpu()
    captioner, alone = (Captioner(model, compiled=config.compile) for _ in range(2))  # batches would drop the graphs of one
    # copies, so that each member reads weights of its own
    three = [alone, *(Captioner(copy.deepcopy(model), compiled=config.compile) for _ in range(2))]
    ensemble = Ensemble(three, rule=config.ensemble_rule)
    device = model.logit_scale.device
    memory = torch.ones(2**20 if tiny else 2**27, device=device)  # 512 MiB: more than any cache holds
    forced = dict(max_length=length, suppress=[model.end_id])
    encode = torch.inference_mode()(lambda images: captioner.embed(model.preprocess(images)))
    with torch.inference_mode():
        encode_one = Graph(alone.embed, model.preprocess(one)) if alone.fixed else encode
    variants = {
        "plain": Variant(lambda: _plain_greedy(model, one, length)),
        "single": Variant(lambda: decode.greedy(alone, one, **forced)),
        "batched_greedy": Variant(lambda: decode.greedy(captioner, many, **forced), batch),
        "batched_beam5": Variant(lambda: decode.beam_search(captioner, many, 5, **forced), batch),
        "generate": Variant(lambda: _generate(model, one, length)),
        "generate_batched": Variant(lambda: _generate(model, many, length), batch),
        "generate_beam5": Variant(lambda: _generate(model, many, length, 5), batch),
        "ensemble3": Variant(lambda: decode.greedy(ensemble, one, **forced)),
        "encoder": Variant(lambda: encode_one(one)), "batched_encoder": Variant(lambda: encode(many), batch),
        "bandwidth": Variant(memory.sum, memory.nbytes)}
    if optimisation.pick_precision("auto") == "bf16":
        half, half_alone = (Captioner(model, "bf16", compiled=config.compile) for _ in range(2))
        variants |= {"single_bf16": Variant(lambda: decode.greedy(half_alone, one, **forced)),
                     "batched_greedy_bf16": Variant(lambda: decode.greedy(half, many, **forced), batch),
                     "batched_beam5_bf16": Variant(lambda: decode.beam_search(half, many, 5, **forced), batch)}
    else:
        report("  without bf16: this hardware does not compute in it")
    seconds = measure(variants, tiny, report)
    a_byte = seconds.pop("bandwidth")
    weights = sum(p.nbytes for p in [*model.gpt.transformer.h.parameters(), model.gpt.lm_head.weight])
    position = 2 * config.model.layers * config.model.width * model.logit_scale.element_size()  # of keys and values
    cached = sum(position * (model.prefix_length + written) for written in range(1, length + 1))
    seconds["bound"] = seconds["encoder"] + (length * weights + cached) * a_byte
    rows: Rows = {name: (1000 * value, "ms an image") for name, value in seconds.items()}
    return rows | {"bandwidth": (1e-9 / a_byte, "GB/s")}


@torch.no_grad()
def _plain_greedy(model: ClipCap, images: Tensor, length: int) -> list[Tensor]:
    """Greedy decoding that runs over everything again for every token -> `length` times (N,)."""
    embedded, tokens = model.begin(model.preprocess(images)), []
    for _ in range(length):
        logits = model.gpt(inputs_embeds=embedded, use_cache=False).logits[:, -1]
        logits[:, model.end_id] = float("-inf")
        tokens.append(logits.argmax(dim=-1))
        embedded = torch.cat([embedded, model.gpt.transformer.wte(tokens[-1])[:, None]], dim=1)
    return tokens


@torch.inference_mode()
def _generate(model: ClipCap, images: Tensor, length: int, beam_size: int = 1) -> Tensor:
    """transformers' own decoding -> (N, length)."""
    embedded = model.begin(model.preprocess(images))
    return model.gpt.generate(inputs_embeds=embedded, attention_mask=torch.ones_like(embedded[..., 0], dtype=torch.long),
                              max_new_tokens=length, do_sample=False, use_cache=True, suppress_tokens=[model.end_id],
                              pad_token_id=model.pad_id, num_beams=beam_size)
