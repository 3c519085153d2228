"""Captioners of few captioned images: what each start takes over, how they are trained, and what is told of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import IMAGES, toy

from clipcap_lib import ablation, checkpoint, cli, leaderboard, metrics, train
from clipcap_lib.config import InputError
from clipcap_lib.corpora import miniature
from clipcap_lib.data import drawn, load_prepared
from clipcap_lib.files import read_json, write_json
from clipcap_lib.prepare import prepare

STILL = replace(toy(), caption=replace(toy().caption, learning_rate=0.0, epochs=1))  # weights stay where they start
SIZE = 12
TOTAL = 56  # training images


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """CLIP and its warm-ups at the toy size."""
    run = tmp_path_factory.mktemp("runs") / "miniature"
    corpora = miniature.write_corpora(tmp_path_factory.mktemp("corpora"), images=IMAGES, processes=1)
    prepare(toy(), run / "data", corpora, processes=1, report=lambda line: None)
    train.pretrain_clip(toy(), run, 1)
    return run


@pytest.fixture(scope="module")
def folder(run) -> Path:
    """Captioners of all starts on two numbers of images, and what they say of board A."""
    folders = ablation.captioners(toy(), run, (SIZE, 30), (1,))
    ablation.predict(toy(), run, [folder.name for folder in folders], "board-a", report=lambda line: None)
    return ablation.folder_of(run)


@pytest.mark.parametrize("start, origins", [
    ("random", {"image_encoder": "image/labelled"}),
    ("language", {"image_encoder": "image/labelled", "gpt": "language/all"}),
    ("encoder", {"image_encoder": "clip/all", "image_head": "clip/all", "gpt": "language/all"}),
    ("shared", {"image_encoder": "clip/all", "image_head": "clip/all", "grid_head": "clip/all", "gpt": "clip/all",
                "text_head": "clip/all"})])
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
    ablation.captioner(replace(toy(), horizontal_flip=False), run, "random", SIZE, 3)
    assert seen[0].rows["file_name"][:] == drawn(load_prepared(run / "data", "train"), SIZE, 3)["file_name"][:]
    assert len(seen[0].pixels) == SIZE


def test_all_starts_take_the_same_steps_and_fewer_images_are_shown_more_often(folder):
    steps = {path.parent.name: read_json(path)["step"] for path in (folder / "caption").glob("*-seed1/done.json")}
    by_size = {size: {count for name, count in steps.items() if ablation.parts_of(name)[1] == size}
               for size in (SIZE, 30)}
    assert by_size == {SIZE: {2 * 1 * 3}, 30: {2 * 2 * 2}}, "epochs x batches of 16 x ceil(sqrt(56 / images))"


def test_the_table_is_what_the_prediction_files_score(folder):
    table = ablation.table(folder)
    assert table["start"].tolist() == 2 * list(ablation.STARTS) and table["images"].tolist() == 4 * [SIZE] + 4 * [30]
    references = metrics.prepare_references(folder / "data" / "references-board-a.json", "characters")
    for _, row in table.iterrows():
        path = folder / "predictions" / f"{row['start']}-{row['images']}-seed1-board-a.json"
        scores = metrics.score(path, references, metrics=("CIDEr",))
        assert row["CIDEr"] == pytest.approx(scores.values["CIDEr"], abs=1e-9)
        assert (row["low"], row["high"]) == pytest.approx(metrics.bootstrap_intervals(scores)["CIDEr"], abs=1e-9)
        assert row["distinct"] == len({caption for caption, in read_json(path).values()})


def test_gains_are_of_the_step_before_on_the_same_images_and_seed(folder, tmp_path):
    table, gains = ablation.table(folder).set_index(["start", "images"]), ablation.gains(folder)
    assert gains["over"].tolist() == 2 * ["random", "language", "encoder"]
    for _, row in gains.iterrows():
        difference = table.loc[(row["start"], row["images"]), "CIDEr"] - table.loc[(row["over"], row["images"]), "CIDEr"]
        assert row["difference"] == pytest.approx(difference, abs=1e-9)
        assert row["low"] <= row["difference"] <= row["high"] and 0 < row["p"] <= 1
    with_gap = tmp_path / "ablation"
    (with_gap / "predictions").mkdir(parents=True)
    (with_gap / "data").symlink_to(folder / "data")
    for path in (folder / "predictions").glob("*.json"):
        if not path.name.startswith("language"):
            (with_gap / "predictions" / path.name).write_bytes(path.read_bytes())
    assert ablation.gains(with_gap)["over"].tolist() == 2 * ["random", "encoder"], "the one before that is there"


def test_a_summary_counts_the_seeds_that_gain_and_lose():
    import pandas as pd

    gains = pd.DataFrame({"start": "shared", "images": 12, "seed": [1, 2, 3], "difference": [4.0, 1.0, -8.0],
                          "low": [1.0, -1.0, -12.0], "high": [7.0, 3.0, -4.0]})
    found = ablation.summary(gains).loc[("shared", 12)]
    assert found.to_dict() == {"seeds": 3, "mean": -1, "better": 1, "worse": 1}


def test_what_is_done_is_not_trained_again(run, folder):
    said = []
    ablation.captioners(toy(), run, (SIZE,), (1,), progress=said.append)
    assert [line["event"] for line in said] == ["done before"] * 4
    assert not (run / "caption").exists(), "the table of the boards does not see them"


def test_settings_without_text_to_begin_from_have_no_such_start(run):
    config = replace(toy(), language=replace(toy().language, epochs=0), caption=replace(toy().caption, epochs=1))
    folders = ablation.captioners(config, run, (10,), (2,))
    assert [ablation.parts_of(path.name)[0] for path in folders] == ["random", "encoder", "shared"]


def test_kept_files_are_recomputed_from_the_predictions(run, folder, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept"
    (kept / "predictions").mkdir(parents=True)
    for path in (folder / "predictions").glob("*.json"):
        (kept / "predictions" / path.name).write_bytes(path.read_bytes())
    ablation.export(folder, kept)
    assert cli._verify_ablation(kept, run) == 0
    assert "kept: 8 rows recomputed, all equal" in capsys.readouterr().out
    text = (kept / "gains.csv").read_text()
    (kept / "gains.csv").write_text(text.replace("random", "shared", 1))
    assert cli._verify_ablation(kept, run) == 1
    assert "gains.csv: is not what the predictions give" in capsys.readouterr().out
    (kept / "gains.csv").write_text(text)
    path = next((kept / "predictions").glob("shared-*.about.json"))
    write_json(path, read_json(path) | {"predictions_sha256": "of another file"})
    with pytest.raises(InputError, match="is not what shared"), leaderboard.kept_results(kept, run) as found:
        ablation.wrong(found, kept)


def test_mistakes_are_told_in_a_sentence(run, tmp_path):
    with pytest.raises(InputError, match="unknown start 'nothing'; choose from random, language, encoder, shared"):
        ablation.captioner(toy(), run, "nothing", SIZE)
    for count in (0, TOTAL + 1):
        with pytest.raises(InputError, match=f"{count} captioned images: there are {TOTAL}"):
            ablation.captioner(toy(), run, "random", count)
    with pytest.raises(InputError, match="no captioner of an ablation"):
        ablation.parts_of("model1")
    (tmp_path / "data").symlink_to(run / "data")
    with pytest.raises(InputError, match="nothing trained here; run `python -m clipcap_lib train --stage clip`"):
        ablation.captioner(toy(), tmp_path, "shared", SIZE)


def test_a_run_may_be_moved_with_its_ablation(tmp_path):
    moved = tmp_path / "elsewhere"
    (moved / "data").mkdir(parents=True)
    (moved / "data" / "here").touch()
    ablation.folder_of(moved)
    moved.rename(tmp_path / "other")
    assert (ablation.folder_of(tmp_path / "other") / "data" / "here").is_file()


def test_names_tell_what_a_captioner_is():
    assert ablation.parts_of(ablation.name_of("encoder", 250, 3)) == ("encoder", 250, 3)
    assert list(ablation.STARTS)[1:] == list(ablation.CLAIMS)
    assert np.unique(list(ablation.STARTS.values())).size == len(ablation.STARTS)
