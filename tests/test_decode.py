"""Greedy and beam search against transformers' `generate` on the same weights, token for token."""

import pytest
import torch
from PIL import Image

from clipcap_lib import decode
from clipcap_lib.config import InputError, ModelConfig
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.model import ClipCap
from clipcap_lib.tokenizer import build_tokenizer, build_vocabulary

MAX_LENGTH = 12


@pytest.fixture(scope="module")
def model() -> ClipCap:
    """Random weights with a deviation at which captions differ: GPT-2's 0.02 repeats one token and proves nothing."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(build_vocabulary(["一二三四五六七八"]))
    config = ModelConfig(encoder="resnet10t", image_size=32, image_tokens="grid", vocab_size=len(tokenizer), layers=2,
                         width=32, heads=4, context=20, initializer_range=0.4)
    model = ClipCap(config, tokenizer).double().eval()
    with torch.no_grad():  # prefixes of different images must differ: take out what they have in common
        for head in (model.image_head, model.grid_head):
            head.project.weight.mul_(100)
            head.norm.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def images(model: ClipCap) -> torch.Tensor:
    """Coarse random patches: an untrained encoder tells these apart, unlike white noise."""
    patches = torch.rand(48, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(patches, size=32, mode="bilinear") * 255).to(torch.uint8)


def reference(model: ClipCap, images: torch.Tensor, **options) -> list[tuple[int, ...]]:
    """transformers' own decoding from the same prefix."""
    prefix = model.prefix(images)
    begin = torch.full((len(images), 1), model.start_id)
    embedded = torch.cat([prefix, model.gpt.transformer.wte(begin)], dim=1)
    found = model.gpt.generate(inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2]),
                               max_new_tokens=MAX_LENGTH, do_sample=False, pad_token_id=0, **options)
    return [decode._strip(row, model.end_id) for row in found.tolist()]


def test_greedy_equals_generate(model, images):
    found = [hypothesis.tokens for hypothesis in decode.greedy(model, images, MAX_LENGTH)]
    assert found == reference(model, images)
    assert len(set(found)) > 10, "images must lead to different captions for this test to mean something"
    assert len({len(tokens) for tokens in found}) > 2, "captions must end at different places"


@pytest.mark.parametrize("beam_size", [1, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.2])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beam_search_equals_generate(model, images, beam_size, length_penalty, early_stopping):
    found = decode.beam_search(model, images, beam_size, MAX_LENGTH, length_penalty, early_stopping)
    if beam_size == 1:  # generate falls back to greedy
        expected = [hypothesis.tokens for hypothesis in decode.greedy(model, images, MAX_LENGTH)]
    else:
        expected = reference(model, images, num_beams=beam_size, length_penalty=length_penalty,
                             early_stopping=early_stopping)
    assert [best[0].tokens for best in found] == expected


def test_hypotheses_come_best_first(model, images):
    for found in decode.beam_search(model, images, 4, MAX_LENGTH):
        scores = [hypothesis.score for hypothesis in found]
        assert scores == sorted(scores, reverse=True)


def test_a_batch_equals_one_by_one(model, images):
    assert [h.tokens for h in decode.greedy(model, images, MAX_LENGTH)] == [
        decode.greedy(model, image[None], MAX_LENGTH)[0].tokens for image in images]
    assert [f[0].tokens for f in decode.beam_search(model, images, 3, MAX_LENGTH)] == [
        decode.beam_search(model, image[None], 3, MAX_LENGTH)[0][0].tokens for image in images]


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
        config = ModelConfig(vocab_size=3)

    def combined(rule):
        return Ensemble([Member(), Member()], [0.75, 0.25], rule)._combine(logits).exp()

    a, b = (values.softmax(-1) for values in logits)
    torch.testing.assert_close(combined("probabilities"), 0.75 * a + 0.25 * b)
    geometric = a**0.75 * b**0.25
    torch.testing.assert_close(combined("log-probabilities"), geometric / geometric.sum())
    torch.testing.assert_close(combined("logits"), (0.75 * logits[0] + 0.25 * logits[1]).softmax(-1))


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
    ([1.0, 1.0], "median", "unknown ensemble rule"),
])
def test_wrong_ensembles_are_refused(model, weights, rule, words):
    with pytest.raises(InputError, match=words):
        Ensemble([model, model], weights, rule)


def test_members_with_different_vocabularies_are_refused(model):
    other = ClipCap(ModelConfig(encoder="resnet10t", image_size=32, vocab_size=9, layers=1, width=32, heads=4))
    with pytest.raises(InputError, match="vocabulary"):
        Ensemble([model, other])


def test_three_lines_caption_an_image(model):
    captions = model.caption([Image.new("RGB", (50, 40), "red"), Image.new("L", (10, 90))], beam_size=3, max_length=8)
    assert len(captions) == 2
    assert all(0 < len(caption) <= 8 and "[" not in caption for caption in captions)
