"""The validator: captions, what readers leave out, and copies of images that were planted in drawn corpora and real ones."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import published
import pytest
from PIL import Image

from clipcap_lib import checks, cli, images, shards
from clipcap_lib.checks import Finding, check_captions, find_copies, near_pairs
from clipcap_lib.config import InputError, preset
from clipcap_lib.corpora import LeftOut, Record, lines, miniature
from clipcap_lib.files import read_json
from clipcap_lib.prepare import check, prepare

SMALL = {"flickr8k-cn": {"train": 40, "val": 8, "test": 8}, "hualu": {"train": 30, "board-a": 10, "board-b": 10},
         "coco-cn": {"train": 20, "val": 8, "test": 8}}


MINIATURE = preset("miniature")


def quiet(line: str) -> None:
    """A report that goes nowhere."""


def record(*captions: str, split: str = "train", corpus: str = "aic-icc", name: str = "1.jpg") -> Record:
    return Record(Path(name), name, corpus, split, captions)


def kinds(found) -> Counter:
    return Counter(finding.kind for finding in found)


# -- captions ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("caption, kind", [
    ("一个:m 戴:v 帽子:n 的:uj 男人:n 。:wj", checks.TAGGED), ("一个/m戴/v帽子/n", checks.TAGGED),
    ("两个 年轻人 在 外面", checks.SEGMENTED), ("两个\u3000年轻人", checks.SEGMENTED), ("。", checks.WORDLESS),
    ("！？", checks.WORDLESS), ("很" * 101, checks.LONG)])
def test_what_is_wrong_with_a_caption_is_found(caption, kind):
    assert kind in kinds(check_captions([record(caption)]))


@pytest.mark.parametrize("caption", ["一个穿着 T恤 的男人在海边。", "时间是12:30的火车", "一辆写着STOP的车", "他说:你好",
                                     "很" * 100, "一只狗在草地上奔跑， 后面跟着一个穿红色衣服的小男孩", "A man rides"])
def test_a_sound_caption_has_no_finding(caption):
    assert list(check_captions([record(caption)], set(caption))) == []


def test_characters_outside_the_vocabulary_are_named_with_their_place():
    found = list(check_captions([record("一只猫", "一只獴。", split="test", name="7.jpg")], "一只猫"))
    assert found == [Finding(checks.UNKNOWN, "aic-icc", "test", "7.jpg#1", "獴")]


def test_a_repeated_training_caption_is_told_with_its_first_place_and_others_are_not():
    rows = [record("一只猫", "一只狗"), record("一只猫", name="2.jpg"),
            record("一只猫", "一只猫", split="test", name="3.jpg")]
    assert [(f.kind, f.place, f.detail) for f in check_captions(rows)] == [
        (checks.REPEATED, "2.jpg#0", "一只猫 (first: 1.jpg#0)")]


def test_every_finding_is_one_line_of_the_file_whatever_is_in_it():
    found = [Finding("a kind", "hualu", "train", "1.jpg#0", '换行\n"引号", 逗号\u2028')]
    lines = checks.findings_file(found).splitlines()
    assert len(lines) == 2
    assert next(csv.DictReader(lines)) == {"kind": "a kind", "corpus": "hualu", "split": "train", "place": "1.jpg#0",
                                           "detail": '换行 "引号", 逗号'}


# -- copies ------------------------------------------------------------------------------------------------------------

def looks(content: bytes) -> tuple[str, np.ndarray]:
    return images.look(content, images.read_square(content, 104))


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


PLANTED = {  # ways to copy a picture
    "the same file": lambda content: content,
    "another quality": lambda content: encoded(Image.open(io.BytesIO(content)), 40),
    "half the size": lambda content: encoded(Image.open(io.BytesIO(content)).reduce(2)),
    "twice the size": lambda content: encoded((i := Image.open(io.BytesIO(content))).resize((2 * i.width, 2 * i.height))),
    "squashed": lambda content: encoded((i := Image.open(io.BytesIO(content))).resize((i.width, i.height * 3 // 4))),
    "as PNG": lambda content: (Image.open(io.BytesIO(content)).save(b := io.BytesIO(), "PNG"), b.getvalue())[1],
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return miniature.write_corpora(tmp_path_factory.mktemp("drawn"), images=SMALL, processes=1)


def photos(root: Path, corpus: str, split: str) -> list[Path]:
    truth = miniature.load_truth(root)
    names = sorted(name for (c, name), row in truth.items() if c == corpus and row["split"] == split)
    return [next((root / corpus).rglob(name)) for name in names]


def test_planted_leaks_are_found_and_removed_and_evaluation_images_stay(tmp_path):
    root = miniature.write_corpora(tmp_path / "corpora", images=SMALL, processes=1)
    before = prepare(MINIATURE, tmp_path / "clean" / "data", root, processes=1, report=quiet)
    clean = read_json(before / "manifest.json")
    assert clean["removed"] == 0 and not any(kind in checks.COPIES.values() for kind in clean["findings"])
    # every way of copying, from validation, test and boards, into training of the same corpus and of another
    sources = [photos(root, "flickr8k-cn", "val")[0], photos(root, "flickr8k-cn", "test")[0],
               photos(root, "hualu", "board-a")[0], photos(root, "hualu", "board-b")[0],
               photos(root, "coco-cn", "test")[0], photos(root, "coco-cn", "val")[0]]
    targets = photos(root, "flickr8k-cn", "train")[:3] + photos(root, "hualu", "train")[:3]
    for source, target, copy in zip(sources, targets, PLANTED.values(), strict=True):
        target.write_bytes(copy(source.read_bytes()))
    said: list[str] = []
    data = prepare(MINIATURE, tmp_path / "leaky" / "data", root, processes=1, report=said.append)
    manifest = read_json(data / "manifest.json")
    assert manifest["removed"] == 6
    assert any("6 training images are copies of validation, test or board images: removed" in line for line in said)
    with (data / "findings.csv").open(encoding="utf-8") as file:
        leaks = {row["place"]: row for row in csv.DictReader(file) if row["kind"].startswith(checks.LEAK)}
    assert {place: row["detail"].split()[1].rstrip(",") for place, row in leaks.items()} == {
        target.name: source.name for source, target in zip(sources, targets, strict=True)}
    assert all(row["detail"].endswith("removed") and row["split"] == "train" for row in leaks.values())
    assert sum("same file" in row["kind"] for row in leaks.values()) == 1
    for split in ("train", "val", "test", "board-a", "board-b"):
        names = set(stored(data, split)["file_name"][:])
        assert names == set(stored(before, split)["file_name"][:]) - {t.name for t in targets if split == "train"}
    assert manifest["images"] == {**clean["images"], "flickr8k-cn/train": 37, "hualu/train": 27}


def stored(data: Path, split: str) -> datasets.Dataset:
    files = [str(path) for path in sorted(data.glob(f"*-{split}-*.parquet"))]
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(data / "plain"))


def test_leaks_stay_if_asked_and_copies_within_training_always_do(tmp_path):
    root = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 12, "val": 4, "test": 4}},
                                   processes=1)
    train, test = photos(root, "flickr8k-cn", "train"), photos(root, "flickr8k-cn", "test")
    train[0].write_bytes(test[0].read_bytes())
    train[1].write_bytes(encoded(Image.open(train[2]), 50))
    test[1].write_bytes(test[2].read_bytes())
    said: list[str] = []
    data = prepare(MINIATURE, tmp_path / "kept" / "data", root, processes=1, report=said.append, keep_leaks=True)
    assert read_json(data / "manifest.json")["images"]["flickr8k-cn/train"] == 12 and any("kept" in line for line in said)
    data = prepare(MINIATURE, tmp_path / "removed" / "data", root, processes=1, report=quiet)
    manifest = read_json(data / "manifest.json")
    assert manifest["images"] == {"flickr8k-cn/train": 11, "flickr8k-cn/val": 4, "flickr8k-cn/test": 4}
    found = {kind: sum(row.values()) for kind, row in manifest["findings"].items()}
    assert {kind: found[kind] for kind in checks.COPIES.values() if kind in found} == {
        checks.COPIES[True, "leak"]: 1, checks.COPIES[False, "train"]: 1, checks.COPIES[True, "evaluation"]: 1}


def test_a_training_image_that_copies_training_and_test_is_a_leak_and_so_is_its_twin():
    rows = [record(name="a.jpg"), record(name="b.jpg"), record(name="c.jpg", split="test")]
    thumbnail = np.random.default_rng(0).integers(0, 256, (16, 16)).astype(np.uint8)
    found = find_copies(rows, ["x", "x", "x"], np.stack([thumbnail] * 3))
    assert [(c.image, c.other, c.kind) for c in found] == [(0, 2, checks.COPIES[True, "leak"]),
                                                           (1, 2, checks.COPIES[True, "leak"])]


def test_blank_images_are_no_copies_unless_the_file_is_the_same():
    blank = np.stack([np.full((16, 16), level, np.uint8) for level in (250, 250, 251)])
    assert not len(near_pairs(blank)[0])
    assert len(find_copies([record(name=f"{i}.jpg") for i in range(3)], ["a", "a", "b"], blank)) == 1


def test_buckets_find_the_pairs_that_comparing_all_finds(drawn):
    files = sorted(drawn.glob("[!l]*/**/*.jpg"))[:120]
    assert len(files) == 120
    squares = [images.read_square(path.read_bytes(), 104) for path in files]
    copies = [images.read_square(encoded(square, 60), 104) for square in squares[::4]]
    thumbnails = np.stack([images.look(b"", square)[1] for square in [*squares, *copies]])
    flat = thumbnails.reshape(len(thumbnails), -1).astype(float)
    distance = np.sqrt(np.square(flat[:, None] - flat[None]).mean(axis=-1))
    plain = {(i, j) for i, j in np.argwhere(distance <= checks.NEAR) if i < j}
    assert set(map(tuple, near_pairs(thumbnails)[0].tolist())) == plain == {(4 * k, 120 + k) for k in range(30)}


# -- the command and the real corpus -----------------------------------------------------------------------------------

def test_check_reports_damage_with_exit_code_0_and_unusable_input_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path / "runs"))
    root = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 8, "val": 4, "test": 4}},
                                   processes=1)
    train = photos(root, "flickr8k-cn", "train")
    train[0].write_bytes(b"")
    train[1].write_bytes(train[1].read_bytes()[:400])
    train[2].unlink()
    assert cli.main(["prepare", "--check", "--data-root", str(root)]) == 0
    said = capsys.readouterr().out
    file = tmp_path / "runs" / "miniature" / "findings.csv"
    with file.open(encoding="utf-8") as lines:
        rows = {row["place"]: row["kind"] for row in csv.DictReader(lines)}
    assert [rows[str(path)] for path in train[:3]] == [images.EMPTY_FILE, images.UNREADABLE, "image file is missing"]
    assert str(file) in said and images.EMPTY_FILE in said
    assert not (tmp_path / "runs" / "miniature" / "data").exists(), "it only looks"
    (root / "flickr8k-cn" / "data" / "flickr8kzhc.caption.txt").write_text("no key here\n", encoding="utf-8")
    assert cli.main(["prepare", "--check", "--data-root", str(root)]) == 2
    assert "flickr8kzhc.caption.txt:1" in capsys.readouterr().err


def test_a_corpus_that_was_mended_is_read_anew(tmp_path):
    """In one process, as a notebook's kernel is."""
    path = tmp_path / "captions.txt"
    for name in ("old.jpg", "new_name.jpg", None):
        path.write_text(f"a.jpg#0 狗\n{name}#0 猫\n" if name else "a.jpg#0 狗", encoding="utf-8")
        left_out = [LeftOut(f"{path}:2", lines.NO_SPLIT)]
        assert [f.detail for f in checks.check_left_out("x", left_out, [])] == [name or ""]


def test_thousands_of_alike_frames_are_told_of_once_each():
    """Every pair of them is near: a list of pairs in Python would take minutes."""
    random = np.random.default_rng(0)
    scene = np.cumsum(np.cumsum(random.normal(size=(16, 16)), axis=0), axis=1)
    scene = 200 * (scene - scene.min()) / np.ptp(scene)
    frames = np.clip(scene + random.normal(0, 0.5, (1500, 16, 16)), 0, 255).astype(np.uint8)
    rows = [record(name=f"{number}.jpg") for number in range(len(frames))]
    began = time.process_time()
    found = find_copies(rows, [str(number) for number in range(len(frames))], frames)
    assert time.process_time() - began < 15
    assert [copy.image for copy in found] == list(range(1, 1500)) and all(copy.other < copy.image for copy in found)


def test_in_the_real_flickr8k_cn_what_is_known_to_be_there_is_found(real_data_root, tmp_path):
    """All but one number of the corpus's description: 7,224 captions are repeated to the letter, and one more when the
    white space around captions is removed, as readers do."""
    found = check(preset("flickr8k-small"), tmp_path / "findings.csv", real_data_root, report=quiet)
    assert kinds(found)["image is in no split"] == 91
    assert kinds(found)[checks.REPEATED] == 7225
    assert raw_repeats(real_data_root / "flickr8k-cn" / "data") == 7224
    assert [f.detail for f in found if f.kind == checks.NO_PHOTO] == ["2258277193_586949ec62.jpg.1"]
    copies = [f for f in found if f.kind in checks.COPIES.values()]
    assert [f.kind for f in copies] == [checks.COPIES[True, "train"]]
    assert {copies[0].place, copies[0].detail.split()[1].rstrip(",")} == {"2851198725_37b6027625.jpg",
                                                                          "3050606344_af711c726c.jpg"}
    assert set(kinds(found)) == {"image is in no split", checks.REPEATED, checks.NO_PHOTO, checks.COPIES[True, "train"],
                                 checks.UNKNOWN}


def raw_repeats(folder: Path) -> int:
    """Training captions that the file has had before, letter by letter."""
    train = set((folder / "flickr8ktrain.txt").read_text().split())
    lines = (line.partition(" ") for line in (folder / "flickr8kzhc.caption.txt").read_text(encoding="utf-8").split("\n"))
    captions = [text for key, _, text in lines if key.partition(".jpg")[0] in train]
    return len(captions) - len(set(captions))


def test_copies_planted_among_real_photos_are_found(real_data_root, tmp_path):
    """Re-encoded and resized photos, and no others: the thresholds hold on photos too."""
    files = sorted((real_data_root / "flickr8k-cn" / "Flicker8k_Dataset").glob("*.jpg"))[:300]
    contents = [path.read_bytes() for path in files]
    contents += [copy(content) for content, copy in zip(contents, PLANTED.values(), strict=False)]
    digests, thumbnails = zip(*map(looks, contents), strict=True)
    rows = [record(name=f"{i}.jpg", split="train" if i < 300 else "test") for i in range(len(contents))]
    found = find_copies(rows, digests, np.stack(thumbnails))
    assert {(copy.image, copy.other) for copy in found} == {(i, 300 + i) for i in range(len(PLANTED))}


def test_captions_that_cannot_be_read_are_a_finding_if_they_are_not_those_asked_for(drawn, tmp_path):
    root = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 6, "val": 3, "test": 3}},
                                   processes=1)
    (root / "flickr8k-cn" / "data" / "flickr8kzhb.caption.txt").write_text("一只 狗\n", encoding="utf-8")
    found = check(MINIATURE, tmp_path / "findings.csv", root, report=quiet)
    assert [f.corpus for f in found if f.kind == "captions cannot be read"] == ["flickr8k-cn (zhb)"]


def test_a_corpus_whose_training_images_are_all_leaks_is_refused(tmp_path):
    root = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 2, "val": 2, "test": 2}},
                                   processes=1)
    for target, source in zip(photos(root, "flickr8k-cn", "train"), photos(root, "flickr8k-cn", "test"), strict=True):
        target.write_bytes(source.read_bytes())
    with pytest.raises(InputError, match="no image is left to train on, all of them are copies of evaluation images"):
        prepare(MINIATURE, tmp_path / "run" / "data", root, processes=1, report=quiet)


def test_a_corpus_whose_photos_are_missing_or_all_unreadable_is_told_of_in_full(tmp_path):
    folder = published.flickr8k(tmp_path / "root" / "flickr8k-cn")  # its photos are no images
    found = check(MINIATURE, tmp_path / "findings.csv", tmp_path / "root", processes=1, report=quiet)
    assert kinds(found)[images.UNREADABLE] == 3
    with pytest.raises(InputError, match="no image is left to train on, all of them cannot be read"):
        prepare(MINIATURE, tmp_path / "run" / "data", tmp_path / "root", processes=1, report=quiet, skip_damaged=True)
    for path in (folder / "Flicker8k_Dataset").iterdir():
        path.unlink()
    found = check(MINIATURE, tmp_path / "findings.csv", tmp_path / "root", processes=1, report=quiet)
    assert kinds(found)["image file is missing"] == 3
    with pytest.raises(InputError, match="no training images in flickr8k-cn"):
        prepare(MINIATURE, tmp_path / "run" / "data", tmp_path / "root", processes=1, report=quiet, skip_damaged=True)


def test_a_shard_keeps_the_order_of_its_rows_when_some_are_taken_out(drawn, tmp_path):
    rows = [Record(path, path.name, "hualu", "train", ("一只狗",)) for path in photos(drawn, "hualu", "train")[:6]]
    with shards.workers(1) as pool:
        parts = shards.process({("hualu", "train"): rows}, tmp_path, 40, pool, quiet)
    (name, part), = parts.items()
    shards.without(tmp_path / name, part, rows, {1, 4})
    again = shards.without(tmp_path / name, part, rows, {1, 4})
    table = stored(tmp_path, "train")
    assert table["file_name"][:] == [rows[i].file_name for i in (0, 2, 3, 5)]
    assert again != part.content and table[0]["image"].size == (40, 40)
