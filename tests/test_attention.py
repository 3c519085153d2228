"""Maps of words: each method against what it is defined to be, on small models with random weights; and their check."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from clipcap_lib import attention, embeddings, localisation
from clipcap_lib.captions import main_nouns, word_spans
from clipcap_lib.config import InputError, ModelConfig, preset
from clipcap_lib.corpora.scenes import object_words
from clipcap_lib.embeddings import embed_images, embed_texts
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.model import ClipCap
from clipcap_lib.tokenizer import build_tokenizer, build_vocabulary

TOKENIZER = build_tokenizer(build_vocabulary(["一只红色的狗在草地上", "两只猫"]))
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
TOKENS = TOKENIZER.convert_tokens_to_ids(list("红色的狗"))
FINE = (8, 8)  # squares of a map: the encoder has 2 x 2 cells


def small(image_tokens: str = "grid", **options) -> ClipCap:
    torch.manual_seed(0)
    return ClipCap(ModelConfig(encoder="resnet10t", image_size=64, image_tokens=image_tokens, vocab_size=len(TOKENIZER),
                               layers=2, width=32, heads=4, context=20, initializer_range=0.2, **options), TOKENIZER).eval()


def log_probability(model: ClipCap, feature_map: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Of TOKENS[first:end] (and [SEP]), computed anew from a feature map (1, C, H, W)."""
    prefix = model.prefix_tokens(model.image_encoder.pool(feature_map), feature_map)
    logits = model.caption_logits(prefix, torch.tensor([[model.start_id, *TOKENS]]))[0]
    return logits.log_softmax(-1)[range(len(TOKENS) + 1), [*TOKENS, model.end_id]][first:end].sum()


@pytest.mark.parametrize("image_tokens", ["grid", "pooled"])
def test_grad_cam_is_the_formula_of_the_paper_for_every_span(image_tokens):
    model, spans = small(image_tokens), [(0, 2), (3, 4), (4, 5)]
    with torch.no_grad():
        feature_map = model.image_encoder(model.preprocess([IMAGE]))[1]
    expected = {False: [], True: []}
    for first, end in spans:
        leaf = feature_map.clone().requires_grad_()
        gradient, = torch.autograd.grad(log_probability(model, leaf, first, end), leaf)
        weights = gradient.mean(dim=(2, 3))[0]  # alpha of equation 1
        expected[False].append(torch.einsum("c,chw->hw", weights, feature_map[0]).clamp(min=0).numpy())
        expected[True].append((gradient * feature_map)[0].sum(0).clamp(min=0).numpy())
    for by_cell, maps in expected.items():
        found = attention.grad_cam(model, IMAGE, TOKENS, spans, by_cell)
        assert found.shape == (3, *FINE) and found.max() > 0
        np.testing.assert_allclose(found, attention.over_image(model, maps), rtol=1e-3, atol=1e-6)


def test_cells_lie_where_they_look():
    """Against what a cell does when a dot moves over the image; even squares would put it 8 pixels off."""
    torch.manual_seed(0)
    model = ClipCap(replace(preset("miniature").model, vocab_size=len(TOKENIZER), layers=1, width=32, heads=4)).eval()
    rows, columns = attention.cell_centres(model)  # 6 x 6 cells of 96 x 96 pixels
    np.testing.assert_allclose(np.diff(rows), 16)
    np.testing.assert_allclose(rows, columns, atol=1.5)
    places = np.arange(0, 96, 4)
    dots = torch.full((len(places) ** 2, 3, 96, 96), 128, dtype=torch.uint8)
    for dot, (y, x) in zip(dots, itertools.product(places, places), strict=True):
        dot[:, y:y + 4, x:x + 4] = 255
    with torch.inference_mode():
        cells = model.image_encoder(dots)[1][:, :, 3, 3] - model.image_encoder(torch.full_like(dots[:1], 128))[1][:, :, 3, 3]
    strength = cells.square().sum(dim=1).view(len(places), -1).numpy()
    for axis, centres in enumerate((rows, columns)):
        seen = (strength.sum(axis=1 - axis) * (places + 2)).sum() / strength.sum()
        assert abs(seen - centres[3]) < 2 and abs(seen - 56) > 6
    one = np.zeros((6, 6))
    one[3, 3] = 1
    peak = np.unravel_index(attention.over_image(model, one).argmax(), (24, 24))
    assert np.abs((np.array(peak) + 0.5) * 4 - (rows[3], columns[3])).max() <= 2


@pytest.mark.parametrize("encoder, tokens", [("vit_tiny_patch16_224", "grid"), ("swin_tiny_patch4_window7_224", "grid"),
                                             ("mobilenetv3_small_050", "grid"), ("mobilenetv3_small_050", "pooled")])
def test_an_encoder_without_a_feature_map_has_no_grid(encoder, tokens):
    with pytest.raises(InputError, match=f"{encoder}: no feature map"):
        ClipCap(ModelConfig(encoder=encoder, image_size=224, image_tokens=tokens, layers=1, width=32, heads=4))


def test_a_transformer_captions_from_its_pooled_token_and_is_asked_by_occlusion():
    torch.manual_seed(0)
    model = ClipCap(ModelConfig(encoder="vit_tiny_patch16_224", encoder_options={"img_size": 32, "depth": 1}, image_size=32,
                                image_tokens="pooled", vocab_size=len(TOKENIZER), layers=1, width=32, heads=4), TOKENIZER)
    assert model.grid_size is None and model.prefix_length == 1
    assert list(attention.word_maps(model, IMAGE, TOKENS)) == ["occlusion"]
    for ask in (lambda: attention.grad_cam(model, IMAGE, TOKENS),
                lambda: attention.similarity_grad_cam(model, IMAGE, ["猫"])):
        with pytest.raises(InputError, match="no feature map to lay over the image; occlusion"):
            ask()


def test_embeddings_do_not_move_the_statistics_of_a_model_in_training():
    model = small().train()
    before = model.state_dict()["image_encoder.backbone.bn1.running_mean"].clone()
    rows = [{"file_name": "a.jpg", "image": IMAGE, "captions": ["两只猫"]}] * 2
    table = Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]}, features=Features(
        file_name=Value("string"), image=ImageFeature(), captions=[Value("string")]))
    embed_images(model, table)
    embed_texts(model, ["两只猫"])
    assert torch.equal(model.state_dict()["image_encoder.backbone.bn1.running_mean"], before)
    assert torch.equal(embed_images(model, table), embed_images(small(), table))


def test_nearest_captions_differ_and_recall_counts_each_text_for_its_own_image(monkeypatch):
    """Embeddings are given here: an image's is its number's axis, a text's begins with the numbers that it holds."""
    axes = torch.eye(3)
    monkeypatch.setattr(embeddings, "embed_images", lambda model, rows: axes[[int(f[0]) for f in rows["file_name"][:]]])
    monkeypatch.setattr(embeddings, "embed_texts", lambda model, texts: torch.tensor(
        [[float(part) for part in text.split()] for text in texts]))
    references = {"0.jpg": [".9 .1 .2", ".8 .2 .1", "0 1 0"], "1.jpg": [".3 .9 .1", ".2 .9 .3"],
                  "2.jpg": [".3 .9 .1", "0 .1 .9"]}
    rows = Dataset.from_dict({"file_name": list(references), "captions": list(references.values())})
    assert embeddings.nearest_captions(None, rows, references, [2, 0], k=5) == {
        "2.jpg": [".9 .1 .2", ".3 .9 .1"], "0.jpg": [".9 .1 .2", ".3 .9 .1"]}, "the same caption of two images is named once"
    apart = {**references, "2.jpg": ["0 .1 .9"]}
    assert embeddings.nearest_captions(None, rows, apart, [1, 2], k=2) == {
        "1.jpg": [".3 .9 .1", ".9 .1 .2"], "2.jpg": ["0 .1 .9", ".9 .1 .2"]}

    recalls = [embeddings.retrieval_of_set(None, rows, apart, count) for count in (1, 2, 3)]
    assert [found["text->image R@1"] for found in recalls] == pytest.approx([100, 100, 500 / 6])
    assert embeddings.retrieval_of_set(None, rows, references, 2)["text->image R@1"] == pytest.approx(500 / 6)
    assert embeddings.retrieval(None, rows, 2) == embeddings.retrieval_of_set(None, rows, references, 2)


def test_what_no_model_can_answer_is_an_error():
    model = small()
    with pytest.raises(InputError, match="give one of its members"):
        attention.word_maps(Ensemble([model, model]), IMAGE, TOKENS)
    for ask in (attention.caption_attention, attention.grad_cam, attention.occlusion):
        with pytest.raises(InputError, match="20 characters .* context of 20"):
            ask(model, IMAGE, TOKENS * 5)
        ask(model, IMAGE, (TOKENS * 5)[:19])


def test_maps_of_a_model_in_bf16_and_within_inference_mode():
    model, expected = small(), attention.word_maps(small(), IMAGE, TOKENS)
    with torch.inference_mode():
        within = attention.word_maps(model, IMAGE, TOKENS)
        similar = attention.similarity_grad_cam(model, IMAGE, ["红色的狗"])
    half = attention.word_maps(model.to(torch.bfloat16), IMAGE, TOKENS)
    for method, maps in expected.items():
        np.testing.assert_allclose(within[method], maps, rtol=1e-4, atol=1e-6)
        assert half[method].dtype == np.float32
        np.testing.assert_allclose(half[method], maps, atol=0.25 * np.abs(maps).max())
    assert attention.similarity_grad_cam(model, IMAGE, ["红色的狗"]).shape == similar.shape


def test_grad_cam_leaves_no_gradient_on_the_model():
    model = small()
    attention.grad_cam(model, IMAGE, TOKENS)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_grad_cam_of_the_similarity_follows_the_cosine():
    model, captions = small("pooled"), ["红色的狗", "两只猫"]
    # of a mean over the cells the two are one: what lies at the left counts more here
    model.image_encoder.pool = lambda feature_map: (feature_map * torch.tensor([3.0, 1.0])).mean(dim=(2, 3))
    model.image_head.norm.weight.data.neg_()  # else all cells speak against both captions, and maps are empty
    by_channel, by_cell = (attention.similarity_grad_cam(model, IMAGE, captions, by) for by in (False, True))
    assert by_channel.shape == by_cell.shape == (2, *FINE)
    feature_map = model.image_encoder(model.preprocess([IMAGE]))[1].detach().requires_grad_()
    embedded = torch.nn.functional.normalize(model.image_head(model.image_encoder.pool(feature_map)), dim=-1)
    ids = torch.tensor(TOKENIZER([captions[1]])["input_ids"])
    gradient, = torch.autograd.grad((embedded * model.encode_text(ids)).sum(), feature_map)
    for maps, weights in (by_channel, gradient.mean(dim=(2, 3), keepdim=True)), (by_cell, gradient):
        cells = (weights * feature_map)[0].sum(0).clamp(min=0).detach()
        np.testing.assert_allclose(maps[1], attention.over_image(model, cells), rtol=1e-3, atol=1e-7)
        assert maps[1].max() > 1e-3
    assert np.abs(by_channel[1] - by_cell[1]).max() > 1e-3
    with pytest.raises(InputError, match="no caption to map"):
        attention.similarity_grad_cam(model, IMAGE, [])


def test_rollout_multiplies_layers_with_half_of_each_passed_by():
    random = np.random.default_rng(0)
    weights = np.tril(random.random((3, 2, 5, 5)))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.eye(5)
    for layer in weights:
        expected = (0.5 * layer.mean(0) + 0.5 * np.eye(5)) @ expected
    found = attention.rollout(torch.tensor(weights)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-12)


def test_attention_of_a_caption_has_rollout_over_the_same_cells():
    found = attention.caption_attention(small(), IMAGE, TOKENS)
    assert found.tokens == tuple(TOKENS) and found.words == (*"红色的狗", "[SEP]")
    np.testing.assert_allclose(found.rolled.sum(-1), 1, atol=1e-5)
    assert found.rollout_maps().shape == (5, *FINE)
    with pytest.raises(InputError, match="occlusion"):
        attention.caption_attention(small("pooled"), IMAGE, TOKENS).rollout_maps()


def test_maps_of_a_caption_are_its_weights_over_the_cells_and_rollout_goes_from_the_first_layer_to_the_last():
    model = small()
    found, last = attention.caption_attention(model, IMAGE, TOKENS), model.prefix_length
    assert last == 1 + 2 * 2 and found.prefix_length == last, "the pooled token, then the cells"
    ids = torch.tensor([[model.start_id, *TOKENS]])
    with torch.no_grad(), attention.plain_attention(model):
        embedded = torch.cat([model.prefix(model.preprocess([IMAGE])), model.gpt.transformer.wte(ids)], dim=1)
        layers = torch.stack(model.gpt(inputs_embeds=embedded, output_attentions=True).attentions)[:, 0]
    np.testing.assert_allclose(found.weights, layers[:, :, last:].permute(2, 0, 1, 3), atol=1e-6)
    np.testing.assert_allclose(found.rolled, attention.rollout(layers)[last:], atol=1e-6)
    assert np.abs(found.rolled - attention.rollout(layers.flip(0))[last:].numpy()).max() > 1e-3, "the order matters"
    for maps, weights in (found.maps(), found.weights), (found.rollout_maps(), found.rolled):
        cells = weights[..., 1:last].reshape(*weights.shape[:-1], 2, 2)
        np.testing.assert_allclose(maps, attention.over_image(model, cells), atol=1e-6)


@pytest.mark.parametrize("image_tokens", ["grid", "pooled"])
def test_occlusion_is_what_the_word_loses_when_a_square_is_covered(image_tokens):
    model = small(image_tokens)
    found = attention.occlusion(model, IMAGE, TOKENS, [(3, 4)], steps=4, patch=0.25)
    pixels = model.preprocess([IMAGE])
    covered = pixels.clone()
    covered[:, :, 16:32, 48:64] = model.image_encoder.mean[0].round().to(torch.uint8)  # row 1, column 3
    with torch.no_grad():
        scores = [log_probability(model, model.image_encoder(p)[1], 3, 4) for p in (pixels, covered)]
    assert found.shape == (1, 4, 4)
    np.testing.assert_allclose(found[0, 1, 3], float(scores[0] - scores[1]), atol=1e-5)


def test_the_centres_of_the_squares_fill_the_image():
    pixels = small().preprocess([IMAGE])[0]
    times = torch.zeros(pixels.shape[1:], dtype=torch.long)  # how often each pixel is covered

    class Marks(ClipCap):
        def prefix(self, images):
            times.add_((images != pixels).any(dim=1).sum(dim=0))
            return super().prefix(images)

    torch.manual_seed(0)
    attention.occlusion(Marks(small().config, TOKENIZER).eval(), IMAGE, TOKENS, steps=6, patch=1 / 3)
    grey = small().image_encoder.mean[0].round().to(torch.uint8)
    visible = (pixels != grey).any(dim=0)  # a covered pixel that was grey before looks the same
    assert visible.float().mean() > 0.9, "else nothing is shown"
    assert (times[visible] > 0).all() and times.max() < 36, "all of the image, never by every square"


def test_word_maps_are_those_of_each_method_and_pooled_models_have_three():
    spans = [(0, 2), (3, 4)]
    maps = attention.word_maps(small(), IMAGE, TOKENS, spans)
    assert tuple(maps) == attention.METHODS
    assert {name: m.shape for name, m in maps.items()} == {
        **{name: (2, *FINE) for name in ("attention", "rollout", "Grad-CAM", "HiResCAM")}, "occlusion": (2, 6, 6)}
    found = attention.caption_attention(small(), IMAGE, TOKENS)
    by_token = {"attention": found.maps()[:, -1].mean(axis=1), "rollout": found.rollout_maps()}
    expected = {**{name: np.stack([values[:2].mean(axis=0), values[3]]) for name, values in by_token.items()},
                "Grad-CAM": attention.grad_cam(small(), IMAGE, TOKENS, spans),
                "HiResCAM": attention.grad_cam(small(), IMAGE, TOKENS, spans, by_cell=True),
                "occlusion": attention.occlusion(small(), IMAGE, TOKENS, spans)}
    for name, values in expected.items():
        np.testing.assert_allclose(maps[name], values, rtol=1e-4, atol=1e-6)
    for one, other in itertools.combinations(list(expected)[:4], 2):
        assert np.abs(expected[one] - expected[other]).max() > 1e-4, f"{one} and {other} must differ to be told apart"
    assert tuple(attention.word_maps(small("pooled"), IMAGE, TOKENS)) == ("Grad-CAM", "HiResCAM", "occlusion")
    with pytest.raises(InputError, match="no words to map"):
        attention.word_maps(small(), IMAGE, [], [])
    assert attention.word_maps(small(), IMAGE, [], [(0, 1)])["attention"].shape == (1, *FINE)
    with pytest.raises(InputError, match="unknown method saliency"):
        attention.word_maps(small(), IMAGE, TOKENS, methods=["saliency"])


@pytest.mark.parametrize("span", [(0, 0), (-1, 2), (3, 6)])
def test_a_span_outside_of_the_caption_is_an_error(span):
    with pytest.raises(InputError, match="leaves the caption of 4 characters"):
        attention.grad_cam(small(), IMAGE, TOKENS, [span])


def test_words_and_object_words_know_their_places():
    caption = "草地上有一只棕色的小狗"
    assert "".join(word for word, _, _ in word_spans(caption)) == caption
    assert all(caption[first:end] == word for word, first, end in word_spans(caption))
    assert object_words(caption) == [("dog", 9, 11)]
    assert main_nouns({"a": ["一只狗在草地上", "狗"], "b": ["狗"], "c": ["跑"]}) == {"a": "狗", "b": "狗", "c": "-"}


# -- are they right? ---------------------------------------------------------------------------------------------------

def test_a_map_on_the_box_has_its_mass_and_its_peak_there():
    mask = localisation.box_mask([(0.0, 0.0, 0.5, 0.5)])
    assert mask.mean() == pytest.approx(0.25)
    on, off = np.zeros((6, 6)), np.zeros((6, 6))
    on[1, 1] = off[4, 4] = 1
    assert localisation.mass_and_hit(on, mask) == (1, 1)
    assert localisation.mass_and_hit(off, mask) == (0, 0)


def test_maps_that_know_nothing_reach_the_share_of_the_box():
    mask = localisation.box_mask([(0.1, 0.2, 0.6, 0.7), (0.8, 0.8, 0.9, 0.9)])
    for nothing in (np.ones((6, 6)), np.zeros((6, 6)), -np.ones((6, 6))):
        assert localisation.mass_and_hit(nothing, mask) == pytest.approx((mask.mean(), mask.mean()), abs=1e-3)
    random = np.random.default_rng(0)
    masses = [localisation.mass_and_hit(random.random((6, 6)), mask)[0] for _ in range(200)]
    assert np.mean(masses) == pytest.approx(mask.mean(), abs=0.02)


def test_negative_values_count_as_nothing():
    mask = localisation.box_mask([(0.5, 0.0, 1.0, 1.0)])
    values = np.tile([1.0, -5.0], (2, 1))  # left speaks for the word, right against it
    assert localisation.mass_and_hit(values, mask)[0] < 0.35


def test_object_words_are_checked_against_the_boxes_of_their_kind_only():
    tokenizer = build_tokenizer(build_vocabulary(["草地上有一只狗和一辆汽车"]))
    torch.manual_seed(0)
    model = ClipCap(ModelConfig(encoder="resnet10t", image_size=64, image_tokens="grid", vocab_size=len(tokenizer), layers=1,
                                width=32, heads=4, context=20), tokenizer).eval()
    scene = {"objects": [{"kind": "dog", "box": [0, 0, 0.5, 0.5]}, {"kind": "dog", "box": [0.5, 0.5, 1, 1]},
                         {"kind": "tree", "box": [0, 0.5, 0.5, 1]}]}
    rows = localisation.object_word_maps({"trained": model, "random": model}, IMAGE, "一只狗和一辆汽车", scene, ["Grad-CAM"])
    assert [(row["word"], row["model"], row["box"]) for row in rows] == [("狗", "trained", 0.5), ("狗", "random", 0.5)]
    assert localisation.object_word_maps({"trained": model}, IMAGE, "一辆汽车", scene) == []
    boxes = localisation.true_boxes(scene, "一只狗和一辆汽车", [(0, 2), (2, 3), (3, 8)])
    assert boxes == [[], [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], []]


def test_the_summary_averages_words_of_an_image_first():
    rows = [{"file": file, "word": "狗", "kind": "dog", "model": model, "method": "Grad-CAM", "mass": mass, "hit": hit,
             "box": 0.1, "nothing": False}
            for file, model, mass, hit in [("a", "trained", 0.2, 0), ("a", "trained", 0.4, 1), ("b", "trained", 0.5, 1),
                                           ("a", "random", 0.1, 0), ("a", "random", 0.1, 0), ("b", "random", 0.3, 0)]]
    found = localisation.summary({"rows": rows})
    assert isinstance(found, pd.DataFrame) and list(found.index) == ["Grad-CAM"]
    line = found.loc["Grad-CAM"]
    assert line["mass"] == pytest.approx(0.4) and line["random mass"] == pytest.approx(0.2)
    assert line["mass / box"] == pytest.approx(4) and line["mass / random"] == pytest.approx(2)
    assert line["hit"] == pytest.approx(0.75)
    assert line["mass / box, low"] <= 4 <= line["mass / box, high"]


def test_a_set_without_truth_is_refused(tmp_path):
    with pytest.raises(InputError, match="miniature boards only"):
        localisation.localisation(tmp_path, tmp_path, "test")


@pytest.mark.parametrize(("layers", "heads"), list(itertools.product((1, 3), (1, 2))))
def test_rollout_of_uniform_attention_is_lower_triangular(layers, heads):
    uniform = torch.tril(torch.ones(layers, heads, 4, 4))
    uniform = uniform / uniform.sum(-1, keepdim=True)
    assert torch.equal(attention.rollout(uniform).triu(1), torch.zeros(4, 4))
