"""One image in the eyes of a model: alternatives with their probabilities, neighbours, and the control for it."""

from __future__ import annotations

import io
from datetime import datetime

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from clipcap_lib import decode, explorer, plots
from clipcap_lib.config import InputError, ModelConfig
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.model import ClipCap
from clipcap_lib.tokenizer import build_tokenizer, build_vocabulary

CAPTIONS = ["一只狗", "两只猫在跑", "一辆汽车", "一只狗"]
TOKENIZER = build_tokenizer(build_vocabulary(CAPTIONS))


def small(seed: int) -> ClipCap:
    torch.manual_seed(seed)
    return ClipCap(ModelConfig(encoder="resnet10t", image_size=32, image_tokens="grid", vocab_size=len(TOKENIZER), layers=1,
                               width=32, heads=4, context=20, initializer_range=0.5), TOKENIZER).eval()


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8))


ROWS = Dataset.from_dict({"image": [noise(i) for i in range(4)], "file_name": [f"{i}.jpg" for i in range(4)],
                          "captions": [[c] for c in CAPTIONS]}).cast_column("image", ImageFeature())


@pytest.mark.parametrize("stepper", [small(0), Ensemble([small(0), small(1)], [0.7, 0.3])], ids=["model", "ensemble"])
def test_hypotheses_are_those_of_the_beam_search_and_their_probabilities_multiply_to_the_score(stepper):
    found = explorer.hypotheses(stepper, noise(9), beam_size=3, max_length=6)
    suppress = sorted({TOKENIZER.pad_token_id, TOKENIZER.unk_token_id, TOKENIZER.cls_token_id})
    beams = decode.beam_search(stepper, [noise(9)], 3, 6, suppress=suppress)[0]
    said = [[word for word in words if word != "[SEP]"] for words, _, _ in found]
    assert [tuple(TOKENIZER.convert_tokens_to_ids(words)) for words in said] == [b.tokens for b in beams]
    ended = 0
    for (words, probabilities, score), beam in zip(found, beams, strict=True):
        assert (words[-1] == "[SEP]") == (len(beam.tokens) < 6), "one that was cut has no end"
        assert len(words) == len(probabilities) and score == beam.score
        assert np.log(probabilities).sum() / len(words) == pytest.approx(score, abs=1e-4)
        ended += len(beam.tokens) < 6
    assert ended, "else none has an end"


def test_neighbours_are_sorted_by_cosine_and_captions_are_named_once():
    pool = explorer.Pool.of(small(0), ROWS)
    images = pool.nearest_images(noise(2), k=3)
    assert images[0][1] == CAPTIONS[2] and images[0][2] == pytest.approx(1, abs=1e-3), "the image itself is the nearest"
    captions = pool.nearest_captions("一只狗")
    assert captions[0] == ("一只狗", pytest.approx(1, abs=1e-5)) and len(captions) == 3
    for found in ([c for *_, c in images], [c for _, c in captions], [c for *_, c in pool.nearest_images("一辆汽车")]):
        assert found == sorted(found, reverse=True)


def test_an_upload_that_is_no_image_is_told_and_changes_nothing(tmp_path):
    plots.use_house_style()
    drawn = []

    def draw(image):
        drawn.append(image)
        return plots.caption_card(image, {"size": [str(image.size)]}, "图")

    box = explorer.image_explorer(ROWS, draw, tmp_path)
    before, count = box.picture.value, len(drawn)
    box.controls["upload"].value = ({"name": "a.txt", "type": "", "size": 3, "content": b"abc",
                                     "last_modified": datetime(2020, 1, 1)},)
    assert "a.txt: not an image" in box.message.value and "0x" not in box.message.value
    assert box.picture.value == before and len(drawn) == count


def test_the_explorer_shows_what_was_chosen_last_and_saves_it(tmp_path):
    plots.use_house_style()
    box = explorer.image_explorer(ROWS, lambda image: plots.caption_card(image, {"": [str(image.size)]}, "图"), tmp_path)
    pictures = [box.picture.value]
    box.controls["image"].value = 2
    pictures.append(box.picture.value)
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "png")
    box.controls["upload"].value = ({"name": "自己.png", "type": "image/png", "size": 1, "content": buffer.getvalue(),
                                     "last_modified": datetime(2020, 1, 1)},)
    pictures.append(box.picture.value)
    assert box.shown["image"].size == (30, 20) and box.message.value == "自己.png"
    box.controls["save"].click()
    assert box.message.value == "saved: explorer-自己.png" and (tmp_path / "explorer-自己.png").is_file()
    box.controls["back"].click()
    assert box.picture.value == pictures[1] and box.shown["name"] == "1", "the slider stands where it stood"
    box.controls["image"].value = 3
    pictures.append(box.picture.value)
    assert len(set(pictures)) == 4 and box.shown["name"] == "2"


@pytest.mark.parametrize("source", [b"", b"GIF89a", b"\xff\xd8\xff"])
def test_bytes_that_are_no_image_are_an_error(source):
    with pytest.raises(InputError, match="the upload: not an image that can be read"):
        explorer.open_image(source)


def test_every_stepper_says_something():
    found = explorer.says({"greedy": (small(0), 1), "two": (Ensemble([small(0), small(1)]), 2)}, noise(1), 6)
    assert list(found) == ["greedy", "two"] and all(set(text) <= set("".join(CAPTIONS)) for text in found.values())
