"""Captions written in Chinese, translated by people and translated by machine: apart, chosen, and said in the manifest."""

from __future__ import annotations

from pathlib import Path

import published
import pytest
from PIL import Image
from published import put

from clipcap_lib import cli
from clipcap_lib.config import InputError
from clipcap_lib.corpora import caption_choices, read_corpora
from clipcap_lib.files import read_json


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with three corpora as published, Flickr30k-CN in both releases, and images that can be opened."""
    published.flickr8k(tmp_path / "flickr8k-cn")
    published.flickr30k(tmp_path / "flickr30k-cn")
    put(tmp_path / "flickr30k-cn/flickr30k_cna_train.txt", "1000092795 两个年轻人。\n")
    published.coco(tmp_path / "coco-cn")
    published.aic(tmp_path / "aic-icc")
    for number, path in enumerate(sorted(tmp_path.rglob("*.jpg"))):
        Image.effect_noise((40, 40), 40 + number).convert("RGB").save(path)
    return tmp_path


def captions(root: Path, *choices: str) -> dict[tuple[str, str], tuple[str, str]]:
    """{(corpus, split): (how translated, first caption)}"""
    records = [r for reading in read_corpora(root, captions=caption_choices(choices)).values() for r in reading.records]
    return {(r.corpus, r.split): (r.translated, r.captions[0]) for r in reversed(records)}


def test_a_choice_changes_its_corpus_alone_and_how_it_is_translated_is_known(root: Path):
    default = captions(root)
    assert default["flickr8k-cn", "train"] == ("none", "一个穿着泳装的女人躺在海水里。")
    assert default["flickr30k-cn", "train"] == ("machine", "两个年轻人在外面。")
    assert default["coco-cn", "test"] == ("none", "两个人。")
    chosen = captions(root, "flickr8k-cn=zhb", "flickr30k-cn=cna")
    assert chosen["flickr8k-cn", "train"] == ("machine", "女人在海中。")
    assert chosen["flickr30k-cn", "train"] == ("human", "两个年轻人。")
    assert {key: value for key, value in chosen.items() if key[0] in ("coco-cn", "aic-icc")} == {
        key: value for key, value in default.items() if key[0] in ("coco-cn", "aic-icc")}


def test_one_split_may_have_captions_of_its_own(root: Path):
    chosen = captions(root, "flickr8k-cn=zhb", "flickr8k-cn/test=zhm", "coco-cn/test=manually-translated")
    assert [chosen["flickr8k-cn", split][0] for split in ("train", "val", "test")] == ["machine", "machine", "human"]
    assert chosen["flickr8k-cn", "test"][1] == "一个女孩和她的马。"
    assert chosen["coco-cn", "test"] == ("human", "一个男人和一个女人。") and chosen["coco-cn", "train"][0] == "none"


@pytest.mark.parametrize("choices, said", [
    (["flickr8k-cn"], "'flickr8k-cn' is no choice of captions; expected <corpus>=<captions>"),
    (["=zhb"], "is no choice of captions"), (["flickr8k-cn="], "is no choice of captions"),
    (["flickr8k-cn/dev=zhb"], "is no choice of captions"),
    (["flickr8k-cn=zhb", "flickr8k-cn=zhc"], "'flickr8k-cn' is chosen twice"),
    (["flickr9k=zhb"], "unknown corpus 'flickr9k'"), (["hualu=zhb"], "'hualu' was asked for and is not there"),
    (["flickr8k-cn=zhx"], "unknown captions 'zhx' of flickr8k-cn; choose zhc, zhb, zhg, zhm"),
    (["flickr30k-cn=zhb"], "unknown captions 'zhb' of flickr30k-cn; choose ruc, cna"),
    (["aic-icc=human"], "aic-icc has one set of captions only"),
    (["flickr8k-cn/train=zhm"], "'zhm' of flickr8k-cn cover no image of the train split")])
def test_a_choice_that_cannot_be_met_says_what_can(root: Path, choices: list[str], said: str):
    with pytest.raises(InputError) as error:
        read_corpora(root, captions=caption_choices(choices))
    assert said in str(error.value)


def test_a_choice_for_a_corpus_that_is_not_read_is_refused(root: Path):
    with pytest.raises(InputError, match="'flickr8k-cn' is of a corpus that is not read"):
        read_corpora(root, ["aic-icc"], caption_choices(["flickr8k-cn=zhb"]))


def test_an_image_in_another_split_of_the_other_captions_is_an_error(root: Path):
    put(root / "flickr30k-cn/flickr30k_cna_test.txt", "1000092795 两个年轻人。\n")
    (root / "flickr30k-cn/flickr30k_cna_train.txt").unlink()
    with pytest.raises(InputError, match=r"'1000092795\.jpg' is in the test split of 'cna' and in another one"):
        read_corpora(root, captions={"flickr30k-cn/test": "cna"})


def test_the_manifest_says_which_captions_were_prepared(root: Path, tmp_path_factory, monkeypatch):
    runs = tmp_path_factory.mktemp("runs")
    monkeypatch.setenv("CLIPCAP_RUNS", str(runs))
    prepare = ["prepare", "--data-root", str(root), "--corpora", "flickr8k-cn", "aic-icc", "--captions"]
    assert cli.main([*prepare, "flickr8k-cn=zhb", "flickr8k-cn/test=zhm"]) == 0
    first = read_json(runs / "miniature/data/manifest.json")
    assert first["caption_sets"] == {"flickr8k-cn/train": "zhb", "flickr8k-cn/val": "zhb", "flickr8k-cn/test": "zhm"}
    assert first["translated"] == {
        "flickr8k-cn/train": {"machine": 1}, "flickr8k-cn/val": {"machine": 1}, "flickr8k-cn/test": {"human": 1},
        "aic-icc/train": {"none": 3}, "aic-icc/val": {"none": 1}}
    assert cli.main([*prepare, "flickr8k-cn=zhc"]) == 0
    second = read_json(runs / "miniature/data/manifest.json")
    assert second["fingerprint"] != first["fingerprint"] and second["translated"]["flickr8k-cn/train"] == {"none": 2}
