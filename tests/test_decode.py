"""Greedy and beam search against transformers' `generate` on the same weights, token for token."""

import copy
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from clipcap_lib import captioner as captioner_module
from clipcap_lib import decode, gpt
from clipcap_lib.captioner import Captioner
from clipcap_lib.config import InputError, ModelConfig
from clipcap_lib.data import pad
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.gpt import Cache, FastGPT, packs
from clipcap_lib.losses import caption_loss
from clipcap_lib.model import ClipCap
from clipcap_lib.tokenizer import build_tokenizer, build_vocabulary

MAX_LENGTH = 12
CHARACTERS = "一二三四五六七八九十百千万天地人山水火木土金日月"


def patches(count: int, seed: int = 1) -> torch.Tensor:
    """Coarse random patches: an untrained encoder tells these apart, unlike white noise."""
    corners = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(corners, size=32, mode="bilinear") * 255).to(torch.uint8)


def random_model(seed: int = 0, **shapes) -> ClipCap:
    """Random weights with a deviation at which captions differ: GPT-2's 0.02 repeats one token and proves nothing."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(build_vocabulary([CHARACTERS]))
    config = ModelConfig(**{"encoder": "resnet10t", "image_size": 32, "image_tokens": "grid", "vocab_size": len(tokenizer),
                            "layers": 2, "width": 64, "heads": 4, "context": 20, "initializer_range": 0.4, **shapes})
    model = ClipCap(config, tokenizer).double().eval()
    with torch.no_grad():  # prefixes of different images must differ: take out what they have in common
        for head in (model.image_head, model.grid_head):
            if head is not None:
                head.project.weight.mul_(100)
                head.norm.weight.mul_(3)
    return model


def trained_model() -> ClipCap:
    """A captioner that was taught a few hundred captions for a few seconds: its next tokens are decided, not noise."""
    model = random_model(1, dropout=0.0, initializer_range=0.1).float().train()
    random, pixels = np.random.default_rng(0), patches(256, seed=2)
    captions = [[model.start_id, *random.choice(np.arange(4, 28), size=random.integers(5, 10), replace=False), model.end_id]
                for _ in range(len(pixels))]
    ids = pad([[int(token) for token in row] for row in captions], model.pad_id)
    with torch.no_grad():
        prefix = model.eval().prefix(pixels)
    optimizer = torch.optim.AdamW(model.train().gpt.parameters(), lr=3e-3)
    for step in range(120):
        chosen = torch.arange(64) + 64 * (step % 4)
        caption_loss(model.caption_logits(prefix[chosen], ids[chosen, :-1]), ids[chosen, 1:], model.pad_id).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.double().eval()


def encoding_once(model: ClipCap) -> ClipCap:
    """The model; it encodes a batch of images the first time only, since these tests ask what comes after."""
    begin, known = model.begin, {}

    def remembered(pixels: torch.Tensor) -> torch.Tensor:
        if id(pixels) not in known:
            known[id(pixels)] = pixels, begin(pixels)  # the pixels too: another tensor must not get their address
        return known[id(pixels)][1]

    model.begin = remembered
    return model


def is_telling(model: ClipCap) -> bool:
    """Whether captions differ, hold several characters and end at different places: else they would prove little."""
    for options in ({}, {"beam_size": 5}):
        found = [best[0] for best in tokens_of(model, patches(64, seed=2), **options)]
        if np.mean([len(set(tokens)) for tokens in found]) < 5.4 or len({len(tokens) for tokens in found}) < 3:
            return False
    return True


@pytest.fixture(scope="module")
def model() -> ClipCap:
    """Of random models, which are as they come, the first that is telling: here number 21, elsewhere a later one maybe."""
    return encoding_once(next(model for model in map(random_model, range(21, 60)) if is_telling(model)))


@pytest.fixture(scope="module", params=["random", "trained"])
def either(request, model) -> ClipCap:
    return model if request.param == "random" else encoding_once(trained_model())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return patches(48)


@pytest.fixture(scope="module")
def many() -> torch.Tensor:
    return patches(200, seed=2)


def reference(model: ClipCap, images: torch.Tensor, **options) -> list[tuple[int, ...]]:
    """transformers' own decoding from the same prefix."""
    embedded = model.begin(images)
    found = model.gpt.generate(inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2]),
                               max_new_tokens=MAX_LENGTH, do_sample=False, pad_token_id=0, **options)
    return [decode._strip(row, model.end_id) for row in found.tolist()]


def tokens_of(stepper, images, **options) -> list[list[tuple[int, ...]]]:
    """The tokens of every image's hypotheses."""
    chosen = decode.Options(**{"max_length": MAX_LENGTH, **options})
    return [[one.tokens for one in found] for found in decode.search(stepper, images, chosen)]


def test_greedy_equals_generate(either, many):
    found = [hypothesis.tokens for hypothesis in decode.greedy(either, many, MAX_LENGTH)]
    assert found == reference(either, many)
    assert len(set(found)) > 20, "images must lead to different captions for this test to mean something"
    assert len({len(tokens) for tokens in found}) > 2, "captions must end at different places"
    assert np.mean([len(set(tokens)) for tokens in found]) >= 5, "captions must not repeat a token or two"


@pytest.mark.parametrize("beam_size", [1, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.2])
def test_beam_search_equals_generate(either, many, beam_size, length_penalty):
    shortest = 0 if length_penalty else 6  # without a penalty the shortest captions win
    found = tokens_of(either, many, beam_size=beam_size, length_penalty=length_penalty, min_length=shortest)
    expected = reference(either, many, min_new_tokens=shortest, **({} if beam_size == 1 else {  # with one beam it is greedy
        "num_beams": beam_size, "length_penalty": length_penalty, "early_stopping": False}))
    assert [best[0] for best in found] == expected
    assert np.mean([len(set(tokens)) for tokens in expected]) >= 5 and len({len(tokens) for tokens in expected}) > 2


@pytest.mark.parametrize("options, theirs", [
    ({"early_stopping": True}, {"early_stopping": True}),
    ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
    ({"min_length": 9}, {"min_new_tokens": 9}),
    ({"min_length": 4, "no_repeat_ngram": 3, "early_stopping": True},
     {"min_new_tokens": 4, "no_repeat_ngram_size": 3, "early_stopping": True}),
])
def test_limits_of_length_and_repetition_equal_those_of_generate(model, images, options, theirs):
    found = tokens_of(model, images, beam_size=3, **options)
    assert [best[0] for best in found] == reference(model, images, num_beams=3, **theirs)
    if "early_stopping" not in theirs:
        assert [best[0] for best in tokens_of(model, images, **options)] == reference(model, images, **theirs)
    if options.keys() != {"early_stopping"}:
        assert found != tokens_of(model, images, beam_size=3), "the option must change something"
    assert all(len(best[0]) >= options.get("min_length", 0) for best in found)


def test_n_best_are_those_of_generate_with_their_scores(model, images):
    found = decode.search(model, images, decode.Options(beam_size=4, n_best=4, max_length=MAX_LENGTH, length_penalty=1.2))
    embedded = model.begin(images)
    theirs = model.gpt.generate(
        inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2]), max_new_tokens=MAX_LENGTH, num_beams=4,
        do_sample=False, num_return_sequences=4, length_penalty=1.2, pad_token_id=0, output_scores=True,
        return_dict_in_generate=True)
    flat = [one for image in found for one in image]
    assert [one.tokens for one in flat] == [decode._strip(row, model.end_id) for row in theirs.sequences.tolist()]
    np.testing.assert_allclose([one.score for one in flat], theirs.sequences_scores.numpy(), atol=1e-6)


def test_hypotheses_come_best_first(model, images):
    for found in decode.beam_search(model, images, 4, MAX_LENGTH):
        scores = [hypothesis.score for hypothesis in found]
        assert scores == sorted(scores, reverse=True)


STRATEGIES = {
    "greedy": {}, "beam": {"beam_size": 3, "n_best": 3},
    "sampling": {"temperature": 1.2, "top_k": 6, "top_p": 0.9, "n_best": 2},
    "diverse": {"beam_size": 4, "groups": 2, "diversity": 1.0, "n_best": 4},
    "limits": {"beam_size": 3, "min_length": 3, "no_repeat_ngram": 2, "length_penalty": 1.3, "early_stopping": True}}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_equals_one_by_one(model, images, strategy):
    options = decode.Options(max_length=MAX_LENGTH, **STRATEGIES[strategy])
    together = decode.search(model, images, options, range(7, 7 + len(images)))
    alone = [decode.search(model, image[None], options, [number])[0] for number, image in enumerate(images, 7)]
    assert [[h.tokens for h in found] for found in together] == [[h.tokens for h in found] for found in alone]
    assert len({len(found[0].tokens) for found in together}) > 1, "ragged ends"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_asking_seldom_what_has_ended_changes_no_result(model, images, strategy, monkeypatch):
    options = decode.Options(max_length=MAX_LENGTH, **STRATEGIES[strategy])
    expected = decode.search(model, images, options)
    asked = []
    monkeypatch.setattr(decode, "_looks", lambda length, device: asked.append(length) or length % decode.LOOK == 0)
    found = decode.search(model, images, options)
    assert [[h.tokens for h in row] for row in found] == [[h.tokens for h in row] for row in expected]
    scores, wanted = ([h.score for row in rows for h in row] for rows in (found, expected))
    np.testing.assert_allclose(scores, wanted, rtol=1e-12)
    assert asked and min(len(h.tokens) for row in found for h in row) < decode.LOOK, "some have ended before it is asked"


class Uncached:
    """A Stepper that runs the training call over everything again for every token."""

    def __init__(self, model: ClipCap):
        self.model, self.start_id, self.end_id, self.pad_id = model, model.start_id, model.end_id, model.pad_id

    def start(self, images):
        state = {"prefix": self.model.prefix(images), "ids": torch.full((len(images), 1), self.start_id)}
        return state, self.model.caption_logits(state["prefix"], state["ids"])[:, -1]

    def step(self, state, tokens):
        state["ids"] = torch.cat([state["ids"], tokens[:, None]], dim=1)
        return self.model.caption_logits(state["prefix"], state["ids"])[:, -1]

    def reorder(self, state, rows):
        state.update({name: value[rows] for name, value in state.items()})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cached_equals_uncached_for_one_model_and_an_ensemble(model, images, strategy):
    options = STRATEGIES[strategy]
    assert tokens_of(model, images, **options) == tokens_of(Uncached(model), images, **options)
    pair = [model, random_model(3, layers=1, width=48, image_tokens="pooled")]
    plain = Ensemble(pair, [0.6, 0.4])
    plain.members = [Uncached(member) for member in pair]
    assert tokens_of(Ensemble(pair, [0.6, 0.4]), images, **options) == tokens_of(plain, images, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fixed_cache_never_moves_and_gives_the_same(model, images, strategy):
    fixed, addresses = Captioner(model, fixed=True), set()
    tokens_of(fixed, images[:1].expand(48, -1, -1, -1), beam_size=6)  # the largest batch to come
    kept = fixed.cache.memory.data_ptr()
    run = fixed.run

    def watched(memory, position, tokens):
        addresses.add(memory.data_ptr())
        return run(memory, position, tokens)

    fixed.run = watched
    assert tokens_of(fixed, images, **STRATEGIES[strategy]) == tokens_of(model, images, **STRATEGIES[strategy])
    assert addresses == {kept}


def test_the_fixed_step_compiles_without_a_break(model, images):
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler on PATH, which torch.compile needs on a CPU")
    torch._dynamo.reset()
    compiled = Captioner(model, fixed=True)
    compiled.run = torch.compile(compiled.run, fullgraph=True)
    with torch._inductor.config.patch(compile_threads=1):  # or a pool of processes starts, each importing torch
        assert tokens_of(compiled, images[:4], beam_size=3) == tokens_of(model, images[:4], beam_size=3)


def test_rows_of_a_fixed_cache_move_in_place_and_may_repeat(model):
    embedded, gpt = torch.randn(6, 5, model.config.width, dtype=torch.float64), FastGPT(model.gpt)
    for rows in ([5, 0, 0, 3, 4, 1], [2, 2], [0, 0, 1, 1, 2, 2, 5, 5]):
        cache, _ = gpt.begin(embedded, Cache(gpt, 6))
        before, address = cache.memory.clone(), cache.memory.data_ptr()
        cache.reorder(torch.tensor(rows))
        torch.testing.assert_close(cache.memory[:, :, :len(rows), :5], before[:, :, rows, :5], rtol=0, atol=0)
        assert (cache.memory.data_ptr() == address) == (len(rows) <= 6)


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_share_memory_are_what_they_would_be_alone(model, images, seed, monkeypatch):
    monkeypatch.setattr("clipcap_lib.gpt.ROOM", 2)
    monkeypatch.setattr("clipcap_lib.gpt.SHARE", 6)
    random, plain, shared = np.random.default_rng(seed), Uncached(model), set()
    (cache, _), (expected, _) = model.start(images[:5]), plain.start(images[:5])
    rows = np.arange(5)  # the image of each row
    for step in range(12):
        tokens = torch.from_numpy(random.integers(4, 28, len(rows)))
        torch.testing.assert_close(model.step(cache, tokens), plain.step(expected, tokens))
        kept = np.unique(rows) if random.random() < 0.7 else np.unique(rows)[::-1]
        kept = kept[random.random(len(kept)) < 0.9] if len(kept) > 2 else kept  # images that leave
        count = int(random.integers(1, 6 if step < 10 else 9))  # at last more than may share
        order = np.concatenate([random.choice(np.flatnonzero(rows == image), count) for image in kept])
        if random.random() < 0.25:  # any rows, as many of an image as it happens
            order = random.permutation(order)[:random.integers(1, len(order) + 1)]
        model.reorder(cache, torch.from_numpy(order.copy()))
        plain.reorder(expected, torch.from_numpy(order.copy()))
        rows = rows[order]
        shared.add(cache.together)
    assert {1} < shared <= set(range(1, 7))


def test_beams_of_an_image_share_its_memory_and_nothing_moves(model, images, monkeypatch):
    begun, steps, taken = model.prefix_length + 1, 4, []
    cache, _ = model.start(images[:3])
    cache.reorder(torch.arange(3).repeat_interleave(5))
    for step in range(steps):
        model.step(cache, torch.arange(4, 19))
        written, address = cache.memory[:, :, :, :cache.written].clone(), cache.memory.data_ptr()
        cache.reorder((torch.arange(3)[:, None] * 5 + torch.tensor([4, 4, 0, 2, 1])).flatten())
        assert cache.written == begun + 5 * (step + 1) and cache.memory.data_ptr() == address
        torch.testing.assert_close(cache.memory[:, :, :, :cache.written], written, rtol=0, atol=0)
    monkeypatch.setattr(Cache, "_move", lambda self, lines: taken.append(lines.tolist()))
    decode.beam_search(model, images[:3], 5, MAX_LENGTH, suppress=[model.end_id])
    assert taken == [[0, 1, 2]] * MAX_LENGTH  # each line stays where it is


def test_lines_that_have_left_do_not_grow(model, images, monkeypatch):
    monkeypatch.setattr("clipcap_lib.gpt.ROOM", 2)
    cache, _ = model.start(images[:8])
    model.reorder(cache, torch.arange(8).repeat_interleave(3))
    model.reorder(cache, torch.tensor([15, 16, 17]))
    for _ in range(5):
        model.step(cache, torch.tensor([4, 5, 6]))
    assert cache.memory.shape[2:4] == (1, model.prefix_length + 1 + 3 * 6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_has_ended_leaves_the_batch(model, images, strategy, monkeypatch):
    options, rows = decode.Options(max_length=MAX_LENGTH, **STRATEGIES[strategy] | {"early_stopping": True}), []
    step = model.step
    monkeypatch.setattr(model, "step", lambda state, tokens: rows.append(len(tokens)) or step(state, tokens), raising=False)
    found, left = decode.search(model, images, options), list(rows)
    rows.clear()
    monkeypatch.setattr(decode, "LEAVE", 1)  # only all at once
    expected = decode.search(model, images, options)
    assert [[h.tokens for h in row] for row in found] == [[h.tokens for h in row] for row in expected]
    assert len(set(rows)) == 1 and left[0] == rows[0] and left[-1] < rows[-1] and left == sorted(left, reverse=True)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_a_cache_grows_with_what_is_written_and_gives_the_same(model, images, strategy, monkeypatch):
    expected = tokens_of(model, images, **STRATEGIES[strategy])
    monkeypatch.setattr("clipcap_lib.gpt.ROOM", 3)
    assert tokens_of(model, images, **STRATEGIES[strategy]) == expected
    cache, _ = model.start(images)
    begun = model.prefix_length + 1
    for step in range(5):
        model.step(cache, torch.full((len(images),), 4))
        assert (cache.length, cache.memory.shape[3]) == (begun + step + 1, begun + (3 if step < 3 else 6))


def test_a_step_of_ours_is_a_step_of_transformers(model):
    embedded = torch.randn(3, 5, model.config.width, dtype=torch.float64)
    cache, logits = FastGPT(model.gpt).begin(embedded)
    theirs = model.gpt(inputs_embeds=embedded, use_cache=True)
    torch.testing.assert_close(logits, theirs.logits[:, -1])
    cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))  # whatever a cache was used for before
    cache, logits = cache.gpt.begin(embedded, cache)
    torch.testing.assert_close(logits, theirs.logits[:, -1])
    for token in (4, 7, 5):
        tokens = torch.full((3,), token)
        theirs = model.gpt(input_ids=tokens[:, None], past_key_values=theirs.past_key_values, use_cache=True)
        torch.testing.assert_close(cache.gpt.step(cache, tokens), theirs.logits[:, -1])


@pytest.mark.parametrize("encoder, options", [
    ("resnet10t", {}), ("res2next50", {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "output_stride": 16}),
    ("vit_tiny_patch16_224", {"img_size": 32})])
def test_norms_become_part_of_the_convolutions_and_the_model_stays_as_it_is(encoder, options, monkeypatch):
    model = random_model(encoder=encoder, encoder_options=options, image_tokens="pooled")
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for norm in norms:  # as after training
        for values in (norm.running_mean, norm.weight.data, norm.bias.data):
            values.normal_()
        norm.running_var.uniform_(0.5, 2)
    images = patches(5)
    expected = model.begin(images)
    folded = Captioner(model).encoder
    torch.testing.assert_close(folded.begin(images), expected)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules()) and torch.equal(
        model.begin(images), expected) and len(norms) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    rounded, fold = [], captioner_module._norms_folded
    monkeypatch.setattr(captioner_module, "_norms_folded",
                        lambda *arguments: rounded.append(torch.is_autocast_enabled("cpu")) or fold(*arguments))
    half = Captioner(copy.deepcopy(model).float(), "bf16")
    half.embed(images)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in half.encoder.modules())
    assert rounded == [False], "whether folding changes anything is not asked in bf16, whose rounding changes more"


def test_a_norm_that_is_not_right_behind_its_convolution_stays():
    model = random_model(image_tokens="pooled")
    backbone = model.image_encoder.backbone
    backbone.bn1.running_mean.fill_(-3.0)
    backbone.conv1.register_forward_hook(lambda layer, inputs, output: output.relu_())  # the same tensor, changed
    images = patches(5)
    expected = model.begin(images)
    encoder = Captioner(model).encoder
    torch.testing.assert_close(encoder.begin(images), expected)
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in encoder.modules())


def test_bf16_is_near_and_leaves_the_model_as_it_is(model, images):
    single = random_model().float()
    before = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    logits, expected = Captioner(single, "bf16").start(images)[1], single.start(images)[1]
    assert logits.dtype == torch.float32 and (logits - expected).abs().max() < 0.25 * expected.abs().max()
    assert all(tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
               for name, tensor in single.state_dict().items())
    with pytest.raises(InputError, match="unknown precision 'int3'"):
        Captioner(single, "int3")


@pytest.mark.parametrize("encoder, options, size, exact", [
    ("res2next50", {"stem_type": "deep"}, 32, ["conv1.0", "conv1.3", "conv1.6"]), ("convnext_atto", {}, 32, ["stem.0"]),
    ("vit_tiny_patch16_224", {"img_size": 32}, 32, ["patch_embed.proj"]), ("densenet121", {}, 32, ["features.conv0"]),
    ("repvgg_a0", {}, 32, ["stem.conv_kxk.conv", "stem.conv_1x1.conv"]), ("hiera_tiny_224", {}, 224, ["patch_embed.proj"])])
@pytest.mark.parametrize("packed", [False, True])
def test_what_reads_the_pixels_stays_exact_in_bf16(encoder, options, size, exact, packed, monkeypatch):
    if packed and not packs(torch.device("cpu"), torch.bfloat16):
        pytest.skip("oneDNN has no products in bf16 for this CPU")
    monkeypatch.setattr("clipcap_lib.captioner.packs", lambda device, dtype: packed)
    model = random_model(encoder=encoder, encoder_options=options, image_size=size, image_tokens="pooled").float()
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = {"fp32": {}, "bf16": {}}
    for precision, found in given.items():
        captioner = Captioner(model, precision)
        for name in exact:
            captioner.encoder.image_encoder.backbone.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, found=found, name=name: found.update({name: output.clone()}))
        captioner.embed(images)
    assert sorted(given["bf16"]) == sorted(exact)
    for name in exact:
        assert given["bf16"][name].dtype == torch.float32
        torch.testing.assert_close(given["bf16"][name], given["fp32"][name], rtol=1e-3, atol=1e-4)
    weights = [one.weight for one in captioner.encoder.image_encoder.modules() if getattr(one, "weight", None) is not None]
    assert sum(weight.dtype == torch.bfloat16 for weight in weights) > 15
    assert sum(weight.dtype == torch.float32 and weight.ndim == 4 for weight in weights) == len(exact)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_encoder_that_timm_says_nothing_of_and_a_model_in_float64_write_in_bf16_too(dtype, packed, monkeypatch):
    if not packed:
        for module in ("gpt", "captioner"):
            monkeypatch.setattr(f"clipcap_lib.{module}.packs", lambda *_: False)
    model = random_model(encoder="res2next50").to(dtype)
    expected = model.start(patches(2))[1]
    for config in (None, {}, {"first_conv": "elsewhere"}, model.image_encoder.backbone.pretrained_cfg):
        model.image_encoder.backbone.pretrained_cfg = config
        found = Captioner(model, "bf16").start(patches(2))[1]
        assert found.dtype == dtype and (found - expected).abs().max() < 0.25 * expected.abs().max()


@pytest.mark.skipif(not packs(torch.device("cpu"), torch.bfloat16), reason="oneDNN has no products in bf16 for this CPU")
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_weights_give_what_plain_ones_give(rows, monkeypatch):
    model, images = random_model(encoder="res2next50", image_tokens="pooled", width=64).float(), patches(rows)
    packed = Captioner(model, "bf16")
    embedded = packed.embed(images)
    monkeypatch.setattr("clipcap_lib.gpt.packs", lambda *_: False)
    monkeypatch.setattr("clipcap_lib.captioner.packs", lambda *_: False)
    plain = Captioner(model, "bf16")
    assert all(weight.is_mkldnn for block in packed.gpt.blocks for _, weight, _ in block[2:])
    assert not any(isinstance(layer, torch.nn.Conv2d) for layer in packed.encoder.image_encoder.modules())
    torch.testing.assert_close(embedded, plain.embed(images), rtol=0, atol=0.02)
    for number in (1, rows + 1):  # laid out once for one image and once for a batch
        torch.testing.assert_close(packed.embed(patches(number)), plain.embed(patches(number)), rtol=0, atol=0.02)
    states = {one: one.start_from(embedded) for one in (packed, plain)}
    tokens = torch.arange(rows) % 20 + 4
    for one, (state, logits) in states.items():
        states[one] = logits, one.step(state, tokens)
    for ours, theirs in zip(states[packed], states[plain], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * theirs.abs().max().item())
    # a step of fixed shapes is there to be compiled, which such weights cannot be
    monkeypatch.undo()
    assert not any(weight.is_mkldnn for block in Captioner(model, "bf16", fixed=True).gpt.blocks for _, weight in block[2:])


@pytest.mark.skipif(not packs(torch.device("cpu"), torch.bfloat16), reason="oneDNN has no products in bf16 for this CPU")
def test_one_row_in_bf16_goes_past_onednn_and_leaves_it_as_it_was(monkeypatch):
    packed = Captioner(random_model(image_tokens="pooled", width=64).float(), "bf16")
    layer, linear, asked, products = packed.gpt._layer, F.linear, [], []
    monkeypatch.setattr(packed.gpt, "_layer", lambda *given: asked.append(torch.backends.mkldnn.enabled) or layer(*given))
    monkeypatch.setattr(F, "linear", lambda hidden, *rest: products.append(hidden.dtype) or linear(hidden, *rest))
    for rows, enabled in ((1, False), (2, True)):
        state, _ = packed.start(patches(rows))
        asked.clear()
        products.clear()
        packed.step(state, torch.full((rows,), 5))
        assert set(asked) == {enabled} and torch.backends.mkldnn.enabled
        assert products.count(torch.bfloat16) == (0 if enabled else 4 * len(packed.gpt.blocks))
    begun = packed.start(patches(1))[0]
    torch.backends.mkldnn.enabled = False
    try:
        packed.step(begun, torch.tensor([5]))
        assert not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.enabled = True
    monkeypatch.setattr(packed.gpt, "_layer", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed.step(begun, torch.tensor([5]))
    assert torch.backends.mkldnn.enabled
    asked.clear()
    monkeypatch.setattr(packed.gpt, "_layer", lambda *given: asked.append(torch.backends.mkldnn.enabled) or layer(*given))
    monkeypatch.setattr(torch.backends, "flags_frozen", lambda: True)  # then it cannot be switched
    packed.step(begun, torch.tensor([5]))
    assert set(asked) == {True}


def test_onednn_is_back_when_the_last_of_several_threads_is_out():
    first, second = [threading.Event() for _ in range(2)]

    def another() -> None:
        with gpt._PRODUCTS_OF_PYTORCH:
            first.set()
            second.wait(10)

    thread = threading.Thread(target=another)
    with gpt._PRODUCTS_OF_PYTORCH:
        thread.start()
        first.wait(10)
        assert not torch.backends.mkldnn.enabled
    assert not torch.backends.mkldnn.enabled  # the other is still within
    second.set()
    thread.join()
    assert torch.backends.mkldnn.enabled


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("rows", [1, 40])
def test_packed_weights_of_fp32_give_what_plain_ones_give(rows, monkeypatch):
    model, images = random_model(encoder="res2next50", image_tokens="pooled", width=64).float(), patches(rows)
    for module in ("gpt", "captioner"):
        monkeypatch.setattr(f"clipcap_lib.{module}.packs", lambda device, dtype: dtype is torch.float32)
    narrow, plain = Captioner(model), Captioner(model, pack=False)
    monkeypatch.setattr("clipcap_lib.gpt.WIDE", 64)
    packed = Captioner(model)
    weights = [weight for block in packed.gpt.blocks for _, weight in block[2:]]
    assert packed.gpt.packed and all(weight.is_mkldnn for weight in [*weights, packed.gpt.last])
    assert not narrow.gpt.packed and narrow.gpt.last.is_mkldnn  # a call of a small product costs more than it saves
    own = model.gpt.transformer.h[0].attn.c_attn.weight
    assert plain.gpt.last is None and plain.gpt.blocks[0][2][1].data_ptr() == own.data_ptr()
    tokens, expected = torch.arange(rows) % 20 + 4, []
    for one in (plain, narrow, packed):
        state, logits = one.start(images)
        found = [logits, one.step(state, tokens)]
        expected = expected or found
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected[0].abs().max().item())
    fixed = Captioner(model, fixed=True).gpt
    assert not fixed.packed and fixed.last is None
    assert torch.equal(copy.deepcopy(packed).embed(images), packed.embed(images))
    assert not any(isinstance(layer, torch.nn.Conv2d) for layer in packed.encoder.image_encoder.modules())
    monkeypatch.setattr("clipcap_lib.captioner.packs", lambda *_: False)
    for count in (rows, 1, rows + 1):  # laid out once for one image and once for a batch
        found, expected = packed.embed(patches(count)), Captioner(model).embed(patches(count))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_how_convolutions_are_packed_does_not_depend_on_what_came_before(monkeypatch):
    model, pack, sizes = random_model(encoder="res2next50").float(), torch.ops.mkldnn._reorder_convolution_weight, []
    monkeypatch.setattr("clipcap_lib.captioner.packs", lambda device, dtype: dtype is torch.float32)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight",
                        lambda weight, *given: sizes.append(given[-1][0]) or pack(weight, *given))
    for counts in ((1, 2, 40), (5, 1)):
        captioner = Captioner(model)
        for count in counts:
            captioner.embed(patches(count))
        assert sizes and sorted(sizes) == sorted([1, 32] * (len(sizes) // 2))  # not the 2 or 5 of a run that goes on
        sizes.clear()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_weights_are_packed_where_products_are_slow_without(monkeypatch):
    def told(name, mkl=True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        return packs(torch.device("cpu"), torch.float32)

    assert told("AMD EPYC") and not told("Intel(R) Xeon(R) Processor")
    assert not told("AMD EPYC", mkl=False) and not told("Neoverse-V1") and not told("Common KVM processor")
    assert not packs(torch.device("cpu"), torch.float64) and not packs(torch.device("cuda"), torch.float32)


def transcribed_diverse_search(model: ClipCap, image: torch.Tensor, groups: int, size: int, penalty: float, top: int):
    """Vijayakumar et al. (2016), equation for one group after the other, in plain Python for one image.

    A partial hypothesis y of group g is ranked at time t by Theta(y_[t]) + lambda * Delta(Y_[t]^1, .., Y_[t]^(g-1))[y_t]:
    its log-probability, minus lambda for each beam of earlier groups whose token at this time is y's. The end token ends a
    hypothesis and is no word to avoid; finished ones are kept as `generate` keeps them.
    """
    prefix = model.prefix(image)

    def log_probabilities(tokens):
        ids = torch.tensor([[model.start_id, *tokens]])
        return torch.log_softmax(model.caption_logits(prefix, ids)[0, -1], dim=-1).tolist()

    opened = [[((), 0.0)] for _ in range(groups)]
    finished = [[] for _ in range(groups)]
    closed = [False] * groups
    for time in range(1, MAX_LENGTH + 1):
        said = []  # tokens that beams of earlier groups take at this time
        for g in range(groups):
            candidates = []
            for tokens, theta in opened[g]:
                for token, value in enumerate(log_probabilities(tokens)):
                    delta = -sum(other == token for other in said)
                    candidates.append((theta + value + penalty * delta, theta + value, (*tokens, token)))
            candidates.sort(key=lambda one: -one[0])
            ends = [one[2][-1] == model.end_id for one in candidates]
            if not closed[g]:
                for (_, theta, tokens), end in list(zip(candidates, ends, strict=True))[:size]:
                    if end or time == MAX_LENGTH:
                        finished[g].append((theta / time, tokens))
                finished[g] = sorted(finished[g], key=lambda one: -one[0])[:size]
            opened[g] = [(tokens, theta) for (_, theta, tokens), end in zip(candidates, ends, strict=True) if not end][:size]
            if not closed[g]:
                said += [tokens[-1] for tokens, _ in opened[g]]
            if opened[g] and len(finished[g]) == size:
                closed[g] = closed[g] or not max(theta for _, theta in opened[g]) / time > finished[g][-1][0]
        if all(closed):
            break
    kept = sorted((one for group in finished for one in group), key=lambda one: -one[0])  # a caption of two groups once
    return list(dict.fromkeys(decode._strip(tokens, model.end_id) for _, tokens in kept))[:top]


@pytest.mark.parametrize("groups, penalty", [(2, 0.5), (3, 2.0), (6, 1.0)])
def test_diverse_beams_follow_the_papers_formula(model, images, groups, penalty):
    found = tokens_of(model, images[:6], beam_size=6, groups=groups, diversity=penalty, n_best=6)
    with torch.inference_mode():
        expected = [transcribed_diverse_search(model, image[None], groups, 6 // groups, penalty, 6) for image in images[:6]]
    assert found == expected
    assert found != tokens_of(model, images[:6], beam_size=6, n_best=6)


def test_groups_without_diversity_find_the_same_and_with_it_more(model, images):
    same = tokens_of(model, images, beam_size=4, groups=2, diversity=0.0, n_best=4)
    apart = tokens_of(model, images, beam_size=4, groups=2, diversity=3.0, n_best=4)
    assert all(len(found) == len(set(found)) for found in same + apart), "each caption once"
    assert all(len(found) <= 2 for found in same), "both groups find the same two"
    assert sum(map(len, apart)) > sum(map(len, same))


def test_beams_that_are_not_there_are_no_captions(model, images):
    """At the first token a vocabulary of 28 has 28 hypotheses, however many beams are asked for."""
    for options in ({}, {"length_penalty": 0.0}, {"early_stopping": True}, {"groups": 2, "diversity": 0.0}):
        found = decode.search(model, images[:4], decode.Options(40, 1, n_best=40, **options))
        assert [len({one.tokens for one in image}) for image in found] == [len(image) for image in found]
        assert all(20 <= len(image) <= 28 and min(one.score for one in image) > -1000 for image in found)


def test_the_lowest_temperature_draws_what_is_most_probable(model, images):
    lowest = tokens_of(model, images, max_length=MAX_LENGTH, temperature=1e-310)
    assert lowest == tokens_of(model, images, max_length=MAX_LENGTH)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8}])
def test_samples_fall_as_transformers_distribution_says(options):
    """Evenly spaced numbers fall on each token as often as it is probable, after temperature, top-k and nucleus."""
    torch.manual_seed(0)
    logits = torch.randn(1, 12, dtype=torch.float64) * 2
    chosen = decode.Options(temperature=0.7, **options)
    numbers = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = decode._draw(logits.log_softmax(-1).expand(len(numbers), -1), numbers, chosen)
    scores = TemperatureLogitsWarper(0.7)(None, logits)
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    share = torch.bincount(drawn, minlength=12) / len(numbers)
    torch.testing.assert_close(share.double(), scores.softmax(-1)[0], atol=1e-4, rtol=0)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)  # the least and the greatest number there are
    assert (scores[0, decode._draw(logits.log_softmax(-1).expand(2, -1), ends, chosen)] > -1e9).all()


def test_samples_depend_on_seed_and_image_alone(model, images):
    options = {"temperature": 1.5, "n_best": 3}
    once, again, other = (tokens_of(model, images, seed=seed, **options) for seed in (5, 5, 6))
    assert once == again and once != other
    assert any(len(set(found)) > 1 for found in once), "samples of one image differ"
    for temperature in (1e-4, 1e-300):
        assert tokens_of(model, images, temperature=temperature) == tokens_of(model, images)


def test_each_image_has_samples_of_its_own_whatever_batch_it_is_in(model, images):
    twins = [found[0] for found in tokens_of(model, images[:1].repeat(8, 1, 1, 1), temperature=1.5)]
    assert len(set(twins)) > 4, "the same image, at eight places"
    photos = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:7]]
    by_two, by_five = (model.caption(photos, max_length=MAX_LENGTH, batch_size=size, temperature=1.5) for size in (2, 5))
    assert by_two == by_five and len(set(by_two)) > 4


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "n_best": 2}])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.3])
def test_scores_of_rows_are_summed_log_probabilities_over_a_power_of_their_length(model, images, options, penalty):
    chosen = decode.Options(max_length=MAX_LENGTH, length_penalty=penalty, **options)
    lengths = set()
    for image, hypotheses in zip(images[:6], decode.search(model, images[:6], chosen), strict=True):
        for one in hypotheses:
            targets = [*one.tokens, model.end_id][:MAX_LENGTH]
            with torch.inference_mode():
                ids = torch.tensor([[model.start_id, *targets[:-1]]])
                values = model.caption_logits(model.prefix(image[None]), ids)[0].log_softmax(-1)
            summed = float(values[range(len(targets)), targets].sum())
            assert one.score == pytest.approx(summed / len(targets)**penalty, abs=1e-6)
            lengths.add(len(targets))
    assert len(lengths) > 1


def test_beam_search_and_captions_pass_their_options_on(model, images):
    plain = decode.beam_search(model, images, 3, MAX_LENGTH)
    for options in {"length_penalty": 0.0}, {"early_stopping": True}:
        found = decode.beam_search(model, images, 3, MAX_LENGTH, **options)
        assert found == decode.search(model, images, decode.Options(3, MAX_LENGTH, n_best=3, **options)) != plain

    tokenizer, logits = model.tokenizer, torch.zeros(1, len(model.tokenizer))
    for token, value in {"[UNK]": 9, "[CLS]": 8, "[PAD]": 7, "一": 6, "二": 5}.items():
        logits[0, tokenizer.convert_tokens_to_ids(token)] = value

    class Same:
        start_id, end_id, pad_id = model.start_id, model.end_id, model.pad_id
        start = staticmethod(lambda images: ({}, logits))
        step = staticmethod(lambda state, tokens: logits)

    assert decode.caption(Same(), tokenizer, None, max_length=3) == ["一一一"], "characters only, however improbable"
    one = tokenizer.convert_tokens_to_ids("一")
    assert decode.caption(Same(), tokenizer, None, max_length=3, suppress=(one,)) == ["二二二"]


@pytest.mark.parametrize("options, words", [
    ({"beam_size": 0}, "beam_size must be at least 1"), ({"max_length": 0}, "max_length must be at least 1"),
    ({"min_length": 30}, "min_length must be"), ({"temperature": -1}, "temperature must not be negative"),
    ({"temperature": 1, "beam_size": 2}, "sample or search"), ({"top_p": 0.0, "temperature": 1}, "top_p be in"),
    ({"top_k": 3}, "give a temperature"), ({"beam_size": 4, "groups": 3}, "not divisible into 3 groups"),
    ({"n_best": 2}, "n_best must be from 1 to beam_size 1"), ({"seed": -1}, "seed must not be negative"),
    ({"length_penalty": -4}, "length_penalty must be from -3 to 10"),
    ({"length_penalty": 300}, "length_penalty must be from -3 to 10"),
    ({"length_penalty": float("inf")}, "length_penalty must be finite"),
    ({"temperature": float("nan")}, "temperature must be finite"),
    ({"beam_size": 2, "diversity": float("nan")}, "diversity must be finite"),
    ({"no_repeat_ngram": -1}, "no_repeat_ngram"), ({"beam_size": 2, "diversity": -1}, "diversity must not be negative")])
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        decode.Options(**options)


def test_what_cannot_go_on_ends(model, images):
    """Five characters, none twice: when all are written, nothing is left but the end."""
    never = (0, 1, 2, *range(9, 28))
    for strategy in ({}, {"beam_size": 3}, {"temperature": 1.0}):
        found = tokens_of(model, images[:8], max_length=18, min_length=15, no_repeat_ngram=1, suppress=never, **strategy)
        assert all(sorted(one) == [4, 5, 6, 7, 8] for image in found for one in image)


def test_suppressed_tokens_are_never_written(model, images):
    unwanted = decode.greedy(model, images, MAX_LENGTH)[0].tokens[0]
    assert all(unwanted not in h.tokens for h in decode.greedy(model, images, MAX_LENGTH, suppress=[unwanted]))
    assert all(unwanted not in h.tokens for found in decode.beam_search(model, images, 3, MAX_LENGTH,
                                                                        suppress=[unwanted]) for h in found)


@pytest.mark.parametrize("rule", ["probabilities", "log-probabilities", "logits"])
def test_an_ensemble_of_copies_equals_the_model(model, images, rule):
    copies = Ensemble([model, model, model], [0.5, 0.3, 0.2], rule)
    assert [h.tokens for h in decode.greedy(copies, images, MAX_LENGTH)] == [
        h.tokens for h in decode.greedy(model, images, MAX_LENGTH)]
    assert [f[0].tokens for f in decode.beam_search(copies, images, 3, MAX_LENGTH)] == [
        f[0].tokens for f in decode.beam_search(model, images, 3, MAX_LENGTH)]


def test_the_three_averaging_rules_follow_their_formulas():
    logits = [torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[3.0, 0.0, 0.5]])]

    class Member:
        start_id, end_id, pad_id = 2, 3, 0
        config = ModelConfig(vocab_size=4)

    a, b = (values.softmax(-1) for values in logits)
    for given, (first, second) in ([0.75, 0.25], (0.75, 0.25)), ([3, 1], (0.75, 0.25)), (None, (0.5, 0.5)):
        geometric = a**first * b**second
        expected = {"probabilities": first * a + second * b, "log-probabilities": geometric / geometric.sum(),
                    "logits": (first * logits[0] + second * logits[1]).softmax(-1)}
        for rule, values in expected.items():
            torch.testing.assert_close(Ensemble([Member(), Member()], given, rule)._combine(logits).exp(), values)


def test_a_member_with_weight_zero_does_not_count(model, images):
    torch.manual_seed(5)
    other = ClipCap(model.config).double().eval()
    ensemble = Ensemble([model, other], [1, 0])
    assert [h.tokens for h in decode.greedy(ensemble, images[:4], MAX_LENGTH)] == [
        h.tokens for h in decode.greedy(model, images[:4], MAX_LENGTH)]


@pytest.mark.parametrize("weights, rule, words", [
    ([1.0], "probabilities", "as many weights"),
    ([1.0, -1.0], "probabilities", "negative"),
    ([0.0, 0.0], "probabilities", "not all zero"),
    ([1e308, 1e308], "probabilities", "not immense"),
    ([1.0, 1.0], "median", "unknown ensemble rule"),
])
def test_wrong_ensembles_are_refused(model, weights, rule, words):
    with pytest.raises(InputError, match=words):
        Ensemble([model, model], weights, rule)


def test_members_with_different_vocabularies_are_refused_by_name(model):
    names = ["red", "blue"]
    shapes = {"encoder": "resnet10t", "image_size": 32, "layers": 1, "width": 32, "heads": 4}
    with pytest.raises(InputError, match="blue has a vocabulary of 9 tokens and red one of 28"):
        Ensemble([model, ClipCap(ModelConfig(vocab_size=9, **shapes))], names=names)
    tokenizer = build_tokenizer(build_vocabulary([CHARACTERS.replace("一", "丁")]))
    other = ClipCap(ModelConfig(vocab_size=28, **shapes), tokenizer)
    with pytest.raises(InputError, match="blue does not have the vocabulary of red: token 4 is '丁' there and '一' here"):
        Ensemble([model, other], names=names)
    for kind in ("start_id", "end_id", "pad_id"):
        ids = {"start_id": model.start_id, "end_id": model.end_id, "pad_id": model.pad_id, kind: 9}
        with pytest.raises(InputError, match="blue and red begin, end or pad captions with different tokens"):
            Ensemble([model, SimpleNamespace(config=model.config, tokenizer=model.tokenizer, **ids)], names=names)


def test_members_may_differ_in_encoder_image_size_and_gpt(model):
    other = random_model(4, encoder="resnet18", image_size=64, image_tokens="pooled", layers=1, width=48, heads=2)
    photos = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in patches(5)]
    found = decode.caption(Ensemble([model, other]), model.tokenizer, photos, beam_size=3, max_length=MAX_LENGTH)
    assert len(found) == 5 and found != decode.caption(model, model.tokenizer, photos, beam_size=3, max_length=MAX_LENGTH)


def test_three_lines_caption_an_image(model):
    captions = model.caption([Image.new("RGB", (50, 40), "red"), Image.new("L", (10, 90))], beam_size=3, max_length=8)
    assert len(captions) == 2
    assert all(0 < len(caption) <= 8 and "[" not in caption for caption in captions)
