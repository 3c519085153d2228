"""The drawn corpora: the same for a seed, true to their captions, read back by the readers, and shifted on board B."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from PIL import Image, ImageChops

from clipcap_lib.config import InputError
from clipcap_lib.corpora import miniature, read_corpora, things
from clipcap_lib.corpora.drawing import PAINTERS, draw_object
from clipcap_lib.corpora.miniature import load_board_references, load_truth, write_corpora
from clipcap_lib.corpora.scenes import LENGTHS, SHAPE, Scene, parse_caption, sample_portrait, sample_scene, write_captions
from clipcap_lib.corpora.slots import concept_recall, error_shares, errors_of, holds, slot_accuracy

SMALL = {"flickr8k-cn": {"train": 8, "val": 3, "test": 2}, "flickr30k-cn": {"train": 6, "val": 3, "test": 3},
         "aic-icc": {"train": 6, "val": 3}, "hualu": {"train": 5, "board-a": 4, "board-b": 4},
         "coco-cn": {"train": 8, "val": 3, "test": 2}}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("miniature") / "corpora", seed=3, images=SMALL)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def scenes(number: int, coco_share: float = 0.3) -> list[Scene]:
    random = Random(7)
    return [sample_scene(random, coco_share) for _ in range(number)]


# --- writing ----------------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_bytes_and_another_does_not(small: Path, tmp_path: Path):
    assert files(write_corpora(tmp_path / "again", seed=3, images=SMALL)) == files(small)
    assert files(write_corpora(tmp_path / "other", seed=4, images=SMALL)) != files(small)


def test_the_number_of_processes_and_of_other_images_changes_no_image(small: Path, tmp_path: Path):
    more = {"flickr8k-cn": {"train": 205, "val": 3}}
    two = write_corpora(tmp_path / "two", seed=3, images=more, processes=2)
    folder = "flickr8k-cn/Flicker8k_Dataset"
    for path in (small / folder).iterdir():
        if load_truth(small)["flickr8k-cn", path.name]["split"] != "test":
            assert (two / folder / path.name).read_bytes() == path.read_bytes()
    for path in (small / "labelled").glob("*/*.jpg"):
        assert (two / path.relative_to(small)).read_bytes() == path.read_bytes()


def test_labelled_images_are_of_every_kind_and_say_their_colour(small: Path):
    folder = small / "labelled"
    assert {path.name for path in folder.iterdir()} == set(things.KINDS)
    paths = sorted(folder.glob("*/*.jpg"))
    assert {path.name.split()[0] for path in paths} == set(things.COLOURS)
    for path in paths:
        kind, number = path.parent.name, int(path.stem.split()[-1])
        group, = sample_portrait(Random(f"3 portrait {kind} {number}"), kind).groups
        assert path.stem == f"{group.colour} {kind} {number:04d}" and group.kind == kind


def test_what_is_whole_is_left_alone_and_what_was_cut_off_is_written_anew(small: Path, tmp_path: Path):
    root = tmp_path / "corpora"
    shutil.copytree(small, root)
    image = next((root / "hualu/board-a").iterdir())
    image.write_bytes(b"changed")
    write_corpora(root, seed=3, images=SMALL)
    assert image.read_bytes() == b"changed"
    state = root / ".miniature.json"
    for cut in (json.dumps({**json.loads(state.read_text()), "complete": False}), '{"version'):
        shutil.rmtree(root / "aic-icc", ignore_errors=True)
        state.write_text(cut)
        write_corpora(root, seed=3, images=SMALL)
        assert files(root) == files(small)


def test_corpora_that_were_not_drawn_are_never_overwritten(tmp_path: Path):
    (tmp_path / "coco-cn").mkdir()
    with pytest.raises(InputError, match="coco-cn: is there and was not drawn here"):
        write_corpora(tmp_path, images=SMALL)
    assert list(tmp_path.iterdir()) == [tmp_path / "coco-cn"]


def test_the_readers_read_back_what_was_written(small: Path):
    readings = read_corpora(small)
    counts = {corpus: dict(Counter(record.split for record in reading.records)) for corpus, reading in readings.items()}
    assert counts == SMALL and not any(reading.left_out for reading in readings.values())
    truth = load_truth(small)
    names = [record.file_name for reading in readings.values() for record in reading.records]
    assert len(set(names)) == len(names) == len(truth)
    for corpus, reading in readings.items():
        for record in reading.records:
            assert truth[corpus, record.file_name]["split"] == record.split
            captions = record.captions or load_board_references(small, record.split)[record.file_name]
            assert len(set(captions)) == 5
            assert all((":" not in c and " " not in c and c.endswith("。")) == (corpus != "aic-icc") for c in captions)
            with Image.open(record.image) as image:
                assert image.format == "JPEG" and image.size == SHAPE
    translated = {(corpus, r.split): r.translated for corpus, reading in readings.items() for r in reading.records}
    assert {key for key, how in translated.items() if how == "machine"} == {("flickr30k-cn", "train"),
                                                                            ("flickr30k-cn", "val")}


def test_tags_are_coco_cn_s_alone_and_name_what_is_in_the_picture(small: Path):
    truth, readings = load_truth(small), read_corpora(small)
    assert all(bool(record.tags) == (corpus == "coco-cn") for corpus, found in readings.items() for record in found.records)
    for record in readings["coco-cn"].records:
        scene = truth["coco-cn", record.file_name]
        kinds = [things.KINDS[item["kind"]].chinese for item in scene["objects"]]
        assert record.tags[-1] == things.BACKGROUNDS[scene["background"]].chinese
        assert set(record.tags[:-1]) == set(kinds) and record.tags[0] == kinds[0]


def test_the_truth_lies_beside_the_corpora_and_boards_have_no_captions_in_them(small: Path):
    assert {path.name for path in small.iterdir()} == {*SMALL, "labelled", "truth", ".miniature.json"}
    assert {path.suffix for board in ("board-a", "board-b") for path in (small / "hualu" / board).iterdir()} == {".jpg"}
    assert set(load_board_references(small, "board-b")) == {path.name for path in (small / "hualu/board-b").iterdir()}
    with pytest.raises(InputError, match="no references of 'board-c'"):
        load_board_references(small, "board-c")
    with pytest.raises(InputError, match="no truth of drawn scenes"):
        load_truth(small / "hualu")


def test_the_default_is_the_size_that_the_workbook_promises():
    totals = Counter()
    for splits in miniature.IMAGES.values():
        totals.update(splits)
    assert totals["train"] == 3000 and totals["val"] == 300 and totals["board-a"] == totals["board-b"] == 300
    ordinary = [kind for kind in things.KINDS.values() if not kind.coco]
    assert len(ordinary) >= 16 and len(things.KINDS) - len(ordinary) >= 5
    assert len(things.COLOURS) == 8 and len(things.BACKGROUNDS) >= 8


# --- scenes and pictures ----------------------------------------------------------------------------------------------

def test_every_box_lies_within_the_image_and_is_large_enough_to_be_seen():
    for scene in scenes(500):
        for item in scene.truth()["objects"]:
            x0, y0, x1, y1 = item["box"]
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
            assert max((x1 - x0), (y1 - y0)) > 0.18


def test_a_relation_of_the_truth_is_true_of_its_boxes():
    seen = Counter()
    for scene in scenes(800):
        truth = scene.truth()
        if not scene.relation:
            continue
        seen[scene.relation[1]] += 1
        if scene.relation[1] == "in front":
            near, far = (truth["objects"][i]["box"] for i in (0, 1))
            assert near[3] > far[3] and near[0] < far[2] and far[0] < near[2]
        else:
            assert holds(scene.relation, {**truth, "relation": None})
    assert set(seen) == {"left", "right", "above", "in front"} and min(seen.values()) > 30


def test_objects_stand_on_sensible_backgrounds_and_differ_in_colour():
    for scene in scenes(500):
        assert all(things.stands_on(group.kind, scene.background) for group in scene.groups)
        assert len({group.colour for group in scene.groups}) == len(scene.groups)


@pytest.mark.parametrize("kind", things.KINDS)
def test_a_kind_fills_its_box_and_its_colours_can_be_told_apart(kind: str):
    height = 100
    width = round(height * things.KINDS[kind].aspect)
    means = []
    for colour in things.COLOURS:
        empty = Image.new("RGB", (width + 40, height + 40), (120, 160, 140))
        canvas = empty.copy()
        draw_object(canvas, kind, colour, (20, 20, 20 + width, 20 + height))
        x0, y0, x1, y1 = ImageChops.difference(canvas, empty).getbbox()
        reach = 0.09  # pale rim included
        assert abs(x0 - 20) <= reach * width + 4 and abs(x1 - 20 - width) <= reach * width + 4
        assert abs(y0 - 20) <= reach * height + 4 and abs(y1 - 20 - height) <= reach * height + 4
        means.append(canvas.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
    distances = [sum(abs(a - b) for a, b in zip(one, other, strict=True))
                 for i, one in enumerate(means) for other in means[:i]]
    assert min(distances) >= 8
    assert set(PAINTERS) == set(things.KINDS)


# --- captions ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("literal", [0.0, 1.0], ids=["written", "translated"])
def test_whatever_a_caption_states_is_true_of_its_scene_and_the_parser_agrees(literal: float):
    random, said = Random(11), Counter()
    for scene in scenes(600):
        captions = write_captions(scene, random, literal=literal)
        assert len(set(captions)) == 5
        groups = {group.kind: group for group in scene.groups}
        for caption in captions:
            parsed = parse_caption(caption)
            assert parsed.objects, caption
            for kind, colour, count in parsed.objects:
                assert colour in (None, groups[kind].colour), (caption, scene)
                assert count in (None, groups[kind].count), (caption, scene)
                assert count or groups[kind].count == 1, (caption, scene)
                said["colour"] += colour is not None
                said["object"] += 1
            assert parsed.background in (None, scene.background), (caption, scene)
            assert parsed.relation is None or holds(parsed.relation, scene.truth()), (caption, scene)
            said["relation"] += parsed.relation is not None
            said["caption"] += 1
            said["main"] += scene.groups[0].kind in {kind for kind, _, _ in parsed.objects}
            plain = caption.replace("大象", "").replace("大海", "").replace("大树", "")
            assert "大" not in plain or "big" in {group.size for group in scene.groups}, (caption, scene)
    assert said["main"] == said["caption"] and said["colour"] > 0.75 * said["object"]
    assert said["relation"] > 0.05 * said["caption"]


def test_captions_have_the_length_of_human_ones_and_few_characters():
    random = Random(5)
    captions = [caption for scene in scenes(600) for caption in write_captions(scene, random, literal=0.2)]
    lengths = [len(caption) - 1 for caption in captions]
    assert min(lengths) >= LENGTHS[0] and max(lengths) <= 24
    assert sum(length <= LENGTHS[1] for length in lengths) > 0.99 * len(lengths)
    assert 120 <= len(set("".join(captions))) <= 250


@pytest.mark.parametrize("caption, objects, relation, background", [
    ("草地上有一只白色的小狗。", (("dog", "white", 1),), None, "grass"),
    ("左边是一只黑猫，右侧是红色的伞。", (("cat", "black", 1), ("umbrella", "red", None)),
     ("cat", "left", "umbrella"), None),
    ("红绿灯的右边有两个气球", (("traffic light", None, None), ("balloon", None, 2)),
     ("balloon", "right", "traffic light"), None),
    ("一朵花在一架飞机的下面。", (("flower", None, 1), ("airplane", None, 1)), ("airplane", "above", "flower"), None),
    ("一座房子在树的后面。", (("house", None, 1), ("tree", None, None)), ("tree", "in front", "house"), None),
    ("球在左边，船在右边。", (("ball", None, None), ("boat", None, None)), ("ball", "left", "boat"), None),
    ("球场上的汽车是红色的。", (("car", "red", None),), None, "court"),
    ("红色红色的的狗狗狗，啊", (("dog", "red", None), ("dog", None, None)), None, None),
    ("三只只小小的紫色", (), None, None), ("", (), None, None), ("[UNK]hello左边", (), None, None)])
def test_the_parser_takes_captions_and_generated_text(caption, objects, relation, background):
    parsed = parse_caption(caption)
    assert (parsed.objects, parsed.relation, parsed.background) == (objects, relation, background)


def test_concepts_are_spread_out_and_a_caption_of_another_image_scores_badly():
    random = Random(2)
    drawn = [sample_scene(random, miniature.ORDINARY_SHARE) for _ in range(1500)]
    mentions = Counter(group.kind for scene in drawn for group in scene.groups)
    assert max(mentions.values()) < 0.08 * sum(mentions.values())
    truth = {str(i): scene.truth() for i, scene in enumerate(drawn)}
    captions = {str(i): write_captions(scene, random, 1) for i, scene in enumerate(drawn)}
    shuffled = {str(i): captions[str(i - 1 if i else len(drawn) - 1)] for i in range(len(drawn))}
    own, other = slot_accuracy(captions, truth), slot_accuracy(shuffled, truth)
    assert own["object_f1"] > 0.9 and other["object_f1"] < 0.2
    assert {own[f"{slot}_accuracy"] for slot in ("colour", "count", "relation", "background")} == {1.0}
    assert other["colour_accuracy"] < 0.3


def test_board_b_holds_what_coco_cn_holds_and_the_others_hardly_do():
    random = Random(1)
    coco = {name for name, kind in things.KINDS.items() if kind.coco}

    def share(coco_share: float) -> float:
        drawn = [sample_scene(random, coco_share) for _ in range(600)]
        return sum(any(group.kind in coco for group in scene.groups) for scene in drawn) / len(drawn)

    assert share(miniature.ORDINARY_SHARE) < 0.03
    assert 0.58 <= share(miniature.BOARD_B_SHARE) <= 0.72 and share(miniature.COCO_SHARE) > 0.62


# --- slots ------------------------------------------------------------------------------------------------------------

def scene_row(background: str, *objects: tuple[str, str, tuple], relation: list | None = None) -> dict:
    return {"background": background, "relation": relation, "count": 1,
            "objects": [{"kind": kind, "colour": colour, "size": "medium", "box": list(box)}
                        for kind, colour, box in objects]}


def test_slots_are_counted_given_the_object():
    left, right = (0.1, 0.4, 0.4, 0.8), (0.6, 0.4, 0.9, 0.8)
    truth = {"a": scene_row("grass", ("dog", "red", left), ("cat", "blue", right), relation=["dog", "left", "cat"]),
             "b": scene_row("snow", ("ball", "green", left), ("ball", "green", right)),
             "c": scene_row("sea", ("boat", "white", left)), "d": scene_row("room", ("cup", "black", left))}
    found = slot_accuracy({"a": ["草地上一只红狗在一只绿色的猫左边。"], "b": ["雪地上有三个绿色的球。"],
                           "c": ["沙滩上有两只白色的鸟和一艘船。", "不算"]}, truth)
    assert found["object_f1"] == pytest.approx(2 * 4 / (5 + 5)) and found["object_f1_n"] == 10
    assert (found["colour_accuracy"], found["colour_accuracy_n"]) == (pytest.approx(2 / 3), 3)
    assert found["colour_stated"] == pytest.approx(3 / 4)
    assert (found["count_accuracy"], found["count_accuracy_n"]) == (0, 1)
    assert (found["relation_accuracy"], found["relation_accuracy_n"]) == (1, 1)
    assert (found["background_accuracy"], found["background_accuracy_n"]) == (pytest.approx(2 / 3), 3)
    assert [image["file_name"] for image in found["per_image"]] == ["a", "b", "c", "d"]
    assert found["per_image"][3]["said"] == [] and found["images"] == 4
    json.dumps(found["per_image"])


def test_errors_are_named_and_what_is_not_stated_is_none():
    left, right = (0.1, 0.4, 0.4, 0.8), (0.6, 0.4, 0.9, 0.8)
    truth = {"all right": scene_row("grass", ("dog", "red", left)),
             "two": scene_row("grass", ("dog", "red", left), ("cat", "blue", right), relation=["dog", "left", "cat"]),
             "several": scene_row("snow", ("ball", "green", left), ("ball", "green", right))}
    said = {"all right": ["一只狗"], "two": ["雪地上一只红狗在一只红色的猫右边"], "several": ["三把绿色的伞"]}
    found = slot_accuracy(said, truth)["per_image"]
    assert [errors_of(image) for image in found] == [
        ["nothing wrong"], ["wrong colour", "wrong relation", "wrong background"], ["object missed", "object invented"]]
    shares = error_shares(found)
    assert shares["nothing wrong"] == shares["wrong colour"] == pytest.approx(100 / 3) and shares["wrong count"] == 0
    assert concept_recall(found) == {"ball": (0, 1), "cat": (1, 1), "dog": (2, 2)}


def test_a_relation_holds_either_way_round_or_by_the_boxes():
    left, right = (0.1, 0.4, 0.4, 0.8), (0.6, 0.4, 0.9, 0.8)
    row = scene_row("grass", ("dog", "red", left), ("cat", "blue", right), relation=["dog", "left", "cat"])
    assert holds(("dog", "left", "cat"), row) and holds(("cat", "right", "dog"), row)
    assert not holds(("cat", "left", "dog"), row) and not holds(("dog", "above", "cat"), row)
    assert not holds(("dog", "left", "bird"), row)
    assert holds(("dog", "left", "cat"), {**row, "relation": None})
