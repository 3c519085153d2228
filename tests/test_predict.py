"""predict and validate-submission: what is read, left out, resumed, shared out, and what a result file may not hold."""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipcap_lib import cli, commands, predict, submission
from clipcap_lib.captioner import Captioner
from clipcap_lib.choose import consensus, rerank
from clipcap_lib.cider import cider_d, document_frequencies
from clipcap_lib.config import InputError, ModelConfig, preset, to_dict
from clipcap_lib.decode import Options, captions, search
from clipcap_lib.images import LARGEST_FILE, ImageError
from clipcap_lib.model import ClipCap
from clipcap_lib.tokenizer import build_tokenizer, build_vocabulary

ROOT = Path(cli.__file__).parents[1]


def small_model(seed: int = 0, **shapes) -> ClipCap:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(build_vocabulary(["一只红色的狗在草地上"]))
    config = ModelConfig(**{"encoder": "resnet10t", "image_size": 32, "vocab_size": len(tokenizer), "layers": 1, "width": 32,
                            "heads": 2, "context": 20, "initializer_range": 0.5, **shapes})
    return ClipCap(config, tokenizer).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two checkpoints that any command takes, and a folder of 12 images."""
    root = tmp_path_factory.mktemp("models")
    found = {"run": root / "runs", "photos": root / "photos"}
    for seed, name in enumerate(("one", "two")):
        small_model(seed, image_size=32 + 16 * seed).save_pretrained(root / name)
        found[name] = root / name
    found["photos"].mkdir()
    for number in range(12):
        Image.effect_noise((40, 30), 20 * number + 1).convert("RGB").save(found["photos"] / f"{number:02}.png")
    return found


def command(folders, capsys, monkeypatch, *arguments) -> tuple[int, str]:
    monkeypatch.setenv("CLIPCAP_RUNS", str(folders["run"]))
    code = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def say(images, numbers):
    """A captioner that takes no time: says the size and the number of each image."""
    return [[(f"{image.width}x{image.height}第{number}", -1.0)] for image, number in zip(images, numbers, strict=True)]


# -- the damage that folders hold ------------------------------------------------------------------------------------


def odd_content(random_: random.Random, good: bytes) -> bytes:
    """One of many ways in which an image file is none, or only just."""
    kind = random_.randrange(8)
    if kind == 0:
        return b""
    if kind == 1:
        return random_.randbytes(random_.randrange(1, 200))
    if kind == 2:
        return good[:random_.randrange(1, len(good))]  # cut off
    if kind == 3:  # bits flipped
        content = bytearray(good)
        for _ in range(20):
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        return bytes(content)
    if kind == 4:
        return b"<html>404</html>"
    if kind == 5:
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # would start a program in some readers
    if kind == 6:  # a header that promises 60,000 x 60,000 pixels
        return b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little") + (
            60_000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24)
    mode = random_.choice(["1", "L", "LA", "P", "I;16", "RGBA", "CMYK", "F"])  # odd, but an image
    buffer = io.BytesIO()
    Image.new(mode, (random_.randrange(1, 9), random_.randrange(1, 9))).save(buffer, "TIFF")
    return buffer.getvalue()


def test_ten_thousand_odd_images_stop_no_run_that_is_not_strict(tmp_path):
    draw, buffer = random.Random(0), io.BytesIO()
    Image.effect_noise((8, 8), 50).convert("RGB").save(buffer, "JPEG")
    good, folder = buffer.getvalue(), tmp_path / "images"
    folder.mkdir()
    for number in range(10_000):
        (folder / f"{number:05}.jpg").write_bytes(odd_content(draw, good))
    for number in range(100):
        (folder / f"{number * 97:05}-good.jpg").write_bytes(good)
    (folder / "a folder.jpg").mkdir()
    (folder / "._0.jpg").write_bytes(b"what a Mac keeps beside a file")
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "large.jpg").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    Path(os.fsdecode(bytes(folder) + b"/\xff.jpg")).write_bytes(good)
    notes = []
    counted = predict.predict(say, predict.in_folder(folder, [8]), tmp_path / "res.json", {}, batch_size=64,
                              lines=tmp_path / "res.jsonl", progress=notes.append)
    found = json.loads((tmp_path / "res.json").read_text(encoding="utf-8"))
    assert counted.total() == 10_104 and counted["captioned"] == len(found) > 1000 and counted["left_out"] > 5000
    assert all(f"{number * 97:05}-good.jpg" in found for number in range(100))
    assert r"\xff.jpg" in found
    rows = [json.loads(line) for line in (tmp_path / "res.jsonl").read_text(encoding="utf-8").splitlines()]
    reasons = Counter(row["error"].split(" (")[0] for row in rows if "error" in row)
    assert reasons.keys() == {"image file is empty", "image cannot be read", "image is absurdly large"}
    errors = {row["file"]: row["error"] for row in rows if "error" in row}
    assert "not a file" in errors["pipe.jpg"] and "absurdly large" in errors["large.jpg"]
    first, *named = [note for note in notes if isinstance(note, str)]
    assert first == "passed over: 1 subfolder"
    assert len(named) == predict.SHOWN and all(note.startswith("left out: ") for note in named)
    assert not list(tmp_path.glob(".res*")), "no working file is left"


def test_strict_stops_at_the_first_unreadable_image_and_leaves_nothing(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"b\.png: image cannot be read .*leave out --strict"):
        predict.predict(say, predict.in_folder(tmp_path, [8]), tmp_path / "res.json", {}, strict=True, progress=print)
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png"}


# -- going on --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def noise_images(count: int) -> predict.Images:
    def read(number):
        if number % 7 == 3:
            raise ImageError("image cannot be read", "made so")
        return Image.new("RGB", (number + 1, 1))

    return predict.Images([f"{number}.jpg" for number in range(count)], read)


@pytest.mark.parametrize("cut", [None, 0, 1, 5, 40])  # bytes that the last line lacks
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, cut):
    images, quiet = noise_images(50), lambda what: None
    predict.predict(say, images, tmp_path / "whole.json", {"a": 1}, 8, lines=tmp_path / "whole.jsonl", progress=quiet)
    calls = []

    def dying(batch, numbers):
        calls.append(numbers[0] // 8 * 8)
        if len(calls) == 4:
            raise Killed
        return say(batch, numbers)

    output = tmp_path / "cut.json"
    with pytest.raises(Killed):
        predict.predict(dying, images, output, {"a": 1}, 8, progress=quiet)
    assert not output.exists()
    part = next(tmp_path.glob(".cut.json*"))
    if cut is not None:  # killed in the middle of a write
        part.write_bytes(part.read_bytes()[:-cut or None] + b'{"file": "24.j' * (cut == 0))
    predict.predict(dying, images, output, {"a": 1}, 8, lines=tmp_path / "cut.jsonl", progress=quiet)
    assert calls[4] == (24 if not cut else 16), "whole batches are not done again"
    for suffix in ("json", "jsonl"):
        assert (tmp_path / f"cut.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


@pytest.mark.parametrize("model, size", [("b", 8), ("a", 10)])
def test_another_run_is_never_taken_up(tmp_path, model, size):
    """Of another model, or in other batches: a batch may decide what is said of an image."""
    images, calls = noise_images(30), []

    def dying(batch, numbers):
        calls.append(numbers)
        if len(calls) == 3:
            raise Killed
        return say(batch, numbers)

    with pytest.raises(Killed):
        predict.predict(dying, images, tmp_path / "res.json", {"model": "a"}, 8, progress=lambda what: None)
    predict.predict(dying, images, tmp_path / "res.json", {"model": model}, size, progress=lambda what: None)
    again = [[n for n in range(start, min(start + size, 30)) if n % 7 != 3] for start in range(0, 30, size)]
    assert [batch[0] // 8 for batch in calls[:3]] == [0, 1, 2] and calls[3:] == again


def test_images_of_the_same_names_are_other_images(tmp_path):
    """Another folder, or a file that was restored meanwhile: nothing that was said of the ones before is taken up."""
    def dying(batch, numbers):
        if numbers[0] > 1:
            raise Killed
        return say(batch, numbers)

    folders = [tmp_path / "red", tmp_path / "blue"]
    for folder in folders:
        folder.mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8), folder.name).save(folder / f"{number}.png")
    (folders[1] / "0.png").write_bytes(b"damaged")
    output = tmp_path / "res.json"
    for folder in folders:
        with pytest.raises(Killed):
            predict.predict(dying, predict.in_folder(folder, [8]), output, {}, 2, progress=lambda what: None)
    assert "0.png" in next(tmp_path.glob(".res.json*")).read_text(), "the last one said that it cannot be read"
    Image.new("RGB", (8, 8), "blue").save(folders[1] / "0.png")

    def colours(batch, numbers):
        return [[(str(image.getpixel((0, 0))), 0.0)] for image in batch]

    predict.predict(colours, predict.in_folder(folders[1], [8]), output, {}, 2, progress=lambda what: None)
    expected = {f"{number}.png": ["(0, 0, 255)"] for number in range(4)}
    assert json.loads(output.read_text(encoding="utf-8")) == expected

    # another file of the same size is told by its time
    folder = tmp_path / "green"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), "red").save(folder / f"{number}.bmp")
    with pytest.raises(Killed):
        predict.predict(dying, predict.in_folder(folder, [8]), output, {}, 2, progress=lambda what: None)
    path = folder / "0.bmp"
    before = path.stat()
    Image.new("RGB", (8, 8), "blue").save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert path.stat().st_size == before.st_size
    predict.predict(colours, predict.in_folder(folder, [8]), output, {}, 2, progress=lambda what: None)
    assert json.loads(output.read_text(encoding="utf-8")) == {
        f"{number}.bmp": ["(255, 0, 0)" if number else "(0, 0, 255)"] for number in range(4)}


def test_what_cannot_be_written_is_said_before_the_first_caption(tmp_path, monkeypatch):
    def never(*_):
        pytest.fail("an image was captioned")

    for output, lines, words in ((tmp_path, None, "is a folder"), (tmp_path / "a.json", tmp_path, "is a folder"),
                                 (tmp_path / "a.json", tmp_path / "x" / ".." / "a.json", "cannot be the same file")):
        with pytest.raises(InputError, match=words):
            predict.predict(never, noise_images(3), output, {}, lines=lines, progress=never)
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which must stay what it is
    for output, lines in ((tmp_path / "pipe", None), (tmp_path / "a.json", tmp_path / "pipe")):
        with pytest.raises(InputError, match="pipe: is no file; give the file that is to be written"):
            predict.predict(never, noise_images(3), output, {}, lines=lines, progress=never)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file stands where it needs a folder"):
        predict.predict(never, noise_images(3), tmp_path / "file" / "a.json", {}, progress=never)
    def quiet(_):
        pass

    predict.predict(say, noise_images(3), tmp_path / "b.json", {}, lines=tmp_path / "new" / "b.jsonl", progress=quiet)
    assert (tmp_path / "new" / "b.jsonl").is_file()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict._Part, "write", full)
    with pytest.raises(InputError, match="No space left on device.*run the same command again"):
        predict.predict(say, noise_images(3), tmp_path / "c.json", {}, progress=quiet)


def test_what_is_read_is_never_written_over_and_a_link_stays_a_link(folders, capsys, monkeypatch, tmp_path):
    shutil.copytree(folders["photos"], tmp_path / "photos")
    (tmp_path / "list.txt").write_text("photos/00.png\nphotos/../photos/00.png\nphotos/01.png\n")  # one file, spelt twice
    before = (tmp_path / "list.txt").read_bytes(), (tmp_path / "photos" / "00.png").read_bytes()
    for output in ("list.txt", "photos/00.png"):
        for flag in ("--output", "--jsonl"):
            code, said = command(folders, capsys, monkeypatch, "predict", "--model", folders["one"], "--images",
                                 tmp_path / "list.txt", flag, tmp_path / output)
            assert code == 2 and f"{tmp_path / output}: is one of the files that are read" in said, said
    assert before == ((tmp_path / "list.txt").read_bytes(), (tmp_path / "photos" / "00.png").read_bytes())
    (tmp_path / "link.json").symlink_to("real.json")
    code, said = command(folders, capsys, monkeypatch, "predict", "--model", folders["one"], "--images",
                         tmp_path / "list.txt", "--output", tmp_path / "link.json", "--max-length", 3)
    assert code == 0 and "2 captions" in said, said
    assert (tmp_path / "link.json").is_symlink() and len(json.loads((tmp_path / "real.json").read_text())) == 2


@pytest.mark.parametrize("name", ["predict", "ensemble", "validate-submission"])
def test_an_empty_name_of_images_is_not_the_test_set(folders, capsys, monkeypatch, tmp_path, name):
    code, said = command(folders, capsys, monkeypatch, name, *["res.json"] * (name == "validate-submission"),
                         *({"predict": ["--model", folders["one"]], "ensemble": ["--models", folders["one"]]}.get(name, [])),
                         "--images", "")
    assert code == 2 and "--images is empty" in said, said


def test_a_list_can_hold_any_names(tmp_path):
    names = [b" spaces .png", "\u2028\u0085\f.png".encode(), b"\xff.png", "猫.png".encode()]
    for name in names:
        Image.new("RGB", (4, 4)).save(os.fsdecode(os.path.join(bytes(tmp_path), name)), "PNG")
    for content in (b"\n".join(names), b"\xef\xbb\xbf" + b"\r\n".join(reversed(names)) + b"\r\n\r\n"):
        found = predict.listed(content, tmp_path, [8], "list.txt")
        assert all(found.read(number).size == (8, 8) for number in range(4)) and len(found.names) == 4
    for content in (b"\x89PNG\0\0", "一张照片.png".encode("gbk")):
        with pytest.raises(InputError, match="not a list of paths in UTF-8"):
            predict.listed(content, tmp_path, [8], "photo.png")


def test_processes_share_the_batches_and_write_what_one_would(tmp_path):
    images = noise_images(50)
    predict.predict(say, images, tmp_path / "one.json", {}, 8, progress=lambda what: None)
    for process in (2, 1, 0):  # the first one joins
        predict.predict(say, images, tmp_path / "three.json", {}, 8, process=process, processes=3,
                        progress=lambda what: None)
    assert (tmp_path / "three.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    predict.predict(say, noise_images(3), tmp_path / "few.json", {}, 8, process=1, processes=2, progress=lambda what: None)
    predict.predict(say, noise_images(3), tmp_path / "few.json", {}, 8, processes=2, progress=lambda what: None)
    assert len(json.loads((tmp_path / "few.json").read_text())) == 3
    assert not list(tmp_path.glob(".*"))
    (tmp_path / ".few.json.1-of-5.jsonl").write_text("what five processes left when they were killed")
    predict.predict(say, noise_images(3), tmp_path / "few.json", {}, 8, progress=lambda what: None)
    assert not list(tmp_path.glob(".*"))


def test_on_a_terminal_progress_leaves_an_empty_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = predict.Progress(2, "predict")
    progress.written = 0.0
    progress(1)
    said = capsys.readouterr().err
    assert "1 of 2 images" in said and not said.endswith("\n")
    progress.close()
    assert capsys.readouterr().err == "\r\x1b[K"


def test_the_progress_of_a_run_that_goes_on_counts_what_is_done(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def run(kill: bool) -> predict.Progress:
        progress = predict.Progress(8, "predict")

        def say(images, numbers):
            if kill and numbers[0] >= 4:
                raise KeyboardInterrupt
            progress.written = 0.0
            return [[("好", 0.0)] for _ in images]

        with contextlib.suppress(KeyboardInterrupt):
            predict.predict(say, noise_images(8), tmp_path / "res.json", {}, 2, progress=progress)
        return progress

    run(kill=True)
    assert run(kill=False).done == 4
    said = capsys.readouterr().err
    assert "6 of 8 images" in said and "8 of 8 images" in said


# -- the commands ----------------------------------------------------------------------------------------------------


def test_a_folder_a_list_and_standard_input_give_the_same(folders, capsys, monkeypatch, tmp_path):
    paths = sorted(folders["photos"].iterdir())
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)) + "\n\n", encoding="utf-8")
    results = []
    for given in (folders["photos"], tmp_path / "list.txt", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(map(str, paths)).encode())))
        code, said = command(folders, capsys, monkeypatch, "predict", "--model", folders["one"], "--images", given,
                             "--output", tmp_path / "res.json", "--max-length", 8)
        assert code == 0 and "12 captions" in said and "images a second" in said
        results.append((tmp_path / "res.json").read_bytes())
    assert results[0] == results[1] == results[2]
    found = json.loads(results[0])
    assert list(found) == [path.name for path in paths] and all(len(c) == 1 and len(c[0]) <= 8 for c in found.values())


def test_each_member_of_an_ensemble_reads_an_image_as_if_it_were_alone(folders, capsys, monkeypatch, tmp_path):
    """A large JPEG: what its decoder skips depends on the size."""
    (tmp_path / "photos").mkdir()
    Image.effect_noise((900, 700), 80).convert("RGB").save(tmp_path / "photos" / "a.jpg")
    models = [ClipCap.from_pretrained(folders[name]) for name in ("one", "two")]
    both = predict.in_folder(tmp_path / "photos", [32, 48]).read(0)
    for model in models:
        alone = predict.in_folder(tmp_path / "photos", [model.config.image_size]).read(0)
        assert torch.equal(model.preprocess([both]), model.preprocess([alone]))
    assert not torch.equal(models[0].preprocess([both[48]]), models[0].preprocess([both]))
    real, asked = predict.in_folder, []
    monkeypatch.setattr(predict, "in_folder", lambda folder, sizes: asked.append(sizes) or real(folder, sizes))
    for flags, sizes in (([], [32, 48]), (["--weights", 0, 1], [48]), (
            ["--weights", 1, 0, "--beam-size", 2, "--rerank", folders["two"]], [32, 48])):
        code, said = command(folders, capsys, monkeypatch, "ensemble", "--models", folders["one"], folders["two"], *flags,
                             "--images", tmp_path / "photos", "--output", tmp_path / "res.json", "--max-length", 4)
        assert code == 0 and asked[-1] == sizes, said


def test_what_is_passed_over_in_a_folder_is_said_once(folders, capsys, monkeypatch, tmp_path):
    """.jfif is how some browsers save a JPEG."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "photos" / "a.jfif", format="jpeg")
    for name in ("list.txt", "b.heic", "._a.jpg", ".DS_Store"):
        (tmp_path / "photos" / name).write_bytes(b"")
    flags = ["predict", "--model", folders["one"], "--output", tmp_path / "res.json", "--max-length", 4, "--images"]
    code, said = command(folders, capsys, monkeypatch, *flags, tmp_path / "photos")
    assert code == 0 and list(json.loads((tmp_path / "res.json").read_text(encoding="utf-8"))) == ["a.jfif"]
    assert said.count("passed over: 1 subfolder, 2 files that are no images by their names\n") == 1, said
    code, said = command(folders, capsys, monkeypatch, *flags, folders["photos"])
    assert code == 0 and "passed over" not in said
    (tmp_path / "photos" / "a.jfif").unlink()
    with pytest.raises(InputError, match="holds no .*, but 1 subfolder and 2 files"):
        predict.in_folder(tmp_path / "photos", [8])


@pytest.mark.parametrize("stage", ["image", "language", "clip"])
def test_a_checkpoint_that_never_learnt_to_caption_is_refused(folders, capsys, monkeypatch, tmp_path, stage):
    shutil.copytree(folders["one"], tmp_path / "other")
    about = json.loads((tmp_path / "other" / "config.json").read_text(encoding="utf-8"))
    flags = ["--images", folders["photos"], "--output", tmp_path / "res.json", "--max-length", 4]
    for named, expected in ((stage, 2), ("scst", 0), ("caption", 0)):
        (tmp_path / "other" / "config.json").write_text(json.dumps({**about, "stage": named}), encoding="utf-8")
        for models in (["predict", "--model"], ["ensemble", "--models", folders["one"]]):
            code, said = command(folders, capsys, monkeypatch, *models, tmp_path / "other", *flags)
            assert code == expected, said
            if expected:
                assert f"{tmp_path / 'other'} is a checkpoint of stage {stage}; give a captioner, such as runs/" in said
                assert not (tmp_path / "res.json").exists()


def test_a_checkpoint_is_found_by_its_folder_by_that_of_its_run_and_by_name(folders, capsys, monkeypatch, tmp_path):
    caption = tmp_path / "miniature" / "caption"
    for name in ("model1", "model2"):
        shutil.copytree(folders["one"], caption / name / "best")
    shutil.copytree(folders["two"], tmp_path / "miniature" / "clip" / "all" / "best")
    monkeypatch.chdir(tmp_path)
    folders, results = {**folders, "run": tmp_path}, set()
    for model in ("model2", "miniature/caption/model1", "miniature/caption/model1/best", folders["one"]):
        for judge in ("all", "miniature/clip/all", "miniature/clip/all/best"):
            code, said = command(folders, capsys, monkeypatch, "predict", "--model", model, "--rerank", judge, "--images",
                                 folders["photos"], "--output", "res.json", "--max-length", 4)
            assert code == 0, said
            results.add((tmp_path / "res.json").read_bytes())
    assert len(results) == 1
    (tmp_path / "empty").mkdir()
    for model, place, names in (("nix", caption / "nix" / "best", f"model1, model2 in {caption}"),
                                ("miniature/clip/nix", "miniature/clip/nix", "all in miniature/clip"),
                                ("miniature/caption", "miniature/caption", "model1, model2 in miniature/caption"),
                                ("empty", "empty", "what `python"), (".", ".", "what `python")):
        code, said = command(folders, capsys, monkeypatch, "predict", "--model", model, "--images", folders["photos"])
        assert code == 2 and f"clipcap: {place}: no checkpoint here; train it first, or name one of {names}" in said, said
    code, said = command(folders, capsys, monkeypatch, "predict", "--model", "model1", "--rerank", "miniature/clip/nix",
                         "--images", folders["photos"])
    assert code == 2 and "miniature/clip/nix: no checkpoint here; train it first, or name one of all in minia" in said


def test_two_files_of_one_name_are_refused(folders, capsys, monkeypatch, tmp_path):
    (tmp_path / "00.png").write_bytes((folders["photos"] / "00.png").read_bytes())
    (tmp_path / "list.txt").write_text(f"00.png\n{folders['photos']}/00.png\n")
    code, said = command(folders, capsys, monkeypatch, "predict", "--model", folders["one"], "--images",
                         tmp_path / "list.txt")
    assert code == 2 and "have the same name" in said


@pytest.mark.parametrize("flags", [
    ["--beam-size", 4, "--n-best", 4, "--length-penalty", 1.2, "--early-stopping", "--min-length", 2],
    ["--beam-size", 4, "--groups", 2, "--diversity", 1, "--n-best", 2], ["--precision", "bf16"],
    ["--temperature", 1, "--top-k", 5, "--top-p", 0.9, "--seed", 3, "--n-best", 3, "--no-repeat-ngram", 2],
    ["--beam-size", 3, "--rerank", "{two}"]])
@pytest.mark.parametrize("several", [False, True])
def test_every_strategy_is_a_flag_of_predict_and_ensemble(folders, capsys, monkeypatch, tmp_path, flags, several):
    models = ["ensemble", "--models", folders["one"], folders["two"]] if several else ["predict", "--model", folders["one"]]
    code, said = command(folders, capsys, monkeypatch, *models, "--images", folders["photos"], "--output",
                         tmp_path / "res.json", "--jsonl", tmp_path / "res.jsonl", "--max-length", 6, "--batch-size", 5,
                         *(str(f).format(**folders) for f in flags))
    assert code == 0, said
    found = json.loads((tmp_path / "res.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (tmp_path / "res.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["file"]: row["captions"][:1] for row in rows} == found and len(found) == 12
    n_best = flags[flags.index("--n-best") + 1] if "--n-best" in flags else 3 if "--rerank" in flags else 1
    assert all(len(row["captions"]) == len(row["scores"]) == n_best for row in rows)
    if "--temperature" not in flags:
        assert all(row["scores"] == sorted(row["scores"], reverse=True) for row in rows)


def test_an_ensemble_of_other_vocabularies_is_refused_by_name(folders, capsys, monkeypatch, tmp_path):
    tokenizer = build_tokenizer(build_vocabulary(["一只红色的猫在草地上"]))
    ClipCap(small_model().config, tokenizer).save_pretrained(tmp_path / "cat")
    code, said = command(folders, capsys, monkeypatch, "ensemble", "--models", folders["one"], tmp_path / "cat", "--images",
                         folders["photos"])
    assert code == 2 and f"{tmp_path / 'cat'} does not have the vocabulary of {folders['one']}" in said


def test_a_killed_command_is_taken_up_and_writes_the_same_bytes(folders, tmp_path):
    """SIGKILL while it writes; `say` is slowed down so that the signal finds it at work."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        Image.effect_noise((20, 20), number + 1).convert("RGB").save(photos / f"{number}.png")
    code = ("import sys, time\nfrom clipcap_lib import cli, decode\ntrue = decode.captions\n"
            "def slow(*a):\n    time.sleep(0.3)\n    return true(*a)\n"
            "decode.captions = slow\nsys.exit(cli.main(sys.argv[1:]))")

    def command(output):
        return ["predict", "--model", str(folders["one"]), "--images", str(photos), "--output", str(output),
                "--batch-size", "4"]

    assert cli.main(command(tmp_path / "whole.json")) == 0
    first = subprocess.Popen([sys.executable, "-c", code, *command(tmp_path / "cut.json")],
                             env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    part, until = tmp_path / ".cut.json.0-of-1.jsonl", time.time() + 100
    while not (part.is_file() and part.read_bytes().count(b"\n") > 8) and time.time() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert part.is_file() and not (tmp_path / "cut.json").exists()
    assert cli.main(command(tmp_path / "cut.json")) == 0
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_accelerate_shares_standard_input_out_among_processes(folders, tmp_path):
    """Both processes have the same standard input, of which each line can be read once."""
    flags = ["predict", "--model", str(folders["one"]), "--batch-size", "3", "--images"]
    assert cli.main([*flags, str(folders["photos"]), "--output", str(tmp_path / "one.json")]) == 0
    flags += ["-", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713",
                           "-m", "clipcap_lib", *flags, str(tmp_path / "two.json")],
                          env=environment, timeout=200, capture_output=True, text=True,
                          input="\n".join(map(str, sorted(folders["photos"].iterdir()))))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 captions") == 1, "one process reports"
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()


# -- choosing among captions -----------------------------------------------------------------------------------------


def test_consensus_is_the_highest_expected_cider_over_the_union():
    lists = [[[("一只狗在草地上", 0.0), ("两只猫", -1.0)]], [[("一只狗在草地", 0.0), ("一只狗在草地上", -1.0)]],
             [[("蓝天", 0.0)]]]
    samples = [[[(text, 0.0) for text in ("两只猫", "一只狗在草地上", "两只猫", "两只猫", "一只狗在草地")]]]
    frequency = document_frequencies([[list("一只狗在草地上")], [list("两只猫")], [list("蓝天下的海")], [list("一个人")]])
    only = consensus(lists, frequency, "characters", weights=[0.0, 0.0, 1.0])[0]
    assert only[0][0] == "蓝天"
    for said, votes, best in (
            (lists, {"一只狗在草地上": 2, "两只猫": 1, "一只狗在草地": 1, "蓝天": 1}, "一只狗在草地上"),
            # what is drawn three times counts three times
            (samples, {"两只猫": 3, "一只狗在草地上": 1, "一只狗在草地": 1}, "两只猫")):
        found = consensus(said, frequency, "characters")[0]
        for text, score in found:
            expected = sum(count * cider_d([list(text)], [[list(other)]], frequency)[0] for other, count in votes.items())
            assert score == pytest.approx(expected / 5)
        weighted = dict(consensus(said, frequency, "characters", weights=[2.0] * len(said))[0])
        assert weighted == pytest.approx(dict(found)), "weights are relative"
        assert found[0][0] == best and {text for text, _ in found} == votes.keys()


def test_reranking_sorts_by_the_cosine_of_the_judge():
    judge = small_model(5)
    images = [Image.effect_noise((40, 40), 10 + 60 * i).convert("RGB") for i in range(3)]
    found = captions(small_model(0), judge.tokenizer, images, Options(beam_size=4, n_best=4, max_length=6))
    ranked = rerank(judge, images, found)
    assert [{text for text, _ in said} for said in ranked] == [{text for text, _ in said} for said in found]
    from clipcap_lib.tokenizer import encode
    for image, said in zip(images, ranked, strict=True):
        with torch.no_grad():
            for text, score in said:
                ids = torch.tensor(encode(judge.tokenizer, [text], 20))
                cosine = (judge.encode_text(ids) * judge.encode_image(judge.preprocess([image]))).sum().item()
                assert score == pytest.approx(cosine, abs=1e-5)
        assert said == sorted(said, key=lambda pair: -pair[1])


# -- handing in ------------------------------------------------------------------------------------------------------

SUBMISSIONS = {
    "not JSON": ('{"a.jpg": ["一"', r"not JSON"), "not UTF-8": (b"\xff\xfe{}", r"not UTF-8 at byte 0"),
    "a list": ("[]", r"expected .* found a list"), "a number": ("7", r"found a number"),
    "missing": ('{"a.jpg": ["一"]}', r"1 missing: .*: b\.jpg"),
    "unknown": ('{"a.jpg": ["一"], "b.jpg": ["二"], "c.jpg": ["三"]}', r"1 unknown: .*: c\.jpg"),
    "duplicate": ('{"a.jpg": ["一"], "b.jpg": ["二"], "a.jpg": ["三"]}', r"1 duplicate: .*: a\.jpg"),
    "null": ('{"a.jpg": null, "b.jpg": ["二"]}', r"1 null: the value.*: a\.jpg"),
    "null in a list": ('{"a.jpg": [null], "b.jpg": ["二"]}', r"1 null: the caption.*: a\.jpg"),
    "text": ('{"a.jpg": "一", "b.jpg": ["二"]}', r"1 wrong type: the value is text.*: a\.jpg"),
    "an object": ('{"a.jpg": {"x": 1}, "b.jpg": ["二"]}', r"1 wrong type: the value is an object.*: a\.jpg"),
    "a number in a list": ('{"a.jpg": [3], "b.jpg": ["二"]}', r"1 wrong type: the list holds.*: a\.jpg"),
    "no caption": ('{"a.jpg": [], "b.jpg": ["二"]}', r"1 empty: the list.*: a\.jpg"),
    "an empty caption": ('{"a.jpg": [" "], "b.jpg": ["二"]}', r"1 empty: the caption.*: a\.jpg"),
    "nothing to be seen": (r'{"a.jpg": ["\u200b\u0000"], "b.jpg": ["二"]}', r"1 empty: the caption.*: a\.jpg"),
    "two captions": ('{"a.jpg": ["一", "二"], "b.jpg": ["二"]}', r"1 too many: .*: a\.jpg"),
    "half a character": (r'{"a.jpg": ["\ud83d"], "b.jpg": ["二"]}', r"1 broken: .*: a\.jpg"),
}


@pytest.mark.parametrize("case", SUBMISSIONS)
def test_each_fault_of_a_submission_has_its_own_message(case, tmp_path):
    content, words = SUBMISSIONS[case]
    path = tmp_path / "res.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = submission.problems(path, ["a.jpg", "b.jpg"])
    assert len(found) == 1 and found[0].startswith(f"{path}: ")
    import re
    assert re.search(words, found[0])


def test_validate_submission_is_a_command_with_exit_code_1(folders, capsys, monkeypatch, tmp_path):
    path = tmp_path / "res.json"
    command(folders, capsys, monkeypatch, "predict", "--model", folders["one"], "--images", folders["photos"], "--output",
            path)
    check = ["validate-submission", path, "--images", folders["photos"]]
    code, said = command(folders, capsys, monkeypatch, *check)
    assert code == 0 and "has a caption of each of 12 images" in said
    (tmp_path / "board.txt").write_text("".join(f"{folders['photos']}/{n:02}.png\n" for n in range(11)))
    code, said = command(folders, capsys, monkeypatch, *check[:-1], tmp_path / "board.txt")
    assert code == 1 and "1 unknown" in said and "11.png" in said
    path.write_text(json.dumps({f"{n:02}.png": None for n in range(11)}))
    code, said = command(folders, capsys, monkeypatch, *check)
    assert code == 1 and said.count("\n") == 2 and "11 null" in said and "1 missing" in said
    assert submission.problems(tmp_path / "nowhere.json", []) == [
        f"{tmp_path / 'nowhere.json'}: cannot be read (No such file or directory)"]


# -- the Python interface --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(folders, tmp_path_factory) -> list[str]:
    """What a fresh process says that may neither connect nor import what scores and widgets need: the caption of a red
    image, then its peak memory in kB (0 where the system does not tell it) after 100 images and after 1,000."""
    code = """
import socket, sys
def none(*_, **__): raise AssertionError("a connection was tried")
socket.socket.connect = none
socket.create_connection = none
for name in ("jieba", "pycocoevalcap", "ipywidgets"): sys.modules[name] = None
import clipcap_lib.train, clipcap_lib.decode, clipcap_lib.cli, clipcap_lib.attention
import torch
from pathlib import Path
from PIL import Image
from clipcap_lib.model import ClipCap
print(ClipCap.from_pretrained(sys.argv[1]).caption([Image.new("RGB", (50, 40), "red")], beam_size=2)[0])
torch.set_num_threads(1)
model, status = ClipCap.from_pretrained(sys.argv[2]), Path("/proc/self/status")
shown = [Image.new("RGB", (32, 32), (i % 256, 0, 0)) for i in range(1000)]
for count in (100, 1000):
    model.caption(shown[:count], beam_size=5, max_length=10, batch_size=20)
    lines = status.read_text().splitlines() if status.is_file() else []
    print(next((line.split()[1] for line in lines if line.startswith("VmHWM")), 0))
"""
    wider = tmp_path_factory.mktemp("wider")
    small_model(layers=2, width=128, heads=4).save_pretrained(wider)
    return subprocess.run([sys.executable, "-c", code, str(folders["one"]), str(wider)], check=True, timeout=300,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}).stdout.splitlines()


def test_a_fresh_process_without_a_network_or_scoring_packages_loads_and_captions(folders, fresh):
    expected = ClipCap.from_pretrained(folders["one"]).caption([Image.new("RGB", (50, 40), "red")], beam_size=2)
    assert fresh[0].strip() == expected[0].strip()


def test_a_saved_model_is_the_same_with_config_tokenizer_and_card(folders, tmp_path):
    model = small_model(0)
    model.save_pretrained(tmp_path / "again")
    assert {p.name for p in (tmp_path / "again").iterdir()} >= {"README.md", "config.json", "model.safetensors",
                                                                "tokenizer.json"}
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "library_name: clipcap_lib" in card and "pipeline_tag: image-to-text" in card and "from_pretrained" in card
    loaded = ClipCap.from_pretrained(tmp_path / "again")
    assert loaded.config == model.config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert loaded.gpt.lm_head.weight is loaded.gpt.transformer.wte.weight
    with pytest.raises(InputError, match="holds no whole model"):
        ClipCap.from_pretrained(tmp_path)


def shapes(**changes):
    """A change of config.json's shapes; None takes one away."""
    def change(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        whole["model"] = {name: value for name, value in {**whole["model"], **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    return change


def without(part: str):
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file({name: tensor for name, tensor in weights.items() if part not in name}, folder / "model.safetensors")
    return change


def written(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


BROKEN = {
    "config.json that is no JSON": written("config.json", "{"),
    "config.json that is a list": written("config.json", "[]"),
    "config.json without shapes": written("config.json", "{}"),
    "a word for a number": shapes(width="x"),
    "an encoder that there is not": shapes(encoder="res2next51"),
    "a setting that there is not": shapes(depth=3),
    "another width": shapes(width=64),
    "another vocabulary": shapes(vocab_size=1000),
    "an end token beyond the vocabulary": shapes(end_id=100000),
    "a weight too few": without("image_head.mix"),
    "no token embedding": without("wte"),
    "weights cut off": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 9),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "tokenizer.json that is no JSON": written("tokenizer.json", "{"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_model_is_one_sentence_in_python_and_on_the_command_line(folders, capsys, monkeypatch, tmp_path, name):
    folder = tmp_path / "broken"
    shutil.copytree(folders["one"], folder)
    BROKEN[name](folder)
    with pytest.raises(InputError, match=f"{folder}.*holds no"):
        ClipCap.from_pretrained(folder)
    code, said = command(folders, capsys, monkeypatch, "predict", "--model", folder, "--images", folders["photos"],
                         "--output", tmp_path / "res.json")
    last = said.strip().splitlines()[-1]
    assert code == 2 and last.startswith("clipcap: ") and str(folder) in last and "Traceback" not in said, said


def test_what_is_no_folder_is_only_looked_for_on_the_hub_if_it_could_be_there(tmp_path, monkeypatch):
    from clipcap_lib import model as room

    asked = []
    monkeypatch.setattr(room.PyTorchModelHubMixin, "from_pretrained",
                        classmethod(lambda cls, name, **_: asked.append(str(name))))
    (tmp_path / "a").touch()
    for name in ("runs/miniature/caption/nix/best", tmp_path / "nix", tmp_path / "a", "model1"):
        with pytest.raises(InputError, match="no such folder, and no name of a hub repository"):
            ClipCap.from_pretrained(name)
    ClipCap.from_pretrained("user/model")
    assert asked == ["user/model"]


def test_what_cannot_be_captioned_is_said_in_one_sentence(folders):
    model, image = ClipCap.from_pretrained(folders["one"]), Image.new("RGB", (50, 40), "red")
    for wrong, options, words in ((image, {}, "give a list of PIL images"), (["a.png"], {}, "an image is a str"),
                                  ([np.zeros((4, 4, 3), np.uint8)], {}, "an image is a ndarray"),
                                  ((i for i in [image]), {}, "images are a generator"),
                                  ([image], {"batch_size": 0}, "batch_size"), ([image], {"batch_size": -1}, "batch_size"),
                                  ([image], {"max_length": 0}, "max_length"),
                                  ([image], {"max_length": 99, "min_length": 40}, "below max_length 20")):
        with pytest.raises(InputError, match=words):
            model.caption(wrong, **options)
    with pytest.raises(InputError, match="give them as uint8"):
        model.start(torch.zeros(1, 3, 32, 32))
    assert model.caption([image], max_length=99, min_length=19) == model.caption([image], max_length=20, min_length=19)
    assert model.caption([]) == []


def test_weights_that_are_no_numbers_write_no_captions(folders, capsys, monkeypatch, tmp_path):
    model = ClipCap.from_pretrained(folders["one"])
    with torch.no_grad():
        model.gpt.transformer.ln_f.bias[0] = float("nan")
    for options in ({}, {"beam_size": 3}, {"temperature": 1.0}):
        with pytest.raises(InputError, match="are no numbers"):
            model.caption([Image.new("RGB", (50, 40), "red")], **options)
    model.save_pretrained(tmp_path / "nan")
    code, said = command(folders, capsys, monkeypatch, "predict", "--model", tmp_path / "nan", "--images", folders["photos"],
                         "--output", tmp_path / "res.json")
    assert code == 2 and "are no numbers" in said and not (tmp_path / "res.json").exists()


def test_a_model_is_built_from_a_mapping_or_a_config_and_fetches_nothing(monkeypatch):
    import huggingface_hub

    def fetch(*_, **__):
        raise AssertionError("something was fetched")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, fetch)
    config = small_model().config
    assert ClipCap(to_dict(config)).config == ClipCap(config).config == config
    with pytest.raises(InputError, match="unknown settings"):
        ClipCap({"pretrained": True})


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_of_five_beams_does_not_grow_with_the_number_of_images(fresh):
    """The peak after 1,000 images against that after 100, in one process: tensors that are kept would add up."""
    after_100, after_1000 = map(int, fresh[1:])
    if not after_100:
        pytest.skip("this system does not tell a process's peak memory")
    cache = 2 * 2 * 100 * 21 * 128 * 4 / 1024  # kB of one batch
    assert after_1000 - after_100 < 900 / 20 * cache / 4, fresh


def test_captioner_and_options_are_what_the_flags_say(monkeypatch):
    arguments = cli.parser().parse_args(["predict", "--beam-size", "4", "--groups", "2", "--early-stopping",
                                         "--length-penalty", "0"])
    assert commands._options(arguments, preset("miniature"), 40) == Options(beam_size=4, groups=2, early_stopping=True,
                                                                        length_penalty=0)
    arguments = cli.parser().parse_args(["predict"])
    assert commands._options(arguments, preset("flickr8k-small"), 40) == Options(beam_size=3, length_penalty=0)
    kinds = {field.name: field.type for field in dataclasses.fields(Options)}
    assert {name: kind.__name__ for name, (kind, _) in commands.FLAGS.items()} == {
        name: kind for name, kind in kinds.items() if name != "suppress"}, "every option is a flag"
    arguments = cli.parser().parse_args(["predict", "--temperature", "0.5"])
    assert commands._options(arguments, preset("flickr8k"), 40).beam_size == 1, "the preset's search is not meant"
    assert commands._options(arguments, preset("flickr8k"), 20).max_length == 20, "no longer than the model can"
    arguments = cli.parser().parse_args(["predict", "--max-length", "21"])
    with pytest.raises(InputError, match="--max-length 21: the model has positions for 20 tokens at most"):
        commands._options(arguments, preset("flickr8k"), 20)
    for flags, words in ((["--diversity", "1"], "--diversity is between groups of beams: give --groups"),
                         (["--diversity", "1", "--groups", "1"], "--diversity is between groups")):
        with pytest.raises(InputError, match=words):
            commands._options(cli.parser().parse_args(["predict", *flags]), preset("miniature"), 40)
    shown = [Image.new("RGB", (9, 9))]
    for fixed in (False, True):
        with pytest.raises(InputError, match="21 positions, and all are written"):
            search(Captioner(small_model(), fixed=fixed), shown, Options(max_length=25, min_length=24))
