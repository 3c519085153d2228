"""Miniature corpora: drawn scenes with Chinese captions, written in the original formats of the five corpora.

`write_corpora(root)` writes, in under a minute on two cores:

    <root>/flickr8k-cn/ flickr30k-cn/ aic-icc/ hualu/ coco-cn/     what a download of each looks like
    <root>/truth/<corpus>.jsonl                                     what each scene holds: for scoring, not for training
    <root>/truth/hualu-board-a.json, hualu-board-b.json             the boards' captions, which an organiser would keep
    <root>/labelled/<kind>/<colour> <kind> <n>.jpg                  single objects by kind, on which an image encoder can
                                                                    be pretrained as the original's was on ImageNet

Every image has a random seed of its own, so that the result depends neither on the number of processes nor on the size
of the other corpora.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from clipcap_lib.config import InputError
from clipcap_lib.corpora.backdrops import paint_background
from clipcap_lib.corpora.drawing import draw_object
from clipcap_lib.corpora.scenes import SHAPE, Scene, sample_portrait, sample_scene, write_captions
from clipcap_lib.corpora.things import BACKGROUNDS, KINDS
from clipcap_lib.files import write_json

VERSION = 9  # raised with every change of what is drawn or written, so that older folders are drawn again
IMAGES: dict[str, dict[str, int]] = {  # images a corpus and split
    "flickr8k-cn": {"train": 600, "val": 75, "test": 60},
    "flickr30k-cn": {"train": 600, "val": 75, "test": 60},
    "aic-icc": {"train": 600, "val": 75},
    "hualu": {"train": 500, "board-a": 300, "board-b": 300},
    "coco-cn": {"train": 700, "val": 75, "test": 60},
}
PORTRAITS = "labelled"  # single objects by kind and colour, apart from the corpora: the stand-in for ImageNet
COCO_SHARE = 0.7  # of the scenes of COCO-CN, how many have a main object of a COCO kind
BOARD_B_SHARE = 0.65
ORDINARY_SHARE = 0.01
_SUPERSAMPLING = 2
_STATE = ".miniature.json"  # says that the folder is ours to write, and once complete, what was written


# --- drawing ----------------------------------------------------------------------------------------------------------

def draw_scene(scene: Scene, random: Random) -> Image.Image:
    """The scene as an RGB image of SHAPE pixels; objects of later groups lie behind those of earlier ones."""
    width, height = (side * _SUPERSAMPLING for side in SHAPE)
    canvas = paint_background(scene.background, (width, height), random)
    shadow = Image.new("L", canvas.size, 0)
    draw = ImageDraw.Draw(shadow)
    placed = [(group, tuple(round(v * side) for v, side in zip(box, (width, height) * 2, strict=True)))
              for group in reversed(scene.groups) for box in group.boxes]
    for group, (x0, _, x1, y1) in placed:
        if KINDS[group.kind].place == "ground":
            draw.ellipse([x0 + 4, y1 - 9, x1 - 4, y1 + 7], 90)
    canvas.paste((20, 24, 40), (0, 0), shadow.filter(ImageFilter.BoxBlur(3)))
    for group, box in placed:
        draw_object(canvas, group.kind, group.colour, box, mirrored=random.random() < 0.5)
    return canvas.reduce(_SUPERSAMPLING)


def _make(corpus: str, split: str, file_name: str, seed: int) -> tuple[bytes, list[str], dict]:
    """JPEG, captions and truth of one image, from nothing but its name and the seed."""
    random = Random(f"{seed}/{corpus}/{split}/{file_name}")
    share = COCO_SHARE if corpus == "coco-cn" else BOARD_B_SHARE if split == "board-b" else ORDINARY_SHARE
    scene = sample_scene(random, share)
    translated = corpus == "flickr30k-cn" and split != "test"
    captions = write_captions(scene, random, literal=0.5 if translated else 0.0,
                              stop="" if corpus == "aic-icc" else "。")
    buffer = io.BytesIO()
    draw_scene(scene, random).save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), captions, {"file_name": file_name, "split": split, **scene.truth()}


def _make_all(tasks: Sequence[tuple[str, str, str, Path]], seed: int, processes: int) -> list[tuple[list[str], dict]]:
    """Draw and save every image -> captions and truth, in the order of the tasks."""
    parts = [tasks[start:start + 100] for start in range(0, len(tasks), 100)]
    made = _in_processes(partial(_make_some, seed=seed), parts, len(tasks), processes)
    return [result for results in made for result in results]


def _in_processes(make: Callable[[Any], Any], parts: Sequence[Any], images: int, processes: int) -> list[Any]:
    """`make` of every part, in several processes where there is enough to draw."""
    if processes < 2 or images < 200:  # starting processes takes longer than drawing so few
        return [make(part) for part in parts]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(make, parts))


def _make_some(tasks: Sequence[tuple[str, str, str, Path]], seed: int) -> list[tuple[list[str], dict]]:
    results = []
    for corpus, split, file_name, folder in tasks:
        image, captions, truth = _make(corpus, split, file_name, seed)
        (folder / file_name).write_bytes(image)
        results.append((captions, truth))
    return results


# --- the five formats -------------------------------------------------------------------------------------------------

Row = tuple[str, list[str]]  # file name, captions


def _name(corpus: str, split: str, index: int) -> str:
    """A file name as the corpus has them, unique over all corpora."""
    digest = hashlib.sha1(f"{corpus}/{split}/{index}".encode()).hexdigest()
    return {"flickr8k-cn": f"{int(digest[:8], 16)}_{digest[8:18]}.jpg",
            "flickr30k-cn": f"{10**9 + int(digest[:8], 16)}.jpg",
            "aic-icc": f"{digest}.jpg", "hualu": f"{split}-{index:05d}.jpg",
            "coco-cn": f"COCO_{'train' if split == 'train' else 'val'}2014_{int(digest[:9], 16) % 10**12:012d}.jpg",
            }[corpus]


def _image_folder(corpus: str, split: str) -> str:
    """Where a corpus keeps the images of a split."""
    return {"flickr8k-cn": "Flicker8k_Dataset", "flickr30k-cn": "flickr30k-images", "hualu": split,
            "aic-icc": _AIC[split][1] if split in _AIC else "",
            "coco-cn": "train2014" if split == "train" else "val2014",
            }[corpus]


_AIC = {"train": ("caption_train_annotations_20170902.json", "caption_train_images_20170902"),
        "val": ("caption_validation_annotations_20170910.json", "caption_validation_images_20170910")}


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def _write_flickr8k(folder: Path, splits: Mapping[str, list[Row]]) -> None:
    rows = [row for split in splits.values() for row in split]
    for split, images in splits.items():
        _write_lines(folder / f"data/flickr8k{split}.txt", (Path(name).stem for name, _ in images))
    _write_lines(folder / "data/flickr8kzhc.caption.txt",
                 (f"{name}#zhc#{n} {caption}" for n in range(5) for name, captions in rows
                  for caption in captions[n:n + 1]))


def _write_flickr30k(folder: Path, splits: Mapping[str, list[Row]]) -> None:
    releases = {"train": "flickr30kzhbbosontrain", "val": "flickr30kzhbbosonval", "test": "flickr30kzhmbosontest"}
    for split, images in splits.items():
        release = releases[split]
        _write_lines(folder / release / "ImageSets" / f"{release}.txt", (Path(name).stem for name, _ in images))
        _write_lines(folder / release / "TextData" / f"seg.{release}.caption.txt",
                     (f"{Path(name).stem}#{'zhm' if split == 'test' else 'zhb'}#{n} "
                      + " ".join(_words(caption, tagged=split == "test"))
                      for name, captions in images for n, caption in enumerate(captions)))


def _words(caption: str, tagged: bool = False) -> list[str]:
    """A stand-in for a segmenter: pieces of two characters, punctuation alone; `tagged`: with a part of speech."""
    words: list[str] = []
    for character in caption:
        if words and len(words[-1]) == 1 and not {words[-1], character} & set("。，、"):
            words[-1] += character
        else:
            words.append(character)
    return [word + (":w" if word in "。，、" else ":n") for word in words] if tagged else words


def _write_aic(folder: Path, splits: Mapping[str, list[Row]]) -> None:
    for split, images in splits.items():
        rows = [{"url": f"http://example.com/{name}", "image_id": name, "caption": captions}
                for name, captions in images]
        (folder / _AIC[split][0]).write_text(json.dumps(rows), encoding="ascii")


def _write_hualu(folder: Path, splits: Mapping[str, list[Row]]) -> None:
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["images", "captions"])
        writer.writerows((name, caption) for name, captions in splits.get("train", []) for caption in captions)


_COCO = "coco-cn-version1805v1.1"


def _write_coco(folder: Path, splits: Mapping[str, list[Row]]) -> None:
    release = folder / _COCO
    for split, images in splits.items():
        _write_lines(release / f"coco-cn_{split}.txt", (Path(name).stem for name, _ in images))
    rows = [(Path(name).stem, n, caption) for images in splits.values() for name, captions in images
            for n, caption in enumerate(captions)]
    _write_lines(release / "imageid.human-written-caption.txt", (f"{i}#{n}\t{caption}" for i, n, caption in rows))
    _write_lines(release / "imageid.human-written-caption.bosonseg.txt",
                 (f"{i}#{n}\t{' '.join(_words(caption))}" for i, n, caption in rows))


def _write_tags(folder: Path, truths: Iterable[dict]) -> None:
    """What is in each picture and where, the main thing first, as COCO-CN's annotators named it."""
    _write_lines(folder / _COCO / "imageid.human-written-tags.txt", (
        " ".join([Path(truth["file_name"]).stem, *dict.fromkeys(KINDS[o["kind"]].chinese for o in truth["objects"]),
                  BACKGROUNDS[truth["background"]].chinese]) for truth in truths))


_WRITERS = {"flickr8k-cn": _write_flickr8k, "flickr30k-cn": _write_flickr30k, "aic-icc": _write_aic,
            "hualu": _write_hualu, "coco-cn": _write_coco}


# --- all of it --------------------------------------------------------------------------------------------------------

def write_corpora(root: Path, seed: int = 0, images: Mapping[str, Mapping[str, int]] | None = None,
                  processes: int | None = None) -> Path:
    """Write the miniature corpora under `root` and return it; at once if they are there, whole and of the same making.

    `images`: {corpus: {split: number}} instead of IMAGES; corpora not in it are not written. A folder left half-written
    by an interruption, or written by another version or seed, is written anew. Raises InputError if `root` holds
    corpora that were not drawn here: they are never overwritten.
    """
    root, images = Path(root), images or IMAGES
    wanted = {"version": VERSION, "seed": seed, "images": {corpus: dict(splits) for corpus, splits in images.items()}}
    state = root / _STATE
    if state.is_file():
        try:
            if json.loads(state.read_text(encoding="utf-8")) == {**wanted, "complete": True}:
                return root
        except ValueError:
            pass  # cut off while it was written: not complete
    elif foreign := [name for name in (*_WRITERS, PORTRAITS, "truth") if (root / name).exists()]:
        raise InputError(f"{root / foreign[0]}: is there and was not drawn here; give the miniature corpora another "
                         f"folder")
    write_json(state, {**wanted, "complete": False})
    for name in (*_WRITERS, PORTRAITS, "truth"):
        if (root / name).exists():
            shutil.rmtree(root / name)

    tasks = []
    for corpus, splits in images.items():
        for split, number in splits.items():
            folder = root / corpus / _image_folder(corpus, split)
            folder.mkdir(parents=True, exist_ok=True)
            tasks += [(corpus, split, _name(corpus, split, index), folder) for index in range(number)]
    total, processes = sum(sum(splits.values()) for splits in images.values()), processes or min(2, os.cpu_count() or 1)
    _write_portraits(root / PORTRAITS, seed, total, processes)
    results = _make_all(tasks, seed, processes)
    for corpus, splits in images.items():
        mine = [result for (name, *_), result in zip(tasks, results, strict=True) if name == corpus]
        rows = {split: [(truth["file_name"], captions) for captions, truth in mine if truth["split"] == split]
                for split in splits}
        _WRITERS[corpus](root / corpus, rows)
        if corpus == "coco-cn":
            _write_tags(root / corpus, (truth for _, truth in mine))
        _write_lines(root / "truth" / f"{corpus}.jsonl", (json.dumps(truth, ensure_ascii=False) for _, truth in mine))
        for board in ("board-a", "board-b"):
            if board in rows:
                _write_lines(root / "truth" / f"{corpus}-{board}.json",
                             [json.dumps(dict(rows[board]), ensure_ascii=False, indent=1)])
    write_json(state, {**wanted, "complete": True})
    return root


def _write_portraits(folder: Path, seed: int, number: int, processes: int) -> None:
    """About `number` labelled images of single objects, a folder a kind: <folder>/<kind>/<colour> <kind> <n>.jpg."""
    make = partial(_write_portraits_of, folder=folder, seed=seed, each=max(1, number // len(KINDS)))
    _in_processes(make, list(KINDS), number, processes)


def _write_portraits_of(kind: str, folder: Path, seed: int, each: int) -> None:
    (folder / kind).mkdir(parents=True, exist_ok=True)
    for index in range(each):
        random = Random(f"{seed} portrait {kind} {index}")
        scene = sample_portrait(random, kind)
        name = f"{scene.groups[0].colour} {kind} {index:04d}.jpg"
        draw_scene(scene, random).save(folder / kind / name, quality=90)


def load_truth(root: Path) -> dict[tuple[str, str], dict]:
    """What each drawn image holds: {(corpus, file name): row of truth/<corpus>.jsonl}."""
    truth = {}
    for path in sorted((Path(root) / "truth").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            truth[path.stem, row["file_name"]] = row
    if not truth:
        raise InputError(f"{Path(root) / 'truth'}: no truth of drawn scenes; it is written beside the miniature "
                         f"corpora")
    return truth


def load_board_references(root: Path, board: str) -> dict[str, list[str]]:
    """The captions of a drawn board ("board-a" or "board-b"), which are in no corpus folder: {file name: captions}."""
    path = Path(root) / "truth" / f"hualu-{board}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no references of '{board}'; boards are board-a and board-b, and the references of "
                         f"drawn ones are written beside the miniature corpora") from error
