"""A table of one's own: read as CSV and as JSON lines, split, prepared, and taken through notebooks 01 to 06."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path
from random import Random

import nbclient
import nbformat
import published
import pytest
from published import put

from clipcap_lib import cli
from clipcap_lib.config import InputError, preset
from clipcap_lib.corpora import lines, miniature, own_table, scenes
from clipcap_lib.data import load_prepared
from clipcap_lib.files import read_json, write_json

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def captions(table: Path, images: Path | None = None) -> dict[str, tuple[str, tuple[str, ...]]]:
    reading = own_table.read(table, images)
    assert not reading.left_out
    return {r.file_name: (r.split, r.captions) for r in reading.records}


def test_csv_and_json_lines_say_the_same(tmp_path: Path):
    found = captions(published.own_csv(tmp_path) / "own.csv")
    assert found == {"a.jpg": ("train", ("一只狗", "狗")), "b.png": ("val", ("猫,在睡",)), "sub/c.webp": ("test", ("鸟",))}
    same = (published.own_jsonl(tmp_path) / "own.jsonl").read_text("utf-8").replace("\\u732b", "猫,在睡")
    put(tmp_path / "own.jsonl", same)
    assert captions(tmp_path / "own.jsonl") == found
    for record in own_table.read(tmp_path / "own.csv").records:
        assert record.image == tmp_path / record.file_name and record.image.is_file() and record.corpus == "own-table"


def test_the_images_may_lie_in_a_folder_of_their_own_and_other_columns_are_passed_over(tmp_path: Path):
    published.own_csv(tmp_path / "photos")
    put(tmp_path / "t.csv", "id,captions,split,images,,\n1,狗,train,./a,,\n2,猫,val,b.png,,\n3,鸟,test,sub/c.webp,,\n,,,,,")
    assert set(captions(tmp_path / "t.csv", tmp_path / "photos")) == {"a.jpg", "b.png", "sub/c.webp"}
    with pytest.raises(InputError, match=r"t\.csv: no image of it can be used \(.*t\.csv:2: 'a': image file is missing\)"):
        own_table.read(tmp_path / "t.csv")


@pytest.mark.parametrize("name, reason", [("{folder}/a.jpg", lines.UNSAFE_NAME), ("C:\\photos\\a.jpg", lines.UNSAFE_NAME),
                                          ("photos/a.jpg", lines.NO_IMAGE)])
def test_a_table_of_names_that_lead_elsewhere_is_told_the_first_and_what_names_are(tmp_path: Path, name: str, reason: str):
    folder, name = published.own_csv(tmp_path / "photos"), name.format(folder=tmp_path / "photos")
    put(tmp_path / "t.csv", f"file,caption\n{name},狗\n")
    with pytest.raises(InputError) as error:
        own_table.read(tmp_path / "t.csv", folder)
    place = f"{tmp_path / 't.csv'}:2: {name!a}"
    assert f"({place}: {reason}); names are relative to {folder}, with / between folders" in str(error.value)


def test_columns_may_be_named_in_capitals(tmp_path: Path):
    published.own_csv(tmp_path)
    before = captions(tmp_path / "own.csv")
    put(tmp_path / "t.csv", (tmp_path / "own.csv").read_text("utf-8").replace("file,caption,split", "File,Caption,SPLIT"))
    assert captions(tmp_path / "t.csv") == before


def test_the_split_by_file_name_is_eighty_ten_ten_and_stays_when_the_table_grows(tmp_path: Path):
    names = [f"{n}.jpg" for n in range(5000)]
    shares = {split: number / 5000 for split, number in Counter(map(own_table.split_of, names)).items()}
    assert shares == pytest.approx({"train": 0.8, "val": 0.1, "test": 0.1}, abs=0.015)
    put(tmp_path / "t.csv", "file,caption\n" + "".join(f"{name},狗\n" for name in names[:60]))
    for name in names[:120]:
        put(tmp_path / name)
    before = captions(tmp_path / "t.csv")
    put(tmp_path / "t.csv", "file,caption\n" + "".join(f"{name},狗\n" for name in reversed(names[:120])))
    after = captions(tmp_path / "t.csv")
    assert len(after) == 120 and before.items() <= after.items()


@pytest.mark.parametrize("content, said", [
    ("image,caption\n", r"t\.csv:1: columns are 'image,caption'; expected 'file,caption' or 'images,captions'"),
    ("file;caption\na.jpg;狗\n", r"t\.csv:1: columns are 'file;caption'"),
    ("file,caption,caption\n", r"t\.csv:1: columns are"),
    ("", r"t\.csv: the file is empty; expected the columns 'file,caption'"), ("\ufeff\n \n", r"t\.csv: the file is empty"),
    ("Image,Caption\n", r"t\.csv:1: columns are 'Image,Caption'; expected 'file,caption'"),
    ("file,caption\n", r"t\.csv:1: no rows under the header"),
    ("file,caption\na.jpg,狗,猫\n", r"t\.csv:2: 3 columns; expected 2"),
    ("file,caption\n ,狗\n", r"t\.csv:2: no file name"),
    ('file,caption\na.jpg,"狗\n', r"t\.csv:\d: not readable as CSV"),
    ("file,caption\na.jpg,狗\n", r"t\.csv: 1 images are too few to be split .* none fell to .*; say in a column split"),
    ("file,caption,split\na.jpg,狗,dev\n", r"t\.csv:2: the split is 'dev'; expected train, val, test"),
    ("file,caption,split\na.jpg,狗,\n", r"t\.csv:2: the split is ''"),
    ("file,caption,split\na.jpg,狗,val\na.jpg,犬,test\n", r"t\.csv:3: 'a\.jpg' is in the split val already"),
    ("file,caption,split\na.jpg,狗,train\nb.png,犬,val\n", r"t\.csv: no image of the split test;")])
def test_a_csv_that_cannot_be_used_is_named_with_line_and_remedy(tmp_path: Path, content: str, said: str):
    published.own_csv(tmp_path)
    put(tmp_path / "t.csv", content)
    with pytest.raises(InputError, match=said):
        own_table.read(tmp_path / "t.csv")


@pytest.mark.parametrize("line, said", [
    ('{"file": "a.jpg", "caption": "狗"', r"t\.jsonl:2: not readable as JSON"),
    ('["a.jpg", "狗"]', r"t\.jsonl:2: is a JSON list; expected an object"),
    ('{"file": "a.jpg"}', r't\.jsonl:2: expected {"file"'),
    ('{"caption": "狗"}', r't\.jsonl:2: expected {"file"'),
    ('{"file": "a.jpg", "caption": "狗", "captions": ["犬"]}', r't\.jsonl:2: expected {"file"'),
    ('{"file": 7, "caption": "狗", "split": "val"}', r"t\.jsonl:2: no file name"),
    ('{"file": "a.jpg", "caption": ["狗"]}', r"t\.jsonl:2: captions are no text"),
    ('{"file": "a.jpg", "captions": "狗"}', r"t\.jsonl:2: captions are no text"),
    ('{"file": "a.jpg", "captions": [7]}', r"t\.jsonl:2: captions are no text"),
    ('{"file": "a.jpg", "caption": "狗"}', r"t\.jsonl:2: lacks a split unlike the lines before it"),
    ('{"file": "a.jpg", "caption": "狗", "split": 1}', r"t\.jsonl:2: the split is '1'"),
    ('{"file": "a.jpg", "caption": "狗", "split": null}', r"t\.jsonl:2: the split is null"),
    ('{"file": "a.jpg", "caption": ' + "[" * 100_000, r"t\.jsonl:2: not readable as JSON")])
def test_a_json_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, said: str):
    published.own_csv(tmp_path)
    put(tmp_path / "t.jsonl", '{"file": "b.png", "caption": "猫", "split": "train"}\n' + line + "\n")
    with pytest.raises(InputError, match=said):
        own_table.read(tmp_path / "t.jsonl")


def test_rows_that_say_nothing_are_left_out_and_counted(tmp_path: Path):
    published.own_csv(tmp_path)
    rows = [{"file": "a.jpg", "captions": ["狗", "狗", None, " ", "a\0b", "\ud83d"]}, {"file": "b", "caption": "猫"},
            {"file": "b.png", "caption": "猫"}, {"file": "gone.jpg", "caption": "不在"}, {"file": "c.jpg", "caption": None},
            {"file": "sub/c.webp", "caption": None}, {"file": "b.jpg", "caption": "猫"}, {"file": "c.jpg", "captions": []}]
    put(tmp_path / "b.jpg")
    put(tmp_path / "c.jpg")
    splits = {"a.jpg": "train", "b.png": "val", "b": "test", "b.jpg": "test"}
    put(tmp_path / "t.jsonl", "".join(json.dumps({**row, "split": splits.get(row["file"], "train")}) + "\n" for row in rows))
    reading = own_table.read(tmp_path / "t.jsonl")
    assert {r.file_name: r.captions for r in reading.records} == {"a.jpg": ("狗",), "b.jpg": ("猫",), "b.png": ("猫",)}
    assert Counter(item.reason for item in reading.left_out) == {
        own_table.SAME_CAPTION: 2, lines.EMPTY: 5, lines.NOT_TEXT: 2, lines.NO_IMAGE: 1, lines.NO_CAPTION: 2}


@pytest.mark.parametrize("name", ["../secret.jpg", "{secret}", "sub/../../secret.jpg", "..", "sub\\c.webp", "C:secret.jpg",
                                  "sub//c.webp", "link.jpg", "linked/secret.jpg", "circle.jpg", "x" * 5000,
                                  "y" * 300 + "/a.jpg", "own.csv/a.jpg"])
def test_no_name_and_no_link_leads_out_of_the_image_folder(tmp_path: Path, name: str):
    put(tmp_path / "secret.jpg")
    folder = published.own_csv(tmp_path / "photos")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    name = name.format(secret=tmp_path / "secret.jpg")
    with (folder / "own.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow([name, "外面", "train"])
    reading = own_table.read(folder / "own.csv")
    assert {r.file_name for r in reading.records} == {"a.jpg", "b.png", "sub/c.webp"}
    assert [item.reason in (lines.UNSAFE_NAME, lines.NO_IMAGE) and item.damaged for item in reading.left_out] == [True]


# --- the whole way ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def own_images(tmp_path_factory) -> Path:
    """Forty drawings as a user would have them: PNG and JPEG, in a subfolder as well, and a table without splits."""
    folder, random = tmp_path_factory.mktemp("own"), Random(5)
    (folder / "photos" / "more").mkdir(parents=True)
    with (folder / "own.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption"])
        for number in range(40):
            name = f"{'more/' if number % 4 == 0 else ''}图{number:02d}.{'png' if number % 3 == 0 else 'jpg'}"
            scene = scenes.sample_scene(random, 0.3)
            miniature.draw_scene(scene, random).save(folder / "photos" / name)
            writer.writerows([name, caption] for caption in scenes.write_captions(scene, random)[:1 + number % 3])
    return folder


@pytest.fixture(scope="module")
def prepared(own_images: Path, tmp_path_factory) -> Path:
    """The runs folder after `prepare --csv`, given the environment that notebooks are run in."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPCAP_RUNS", str(runs))
        assert cli.main(["prepare", "--preset", "miniature-debug", "--csv", str(own_images / "own.csv"),
                         "--images", str(own_images / "photos")]) == 0
    return runs


def test_prepare_takes_a_table_and_needs_no_data_root(prepared: Path):
    data = prepared / "miniature-debug" / "data"
    manifest = read_json(data / "manifest.json")
    assert sum(manifest["images"].values()) == 40 and set(manifest["images"]) == {
        "own-table/train", "own-table/val", "own-table/test"}
    rows = load_prepared(data, "test")
    assert rows[0]["image"].size == (preset("miniature").stored_size,) * 2
    assert set(read_json(data / "references-test.json")) == set(rows["file_name"][:])
    assert all(own_table.split_of(name) == "test" for name in rows["file_name"][:])


def test_a_sliver_of_a_table_is_not_drawn_instead(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path))
    write_json(tmp_path / "miniature" / "data" / ".options", {"table": "own.csv"})
    assert cli.main(["train", "--preset", "miniature", "--debug"]) == 2
    assert "is of a table; prepare the sliver from it as well" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, said", [
    (["--csv", "{own}", "--data-root", "."], "--csv is prepared alone"),
    (["--images", "."], "give the table as well, with --csv"),
    (["--csv", "{own}.txt"], "is neither .csv nor .jsonl"),
    (["--csv", "nowhere.csv"], "nowhere.csv: no such file"),
    (["--csv", "{own}", "--images", "nowhere"], "nowhere: no such folder")])
def test_arguments_that_do_not_go_together_end_in_one_sentence(own_images: Path, arguments, said, capsys, monkeypatch,
                                                               tmp_path: Path):
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *(a.format(own=own_images / "own.csv") for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_notebooks_one_to_six_work_on_a_table_of_ones_own(prepared: Path, monkeypatch, tmp_path: Path):
    library = os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")])
    for name, value in {"CLIPCAP_RUNS": prepared, "CLIPCAP_PRESET": "miniature-debug", "CLIPCAP_FIGURES": tmp_path,
                        "OMP_NUM_THREADS": 1, "PYTHONPATH": library,
                        "MPLBACKEND": "module://matplotlib_inline.backend_inline"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("CLIPCAP_DATA", raising=False)
    notebook = nbformat.v4.new_notebook()  # all of them in one kernel: starting it takes longer than most
    for path in sorted(NOTEBOOKS.glob("0[1-6]_*.ipynb")):
        notebook.cells += nbformat.read(path, as_version=4).cells
        for cell in notebook.cells:  # captioners of few images are only trained of the miniature, unless asked for
            cell.source = cell.source.replace('seeds = (1, 2) if preset_name == "miniature" else ()', "seeds = (1,)")
    nbclient.NotebookClient(notebook, timeout=170, kernel_name="python3",
                            resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    run = prepared / "miniature-debug"
    assert {path.stem for path in (run / "scores").glob("*.json")} == {
        f"{system}-test" for system in ("model1", "model2", "model3", "1+2+3", "human", "constant", "shuffled")}
    assert set(read_json(run / "data" / "manifest.json")["images"]) == {"own-table/train", "own-table/val", "own-table/test"}
    references = read_json(run / "data" / "references-test.json")
    assert read_json(run / "predictions" / "1+2+3-test.json").keys() == references.keys()
    assert not (run / "image").exists(), "there are no labelled images to pretrain the image encoder on"
    assert {path.name[:2] for path in tmp_path.glob("*.png")} == {"01", "02", "03", "04", "05", "06"}
    assert len(list((run / "ablation" / "predictions").glob("*-seed1-test.json"))) == 8
