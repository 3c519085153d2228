"""Damaged files: every reader reads them rightly, leaves out and counts what is broken, or names the file. Never else."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import published
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from published import COCO, put

from clipcap_lib.config import InputError
from clipcap_lib.corpora import (
    SPLITS,
    TRANSLATED,
    Reading,
    aic_icc,
    coco_cn,
    flickr8k_cn,
    flickr30k_cn,
    hualu,
    lines,
    own_table,
)


@dataclass(frozen=True)
class Layout:
    """A corpus as published: what writes it, what reads it, and the files that say what is in it."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Reading]
    files: tuple[str, ...]


RUC = ("flickr30kzhbbosontrain", "flickr30kzhbbosonval", "flickr30kzhmbosontest")
LAYOUTS = {
    "flickr8k zhc": Layout(published.flickr8k, flickr8k_cn.read, (
        "data/flickr8ktrain.txt", "data/flickr8kval.txt", "data/flickr8ktest.txt", "data/flickr8kzhc.caption.txt")),
    "flickr8k zhb": Layout(published.flickr8k, partial(flickr8k_cn.read, captions="zhb"), ("data/flickr8kzhb.caption.txt",)),
    "flickr8k zhm": Layout(published.flickr8k, partial(flickr8k_cn.read, captions="zhm"),
                           ("data/flickr8kzhmtest.captions.txt",)),
    "flickr30k ruc": Layout(published.flickr30k, flickr30k_cn.read, tuple(
        file for name in RUC for file in (f"{name}/ImageSets/{name}.txt", f"{name}/TextData/seg.{name}.caption.txt"))),
    "flickr30k cna": Layout(published.flickr30k_cna, flickr30k_cn.read, (
        "train/flickr30k_cna_train.txt", "val/flickr30k_cna_val.txt", "flickr30k_cn_test.txt")),
    "aic-icc": Layout(published.aic, aic_icc.read, (published.TRAIN, "caption_validation_annotations_20170910.json")),
    "hualu": Layout(published.hualu_cup, hualu.read, ("train.csv",)),
    "coco-cn": Layout(published.coco_extended, coco_cn.read, (
        f"{COCO}/coco-cn_train.txt", f"{COCO}/coco-cn_val.txt", f"{COCO}/coco-cn_test.txt",
        f"{COCO}/imageid.human-written-caption.txt", f"{COCO}/imageid.human-written-tags.txt", coco_cn.EXTENSION)),
    "coco-cn translated": Layout(published.coco, partial(coco_cn.read, captions="manually-translated"),
                                 (f"{COCO}/imageid.manually-translated-caption.txt",)),
    "coco-cn machine": Layout(published.coco, partial(coco_cn.read, captions="machine-translated"),
                              (f"{COCO}/imageid.machine-translated-caption.bosonseg.txt",)),
    "own csv": Layout(published.own_csv, lambda folder: own_table.read(folder / "own.csv"), ("own.csv",)),
    "own jsonl": Layout(published.own_jsonl, lambda folder: own_table.read(folder / "own.jsonl"), ("own.jsonl",)),
}
FILES = [(layout, file) for layout, found in LAYOUTS.items() for file in found.files]
CHINESE = [(layout, file) for layout, file in FILES if file != published.TRAIN
           and not re.search(r"ImageSets|flickr8k(train|val|test)\.txt|coco-cn_(train|val|test)\.txt", file)]

each_file = pytest.mark.parametrize("layout, file", FILES)
each_text = pytest.mark.parametrize("layout, file", CHINESE)  # files that hold characters beyond ASCII


def images_of(reading: Reading) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {record.file_name: (record.split, record.captions) for record in reading.records}


def check_well_formed(reading: Reading, folder: Path) -> None:
    """What every reading must be, whatever the files were. In tables a caption may hold what begins a line elsewhere."""
    root, seen = os.path.realpath(folder), Counter()
    for record in reading.records:
        assert os.path.realpath(record.image).startswith(root + os.sep) and ".." not in record.image.parts
        assert record.image.is_file() and str(record.image).endswith(record.file_name)
        assert record.split in SPLITS and record.translated in TRANSLATED
        assert record.captions or record.split.startswith("board-")
        for text in (*record.captions, *record.tags):
            assert text == text.strip() and text.encode("utf-8")
            assert not any(ord(c) < 32 or c in "\ufffd\x7f" for c in text)
            if record.corpus in ("flickr8k-cn", "flickr30k-cn", "coco-cn"):
                assert not re.search(r"#zh[bcgm]#\d|COCO_\w+2014_\d{12}|\d{10}(\.jpg)?\s", text), "another line's key"
        seen[record.image] += 1
    assert max(seen.values(), default=1) == 1, "an image is in one record"
    for item in reading.left_out:
        assert item.reason and item.place.encode("utf-8"), "can be counted and written to a file"


# --- one damage, every file -------------------------------------------------------------------------------------------

@each_file
@pytest.mark.parametrize("change", [
    lambda content: b"\xef\xbb\xbf" + content, lambda content: content.replace(b"\n", b"\r\n"),
    lambda content: content.replace(b"\n", b"\r"), lambda content: content.rstrip(b"\n"),
    lambda content: content + b"\n\n"], ids=["BOM", "CRLF", "CR", "no last line end", "blank lines"])
def test_byte_order_marks_and_line_ends_of_other_systems_change_nothing(layout, file, change, tmp_path: Path):
    found = LAYOUTS[layout]
    expected = found.read(found.write(tmp_path))
    put(tmp_path / file, change((tmp_path / file).read_bytes()))
    assert found.read(tmp_path) == expected
    check_well_formed(expected, tmp_path)


@each_text
@pytest.mark.parametrize("encoding", ["gb18030", "big5", "utf-16", "utf-16-be"])
def test_another_encoding_is_named_with_its_file_and_line(layout, file, encoding, tmp_path: Path):
    found = LAYOUTS[layout]
    path = found.write(tmp_path) / file
    put(path, path.read_text(encoding="utf-8").encode(encoding, "replace"))
    with pytest.raises(InputError) as error:
        found.read(tmp_path)
    assert f"{path}:1" in str(error.value) or f"{path}:2" in str(error.value)


@each_text
def test_a_lossy_conversion_is_left_out_and_counted(layout, file, tmp_path: Path):
    """What a wrong decoding leaves, U+FFFD, is no character of any caption."""
    found = LAYOUTS[layout]
    path = found.write(tmp_path) / file
    content = path.read_text(encoding="utf-8")
    last = next(c for c in reversed(content) if "\u4e00" <= c <= "\u9fff")
    put(path, "\ufffd\ufffd".join(content.rsplit(last, 1)))
    if "tags" in file:
        assert any(item.reason == coco_cn.BAD_TAGS for item in found.read(tmp_path).left_out)
        return
    try:
        left_out = found.read(tmp_path).left_out
    except InputError as error:  # where a split or the whole table is left without an image
        assert lines.NOT_TEXT in str(error) or "no image of the split" in str(error)
    else:
        assert lines.NOT_TEXT in {item.reason for item in left_out if item.damaged}


@each_file
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf\r\n \n"], ids=["no bytes", "blank"])
def test_an_empty_file_is_named(layout, file, content, tmp_path: Path):
    found = LAYOUTS[layout]
    put(found.write(tmp_path) / file, content)
    with pytest.raises(InputError) as error:
        found.read(tmp_path)
    assert str(tmp_path / file) in str(error.value)


@each_file
def test_a_file_that_is_a_folder_or_missing_is_named(layout, file, tmp_path: Path):
    found = LAYOUTS[layout]
    path = found.write(tmp_path) / file
    path.unlink()
    optional = file in (coco_cn.EXTENSION, f"{COCO}/imageid.human-written-tags.txt", "train.csv",
                        published.TRAIN) or layout == "flickr30k cna"
    for _ in range(2):
        try:
            found.read(tmp_path)
        except InputError as error:
            assert path.name in str(error)
        else:
            assert optional
        path.mkdir(exist_ok=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_that_are_links_out_of_the_folder_are_no_images(layout, tmp_path: Path):
    found = LAYOUTS[layout]
    folder, secret = found.write(tmp_path / "corpus"), tmp_path / "secret.jpg"
    put(secret)
    images = {record.image for record in found.read(folder).records}
    for image in images:
        image.unlink()
        image.symlink_to(secret)
    try:
        reading = found.read(folder)
    except InputError as error:
        assert lines.NO_IMAGE in str(error)
    else:
        assert not reading.records and sum(
            item.reason in (lines.NO_IMAGE, hualu.NO_PHOTO) for item in reading.left_out) >= len(images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_links_in_a_circle_and_folders_named_like_images_are_no_images(layout, tmp_path: Path):
    found = LAYOUTS[layout]
    records = found.read(found.write(tmp_path)).records
    for number, record in enumerate(records):
        record.image.unlink()
        if number % 2:
            record.image.mkdir()
        else:
            record.image.symlink_to(record.image)
    try:
        assert not found.read(tmp_path).records
    except InputError as error:
        assert lines.NO_IMAGE in str(error)


@pytest.mark.parametrize("layout, file, number", [
    ("flickr8k zhc", "data/flickr8kzhc.caption.txt", 1), ("flickr30k ruc", f"{RUC[0]}/TextData/seg.{RUC[0]}.caption.txt", 1),
    ("coco-cn", f"{COCO}/imageid.human-written-caption.txt", 1), ("flickr30k cna", "train/flickr30k_cna_train.txt", 1)])
def test_two_captions_on_one_line_are_not_taken_for_one(layout, file, number, tmp_path: Path):
    found = LAYOUTS[layout]
    path = found.write(tmp_path) / file
    put(path, path.read_text(encoding="utf-8").replace("\n", "", number))
    reading = found.read(tmp_path)
    assert lines.TWO_CAPTIONS in {item.reason for item in reading.left_out if item.damaged}
    check_well_formed(reading, tmp_path)


def test_an_archive_from_a_mac_has_files_that_are_no_board_images(tmp_path: Path):
    put(published.hualu_cup(tmp_path) / "board-b/._b1.jpg")
    assert [r.file_name for r in hualu.read(tmp_path).records if r.split == "board-b"] == ["b1.jpg"]


# --- any damage -------------------------------------------------------------------------------------------------------

PIECES = [b"", b"\n", b"\r", b"\t", b" ", b"#", b"#zhc#0 ", b",", b'"', b"'", b"../", b"/etc/passwd", b"\\", b"\0", b"\xff",
          b"\xef\xbb\xbf", b"\xef\xbf\xbd", b"\xe3\x80\x80", b"\xe2\x80\xa8", b".jpg", b"null", b"[]", b"{}", b"[" * 3000,
          b"\\ud83d", b"\\u0000", b"9" * 5000, b"-1", b"1e999", b"NaN", b":n", b"x" * 400, "狗".encode(),
          "狗".encode("gb18030"), b"COCO_val2014_000000217153#0\t", b"COCO_train2014_000000000101", b"6228559981 ",
          b"../secret.jpg", b"secret"]


PLACE = st.floats(0, 1, exclude_max=True)  # in a file, as a share of its length


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple]:
    """What is done to a file: a few edits of bytes or lines, at places given as shares of its length."""
    edit = st.one_of(
        st.tuples(st.just("flip"), PLACE, st.integers(0, 7)), st.tuples(st.just("set"), PLACE, st.integers(0, 255)),
        st.tuples(st.just("drop"), PLACE, st.integers(1, 9)), st.tuples(st.just("double"), PLACE, st.integers(1, 60)),
        st.tuples(st.just("insert"), PLACE, st.sampled_from(PIECES)), st.tuples(st.just("cut"), PLACE, st.none()),
        st.tuples(st.just("drop line"), PLACE, st.none()), st.tuples(st.just("double line"), PLACE, st.none()),
        st.tuples(st.just("swap lines"), PLACE, PLACE))
    return draw(st.lists(edit, min_size=1, max_size=4))


def mutated(content: bytes, edits: list[tuple]) -> bytes:
    for what, share, how in edits:
        place = int(share * len(content))
        rows = content.split(b"\n")
        row = int(share * len(rows))
        if what == "flip" and content:
            content = content[:place] + bytes([content[place] ^ 1 << how]) + content[place + 1:]
        elif what == "set" and content:
            content = content[:place] + bytes([how]) + content[place + 1:]
        elif what == "drop":
            content = content[:place] + content[place + how:]
        elif what == "double":
            content = content[:place] + content[place:place + how] + content[place:]
        elif what == "insert":
            content = content[:place] + how + content[place:]
        elif what == "cut":
            content = content[:place]
        elif what == "drop line":
            content = b"\n".join(rows[:row] + rows[row + 1:])
        elif what == "double line":
            content = b"\n".join(rows[:row] + rows[row:row + 1] + rows[row:])
        elif what == "swap lines":
            other = int(how * len(rows))
            rows[row], rows[other] = rows[other], rows[row]
            content = b"\n".join(rows)
    return content


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Every layout in a folder of its own, with a file beside it that no reading may reach."""
    root = tmp_path_factory.mktemp("mutated")
    put(root / "secret.jpg")
    found = {layout: LAYOUTS[layout].write(root / layout) for layout in LAYOUTS}
    yield found
    shutil.rmtree(root)


@each_file
@settings(max_examples=60, deadline=timedelta(seconds=5), derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(edits=[("insert", 0.0, b"../")])
@given(edits=mutations())
def test_whatever_is_done_to_a_file_it_is_read_well_or_named(layout, file, corpora, edits):
    path, whole = corpora[layout] / file, (corpora[layout] / file).read_bytes()
    path.write_bytes(mutated(whole, edits))
    try:
        reading = LAYOUTS[layout].read(corpora[layout])
    except InputError as error:
        assert any(str(corpora[layout] / name) in str(error) for name in LAYOUTS[layout].files), error
        assert "\n" not in str(error), "one sentence, on one line"
    else:
        check_well_formed(reading, corpora[layout])
    finally:
        path.write_bytes(whole)


KEYS = {"data/flickr8kzhc.caption.txt": rb" ", f"{RUC[0]}/TextData/seg.{RUC[0]}.caption.txt": rb" ",
        "train/flickr30k_cna_train.txt": rb"[ \t]", f"{COCO}/imageid.human-written-caption.txt": rb"\t"}


@pytest.mark.parametrize("layout, file", [(layout, file) for layout, file in FILES if file in KEYS])
@settings(max_examples=60, deadline=timedelta(seconds=5), derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=PLACE, edits=st.lists(st.tuples(PLACE, st.integers(0, 255).filter(lambda byte: byte not in b"\r\n")),
                                 min_size=1, max_size=5))
def test_damage_to_one_caption_is_named_with_its_line_or_touches_no_other_image(layout, file, corpora, row, edits):
    path, whole = corpora[layout] / file, (corpora[layout] / file).read_bytes()
    expected = images_of(LAYOUTS[layout].read(corpora[layout]))
    rows = whole.rstrip(b"\n").split(b"\n")
    number = int(row * len(rows))
    key, space, text = re.fullmatch(rb"(\S+?)(" + KEYS[file] + rb")(.*)", rows[number]).groups()
    for share, byte in edits:
        place = int(share * len(text))
        text = text[:place] + bytes([byte]) + text[place + 1:]
    path.write_bytes(b"\n".join([*rows[:number], key + space + text, *rows[number + 1:]]))
    try:
        found = images_of(LAYOUTS[layout].read(corpora[layout]))
    except InputError as error:
        assert str(error).startswith(f"{path}:{number + 1}: ")
    else:
        mine = re.split(rb"[#.]", key)[0].decode() + ".jpg"
        assert {name: image for name, image in found.items() if name != mine} == {
            name: image for name, image in expected.items() if name != mine}
    finally:
        path.write_bytes(whole)
