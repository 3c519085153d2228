"""Captioners of few captioned images: what each start takes over, how they are trained, and what is told of them."""

import fcntl
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import IMAGES, toy

from clipcap_lib import ablation, checkpoint, cli, metrics, processes, systems, train
from clipcap_lib import prepare as prepare_module
from clipcap_lib.config import InputError
from clipcap_lib.corpora import miniature
from clipcap_lib.data import data_fingerprint, drawn, load_prepared
from clipcap_lib.files import read_json, write_json
from clipcap_lib.prepare import prepare

STILL = replace(toy(), caption=replace(toy().caption, learning_rate=0.0, epochs=1))  # weights stay where they start
SIZE = 12
TOTAL = 56  # training images


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """CLIP and its warm-ups at the toy size, with and without COCO-CN."""
    run = tmp_path_factory.mktemp("runs") / "miniature"
    corpora = miniature.write_corpora(tmp_path_factory.mktemp("corpora"), images=IMAGES, processes=1)
    prepare(toy(), run / "data", corpora, processes=1, report=lambda line: None)
    for without in ((), ("coco-cn",)):
        train.pretrain_clip(toy(), run, 1, without)
    return run


@pytest.fixture(scope="module")
def folder(run) -> Path:
    """Captioners of all starts on two numbers of images."""
    ablation.captioners(toy(), run, (SIZE, 30), (1,))
    return ablation.folder_of(run)


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> Path:
    """Predictions by hand: the better a start, the more images have a caption of their own, the others another image's."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "data").symlink_to(run / "data")
    (folder / "predictions").mkdir()
    for board in ("board-a", "board-b"):
        references = read_json(run / "data" / f"references-{board}.json")
        files = sorted(references)
        for place, start in enumerate(ablation.STARTS):
            for images in (12, 30):
                for seed in (1, 2):
                    right = {files[(i * 5 + seed + images) % len(files)] for i in range(2 * place + seed - 1)}
                    said = {file: [references[file if file in right else files[i - 3]][seed]]
                            for i, file in enumerate(files)}
                    write(folder, ablation.name_of(start, images, seed), board, said)
    return folder


def write(folder: Path, name: str, board: str, said: dict[str, list[str]]) -> None:
    path = folder / "predictions" / f"{name}-{board}.json"
    write_json(path, said)
    write_json(path.with_suffix(".about.json"), {"system": name, "set": board, "predictions_sha256": systems.sha256(path)})


def scores(folder: Path, start: str, images: int, seed: int, board: str) -> metrics.Scores:
    """By the metrics alone; these corpora are not called drawn, so that words count."""
    references = metrics.prepare_references(folder / "data" / f"references-{board}.json", "jieba")
    path = folder / "predictions" / f"{start}-{images}-seed{seed}-{board}.json"
    return metrics.score(path, references, metrics=("CIDEr",))


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start, origins", [
    ("random", {"image_encoder": "image/labelled"}),
    ("language", {"image_encoder": "image/labelled", "gpt": "language/all"}),
    ("encoder", {"image_encoder": "clip/all", "image_head": "clip/all", "gpt": "language/all"}),
    ("shared", {"image_encoder": "clip/all", "image_head": "clip/all", "gpt": "clip/all"})])
def test_a_start_takes_over_what_it_says_and_nothing_else(run, start, origins):
    found = load_file(ablation.captioner(STILL, run, start, SIZE, 5) / "best" / "model.safetensors")
    sources = {name: load_file(run / name / "best" / "model.safetensors")
               for name in ("image/labelled", "language/all", "clip/all")}
    new = train.new_model(STILL, checkpoint.load(run / "clip" / "all" / "best").tokenizer, 5).state_dict()
    weights = [name for name in found if name.endswith("weight") and name in new and found[name].ndim >= 2]
    assert {name.split(".")[0] for name in weights} == {"image_encoder", "image_head", "grid_head", "text_head", "gpt"}
    for name in weights:
        part = name.split(".")[0]
        expected = sources[origins[part]][name] if part in origins else new[name]
        assert torch.equal(found[name], expected), name
    trained = {"image_encoder.backbone.layer4.0.conv1.weight": ("image/labelled", "clip/all"),
               "gpt.transformer.h.0.mlp.c_fc.weight": ("language/all", "clip/all")}
    for name, (before, after) in trained.items():
        assert not torch.equal(sources[before][name], sources[after][name]), "the test can tell them apart"


def asked(run, monkeypatch, config, **options) -> dict[str, tuple]:
    """What `train.train_stage` is asked for by each start."""
    found = {}
    monkeypatch.setattr(train, "train_stage", lambda *given: found.update({given[3].split("-")[0]: given}) or Path(given[3]))
    ablation.captioners(config, run, (SIZE,), (7,), **options)
    return found


def test_all_starts_are_trained_alike_and_nothing_is_frozen(run, monkeypatch):
    config = replace(toy(), caption=replace(toy().caption, visits=2, freeze=("conv1", "layer1")))
    found = asked(run, monkeypatch, config, without=("coco-cn",))
    assert list(found) == list(ablation.STARTS)
    stage, given, _, _, seed, without, _, _, _, images = found["random"]
    assert (stage, seed, without, images) == ("caption", 7, ("coco-cn",), SIZE)
    alike = replace(config.caption, freeze=(), visits=2 * 2)
    assert given == replace(config, caption=alike), "of 40 images without COCO-CN: ceil(sqrt(40 / 12)) times as often"
    same = (0, 1, 2, 4, 5, 9)
    assert all([one[i] for i in same] == [found["random"][i] for i in same] for one in found.values())
    paths = {start: [path.parent.relative_to(run).as_posix() for path, _ in one[6]] for start, one in found.items()}
    clip, text, image = "clip/without-coco-cn", "language/without-coco-cn", "image/labelled"
    assert paths == {"random": [image], "language": [image, text], "encoder": [clip, text], "shared": [clip, clip]}


def test_starts_that_the_settings_do_not_know_are_left_out(run, monkeypatch):
    found = asked(run, monkeypatch, replace(toy(), language=replace(toy().language, epochs=0)))
    assert list(found) == ["random", "encoder", "shared"], "no text to begin from"
    found = asked(run, monkeypatch, replace(toy(), gpt_weights="some/gpt", language=replace(toy().language, epochs=0)))
    assert list(found) == ["language", "encoder", "shared"], "a GPT that reads by another vocabulary"
    assert [parts for _, parts in found["language"][6]] == [("image_encoder",)], "its weights are the pretrained ones"
    monkeypatch.setattr(train, "has_image_warm_up", lambda *_: False)
    assert asked(run, monkeypatch, toy())["random"][6] == []


def test_few_images_are_drawn_for_the_seed_and_the_fewer_are_among_the_more(run):
    rows = load_prepared(run / "data", "train")
    few, more, others = (set(drawn(rows, count, seed)["file_name"][:]) for count, seed in ((8, 1), (20, 1), (8, 2)))
    assert len(few) == 8 and len(more) == 20 and few < more
    assert few != others
    names = rows["file_name"][:]
    assert few != set(names[:8]) and drawn(rows, 8, 1)["file_name"][:] == sorted(few, key=names.index)
    assert drawn(rows, None, 1) is rows and drawn(rows, TOTAL, 1) is rows


def test_training_sees_the_drawn_images_only(run, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "fit", lambda stage, model, data, *others: seen.append(data))
    ablation.captioner(toy(), run, "random", SIZE, 3)
    assert seen[0].rows["file_name"][:] == drawn(load_prepared(run / "data", "train"), SIZE, 3)["file_name"][:]
    assert len(seen[0].pixels) == SIZE


def test_all_starts_take_the_same_steps_and_fewer_images_are_shown_more_often(folder):
    steps = {path.parent.name: read_json(path)["step"] for path in (folder / "caption").glob("*-seed1/done.json")}
    assert len(steps) == 8
    by_size = {size: {count for name, count in steps.items() if ablation.parts_of(name)[1] == size} for size in (SIZE, 30)}
    assert by_size == {SIZE: {2 * 1 * 3}, 30: {2 * 2 * 2}}, "epochs x batches of 16 x ceil(sqrt(56 / images))"


def test_what_is_done_is_not_trained_again_and_predicted_once(run, folder):
    said, told = [], []
    names = [path.name for path in ablation.captioners(toy(), run, (SIZE,), (1,), progress=said.append)]
    assert [line["event"] for line in said] == ["done before"] * 4
    assert not (run / "caption").exists(), "the table of the boards does not see them"
    for _ in range(2):
        ablation.predict(toy(), run, names, "board-a", report=told.append)
    assert told == [f"ablation: 4 captioners on board-a: {count}" for count in ("4 predicted, 0 done before",
                                                                             "0 predicted, 4 done before")]
    assert ablation.table(folder, "board-a", names)["start"].tolist() == list(ablation.STARTS)


def test_data_stay_as_they_are_while_an_ablation_trains_on_them(run):
    with processes.alone(ablation.folder_of(run), "caption", "any"), (run / ".lock").open("w") as lock, \
            pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as `prepare` asks


def test_a_run_may_be_moved_with_its_ablation_and_sees_no_other_data(tmp_path):
    moved = tmp_path / "elsewhere"
    (moved / "data").mkdir(parents=True)
    (moved / "data" / "here").touch()
    assert ablation.folder_of(moved) == ablation.folder_of(moved)
    moved.rename(tmp_path / "other")
    folder = ablation.folder_of(tmp_path / "other")
    assert (folder / "data" / "here").is_file()
    (folder / "data").unlink()
    (folder / "data").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is not the link to"):
        ablation.folder_of(tmp_path / "other")


def test_mistakes_are_told_in_a_sentence(run, tmp_path):
    with pytest.raises(InputError, match="unknown start 'nothing'; choose from random, language, encoder, shared"):
        ablation.captioner(toy(), run, "nothing", SIZE)
    for count in (0, TOTAL + 1):
        with pytest.raises(InputError, match=f"{count} captioned images: there are {TOTAL}"):
            ablation.captioner(toy(), run, "random", count)
    with pytest.raises(InputError, match="no captioner of an ablation"):
        ablation.parts_of("model1")
    (tmp_path / "data").symlink_to(run / "data")
    shutil.copytree(run / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "all" / "done.json").unlink()  # as a training leaves it that was cut off
    with pytest.raises(InputError, match="nothing trained here; run `python -m clipcap_lib train --stage clip`"):
        ablation.captioner(toy(), tmp_path, "shared", SIZE)


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", ["board-a", "board-b"])
def test_the_table_is_what_the_prediction_files_score(written, board):
    table = ablation.table(written, board)
    assert table[["images", "start", "seed"]].to_numpy().tolist() == [
        [images, start, seed] for images in (12, 30) for start in ablation.STARTS for seed in (1, 2)]
    assert table["CIDEr"].nunique() > 12 and set(table["set"]) == {board}
    for _, row in table.iterrows():
        found = scores(written, row["start"], row["images"], row["seed"], board)
        assert row["CIDEr"] == pytest.approx(found.values["CIDEr"], abs=1e-9)
        assert (row["low"], row["high"]) == pytest.approx(metrics.bootstrap_intervals(found)["CIDEr"], abs=1e-9)
        assert row["low"] < row["high"] and row["signature"] == found.signature
        said = read_json(written / "predictions" / f"{row['start']}-{row['images']}-seed{row['seed']}-{board}.json")
        assert row["distinct"] == len({caption for caption, in said.values()})
        references = metrics.prepare_references(written / "data" / f"references-{board}.json", "jieba")
        assert row["shuffled"] == pytest.approx(metrics.score(systems.shuffled(said), references).values["CIDEr"], abs=1e-9)
    captions = systems.training_captions(written, data_fingerprint(written / "data"))
    constant = metrics.best_constant_caption(read_json(written / "data" / f"references-{board}.json"), captions, "jieba")
    assert table["constant"].tolist() == pytest.approx(16 * [constant[1]], abs=1e-9)


@pytest.mark.parametrize("board", ["board-a", "board-b"])
def test_a_gain_is_of_one_start_over_another_on_the_same_images_and_seed(written, board):
    gains = ablation.gains(written, board)
    assert gains[["comparison", "images", "seed"]].to_numpy().tolist() == [
        [comparison, images, seed] for comparison in ablation.COMPARISONS for images in (12, 30) for seed in (1, 2)]
    for _, row in gains.iterrows():
        has, lacks = ablation.COMPARISONS[row["comparison"]]
        found = metrics.paired_bootstrap(*(scores(written, start, row["images"], row["seed"], board)
                                           for start in (has, lacks)), "CIDEr")
        assert (row["difference"], row["low"], row["high"], row["p"]) == pytest.approx(
            (found.difference, found.low, found.high, found.p), abs=1e-9)
    assert gains["difference"].nunique() > 12 and gains["p"].nunique() > 3


def test_only_the_captioners_that_are_named_are_told_of(written):
    names = [ablation.name_of(start, 12, 1) for start in ("random", "encoder", "shared")]
    assert len(ablation.table(written, "board-a", names)) == 3
    assert ablation.gains(written, "board-a", names)["comparison"].tolist() == [
        "both: the second claim", "GPT of CLIP: the third claim", "all: the method"], "none over one that is not there"
    empty = ablation.gains(written, "board-a", [])
    assert len(empty) == len(ablation.table(written, "board-a", [])) == len(ablation.summary(empty)) == 0


def test_a_summary_counts_the_seeds_that_gain_and_lose():
    gains = pd.DataFrame({"comparison": "all", "images": 12, "seed": [1, 2, 3], "difference": [4.0, 1.0, -8.0],
                          "low": [1.0, -1.0, -12.0], "high": [7.0, 3.0, -4.0]})
    found = ablation.summary(gains).loc[("all", 12)]
    assert found.to_dict() == {"seeds": 3, "mean": -1, "least": -8, "most": 4, "above": 1, "below": 1}


def test_the_chance_of_training_is_how_far_seeds_of_one_start_lie_apart():
    table = pd.DataFrame({"start": list("aaabb"), "images": 12, "seed": [1, 2, 3, 1, 2], "CIDEr": [10.0, 13, 11, 50, 58]})
    assert ablation.between_seeds(table) == pytest.approx((3 + 1 + 2 + 8) / 4)
    assert math.isnan(ablation.between_seeds(table[table["seed"] == 1]))


def test_the_command_recomputes_what_is_kept_of_an_ablation(run, written, tmp_path, monkeypatch, capsys):
    """Data are those of the toy run: drawing the preset's would take a minute."""
    def prepared(config, output, data_root=None):
        output.parent.mkdir(parents=True, exist_ok=True)
        if not output.is_dir():
            output.symlink_to(run / "data")

    monkeypatch.setattr(prepare_module, "prepare", prepared)
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path / "runs"))
    results = tmp_path / "results"
    shutil.copytree(written / "predictions", results / "predictions",
                    ignore=lambda _, names: [name for name in names if not name.startswith("shared-12-seed1-board-a")])
    shutil.copytree(written / "predictions", results / "ablation" / "predictions")
    ablation.export(written, results / "ablation")
    command = ["leaderboard", "--results", str(results)]
    assert cli.main(command) == 0
    assert cli.main([*command, "--verify"]) == 0
    assert "ablation: 32 rows recomputed, all equal" in capsys.readouterr().out
    there = {path.name for path in (results / "ablation").iterdir()}
    assert there == {"predictions", *ablation.FILES}, "nothing is left there"
    for name in ablation.FILES:
        file = results / "ablation" / name
        text = file.read_text()
        file.write_text(text.replace("12,1,board-a", "12,2,board-a", 1))
        assert cli.main([*command, "--verify"]) == 1
        assert f"{name}: is not what the predictions give" in capsys.readouterr().out
        file.write_text(text)
    path = results / "ablation" / "predictions" / "shared-12-seed1-board-a.json"
    path.write_text(path.read_text().replace("一", "二", 1))
    assert cli.main([*command, "--verify"]) == 2
    assert "is not what shared-12-seed1 wrote" in capsys.readouterr().err
    shutil.rmtree(results / "ablation" / "predictions")
    assert cli.main([*command, "--verify"]) == 2, "a table without predictions is no result"
    assert "no predictions kept here" in capsys.readouterr().err


def test_what_comes_with_the_workbook_is_read_where_it_is_whole(written, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "SHIPPED", tmp_path)
    ablation.export(written, tmp_path / "some" / "ablation")
    table, gains = ablation.kept("some")
    assert len(table) == 32 and len(gains) == 40 and ablation.kept("other") is None
    assert table["CIDEr"].tolist() == pytest.approx([*ablation.table(written, "board-a")["CIDEr"],
                                                     *ablation.table(written, "board-b")["CIDEr"]])
    (tmp_path / "some" / "ablation" / "gains.csv").unlink()
    assert ablation.kept("some") is None


def test_names_tell_what_a_captioner_is():
    assert ablation.parts_of(ablation.name_of("encoder", 250, 3)) == ("encoder", 250, 3)
    assert {start for pair in ablation.COMPARISONS.values() for start in pair} == set(ablation.STARTS)
