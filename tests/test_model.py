"""The joint model: shapes, the end token, positions, losses against a numpy transcription of the pseudo-code."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipcap_lib import attention, checkpoint
from clipcap_lib.config import InputError, ModelConfig, from_dict, preset, to_dict
from clipcap_lib.data import pad
from clipcap_lib.losses import caption_loss, contrastive_loss, own_captions
from clipcap_lib.model import ClipCap
from clipcap_lib.optimisation import parameter_groups
from clipcap_lib.tokenizer import (
    build_tokenizer,
    build_vocabulary,
    decode,
    encode,
    load_tokenizer,
    read_vocabulary,
    vocabulary_of,
)
from clipcap_lib.train import new_model

CAPTIONS = ["一只红色的狗在草地上。", "两只猫", "一个男人在海边跑步。"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(build_vocabulary(CAPTIONS))


def small(tokenizer, image_tokens="grid", **options) -> ClipCap:
    torch.manual_seed(0)
    config = ModelConfig(encoder="resnet10t", image_size=64, image_tokens=image_tokens, vocab_size=len(tokenizer),
                         **{"layers": 2, "width": 32, "heads": 4, "context": 20, **options})
    return ClipCap(config, tokenizer).eval()


def pixels(count=3, size=64):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_contrastive_loss_equals_the_pseudo_code_in_numpy():
    random = np.random.default_rng(0)
    image_features, text_features = random.normal(size=(6, 10)), random.normal(size=(6, 7))
    image_weights, text_weights, t = random.normal(size=(10, 4)), random.normal(size=(7, 4)), 0.7

    def l2_normalize(x):
        return x / np.sqrt((x**2).sum(axis=1, keepdims=True))

    def cross_entropy_loss(logits, labels, axis):
        log_softmax = logits - np.log(np.exp(logits).sum(axis=axis, keepdims=True))
        return -(log_softmax[labels, labels]).mean()

    image_embedding = l2_normalize(np.dot(image_features, image_weights))
    text_embedding = l2_normalize(np.dot(text_features, text_weights))
    logits = np.dot(image_embedding, text_embedding.T) * np.exp(t)
    labels = np.arange(6)
    expected = (cross_entropy_loss(logits, labels, axis=0) + cross_entropy_loss(logits, labels, axis=1)) / 2

    found = contrastive_loss(torch.tensor(image_embedding), torch.tensor(text_embedding), torch.tensor(np.exp(t)))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_identical_captions_are_no_negatives():
    image = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    text = image[[0, 0, 2]]  # rows 0 and 1 have the same caption, and image 1 is another image
    duplicates = own_captions(torch.arange(3), torch.tensor([0, 0, 1]))
    assert duplicates.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    masked = contrastive_loss(image, text, torch.tensor(10.0), duplicates)
    # the loss of the masked matrix, entry by entry
    logits = (10 * image @ text.mT).numpy().astype(float)
    logits[0, 1] = logits[1, 0] = -np.inf
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    assert float(masked) == pytest.approx((rows.mean() + columns.mean()) / 2, abs=1e-5)
    assert masked < contrastive_loss(image, text, torch.tensor(10.0))


def test_caption_loss_is_the_sum_over_tokens_and_pads_are_free():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[4, 5, 3, 0], [6, 3, 0, 0]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 4] + log_p[0, 1, 5] + log_p[0, 2, 3] + log_p[1, 0, 6] + log_p[1, 1, 3]) / 2
    torch.testing.assert_close(caption_loss(logits, targets, pad_id=0), expected)
    torch.testing.assert_close(caption_loss(logits[:, :3], targets[:, :3], pad_id=0), expected)


def test_embeddings_have_unit_norm_and_the_text_one_is_read_at_the_end_token(tokenizer):
    model = small(tokenizer)
    ids = pad(encode(tokenizer, CAPTIONS, 20), 0)
    with torch.inference_mode():
        image, text = model.encode_image(pixels()), model.encode_text(ids)
        longer = model.encode_text(torch.cat([ids, torch.zeros(3, 5, dtype=torch.long)], dim=1))
        alone = model.encode_text(torch.tensor([encode(tokenizer, CAPTIONS[1:2], 20)[0]]))
    assert image.shape == text.shape == (3, 32)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text, longer)  # what follows [SEP] does not matter
    torch.testing.assert_close(text[1], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("image_tokens, expected", [("pooled", 1), ("grid", 1 + 2 * 2)])
def test_another_prefix_gives_other_logits_under_the_training_call(tokenizer, image_tokens, expected):
    model = small(tokenizer, image_tokens).double()
    ids = pad(encode(tokenizer, CAPTIONS, 20), 0)
    with torch.inference_mode():
        prefix = model.prefix(pixels())
        logits = model.caption_logits(prefix, ids[:, :-1])
        swapped = model.caption_logits(prefix[[1, 2, 0]], ids[:, :-1])
    assert prefix.shape == (3, expected, 32)
    assert logits.shape == (3, ids.shape[1] - 1, len(tokenizer))
    assert ((logits - swapped).abs().amax(-1) > 1e-6).all(), "every text position must see the prefix"


def test_text_has_the_same_positions_in_both_stages(tokenizer):
    """A text token's position embedding is P + t, with and without an image before it."""
    model = small(tokenizer)
    seen = []
    model.gpt.transformer.wpe.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0].tolist()))
    ids = pad(encode(tokenizer, CAPTIONS, 20), 0)
    with torch.inference_mode():
        model.encode_text(ids)
        model.language_logits(ids)
        model.caption_logits(model.prefix(pixels()), ids)
    reading, warming, writing = seen
    assert reading == warming == writing[model.prefix_length:]
    assert writing[0] == 0
    assert model.gpt.config.n_positions == model.prefix_length + model.config.context


def test_the_captioner_steps_to_what_the_training_call_predicts(tokenizer):
    """Cached decoding against the uncached training pass."""
    model = small(tokenizer).double()
    ids = torch.tensor(encode(tokenizer, CAPTIONS[:1], 20))
    with torch.inference_mode():
        full = model.caption_logits(model.prefix(pixels(1)), ids)[0]
        state, logits = model.start(pixels(1))
        stepped = [logits[0]]
        for token in ids[0, 1:]:
            stepped.append(model.step(state, token[None])[0])
    torch.testing.assert_close(torch.stack(stepped), full)


def test_captions_packed_behind_one_prefix_give_what_each_gives_alone(tokenizer):
    model = small(tokenizer).double()
    ids = torch.randint(4, len(tokenizer), (6, 4), generator=torch.Generator().manual_seed(2))
    prefix = model.prefix(pixels(2)).double().detach().requires_grad_()
    assert model.prefix_length > ids.shape[1], "else nothing is packed"
    packed = model.caption_logits(prefix, ids)  # three captions an image
    alone = model.caption_logits(prefix.repeat_interleave(3, dim=0), ids)
    torch.testing.assert_close(packed, alone, atol=1e-12, rtol=1e-9)
    gradients = [torch.autograd.grad(logits.square().sum(), prefix)[0] for logits in (packed, alone)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-9)
    other = ids.clone()
    other[1] = other[1].roll(1)
    changed = (model.caption_logits(prefix, other) - packed).abs().amax(dim=(1, 2))
    assert changed[1] > 1e-6 and changed[[0, 2, 3, 4, 5]].max() == 0, "a caption must not see the one beside it"


def test_attention_weights_belong_to_the_fused_pass(tokenizer):
    model = small(tokenizer)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60, 3), dtype=np.uint8))
    found = attention.caption_attention(model, image, max_length=8)
    steps = len(found.words)
    assert found.words[-1] == "[SEP]"
    assert found.weights.shape == (steps, 2, 4, model.prefix_length + steps)
    np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-5)
    assert found.maps().shape == (steps, 2, 4, 8, 8)
    assert np.all(found.weights[0, ..., model.prefix_length + 1:] == 0), "the first word sees no later text"
    ids = torch.tensor([[model.start_id, *tokenizer.convert_tokens_to_ids(list(found.words[:-1]))]])
    with torch.inference_mode():  # the fused path gives the same probabilities
        fused = model.caption_logits(model.prefix(model.preprocess([image])), ids)[0].softmax(-1)
        with attention.plain_attention(model):
            plain = model.caption_logits(model.prefix(model.preprocess([image])), ids)[0].softmax(-1)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)
    targets = tokenizer.convert_tokens_to_ids(list(found.words))
    np.testing.assert_allclose(found.probabilities, fused[range(steps), targets].numpy(), atol=1e-5)


def test_pooled_tokens_have_a_share_but_no_map(tokenizer):
    found = attention.caption_attention(small(tokenizer, "pooled"), Image.new("RGB", (64, 64)), max_length=4)
    assert ((found.image_share() > 0) & (found.image_share() <= 1)).all()
    with pytest.raises(InputError, match="no attention map"):
        found.maps()


def test_the_caption_stage_takes_over_the_weights_of_the_text_encoder(tokenizer, tmp_path):
    clip = small(tokenizer)
    checkpoint.save(tmp_path / "clip", clip, preset("miniature"), {"stage": "clip"})
    captioner = small(tokenizer)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.add_(1)
    checkpoint.load_weights(captioner, tmp_path / "clip")
    for name, parameter in clip.gpt.named_parameters():
        torch.testing.assert_close(parameter, dict(captioner.gpt.named_parameters())[name])
    assert captioner.gpt.lm_head.weight is captioner.gpt.transformer.wte.weight


def test_a_loaded_model_is_in_evaluation_mode(tokenizer, tmp_path):
    checkpoint.save(tmp_path / "clip", small(tokenizer).train(), preset("miniature"), {"stage": "clip"})
    assert not any(module.training for module in checkpoint.load(tmp_path / "clip").modules())


@pytest.mark.parametrize("change, said", [
    (lambda weights: weights.pop("gpt.transformer.ln_f.bias"), "1 missing, 0 unexpected, such as gpt.transformer.ln_f.bias"),
    (lambda weights: weights.update({"gpt.more": torch.zeros(1)}), "0 missing, 1 unexpected, such as gpt.more")])
def test_weights_that_lack_a_tensor_or_have_one_more_are_refused(tokenizer, tmp_path, change, said):
    folder = checkpoint.save(tmp_path / "clip", small(tokenizer), preset("miniature"), {"stage": "clip"})
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    for parts in (None, ("gpt",)):
        with pytest.raises(InputError, match=said):
            checkpoint.load_weights(small(tokenizer), folder, parts)
    checkpoint.load_weights(small(tokenizer), folder, ("image_encoder",))  # in which nothing is wrong


def test_a_caption_that_contains_the_end_tokens_text_does_not_end_there(tokenizer):
    ids = encode(tokenizer, ["两只[SEP]猫"], 20)[0]
    assert ids.count(tokenizer.sep_token_id) == 1
    assert ids[-1] == tokenizer.sep_token_id
    assert ids[0] == tokenizer.cls_token_id


def test_the_tokenizer_survives_saving_and_reads_the_originals_vocabulary(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert vocabulary_of(again) == vocabulary_of(tokenizer)
    assert [decode(again, row) for row in encode(again, CAPTIONS, 20)] == [c.rstrip("。") for c in CAPTIONS]
    tokens = vocabulary_of(tokenizer)
    for content in (tokens, {t: i for i, t in enumerate(tokens)}, {str(i): t for i, t in enumerate(tokens)}):
        (tmp_path / "vocab_cn.json").write_text(json.dumps(content), encoding="utf-8")
        assert read_vocabulary(tmp_path / "vocab_cn.json") == tokens


@pytest.mark.parametrize("content", ["{", "3", "[]", "{}", '["[PAD]", "猫"]',
                                     '["[PAD]", "[UNK]", "[CLS]", "[SEP]", "猫", "猫"]',
                                     '{"[PAD]": 0, "[UNK]": 2}', '{"[PAD]": "x"}'])
def test_a_damaged_vocabulary_is_refused(tmp_path, content):
    (tmp_path / "vocab_cn.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="vocab_cn.json"):
        read_vocabulary(tmp_path / "vocab_cn.json")


def test_characters_outside_the_vocabulary_become_unknown(tokenizer):
    assert encode(tokenizer, ["猫龍"], 20)[0] == [2, tokenizer.convert_tokens_to_ids("猫"), 1, 3]


def test_long_captions_are_cut_and_still_end(tokenizer):
    ids = encode(tokenizer, ["猫" * 200], 20)[0]
    assert len(ids) == 20
    assert ids[-1] == tokenizer.sep_token_id


def test_hualu_is_the_originals_model_and_takes_a_step():
    tokenizer = build_tokenizer(build_vocabulary(CAPTIONS))
    config = preset("hualu")
    model = new_model(config, tokenizer, seed=1).train()
    assert (config.model.encoder, config.model.layers, config.model.width, config.model.heads) == (
        "res2next50", 12, 768, 12)
    assert (config.clip.batch_size, config.clip.epochs, config.caption.epochs) == (160, 5, 20)
    assert (config.clip.learning_rate, config.clip.weight_decay, config.ensemble_rule) == (3e-4, 0.01, "logits")
    assert model.image_encoder.width == 2048
    with_original_vocabulary = sum(model.parameter_counts().values()) + (6_000 - len(tokenizer)) * 768
    assert 100e6 < with_original_vocabulary < 125e6
    optimizer = torch.optim.AdamW(parameter_groups(model, config.clip), lr=3e-4)
    images, ids = pixels(2, 224), pad(encode(tokenizer, CAPTIONS[:2], 100), 0)
    before = model.gpt.transformer.wte.weight.detach().clone()
    loss = contrastive_loss(model.encode_image(images), model.encode_text(ids), model.scale())
    loss = loss + caption_loss(model.caption_logits(model.prefix(images), ids[:, :-1]), ids[:, 1:], 0)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert not torch.equal(before, model.gpt.transformer.wte.weight)


def test_settings_survive_json_and_unknown_ones_are_refused():
    for name in ("miniature", "flickr8k-small", "flickr8k", "hualu"):
        config = preset(name)
        assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(InputError, match="unknown settings"):
        from_dict(ModelConfig, {"depth": 3})
    with pytest.raises(InputError, match="unknown preset 'huge'"):
        preset("huge")
