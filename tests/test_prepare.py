"""Prepared data: images of every kind read as they look, damage named, a killed run that goes on, memory, plain loading."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import psutil
import published
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from clipcap_lib import images, shards
from clipcap_lib.bench_memory import peak_memory
from clipcap_lib.config import InputError, preset
from clipcap_lib.corpora import miniature
from clipcap_lib.data import check_without, load_prepared, to_pixels
from clipcap_lib.explorer import open_image
from clipcap_lib.files import exclusive, read_json, write_json
from clipcap_lib.prepare import check, options_of, prepare, prepare_again

MINIATURE = preset("miniature")
RED, BLUE, WHITE, GREY = (220, 30, 30), (30, 60, 200), (255, 255, 255), (128, 128, 128)


def quiet(line: str) -> None:
    """A report that goes nowhere."""


# -- images that are unusual, and right --------------------------------------------------------------------------------

def halves(left, right, size=(64, 64), mode: str = "RGB") -> Image.Image:
    """An image whose left half is of one colour and whose right half of another."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def content(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif_rotated(orientation: int, kind: str = "JPEG") -> bytes:
    """An image stored turned, whose Exif says how to turn it back: upright, its left half is red and its right one blue."""
    stored = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
              Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE,
              Image.Transpose.ROTATE_270)[orientation - 2]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return content(halves(RED, BLUE).transpose(stored), kind, quality=95, exif=exif)


def xmp_rotated() -> bytes:
    """The same said in XMP alone, as some programs do."""
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    return content(halves(RED, BLUE).transpose(Image.Transpose.ROTATE_90), "PNG", pnginfo=note)


def palette(**options) -> bytes:
    image = halves(RED, BLUE).quantize(4)
    return content(image, "PNG", **options)


def palette_with_transparency() -> bytes:
    """Half of it shows nothing; the colour that is stored there, blue, must not appear."""
    image = halves(RED, BLUE).quantize(4)
    return content(image, "PNG", transparency=image.getpixel((60, 5)))


def sixteen_bits(low: int, high: int) -> bytes:
    return content(Image.fromarray(np.repeat(np.array([[low, high]], np.uint16), 64, axis=0).repeat(32, axis=1)), "PNG")


def sixteen_bits_rgb() -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but cannot write: left half red, right half blue."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = b"\0" + b"".join(struct.pack(">HHH", *(v * 257 for v in colour)) * 32 for colour in (RED, BLUE))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(row * 64)) + chunk(b"IEND", b""))


def animated(kind: str) -> bytes:
    """The first of three frames counts."""
    frames = [halves(RED, BLUE), halves(BLUE, WHITE), halves(WHITE, WHITE)]
    return content(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **(
        {"lossless": True} if kind == "WEBP" else {}))


RIGHT = {  # what is in the file, and what its left and right halves look like
    "RGB JPEG": (lambda: content(halves(RED, BLUE), "JPEG", quality=95), RED, BLUE),
    "CMYK JPEG": (lambda: content(halves(RED, BLUE).convert("CMYK"), "JPEG", quality=95), RED, BLUE),
    "CMYK TIFF": (lambda: content(halves(RED, BLUE).convert("CMYK"), "TIFF"), RED, BLUE),
    "grey": (lambda: content(halves(40, 200, mode="L"), "PNG"), (40,) * 3, (200,) * 3),
    "grey with transparency": (lambda: content(halves((40, 255), (40, 0), mode="LA"), "PNG"), (40,) * 3, WHITE),
    "one bit": (lambda: content(halves(0, 255, mode="1"), "PNG"), (0,) * 3, WHITE),
    "16-bit grey": (lambda: sixteen_bits(40 * 257, 200 * 257), (40,) * 3, (200,) * 3),
    "16-bit grey TIFF": (lambda: content(Image.open(io.BytesIO(sixteen_bits(10280, 51400))), "TIFF"), (40,) * 3, (200,) * 3),
    "16-bit RGB": (sixteen_bits_rgb, RED, BLUE),
    "floats TIFF": (lambda: content(halves(0.25, 0.75, mode="F"), "TIFF"), (64,) * 3, (191,) * 3),
    "palette": (palette, RED, BLUE),
    "palette with transparency": (palette_with_transparency, RED, WHITE),
    "RGBA": (lambda: content(halves((*RED, 255), (*BLUE, 0), mode="RGBA"), "PNG"), RED, WHITE),
    "half transparent": (lambda: content(halves((*RED, 255), (0, 0, 0, 127), mode="RGBA"), "PNG"), RED, GREY),
    "mirrored": (lambda: exif_rotated(2), RED, BLUE),
    "turned by 180": (lambda: exif_rotated(3), RED, BLUE),
    "upside down": (lambda: exif_rotated(4), RED, BLUE),
    "transposed": (lambda: exif_rotated(5), RED, BLUE),
    "turned by 90": (lambda: exif_rotated(6), RED, BLUE),
    "transversed": (lambda: exif_rotated(7), RED, BLUE),
    "turned by 270": (lambda: exif_rotated(8), RED, BLUE),
    "turned PNG": (lambda: exif_rotated(6, "PNG"), RED, BLUE),
    "turned PNG, by XMP": (xmp_rotated, RED, BLUE),
    "turned WebP": (lambda: exif_rotated(6, "WEBP"), RED, BLUE),
    "turned TIFF": (lambda: exif_rotated(6, "TIFF"), RED, BLUE),
    "Exif that is none": (lambda: content(halves(RED, BLUE), "JPEG", quality=95, dpi=(72, 72), exif=b"Exif\0\0no TIFF"), RED,
                          BLUE),
    "Exif that is right but for a tag": (lambda: exif_with_a_wrong_tag(), RED, BLUE),
    "Exif that is none, PNG": (lambda: content(halves(RED, BLUE), "PNG", exif=b"no TIFF either"), RED, BLUE),
    "Exif that ends in the middle": (lambda: broken_exif(), RED, BLUE),
    "animated GIF": (lambda: animated("GIF"), RED, BLUE),
    "animated PNG": (lambda: animated("PNG"), RED, BLUE),
    "animated WebP": (lambda: animated("WEBP"), RED, BLUE),
}


@pytest.fixture
def corpus(tmp_path) -> Path:
    return miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 10, "val": 3, "test": 2}},
                                   processes=1)


def photo(corpus: Path, number: int = 0) -> Path:
    """A training photo's file."""
    names = (corpus / "flickr8k-cn" / "data" / "flickr8ktrain.txt").read_text().split()
    return corpus / "flickr8k-cn" / "Flicker8k_Dataset" / f"{names[number]}.jpg"


@pytest.mark.parametrize("name", RIGHT)
def test_an_unusual_image_is_read_as_it_looks(name):
    make, left, right = RIGHT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of Exif
        opened = to_pixels(Image.open(io.BytesIO(make())), 32).permute(1, 2, 0)  # as `ClipCap.caption` sees it
        shown = open_image(make()).resize((32, 32))
    read = images.read_square(make(), 32)
    predicted = to_pixels(read, 32).permute(1, 2, 0)  # as `predict` hands it to a model: it must not be turned once more
    explored = to_pixels(open_image(make()), 32).permute(1, 2, 0)  # and the explorer
    for square in (read, predicted, opened, shown, explored):
        pixels = np.asarray(square).astype(int)
        assert pixels.shape == (32, 32, 3)
        assert np.abs(pixels[4:28, 4:12] - left).max() <= 6, pixels[16, 8]
        assert np.abs(pixels[4:28, 20:28] - right).max() <= 6, pixels[16, 24]


def test_prepared_data_that_cannot_be_unpacked_is_one_sentence(corpus, tmp_path, monkeypatch):
    data = prepare(MINIATURE, tmp_path / "data", corpus, processes=1, report=quiet)
    shutil.rmtree(data / "cache", ignore_errors=True)
    next(data.glob("*train*.parquet")).write_bytes(b"no Parquet")
    with pytest.raises(InputError, match="the prepared images cannot be read, or not be unpacked into .*cache"):
        load_prepared(data, "train")

    def full(*_, **__):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from error

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(InputError, match="unpacked into .*cache .*No space left on device.*make room"):
        load_prepared(data, "val")


def test_unusual_images_are_stored_as_they_look(corpus, tmp_path):
    """Through all of prepare, in files called .jpg, as downloads have them."""
    chosen = ["CMYK JPEG", "16-bit grey", "palette with transparency", "turned by 90", "animated GIF"]
    for number, name in enumerate(chosen):
        photo(corpus, number).write_bytes(RIGHT[name][0]())
    data = prepare(MINIATURE, tmp_path / "data", corpus, processes=1, report=quiet)
    rows = plain(data, "train")
    found = dict(zip(rows["file_name"][:], rows["image"][:], strict=True))
    for number, name in enumerate(chosen):
        image = found[photo(corpus, number).name]
        assert image.size == (MINIATURE.stored_size,) * 2 and image.mode == "RGB"
        for place, colour in zip((0.2, 0.8), RIGHT[name][1:], strict=True):
            pixel = image.getpixel((int(place * image.width), image.height // 2))
            assert np.abs(np.array(pixel) - colour).max() <= 8, (name, pixel)


def bomb() -> bytes:
    """A PNG of 900 million pixels in under a megabyte."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packed = zlib.compressobj()
    body = b"".join(packed.compress(bytes(30001 * 100)) for _ in range(300)) + packed.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def broken_exif() -> bytes:
    """Sound pixels behind an Exif block that ends in the middle."""
    return content(halves(RED, BLUE), "JPEG", quality=95, dpi=(72, 72), exif=Image.Exif().tobytes() + b"II*\0\x08\0\0\0\x09")


def exif_with_a_wrong_tag() -> bytes:
    """Turned by 180; the unit of its resolution has four bytes, which Pillow reads but cannot write."""
    tags = struct.pack("<H2HII2HIIxxxx", 2, 0x112, 3, 1, 3, 0x128, 4, 1, 2)
    turned = halves(RED, BLUE).transpose(Image.Transpose.ROTATE_180)
    return content(turned, "JPEG", quality=95, exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)


BROKEN = {
    "zero bytes": (lambda sound: b"", images.EMPTY_FILE),
    "truncated": (lambda sound: sound[:len(sound) // 2], images.UNREADABLE),
    "a header and no more": (lambda sound: sound[:30], images.UNREADABLE),
    "a page of text": (lambda sound: b"<html>404 Not Found</html>", images.UNREADABLE),
    "PostScript, which would call a program": (lambda sound: content(halves(RED, BLUE), "EPS"), images.UNREADABLE),
    "a decompression bomb": (lambda sound: bomb(), images.TOO_LARGE),
    "more pixels than any photo": (lambda sound: content(Image.new("L", (9000, 9000)), "PNG"), images.TOO_LARGE),
    "a truncated PNG": (lambda sound: content(halves(RED, BLUE), "PNG")[:80], images.UNREADABLE),
    "an end that never came, and zeros in its place": (
        lambda sound: sound[:len(sound) * 2 // 3] + bytes(len(sound) // 3), images.UNREADABLE),
    "a truncated GIF": (lambda sound: animated("GIF")[:60], images.UNREADABLE),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named_or_left_out_and_counted(name, corpus, tmp_path):
    damage, reason = BROKEN[name]
    path = photo(corpus)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{path.name}: {reason}.*--skip-damaged"):
        prepare(MINIATURE, tmp_path / "data", corpus, processes=1, report=quiet)
    data = prepare(MINIATURE, tmp_path / "data", corpus, processes=1, report=quiet, skip_damaged=True)
    manifest = read_json(data / "manifest.json")
    assert manifest["left_out"] == {reason: 1} and manifest["images"]["flickr8k-cn/train"] == 9
    assert path.name not in plain(data, "train")["file_name"][:]
    found = check(MINIATURE, tmp_path / "findings.csv", corpus, processes=1, report=quiet)
    assert [(f.kind, f.place) for f in found if f.kind == reason] == [(reason, str(path))]


@pytest.mark.parametrize("seed", range(40))
def test_bytes_changed_at_random_give_an_image_or_a_reason(seed):
    random = np.random.default_rng(seed)
    for make, _, _ in RIGHT.values():
        damaged = bytearray(make())
        for place in random.integers(0, len(damaged), 8):
            damaged[place] = random.integers(256)
        try:
            assert images.read_square(bytes(damaged), 16).size == (16, 16)
        except images.ImageError as error:
            assert error.reason in (images.UNREADABLE, images.TOO_LARGE)


def test_a_file_of_absurd_length_is_not_read(tmp_path):
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(20 * 2 ** 30)  # a hole: it takes no room, and would take all memory
    with pytest.raises(images.ImageError, match=images.TOO_LARGE):
        images.read_file(tmp_path / "huge.jpg")


WHOLE = {  # files of each format, the first of several frames first
    "JPEG": lambda: content(picture(), "JPEG"), "progressive JPEG": lambda: content(picture(), "JPEG", progressive=True),
    "PNG": lambda: content(picture(), "PNG"), "GIF": lambda: content(picture(), "GIF"),
    "animated PNG": lambda: content(picture(), "PNG", save_all=True, append_images=[picture().rotate(90)]),
    "WebP": lambda: content(picture(), "WEBP"), "lossless WebP": lambda: content(picture(), "WEBP", lossless=True),
    "BMP": lambda: content(picture(), "BMP"), "TIFF": lambda: content(picture(), "TIFF"),
    "packed TIFF": lambda: content(picture(), "TIFF", compression="tiff_lzw"),
}


def picture() -> Image.Image:
    """Noise over slopes: no two regions alike, so that a missing one shows."""
    slopes = np.add.outer(np.arange(64) * 2, np.arange(64) * 2)
    noise = np.random.default_rng(0).integers(0, 40, (64, 64))
    return Image.fromarray(np.stack([slopes, slopes[::-1], noise + 100], axis=-1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("name, filled", [(name, filled) for name in WHOLE for filled in (False, True)
                                          if not (filled and name in ("BMP", "TIFF"))])  # zeros are black pixels there
def test_a_file_that_ends_early_is_no_image_or_the_whole_one(name, filled):
    """Wherever a download broke off, and whether or not the rest of its room was filled with zeros."""
    whole = WHOLE[name]()
    expected = np.asarray(images.read_square(whole, 32))
    places = {*np.linspace(0, len(whole) - 40, 60).astype(int), *(range(len(whole) - 12, len(whole)) if not filled else ())}
    for place in sorted(places):
        try:
            found = images.read_square(whole[:place] + bytes(len(whole) - place if filled else 0), 32)
        except images.ImageError as error:
            assert error.reason in (images.UNREADABLE, images.EMPTY_FILE, images.TOO_LARGE)
        else:
            assert np.array_equal(found, expected), f"cut at {place} of {len(whole)} bytes"


def test_an_ordinary_photo_is_stored_as_the_plain_twin_stores_it(corpus):
    path = photo(corpus)
    assert images.jpeg(images.read_square(path.read_bytes(), 104)) == images.bare_jpeg(path, 104)


# -- the files ---------------------------------------------------------------------------------------------------------

def plain(data: Path, split: str) -> datasets.Dataset:
    """The prepared rows by nothing but `datasets`."""
    files = [str(path) for path in sorted(data.glob(f"*-{split}-*.parquet"))]
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(data / "plain"))


def test_prepared_files_load_and_stream_with_plain_datasets(corpus, tmp_path):
    data = prepare(MINIATURE, tmp_path / "data", corpus, processes=1, report=quiet)
    rows = plain(data, "val")
    assert isinstance(rows.features["image"], datasets.Image) and isinstance(rows[0]["image"], Image.Image)
    assert {name: rows.features[name].dtype for name in ("file_name", "corpus", "split", "translated")} == dict.fromkeys(
        ("file_name", "corpus", "split", "translated"), "string")
    files = [str(path) for path in data.glob("*-val-*.parquet")]
    streamed = list(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True))
    assert [row["file_name"] for row in streamed] == rows["file_name"][:]
    assert [row["captions"] for row in streamed] == rows["captions"][:] and len(streamed[0]["captions"]) == 5


def test_the_schema_of_shards_is_the_one_that_datasets_writes():
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "file_name": text, "corpus": text, "split": text,
                                  "captions": datasets.List(text), "translated": text, "tags": datasets.List(text)})
    assert shards.schema().equals(features.arrow_schema, check_metadata=True)
    assert shards.schema().metadata == features.arrow_schema.metadata


def test_tags_are_a_typed_list_of_the_prepared_rows_and_empty_where_there_are_none(tmp_path):
    """COCO-CN as published, with tags for two of three images, and a corpus without any; loaded as one, and streamed."""
    published.coco(tmp_path / "root" / "coco-cn")
    published.aic(tmp_path / "root" / "aic-icc")
    for number, path in enumerate(sorted(tmp_path.rglob("*.jpg"))):
        Image.effect_noise((40, 40), 40 + number).convert("RGB").save(path)
    data = prepare(MINIATURE, tmp_path / "data", tmp_path / "root", processes=1, report=quiet)
    files = [str(path) for path in sorted(data.glob("*.parquet"))]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "plain"))
    assert rows.features["tags"] == rows.features["captions"] == datasets.List(datasets.Value("string"))
    found = {(row["corpus"], row["split"]): row["tags"] for row in rows}
    assert found == {("coco-cn", "train"): ["长颈鹿", "草地"], ("coco-cn", "val"): [],
                     ("coco-cn", "test"): ["男人", "女人", "手机"], ("aic-icc", "train"): [], ("aic-icc", "val"): []}
    streamed = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert [row["tags"] for row in streamed] == rows["tags"][:]
    before = read_json(data / "manifest.json")["fingerprint"]
    file = tmp_path / "root" / "coco-cn" / published.COCO / "imageid.human-written-tags.txt"
    file.write_text(file.read_text(encoding="utf-8").replace("草地", "草原"), encoding="utf-8")
    prepare(MINIATURE, data, tmp_path / "root", processes=1, report=quiet)
    assert read_json(data / "manifest.json")["fingerprint"] != before
    assert plain(data, "train")["tags"][:][-1] == ["长颈鹿", "草原"]


KILLED = """
import sys
from pathlib import Path
from clipcap_lib import shards
from clipcap_lib.config import preset
from clipcap_lib.prepare import prepare

if __name__ == "__main__":
    shards.SHARD_IMAGES = 20
    prepare(preset("miniature"), Path(sys.argv[2]), Path(sys.argv[1]), processes=2)
"""


def test_a_run_that_is_killed_goes_on_where_it_was_and_ends_with_the_same_files(tmp_path, monkeypatch):
    root = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 240, "val": 20, "test": 20}},
                                   processes=1)
    for path in list(root.rglob("Flicker8k_Dataset/*.jpg")):  # large photos, so that there is time to kill it
        Image.open(path).resize((1000, 1000)).save(path, quality=80)
    script, data = tmp_path / "run.py", tmp_path / "killed" / "data"
    script.write_text(KILLED, encoding="utf-8")
    run = subprocess.Popen([sys.executable, str(script), str(root), str(data)], stdout=subprocess.PIPE, text=True,
                           env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    line = run.stdout.readline()
    workers = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=30)
    run.stdout.close()
    total = int(re.fullmatch(r"prepare: 20/(\d+) images, .*\n", line)[1])
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "no worker outlives the run that started it"
    finished = {path.name: path.stat().st_mtime_ns for path in data.glob("*.parquet")
                if (data / f".{path.name}.looks").is_file()}
    assert 1 <= len(finished) < total // 20 and not (data / "manifest.json").exists()
    (data / ".of-another-run.1.partial").write_bytes(b"cut off")
    monkeypatch.setattr("clipcap_lib.shards.SHARD_IMAGES", 20)
    said: list[str] = []
    prepare(MINIATURE, data, root, processes=1, report=said.append)
    rest = total - sum(pq.ParquetFile(data / name).metadata.num_rows for name in finished)
    assert said[-2].startswith(f"prepare: {rest}/{rest} images"), "only what was not whole is read again"
    assert {name: (data / name).stat().st_mtime_ns for name in finished} == finished, "what was whole is left alone"
    assert not list(data.glob(".*.partial"))
    whole = prepare(MINIATURE, tmp_path / "whole" / "data", root, processes=1, report=quiet)
    assert read_json(data / "manifest.json")["fingerprint"] == read_json(whole / "manifest.json")["fingerprint"]
    for path in whole.glob("*.parquet"):
        assert path.read_bytes() == (data / path.name).read_bytes()


@pytest.fixture
def small(tmp_path) -> tuple[Path, Path]:
    """A drawn corpus, and what was prepared of it, in two shards of training images."""
    root = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 24, "val": 4, "test": 4}},
                                   processes=1)
    return root, prepare(MINIATURE, tmp_path / "run" / "data", root, processes=1, report=quiet)


def test_a_run_killed_while_it_clears_old_data_leaves_none_that_passes_for_whole(small, monkeypatch):
    root, data = small
    real = Path.unlink

    def killed(path: Path, *arguments, **options) -> None:
        if path.suffix == ".parquet":
            raise KeyboardInterrupt
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(MINIATURE, vocabulary_minimum=2), data, root, processes=1, report=quiet)
    monkeypatch.setattr(Path, "unlink", real)
    assert not (data / "manifest.json").exists()


@pytest.mark.parametrize("lost", ["flickr8k-cn-test-00000.parquet", "references-test.json", "tokenizer/tokenizer.json"])
def test_a_file_that_is_gone_is_made_again(small, lost):
    root, data = small
    fingerprint = read_json(data / "manifest.json")["fingerprint"]
    (data / lost).unlink()
    said: list[str] = []
    prepare(MINIATURE, data, root, processes=1, report=said.append)
    assert (data / lost).is_file() and "nothing has changed" not in said[-1]
    assert read_json(data / "manifest.json")["fingerprint"] == fingerprint
    prepare(MINIATURE, data, root, processes=1, report=said.append)
    assert "nothing has changed" in said[-1]


def test_what_cannot_be_read_stops_each_time_and_keeps_the_shards(small):
    root, data = small
    photo(root, 5).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match="image file is empty"):
            prepare(MINIATURE, data, root, processes=1, report=quiet)
        assert list(data.glob("*.parquet")) and not (data / "manifest.json").exists()
    said: list[str] = []
    prepare(MINIATURE, data, root, processes=1, report=said.append, skip_damaged=True)
    assert len(said) == 1, "the shards are used again"
    assert "findings (listed in run/data/findings.csv)" in said[0] and (data / "findings.csv").is_file()
    assert len(plain(data, "train")) == 23
    with pytest.raises(InputError, match="image file is empty"):
        prepare(MINIATURE, data, root, processes=1, report=quiet)
    prepare(MINIATURE, data, root, processes=1, report=said.append, skip_damaged=True)
    assert "nothing has changed" in said[-1]


def test_where_what_is_asked_for_is_not_prepared_what_is_there_is_named(tmp_path):
    images = {"hualu/train": 3, "hualu/board-a": 2, "coco-cn/train": 3, "coco-cn/val": 1, "other/test": 1}
    write_json(tmp_path / "manifest.json", {"images": images})
    with pytest.raises(InputError, match="no prepared images for 'bord-a'; .* prepare have train, board-a, val, test$"):
        load_prepared(tmp_path, "bord-a")
    check_without(tmp_path, ["hualu"])
    for without in (["hualu", "coco-cn"], ["coco-cn", "other", "hualu"]):
        with pytest.raises(InputError, match="--without leaves no corpus to train on; there are hualu, coco-cn, other"):
            check_without(tmp_path, without)


def test_preparing_again_keeps_the_options(small, monkeypatch, tmp_path):
    root, data = small
    photo(root, 5).write_bytes(b"")
    prepare(MINIATURE, data, root, processes=1, report=quiet, skip_damaged=True, captions={"flickr8k-cn": "zhc"})
    mark = read_json(data / "manifest.json")["fingerprint"]
    monkeypatch.delenv("CLIPCAP_DATA", raising=False)
    said: list[str] = []
    prepare_again(MINIATURE, data, report=said.append)
    assert read_json(data / "manifest.json")["fingerprint"] == mark and "nothing has changed" in said[-1]
    assert "skip_damaged True" in said[0] and "zhc" in said[0]
    moved = root.rename(tmp_path / "moved")
    prepare_again(MINIATURE, data, moved, report=said.append)
    assert read_json(data / "manifest.json")["fingerprint"] == mark
    assert options_of(data)["data_root"] == str(moved)


def test_options_outlive_damage_and_a_root_does_not_replace_a_table(small, tmp_path, monkeypatch):
    root, data = small
    monkeypatch.delenv("CLIPCAP_DATA", raising=False)
    names = (root / "flickr8k-cn" / "data" / "flickr8ktrain.txt").read_text().split()
    rows = [f"{name}.jpg,一只狗,{split}" for name, split in zip(names, ["val", "test", *["train"] * 8], strict=False)]
    (tmp_path / "own.csv").write_text("\n".join(["file,caption,split", *rows]) + "\n", encoding="utf-8")
    own = dict(table=tmp_path / "own.csv", images=photo(root).parent)
    prepare(MINIATURE, data, **own, processes=1, report=quiet)
    good = photo(root, 4).read_bytes()
    photo(root, 4).write_bytes(b"cut off")
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be read"):
            prepare_again(MINIATURE, data, report=quiet)
    photo(root, 4).write_bytes(good)
    prepare_again(MINIATURE, data, report=quiet)
    assert set(read_json(data / "manifest.json")["images"]) == {"own-table/train", "own-table/val", "own-table/test"}
    with pytest.raises(InputError, match=r"was prepared from .*own\.csv; leave out the data root"):
        prepare_again(MINIATURE, data, root, report=quiet)


def test_a_check_does_not_wait_for_a_training(small):
    """Which holds the run's folder, shared, from beginning to end."""
    root, data = small
    said: list[str] = []
    with exclusive(data.parent, shared=True):
        check(MINIATURE, data.parent / "findings.csv", root, processes=1, report=said.append)
    assert not any("waiting" in line for line in said)


def test_where_nothing_is_prepared_preparing_again_needs_a_root_as_ever(tmp_path, monkeypatch):
    monkeypatch.delenv("CLIPCAP_DATA", raising=False)
    with pytest.raises(InputError, match="needs real corpora"):
        prepare_again(preset("flickr8k"), tmp_path / "data", report=quiet)


def test_without_a_split_for_validation_or_test_some_training_images_are_held_out(tmp_path):
    root = miniature.write_corpora(tmp_path / "corpora", images={
        "aic-icc": {"train": 120, "val": 6}, "hualu": {"train": 90, "board-a": 4, "board-b": 4}}, processes=1)
    said: list[str] = []
    aic = prepare(MINIATURE, tmp_path / "a" / "data", root, ["aic-icc"], processes=1, report=said.append)
    numbers = read_json(aic / "manifest.json")["images"]
    assert numbers["aic-icc/val"] == 6 and numbers["aic-icc/train"] + numbers["aic-icc/test"] == 120
    assert 1 <= numbers["aic-icc/test"] <= 20 and f"test split; {numbers['aic-icc/test']} of 120" in said[0]
    assert read_json(aic / "references-test.json").keys() == set(plain(aic, "test")["file_name"])
    hualu = prepare(MINIATURE, tmp_path / "h" / "data", root, ["hualu"], processes=1, report=said.append)
    numbers = read_json(hualu / "manifest.json")["images"]
    assert numbers["hualu/train"] + numbers["hualu/val"] == 90, "drawn boards have captions: they are the test"
    assert not set(plain(hualu, "val")["file_name"]) & set(plain(hualu, "train")["file_name"])


def test_a_validation_split_of_which_nothing_can_be_read_is_refused(small):
    root, data = small
    names = plain(data, "val")["file_name"][:]
    for path in (photo(root, 3), *(photo(root).parent / name for name in names)):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match=f"no image is left to choose checkpoints by.*({'|'.join(names)})"):
        prepare(MINIATURE, data, root, processes=1, report=quiet, skip_damaged=True)


def test_runs_may_lie_in_a_folder_whose_name_is_a_pattern(tmp_path):
    root = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 24, "val": 4, "test": 4}},
                                   processes=1)
    data = prepare(MINIATURE, tmp_path / "run [1]*" / "data", root, processes=1, report=quiet)
    assert len(load_prepared(data, "train")) == 24


def test_a_place_that_cannot_be_written_ends_in_one_sentence(small, tmp_path):
    root, _ = small
    (tmp_path / "file").write_text("")
    for act in (prepare, check):
        with pytest.raises(InputError, match="cannot be written"):
            act(MINIATURE, tmp_path / "file" / "run" / "data", root, processes=1, report=quiet)


def test_a_run_killed_while_leaks_are_taken_out_takes_out_the_rest(tmp_path, monkeypatch):
    root = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 40, "val": 4, "test": 4}},
                                   processes=1)
    test = (root / "flickr8k-cn" / "data" / "flickr8ktest.txt").read_text().split()
    for number, name in zip((3, 30), test, strict=False):
        photo(root, number).write_bytes((photo(root).parent / f"{name}.jpg").read_bytes())
    monkeypatch.setattr("clipcap_lib.shards.SHARD_IMAGES", 20)
    whole = prepare(MINIATURE, tmp_path / "whole" / "data", root, processes=1, report=quiet)
    real, calls = shards.without, []

    def once(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(real(*arguments))
        return calls[-1]

    monkeypatch.setattr(shards, "without", once)
    with pytest.raises(KeyboardInterrupt):
        prepare(MINIATURE, tmp_path / "cut" / "data", root, processes=1, report=quiet)
    monkeypatch.setattr(shards, "without", real)
    cut = prepare(MINIATURE, tmp_path / "cut" / "data", root, processes=1, report=quiet)
    assert read_json(cut / "manifest.json")["removed"] == 2 and len(plain(cut, "train")) == 38
    assert read_json(cut / "manifest.json")["fingerprint"] == read_json(whole / "manifest.json")["fingerprint"]


def test_what_older_versions_prepared_is_prepared_again(corpus, tmp_path):
    data = prepare(MINIATURE, tmp_path / "data", corpus, processes=1, report=quiet)
    manifest = read_json(data / "manifest.json")
    del manifest["checks"]
    (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    said: list[str] = []
    prepare(MINIATURE, data, corpus, processes=1, report=said.append)
    assert "nothing has changed" not in said[-1] and "checks" in read_json(data / "manifest.json")


def test_one_name_for_two_evaluation_images_is_refused(tmp_path):
    """Captions are scored by file name: the one's would be taken for the other's as well."""
    published.flickr8k(tmp_path / "root/flickr8k-cn")
    published.aic(tmp_path / "root/aic-icc")
    annotations = tmp_path / "root/aic-icc/caption_validation_annotations_20170910.json"
    annotations.write_text('[{"image_id": "3637013_c675de7705.jpg", "caption": ["一只狗"]}]', encoding="utf-8")
    published.put(tmp_path / "root/aic-icc/caption_validation_images_20170910/3637013_c675de7705.jpg")
    with pytest.raises(InputError, match=r"3637013_c675de7705\.jpg: the val images of flickr8k-cn and aic-icc share"):
        prepare(MINIATURE, tmp_path / "data", tmp_path / "root", processes=1, report=quiet)


DYING = """
import os
import sys
from pathlib import Path
from clipcap_lib import cli, images

if __name__ == "__mp_main__":  # in a worker
    if sys.argv[2] == "dies":
        images.look = lambda *_: os._exit(9)
    else:
        def look(*_):
            raise OSError(28, "No space left on device")
        images.look = look

if __name__ == "__main__":
    sys.exit(cli.main(["prepare", "--data-root", sys.argv[1]]))
"""


@pytest.mark.parametrize("how, said", [("dies", "was ended from outside"), ("full", "No space left on device")])
def test_a_worker_that_dies_or_a_disk_that_is_full_ends_in_one_sentence(how, said, corpus, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DYING, encoding="utf-8")
    run = subprocess.run([sys.executable, str(script), str(corpus), how], capture_output=True, text=True, timeout=120,
                         env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CLIPCAP_RUNS": str(tmp_path / "runs")})
    assert run.returncode == 2 and said in run.stderr and "run the same command again" in run.stderr
    assert run.stderr.count("\n") == 1


def test_workers_import_neither_torch_nor_transformers_nor_datasets():
    code = ("import sys\nfor n in ('torch', 'transformers', 'tokenizers', 'datasets', 'pandas'): sys.modules[n] = None\n"
            "import clipcap_lib.shards")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_whole_of_prepare_stays_under_a_gibibyte_with_two_workers(tmp_path):
    """Measured on drawn scenes; `bench --what prepare --data-root` measures it on real photos."""
    root = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 600, "val": 4, "test": 4}},
                                   processes=1)
    peak = peak_memory(prepare, (MINIATURE, tmp_path / "data", root), {"processes": 2, "report": str})
    assert (tmp_path / "data" / "manifest.json").is_file()
    assert 50 * 2**20 < peak < 2**30


def test_the_memory_of_a_function_that_fails_is_no_number(tmp_path):
    with pytest.raises(RuntimeError, match="ended with"):
        peak_memory(prepare, (MINIATURE, tmp_path / "data", tmp_path / "nowhere"), {})
