"""JSON and CSV whose records have run into one another, quoting as people and programs do it, names as they are listed."""

from __future__ import annotations

from pathlib import Path

import published
import pytest
from published import AIC, TRAIN, put

from clipcap_lib.config import InputError
from clipcap_lib.corpora import aic_icc, flickr30k_cn, hualu, lines, own_table


@pytest.fixture
def aic(tmp_path: Path) -> Path:
    return published.aic(tmp_path)


@pytest.fixture
def hualu_cup(tmp_path: Path) -> Path:
    return published.hualu_cup(tmp_path)


def captions(reading) -> dict[str, tuple[str, ...]]:
    return {record.file_name: record.captions for record in reading.records}


def test_two_json_records_run_into_one_are_named_and_not_read_as_the_second(aic: Path):
    put(aic / TRAIN, AIC.replace("]},\n {", "],\n "))
    with pytest.raises(InputError, match=r"20170902\.json:4: an object has the key 'url' twice"):
        aic_icc.read(aic)
    published.own_jsonl(aic / "own")
    put(aic / "own/own.jsonl", '{"file": "a.jpg", "caption": "一只狗", "file": "b.png", "caption": "猫"}\n')
    with pytest.raises(InputError, match=r"own\.jsonl:1: not readable as JSON \(an object has the key 'file' twice\)"):
        own_table.read(aic / "own/own.jsonl")


@pytest.mark.parametrize("rows, number", [
    ('0001.jpg,"一只狗\n0002.jpg,二"\n', 2), ('0002.jpg,二\n0001.jpg,"一只狗\n0002.jpg,一\n0002.jpg,三"\n', 3),
    ('0001.jpg,"一只\n0002.jpg,""二"""\n', 2)])
def test_a_quotation_mark_closed_by_a_later_row_swallows_none(hualu_cup: Path, rows: str, number: int):
    put(hualu_cup / "train.csv", f"images,captions\n{rows}")
    with pytest.raises(InputError, match=rf"train\.csv:{number}: a cell in quotation marks holds what looks like \d more"):
        hualu.read(hualu_cup)
    put(hualu_cup / "t.csv", f"file,caption\n{rows}")
    with pytest.raises(InputError, match=rf"t\.csv:{number}: a cell"):
        own_table.read(hualu_cup / "t.csv", hualu_cup / "train")


def test_quoting_of_every_usual_kind_is_read_as_it_is_meant(hualu_cup: Path):
    put(hualu_cup / "train.csv", '"images","captions"\r\n'
                                 '"0001.jpg","男人,在街上"\r\n'
                                 '0001.jpg, "女人,在街上"\r\n'
                                 '0001.jpg,"他说""你好"""\r\n'
                                 '0001.jpg,写着"停"的牌子\r\n'
                                 '0001.jpg,"两行\r\n的句子"\r\n'
                                 '0001.jpg,“中文，引号”\r\n')
    assert captions(hualu.read(hualu_cup))["0001.jpg"] == (
        "男人,在街上", "女人,在街上", '他说"你好"', '写着"停"的牌子', "两行 的句子", "“中文，引号”")


def test_training_images_of_hualu_are_found_as_they_are_listed(hualu_cup: Path):
    for name in ("3.JPG", "4.png", "5.jpg"):
        put(hualu_cup / "train" / name)
    put(hualu_cup / "train.csv", "images,captions\n3.JPG,三\n4.png,四\n5,五\n5.jpg.jpg,六\n6.PNG,七\n")
    reading = hualu.read(hualu_cup)
    assert {name: c for name, c in captions(reading).items() if c} == {"3.JPG": ("三",), "4.png": ("四",), "5.jpg": ("五",)}
    assert [item.reason for item in reading.left_out if item.damaged] == [lines.NO_IMAGE] * 2


def test_the_second_release_of_flickr30k_may_number_its_captions(tmp_path: Path):
    published.flickr30k_cna(tmp_path)
    put(tmp_path / "flickr30k_cn_test.txt", "18#1\t猫。\n18#0\t一只猫。\n18#0\t又一只。\n")
    reading = flickr30k_cn.read(tmp_path)
    assert captions(reading)["18.jpg"] == ("一只猫。", "猫。")
    assert [item.reason for item in reading.left_out] == [lines.REPEATED_CAPTION]


def test_a_long_number_in_a_table_is_no_second_caption(tmp_path: Path):
    """It is one in the line formats, where the next line's id follows if the end of a line is missing."""
    published.own_csv(tmp_path)
    put(tmp_path / "t.csv", "file,caption,split\na.jpg,电话 13800138000 的广告牌,train\n"
                            "b.png,猫,val\nsub/c.webp,鸟,test\n")
    reading = own_table.read(tmp_path / "t.csv")
    assert captions(reading)["a.jpg"] == ("电话 13800138000 的广告牌",) and not reading.left_out
