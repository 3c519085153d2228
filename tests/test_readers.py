"""Each reader against files written here by hand in the published layout, whole and damaged; nothing is drawn."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import published
import pytest
from published import AIC, TRAIN, ZHC, A, B, C, D, put

from clipcap_lib.config import InputError
from clipcap_lib.corpora import Reading, aic_icc, coco_cn, flickr8k_cn, flickr30k_cn, hualu, lines, read_corpora


def by_split(reading: Reading) -> dict[str, dict[str, tuple[str, ...]]]:
    splits: dict[str, dict[str, tuple[str, ...]]] = {}
    for record in reading.records:
        assert record.image.is_file() and record.image.name == record.file_name
        splits.setdefault(record.split, {})[record.file_name] = record.captions
    return splits


def reasons(reading: Reading) -> Counter:
    return Counter(item.reason for item in reading.left_out)


# --- Flickr8k-CN ------------------------------------------------------------------------------------------------------

@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    return published.flickr8k(tmp_path)


def test_flickr8k_cn_has_its_splits_and_its_captions_in_order(flickr8k: Path):
    reading = flickr8k_cn.read(flickr8k)
    assert by_split(reading) == {
        "train": {"667626_18933d713e.jpg": ("一个穿着泳装的女人躺在海水里。", "女人躺在水里。")},
        "val": {"3637013_c675de7705.jpg": ("一对恋人在公园河边拥抱。",)},
        "test": {"10815824_2997e03d76.jpg": ("马场一个小女孩牵着一匹马在火堆旁边。",)}}
    assert {record.translated for record in reading.records} == {"none"} and not reading.left_out


def test_flickr8k_cn_keeps_written_and_translated_captions_apart(flickr8k: Path):
    machine, google, human = (flickr8k_cn.read(flickr8k, captions=which) for which in ("zhb", "zhg", "zhm"))
    assert by_split(machine)["train"] == {"667626_18933d713e.jpg": ("女人在海中。",)}
    assert {record.translated for record in machine.records} == {"machine"}
    assert reasons(machine) == {lines.NO_SPLIT: 1}
    assert by_split(google)["test"] == {"10815824_2997e03d76.jpg": ("一个女孩和她的马站在火灾。",)}
    assert {record.translated for record in google.records} == {"machine"}
    assert by_split(human) == {"test": {"10815824_2997e03d76.jpg": ("一个女孩和她的马。",)}}
    assert {record.translated for record in human.records} == {"human"}
    with pytest.raises(InputError, match="zhx.*zhc, zhb, zhg, zhm"):
        flickr8k_cn.read(flickr8k, captions="zhx")


def test_images_in_no_split_are_left_out_and_counted_once(flickr8k: Path):
    put(flickr8k / "data/flickr8kzhc.caption.txt", ZHC + "1_a.jpg#zhc#0 一只狗。\n1_a.jpg#zhc#1 狗。\n")
    left_out = flickr8k_cn.read(flickr8k).left_out
    assert [(item.reason, item.damaged) for item in left_out] == [(lines.NO_SPLIT, False)]
    assert left_out[0].place.endswith("flickr8kzhc.caption.txt:5")


@pytest.mark.parametrize("encode", [lambda text: b"\xef\xbb\xbf" + text.encode(),
                                    lambda text: text.replace("\n", "\r\n").encode(),
                                    lambda text: text.replace("\n", "\n\n").encode()],
                         ids=["BOM", "CRLF", "blank lines"])
def test_byte_order_marks_windows_line_ends_and_blank_lines_change_nothing(flickr8k: Path, encode):
    expected = flickr8k_cn.read(flickr8k)
    for path in (flickr8k / "data").glob("*.txt"):
        path.write_bytes(encode(path.read_text(encoding="utf-8")))
    assert flickr8k_cn.read(flickr8k) == expected


def test_ids_with_and_without_jpg_are_the_same(flickr8k: Path):
    expected = flickr8k_cn.read(flickr8k)
    put(flickr8k / "data/flickr8ktrain.txt", "667626_18933d713e.jpg \n")
    put(flickr8k / "data/flickr8kzhc.caption.txt", ZHC.replace(".jpg", ""))
    assert flickr8k_cn.read(flickr8k) == expected


@pytest.mark.parametrize("line, said", [
    ("667626_18933d713e.jpg 一个女人。", "expected '<file>#zhc#<n> <caption>'"),
    ("667626_18933d713e.jpg#zhc#5一个女人。", "expected '<file>#zhc#<n> <caption>'"),
    ("667626_18933d713e.jpg#zhb#5 一个女人。", "expected '<file>#zhc#<n> <caption>'"),
    ("667626_18933d713e.jpg#zhc#five 一个女人。", "expected '<file>#zhc#<n> <caption>'"),
    ("#zhc#0 一个女人。", "expected '<file>#zhc#<n> <caption>'")])
def test_a_malformed_caption_line_is_named_with_its_number(flickr8k: Path, line: str, said: str):
    put(flickr8k / "data/flickr8kzhc.caption.txt", ZHC + line + "\n")
    with pytest.raises(InputError) as error:
        flickr8k_cn.read(flickr8k)
    assert "flickr8kzhc.caption.txt:5: " in str(error.value) and said in str(error.value)


def test_a_file_in_another_encoding_is_named_with_line_and_remedy(flickr8k: Path):
    put(flickr8k / "data/flickr8kzhc.caption.txt", b"ascii\n" + ZHC.encode("gb18030"))
    with pytest.raises(InputError, match=r"flickr8kzhc\.caption\.txt:2: not UTF-8 .*iconv"):
        flickr8k_cn.read(flickr8k)
    put(flickr8k / "data/flickr8kzhc.caption.txt", ZHC.encode("utf-16"))
    with pytest.raises(InputError, match=r"flickr8kzhc\.caption\.txt:1: not UTF-8"):
        flickr8k_cn.read(flickr8k)


@pytest.mark.parametrize("caption", ["", " ", "　"], ids=["nothing", "a space", "a wide space"])
def test_an_empty_caption_is_left_out_and_then_the_image_without_any(flickr8k: Path, caption: str):
    put(flickr8k / "data/flickr8kzhc.caption.txt", ZHC.replace("一对恋人在公园河边拥抱。", caption))
    reading = flickr8k_cn.read(flickr8k)
    assert reasons(reading) == {lines.EMPTY: 1, lines.NO_CAPTION: 1} and all(item.damaged for item in reading.left_out)
    assert set(by_split(reading)) == {"train", "test"}


def test_repeated_captions_and_ids_are_counted_and_the_first_is_kept(flickr8k: Path):
    put(flickr8k / "data/flickr8kzhc.caption.txt", ZHC + "667626_18933d713e.jpg#zhc#0 另一句。\n")
    put(flickr8k / "data/flickr8ktrain.txt", "667626_18933d713e\n667626_18933d713e\n")
    reading = flickr8k_cn.read(flickr8k)
    assert reasons(reading) == {lines.REPEATED_CAPTION: 1, lines.REPEATED_IMAGE: 1}
    assert by_split(reading)["train"]["667626_18933d713e.jpg"][0] == "一个穿着泳装的女人躺在海水里。"


def test_an_image_in_two_splits_is_an_error(flickr8k: Path):
    put(flickr8k / "data/flickr8ktest.txt", "10815824_2997e03d76\n667626_18933d713e\n")
    with pytest.raises(InputError, match=r"flickr8ktest\.txt:2: '667626_18933d713e' is in the train split already"):
        flickr8k_cn.read(flickr8k)


def test_a_split_list_with_captions_in_it_is_an_error(flickr8k: Path):
    put(flickr8k / "data/flickr8ktrain.txt", "667626_18933d713e 一个女人\n")
    with pytest.raises(InputError, match=r"flickr8ktrain\.txt:1: .* is no image id"):
        flickr8k_cn.read(flickr8k)


def test_a_missing_photo_is_left_out_as_damage(flickr8k: Path):
    (flickr8k / "Flicker8k_Dataset/3637013_c675de7705.jpg").unlink()
    reading = flickr8k_cn.read(flickr8k)
    assert reasons(reading) == {lines.NO_IMAGE: 1} and reading.left_out[0].damaged
    assert reading.left_out[0].place.endswith("Flicker8k_Dataset/3637013_c675de7705.jpg")


@pytest.mark.parametrize("missing", ["data/flickr8kval.txt", "data/flickr8kzhc.caption.txt"])
def test_a_missing_annotation_file_is_named_with_a_remedy(flickr8k: Path, missing: str):
    (flickr8k / missing).unlink()
    with pytest.raises(InputError, match=f"{missing}: no such file; complete the download"):
        flickr8k_cn.read(flickr8k)


def test_a_missing_photo_folder_is_named(flickr8k: Path):
    (flickr8k / "Flicker8k_Dataset").rename(flickr8k / "photos")
    with pytest.raises(InputError, match="Flicker8k_Dataset: no such folder"):
        flickr8k_cn.read(flickr8k)


@pytest.mark.parametrize("name", ["../secret", "/etc/secret", "sub/secret", "..", "a\\b", "C:secret"])
def test_names_that_lead_out_of_the_photo_folder_are_left_out(flickr8k: Path, name: str):
    put(flickr8k / "secret.jpg")
    put(flickr8k / "Flicker8k_Dataset/sub/secret.jpg")
    put(flickr8k / "data/flickr8ktrain.txt", f"667626_18933d713e\n{name}\n")
    put(flickr8k / "data/flickr8kzhc.caption.txt", ZHC + f"{name}.jpg#zhc#0 一只狗。\n")
    reading = flickr8k_cn.read(flickr8k)
    assert len(by_split(reading)["train"]) == 1
    assert reasons(reading).keys() <= {lines.UNSAFE_NAME, lines.NO_IMAGE} and len(reading.left_out) == 1


def test_a_link_that_leads_out_of_the_photo_folder_is_no_photo(flickr8k: Path):
    put(flickr8k / "secret.jpg")
    photo = flickr8k / "Flicker8k_Dataset/667626_18933d713e.jpg"
    photo.unlink()
    photo.symlink_to(flickr8k / "secret.jpg")
    reading = flickr8k_cn.read(flickr8k)
    assert reasons(reading) == {lines.NO_IMAGE: 1} and "train" not in by_split(reading)


def test_a_photo_folder_elsewhere_may_be_linked_as_a_whole(flickr8k: Path, tmp_path_factory):
    expected = flickr8k_cn.read(flickr8k)
    elsewhere = tmp_path_factory.mktemp("photos") / "all"
    (flickr8k / "Flicker8k_Dataset").rename(elsewhere)
    (flickr8k / "Flicker8k_Dataset").symlink_to(elsewhere)
    assert flickr8k_cn.read(flickr8k) == expected


def test_a_line_separator_within_a_caption_does_not_end_the_line(flickr8k: Path):
    put(flickr8k / "data/flickr8kzhc.caption.txt", ZHC.replace("泳装的", "泳装\u2028的"))
    assert "\u2028" in by_split(flickr8k_cn.read(flickr8k))["train"]["667626_18933d713e.jpg"][0]


def test_the_real_flickr8k_cn_has_its_published_counts(real_data_root: Path):
    reading = flickr8k_cn.read(real_data_root / "flickr8k-cn")
    assert Counter(record.split for record in reading.records) == {"train": 6000, "val": 1000, "test": 1000}
    captions = [(record.split, caption) for record in reading.records for caption in record.captions]
    assert Counter(split for split, _ in captions) == {"train": 30000, "val": 5000, "test": 5000}
    assert reasons(reading) == {lines.NO_SPLIT: 91}
    # 22,776 lines are distinct; two of them differ only by white space, which readers remove
    assert len({caption for split, caption in captions if split == "train"}) == 22775
    machine = flickr8k_cn.read(real_data_root / "flickr8k-cn", captions="zhb")
    assert reasons(machine) == {lines.NO_SPLIT: 92}  # and the entry without a photo
    human = flickr8k_cn.read(real_data_root / "flickr8k-cn", captions="zhm")
    assert Counter(r.split for r in human.records for _ in r.captions) == {"test": 5000} and not human.left_out


# --- Flickr30k-CN -----------------------------------------------------------------------------------------------------

@pytest.fixture
def flickr30k(tmp_path: Path) -> Path:
    return published.flickr30k(tmp_path)


def test_flickr30k_cn_joins_the_words_and_strips_parts_of_speech(flickr30k: Path):
    reading = flickr30k_cn.read(flickr30k)
    assert by_split(reading) == {"train": {"1000092795.jpg": ("两个年轻人在外面。", "两个人穿T恤")},
                                 "val": {"1018148011.jpg": ("一群人站着。",)},
                                 "test": {"1007129816.jpg": ("一个戴帽子的男人。",)}}
    assert [record.translated for record in reading.records] == ["machine", "machine", "human"]


@pytest.mark.parametrize("text, tagged, joined", [
    ("两个 New York 人", False, "两个New York人"), ("iPad:n Pro:n 和:c 3:m 人:n", True, "iPad Pro和3人"),
    ("比分:n 3:2:m", True, "比分3:2"), ("::wm 是:v", True, ":是"), ("时间 10:30", False, "时间10:30")])
def test_joining_keeps_latin_words_apart_and_colons_in_place(text: str, tagged: bool, joined: str):
    assert flickr30k_cn.join_words(text, tagged) == joined


@pytest.mark.parametrize("line", ["1000092795 两个 人", "1000092795#zhm#0 两个:m 人:n", "1000092795#zhb#0两个"])
def test_a_malformed_line_of_flickr30k_cn_is_named(flickr30k: Path, line: str):
    put(flickr30k / "flickr30kzhbbosontrain/TextData/seg.flickr30kzhbbosontrain.caption.txt", f"\n{line}\n")
    with pytest.raises(InputError, match=r"bosontrain\.caption\.txt:2: .*expected '<id>#zhb#<n> word word"):
        flickr30k_cn.read(flickr30k)


def test_the_second_release_of_flickr30k_has_tabs_or_spaces(tmp_path: Path):
    published.flickr30k_cna(tmp_path)
    put(tmp_path / "flickr30k_cn_test.txt", "18 一只猫。\n19 \n")
    put(tmp_path / "flickr30k-images/19.jpg")
    reading = flickr30k_cn.read(tmp_path)
    assert by_split(reading) == {"train": {"6228559981.jpg": ("一个孩子跑过喷泉。", "孩子在 喷泉边。")},
                                 "val": {"17.jpg": ("一只狗。",)}, "test": {"18.jpg": ("一只猫。",)}}
    assert {record.translated for record in reading.records} == {"human"}
    assert reasons(reading) == {lines.EMPTY: 1, lines.NO_CAPTION: 1}


@pytest.mark.parametrize("line, said", [
    ("622855998一个孩子。", r"val\.txt:1: .*a tab or space"),
    ("6228559981 一个孩子。", r"val\.txt:1: '6228559981' is in the train split already")])
def test_the_second_release_names_lines_it_cannot_take(tmp_path: Path, line: str, said: str):
    put(tmp_path / "flickr30k_cna_train.txt", "6228559981 一个孩子跑过喷泉。\n")
    put(tmp_path / "flickr30k_cna_val.txt", line)
    put(tmp_path / "flickr30k-images/6228559981.jpg")
    with pytest.raises(InputError, match=said):
        flickr30k_cn.read(tmp_path)


def test_with_both_releases_the_one_asked_for_is_read(flickr30k: Path):
    put(flickr30k / "flickr30k_cna_train.txt", "1000092795 两个年轻人。\n")
    assert len(flickr30k_cn.read(flickr30k).records) == 3
    assert by_split(flickr30k_cn.read(flickr30k, captions="cna")) == {"train": {"1000092795.jpg": ("两个年轻人。",)}}
    with pytest.raises(InputError, match="neither release"):
        flickr30k_cn.read(flickr30k / "flickr30k-images")


# --- AIC-ICC ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def aic(tmp_path: Path) -> Path:
    return published.aic(tmp_path)


def test_aic_icc_has_a_training_and_a_validation_file(aic: Path):
    reading = aic_icc.read(aic)
    assert by_split(reading) == {
        "train": {"8f00f3d0f1008e085ab660e70dffced16a8259f6.jpg": ("两个衣着休闲的人", "道路上有一个人"),
                  "b96ff46ba5b1cbe5bb4cc32b566431132ca71a64.jpg": ("一个人",)},
        "val": {"c.jpg": ("一只狗",)}}
    assert not reading.left_out


@pytest.mark.parametrize("content, said", [
    (AIC[:-60], r"20170902\.json:4: not readable as JSON"),
    ("", r"20170902\.json:1: not readable as JSON"),
    ("[" * 100_000, r"20170902\.json:1: not readable as JSON"),
    ('{"image_id": "a.jpg"}', r"20170902\.json:1: holds a JSON dict; expected a list"),
    ('["a.jpg"]', r"record 1: is a JSON str; expected an object"),
    ('[{"image_id": "a.jpg"}]', r"record 1: has no 'caption'"),
    ('[{"caption": ["a"]}]', r"record 1: has no 'image_id'"),
    ('[{"image_id": 7, "caption": ["a"]}]', r"record 1: image_id is a JSON int"),
    ('[{"image_id": "a.jpg", "caption": "一只狗"}]', r"record 1: caption is not a list of sentences"),
    ('[{"image_id": "a.jpg", "caption": ["一只狗", 7]}]', r"record 1: caption is not a list of sentences")])
def test_broken_json_of_aic_icc_is_named_with_its_place(aic: Path, content: str, said: str):
    put(aic / TRAIN, content)
    with pytest.raises(InputError, match=said):
        aic_icc.read(aic)


def test_null_empty_and_unencodable_captions_of_aic_icc_are_left_out(aic: Path):
    items = [{"image_id": "8f00f3d0f1008e085ab660e70dffced16a8259f6.jpg",
              "caption": [None, "", "\ud83d", "a\0b", "好"]},
             {"image_id": "b96ff46ba5b1cbe5bb4cc32b566431132ca71a64.jpg", "caption": None},
             {"image_id": "b96ff46ba5b1cbe5bb4cc32b566431132ca71a64.jpg", "caption": ["再一次"]},
             {"image_id": "../c.jpg", "caption": ["外面"]}, {"image_id": "\ud83d.jpg", "caption": ["半个字"]},
             {"image_id": "gone.jpg", "caption": ["不在"]}]
    put(aic / TRAIN, json.dumps(items))
    reading = aic_icc.read(aic)
    assert by_split(reading)["train"] == {"8f00f3d0f1008e085ab660e70dffced16a8259f6.jpg": ("好",)}
    assert reasons(reading) == {lines.EMPTY: 2, lines.NOT_TEXT: 2, lines.NO_CAPTION: 1, lines.REPEATED_IMAGE: 1,
                                lines.UNSAFE_NAME: 2, lines.NO_IMAGE: 1}
    json.dumps([item.place for item in reading.left_out], ensure_ascii=False).encode()  # can be written to a file


def test_one_part_of_aic_icc_will_do_but_images_without_annotations_will_not(aic: Path):
    (aic / TRAIN).unlink()
    with pytest.raises(InputError, match=f"{TRAIN}: no such file"):
        aic_icc.read(aic)
    for path in (aic / "caption_train_images_20170902").iterdir():
        path.unlink()
    (aic / "caption_train_images_20170902").rmdir()
    assert set(by_split(aic_icc.read(aic))) == {"val"}


# --- Hualu Cup --------------------------------------------------------------------------------------------------------

@pytest.fixture
def hualu_cup(tmp_path: Path) -> Path:
    return published.hualu_cup(tmp_path)


def test_hualu_has_a_table_and_two_boards_without_captions(hualu_cup: Path):
    reading = hualu.read(hualu_cup)
    assert by_split(reading) == {"train": {"0001.jpg": ("一个男人在打电话", "男人,在街上"), "0002.jpg": ("一只狗",)},
                                 "board-a": {"a1.JPG": (), "a2.jpg": ()}, "board-b": {"b1.jpg": ()}}
    assert reasons(reading) == {hualu.NO_PHOTO: 1}


@pytest.mark.parametrize("content, said", [
    ("image,caption\n", r"train\.csv:1: columns are 'image,caption'; expected 'images,captions'"),
    ("", r"train\.csv: the file is empty; expected the columns 'images,captions'"),
    ("images,captions\n0001.jpg,一,二\n", r"train\.csv:2: 3 columns; expected"),
    ("images,captions\n0001.jpg\n", r"train\.csv:2: 1 columns; expected"),
    ("images,captions\n,一只狗\n", r"train\.csv:2: no file name"),
    ('images,captions\n0001.jpg,"一只狗\n0002.jpg,二\n', r"train\.csv:\d: not readable as CSV"),
    ("images,captions\n0001.jpg," + "长" * 200_000, r"train\.csv:2: not readable as CSV")])
def test_a_malformed_table_of_hualu_is_named_with_its_line(hualu_cup: Path, content: str, said: str):
    put(hualu_cup / "train.csv", content)
    with pytest.raises(InputError, match=said):
        hualu.read(hualu_cup)


def test_rows_of_hualu_without_caption_or_image_are_left_out(hualu_cup: Path):
    put(hualu_cup / "train.csv",
        "\ufeffimages,captions\r\n0001.jpg,\r\n../board-a/a2.jpg,外\r\n0002.jpg,狗\r\n3.jpg,没有\r\n")
    reading = hualu.read(hualu_cup)
    assert by_split(reading)["train"] == {"0002.jpg": ("狗",)}
    assert reasons(reading) == {lines.EMPTY: 1, lines.NO_CAPTION: 1, lines.UNSAFE_NAME: 1, lines.NO_IMAGE: 1,
                                hualu.NO_PHOTO: 1}


def test_a_hualu_folder_with_nothing_in_it_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"train\.csv: no such file, nor"):
        hualu.read(tmp_path)


# --- COCO-CN ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return published.coco(tmp_path)


def test_coco_cn_finds_photos_by_their_prefix(coco: Path):
    reading = coco_cn.read(coco)
    assert by_split(reading) == {"train": {f"{A}.jpg": ("一只长颈鹿。", "草地上的长颈鹿。")},
                                 "val": {f"{B}.jpg": ("一辆火车 停着。",)}, "test": {f"{C}.jpg": ("两个人。",)}}
    assert not reading.left_out


def test_the_translated_sentences_of_coco_cn_are_kept_apart(coco: Path):
    reading = coco_cn.read(coco, captions="manually-translated")
    assert by_split(reading) == {"test": {f"{C}.jpg": ("一个男人和一个女人。",)}}
    assert reading.records[0].translated == "human"


def test_the_machine_translation_of_coco_cn_is_joined_and_kept_apart(tmp_path: Path):
    reading = coco_cn.read(published.coco_extended(tmp_path), captions="machine-translated")
    assert by_split(reading) == {"train": {f"{A}.jpg": ("一个长颈鹿吃树", "长颈鹿在外面10:30")},
                                 "val": {f"{B}.jpg": ("一辆火车",)}, "test": {f"{C}.jpg": ("两个人",)}}
    assert {record.translated for record in reading.records} == {"machine"} and not reading.left_out
    assert {which for which in reading.captions.values()} == {"machine-translated"}
    put(tmp_path / "coco-cn-version1805v1.1/imageid.machine-translated-caption.bosonseg.txt", f"{A}#0一个:m\n")
    with pytest.raises(InputError, match=r"bosonseg\.txt:1: .*word:POS"):
        coco_cn.read(tmp_path, captions="machine-translated")


def test_the_extension_of_coco_cn_trains_and_touches_no_references(tmp_path: Path):
    reading = coco_cn.read(published.coco_extended(tmp_path))
    assert by_split(reading)["train"] == {f"{A}.jpg": ("一只长颈鹿。", "草地上的长颈鹿。", "动物园里。"),
                                          f"{D}.jpg": ("一个比萨。",)}
    assert by_split(reading)["test"] == {f"{C}.jpg": ("两个人。",)}
    assert reasons(reading) == {coco_cn.HELD_OUT: 1} and not reading.left_out[0].damaged


def test_the_tags_of_coco_cn_go_with_their_images(coco: Path):
    tags = {record.file_name: record.tags for record in coco_cn.read(coco).records}
    assert tags == {f"{A}.jpg": ("长颈鹿", "草地"), f"{B}.jpg": (), f"{C}.jpg": ("男人", "女人", "手机")}
    file = coco / published.COCO / "imageid.human-written-tags.txt"
    put(file, f"{A} 长颈鹿\n{A} 另一次\n{B} \n{C}\t人\n")
    reading = coco_cn.read(coco)
    assert [record.tags for record in reading.records] == [("长颈鹿",), (), ("人",)]
    assert reasons(reading) == {coco_cn.REPEATED_TAGS: 1, coco_cn.NO_TAGS: 1}
    put(file, f"{A} 长颈鹿\n101 草地\n")
    with pytest.raises(InputError, match=r"human-written-tags\.txt:2: .*expected 'COCO_train2014_"):
        coco_cn.read(coco)
    file.unlink()
    assert not any(record.tags for record in coco_cn.read(coco).records)


@pytest.mark.parametrize("line", [f"{A}#2 一个空格", f"{A}\t没有号码", "101#0\t没有前缀", f"../{A}#0\t外面"])
def test_a_malformed_line_of_coco_cn_is_named(coco: Path, line: str):
    put(coco / "coco-cn-version1805v1.1/imageid.human-written-caption.txt", f"{A}#0\t好\n{line}\n")
    with pytest.raises(InputError, match=r"human-written-caption\.txt:2: .*a tab, and a sentence"):
        coco_cn.read(coco)
    put(coco / "coco-cn-version1805v1.1/coco-cn_val.txt", "101\n")
    with pytest.raises(InputError, match=r"coco-cn_val\.txt:1: '101' is no image id"):
        coco_cn.read(coco)


# --- all of them ------------------------------------------------------------------------------------------------------

def test_the_corpora_that_are_there_are_read_in_a_fixed_order(flickr8k: Path, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    os.symlink(flickr8k, root / "flickr8k-cn")
    put(root / "hualu/board-a/a.jpg")
    assert list(read_corpora(root)) == ["flickr8k-cn", "hualu"]
    assert list(read_corpora(root, ["hualu"])) == ["hualu"]
    for names, said in ((["coco-cn"], "asked for and is not there"), (["coco"], "unknown corpus 'coco'")):
        with pytest.raises(InputError, match=said):
            read_corpora(root, names)
    with pytest.raises(InputError, match="holds no corpus"):
        read_corpora(root / "hualu")
    with pytest.raises(InputError, match="no such folder"):
        read_corpora(root / "nowhere")


def test_a_second_reading_is_the_same(coco: Path):
    assert coco_cn.read(coco) == coco_cn.read(coco)
