"""What the miniature run must show, checked on the files that `make workbook` wrote."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from PIL import Image
from test_decode import patches, random_model

from clipcap_lib import checks, clip_scores, decode, ensemble_weights, leaderboard, localisation, metrics, systems
from clipcap_lib.config import MODELS, InputError, preset, runs_folder
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.files import read_json, write_json

WITHOUT_COCO = [system.name for system in MODELS[:3]]


@pytest.fixture(scope="module")
def run() -> Path:
    run = runs_folder() / "miniature"
    if len(list((run / "scores").glob("*.json"))) < 12:
        reason = f"{run} holds no finished run; `make workbook` makes it"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return run


@pytest.fixture(scope="module")
def rows(run) -> dict:
    return {(row["system"], row["set"]): row for row in leaderboard.rows(run)}


def cider(rows: dict, system: str, board: str) -> float:
    return rows[system, board]["characters"]["values"]["CIDEr"]


def test_no_two_of_the_drawn_images_are_copies(run):
    """Of all 4,080 of them; their nearest pair is further apart than planted copies ever are."""
    assert sum(read_json(run / "data" / "manifest.json")["images"].values()) >= 4080
    found = set(pd.read_csv(run / "data" / "findings.csv")["kind"])
    assert not found & set(checks.COPIES.values()) and found <= {checks.REPEATED, checks.UNKNOWN}


def test_clip_finds_captions_at_twenty_times_chance(run):
    found = read_json(run / "retrieval" / "clip-without-coco-cn-board-a.json")
    assert found["images"] == 300
    assert found["recalls"]["image->text R@1"] >= 20 * found["chance"]["R@1"]


@pytest.mark.parametrize("system", WITHOUT_COCO)
def test_a_captioner_needs_its_image(rows, system):
    row = rows[system, "board-a"]
    assert cider(rows, system, "board-a") >= 2 * row["characters"]["shuffled_CIDEr"]
    for slot, least in (("object_f1", 0.6), ("colour_accuracy", 0.5)):
        assert row["slots"][slot] >= least
        assert row["slots"][slot] >= 2 * row["shuffled_slots"][slot]
    for slot in ("count_accuracy", "relation_accuracy"):  # whatever they are; no number where nothing was stated
        assert 0 <= row["slots"][slot] <= 1 if row["slots"][f"{slot}_n"] else row["slots"][slot] is None


def test_an_ensemble_beats_its_members_mean_and_is_shown_to_be_worse_than_none(rows, run):
    """By how much, differs from processor to processor, as the bits of training do: +3.5 to -1.5 against the best member."""
    members = {system: cider(rows, system, "board-a") for system in WITHOUT_COCO}
    assert cider(rows, "1+2+3", "board-a") > sum(members.values()) / len(members)
    for system in members:
        assert leaderboard.compare(run, "1+2+3", system, "board-a").high >= 0, f"shown to be worse than {system}"


def test_in_the_published_table_the_ensemble_is_within_a_point_of_its_best_member():
    lines = (Path(__file__).parents[1] / "figures" / "leaderboard.jsonl").read_text(encoding="utf-8").splitlines()
    published = {(row["system"], row["set"]): row for row in map(json.loads, lines)}
    assert cider(published, "1+2+3", "board-a") >= max(cider(published, m, "board-a") for m in WITHOUT_COCO) - 1


def test_grad_cam_points_at_the_objects_that_words_name(run):
    """On 200 images of board A: twice the box's share, one and a half times the same maps of a random model."""
    found = read_json(run / "localisation" / "model1-board-a.json")
    maps = localisation.summary(found).loc["Grad-CAM"]
    assert found["images"] == 200 and maps["box"] > 0.15
    assert maps["mass / box"] >= 2 and maps["mass / random"] >= 1.5


def test_board_b_is_harder_without_coco_and_coco_repairs_it(rows, run):
    for system in WITHOUT_COCO:
        assert cider(rows, system, "board-b") < cider(rows, system, "board-a")
        assert cider(rows, "model4", "board-b") > cider(rows, system, "board-b")
    assert cider(rows, "1+2+4", "board-b") >= cider(rows, "1+2+3", "board-b")
    difference = leaderboard.compare(run, "1+2+4", "1+2+3", "board-b")
    assert difference.low <= difference.difference <= difference.high


def test_every_row_of_the_table_is_what_its_prediction_file_gives(run):
    assert leaderboard.verify(run) == []


def test_every_number_of_the_table_has_its_prediction_file(run):
    found = leaderboard.rows(run)
    assert all((run / row["predictions"]).is_file() and (run / row["predictions"]).with_suffix(".about.json").is_file()
               for row in found)
    for key in ("config", "data", "seeds", "members", "weights", "milliseconds_per_image", "parameters", "commit"):
        assert all(key in row for row in found if row["system"] not in leaderboard.BASELINES), key
    table = leaderboard.table(run)
    assert len(table) == len({row["system"] for row in found})


def test_a_human_caption_is_the_ceiling_and_not_looking_the_floor(rows):
    for board in ("board-a", "board-b"):
        human, constant, shuffled = (cider(rows, name, board) for name in leaderboard.BASELINES)
        models = [cider(rows, system.name, board) for system in MODELS]
        assert max(models) < human and min(models) > max(constant, shuffled)
        assert rows["human", board]["characters"]["signature"].split("|")[2] == "refs:4"


def test_the_scores_of_every_image_are_kept_and_give_the_corpus_score(rows, run):
    for row in rows.values():
        kept = pd.read_csv(run / "scores" / f"{row['system']}-{row['set']}.csv", index_col="file")
        assert len(kept) == row["images"]
        assert kept["CIDEr (characters)"].mean() == pytest.approx(row["characters"]["values"]["CIDEr"], abs=1e-9)


def test_the_exported_tables_hold_the_rows_numbers(run, tmp_path):
    table, markdown, tex, lines = leaderboard.export(run, tmp_path)
    value = next(r for r in leaderboard.rows(run) if (r["system"], r["set"]) == ("1+2+3", "board-a"))
    exact = value["characters"]["values"]["CIDEr"]
    assert pd.read_csv(table, index_col="system").loc["1+2+3", "board-a CIDEr"] == pytest.approx(exact, abs=1e-12)
    for text in (markdown.read_text(encoding="utf-8"), tex.read_text(encoding="utf-8")):
        assert f"{exact:.1f} [" in text and "human, one caption" in text
        assert "not documented" in text and "document frequencies of the full set" in text
    assert len(lines.read_text(encoding="utf-8").splitlines()) == len(leaderboard.rows(run))


def test_a_captioner_is_not_judged_by_the_clip_it_grew_from(run):
    clips = {name: run / "clip" / name for name in ("all", "without-coco-cn")}
    for system, own, other in (("model1", "without-coco-cn", "all"), ("1+2+3", "without-coco-cn", "all"),
                               ("model4", "all", "without-coco-cn")):
        with pytest.raises(InputError, match="not judged by its own encoder"):
            leaderboard.judged(run, system, "board-a", clips[own])
        found = leaderboard.judged(run, system, "board-a", clips[other])
        assert found["interval"][0] < found["score"] < found["interval"][1] and "CLIP-zh" in found["signature"]
    for name in clips:  # both had a part in 1+2+4
        with pytest.raises(InputError, match="own encoder"):
            leaderboard.judged(run, "1+2+4", "board-a", clips[name])
    with pytest.raises(InputError, match="own encoder"):
        leaderboard.judged(run, "model1", "board-a", run / "caption" / "model2")
    floor = leaderboard.judged(run, "constant", "board-a", clips["all"])
    assert floor["score"] < leaderboard.judged(run, "model1", "board-a", clips["all"])["score"]


# --- the check of the table must see what is wrong ----------------------------------------------------------------------

@pytest.fixture
def two_rows(run, tmp_path) -> Path:
    """A run of two rows, whose files may be changed."""
    for name in ("data", "caption", "clip"):
        (tmp_path / name).symlink_to(run / name, target_is_directory=True)
    for name in ("predictions", "scores"):
        (tmp_path / name).mkdir()
        for path in (run / name).glob("*-board-a.*"):
            if path.name.startswith(("model1-", "constant-")):
                shutil.copy(path, tmp_path / name)
    leaderboard.export(tmp_path, tmp_path / "figures")
    assert len(leaderboard.rows(tmp_path)) == 2 and leaderboard.verify(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize("kind", ["csv", "md", "tex", "jsonl"])
def test_a_number_changed_in_a_file_of_the_table_is_found(two_rows, kind):
    path = two_rows / "figures" / f"leaderboard.{kind}"
    value = next(r for r in leaderboard.rows(two_rows) if r["system"] == "model1")["characters"]["values"]["CIDEr"]
    text = path.read_text(encoding="utf-8")
    shown = f"{value:.1f}" if kind in ("md", "tex") else str(value)
    assert shown in text
    path.write_text(text.replace(shown, "999.9"), encoding="utf-8")
    problem, = leaderboard.verify(two_rows)
    assert path.name in problem
    leaderboard.export(two_rows, two_rows / "figures", "jieba")
    assert leaderboard.verify(two_rows) == [], "a table under the other segmentation is as good"


def test_predictions_without_a_row_are_found(two_rows):
    (two_rows / "scores" / "constant-board-a.json").unlink()
    leaderboard.export(two_rows, two_rows / "figures")
    assert [problem.split(":")[0] for problem in leaderboard.verify(two_rows)] == ["predictions/constant-board-a.json"]


def test_rows_that_are_none_and_images_scores_that_are_no_text_are_told(two_rows):
    (two_rows / "scores" / "constant-board-a.csv").write_bytes(b"\xff\xfe\x00")
    problem, = leaderboard.verify(two_rows)
    assert problem == "constant on board-a: scores of the images is not what its prediction file gives"
    (two_rows / "scores" / "constant-board-a.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(InputError, match=r"constant-board-a\.json: no row of results"):
        leaderboard.verify(two_rows)


@pytest.mark.parametrize("damage", [
    lambda row: row["characters"].pop("intervals"), lambda row: row.update(characters={}),
    lambda row: row["characters"]["values"].update(CIDEr="much")])
def test_a_damaged_row_is_told_beside_what_else_is_wrong(two_rows, damage):
    path = two_rows / "scores" / "model1-board-a.json"
    row = read_json(path)
    damage(row)
    write_json(path, row)
    (two_rows / "predictions" / "constant-board-a.json").unlink()
    problems = leaderboard.verify(two_rows)
    assert any(p.startswith("model1 on board-a: characters") for p in problems)
    assert any(p.startswith("constant on board-a: its prediction file") for p in problems)
    assert sum("leaderboard." in p for p in problems) == 4


def test_rows_of_which_an_older_version_wrote_nan_are_as_good(two_rows):
    path = two_rows / "scores" / "model1-board-a.json"
    row = read_json(path)
    row["slots"] = {name: value if value is not None else math.nan for name, value in row["slots"].items()}
    assert leaderboard.alike({"a": None, "b": [math.nan]}, {"a": math.nan, "b": [None]})
    assert not leaderboard.alike({"a": None}, {"a": 0.0})
    path.write_text(json.dumps(row), encoding="utf-8")
    assert leaderboard.verify(two_rows) == []


def test_weights_searched_on_other_images_are_told(two_rows):
    write_json(two_rows / "weights" / "a+b.json", {"segmentation": "characters", "points": [
        {"weights": [1, 0], "CIDEr": 1.0, "captions": {"nowhere.jpg": ["狗"]}}]})
    assert leaderboard.verify(two_rows) == [
        "a+b, weights on validation images: not the CIDEr of the captions kept with it"]


def test_rows_are_json_without_nan(two_rows):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    path = two_rows / "predictions" / "constant-board-a.json"
    write_json(path, {file: ["什么"] for file in read_json(path)})  # what says nothing has no accuracy
    about = path.with_suffix(".about.json")
    write_json(about, {**read_json(about), "predictions_sha256": systems.sha256(path)})
    leaderboard.score_system(two_rows, "constant", "board-a")
    lines = leaderboard.export(two_rows, two_rows / "figures")[-1].read_text(encoding="utf-8").splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [r["slots"]["colour_accuracy"] for r in found if r["system"] == "constant"] == [None]


def test_the_best_constant_caption_says_by_what_it_is_the_best(two_rows):
    assert "best constant caption" in leaderboard.table(two_rows, "characters").index
    assert "best constant caption by characters" in leaderboard.table(two_rows, "jieba").index


def test_recall_is_measured_anew_when_the_data_have_changed(two_rows, monkeypatch):
    kept = leaderboard.retrieval(two_rows, two_rows / "clip" / "all", "test")
    monkeypatch.setattr(clip_scores, "retrieval_of_set", lambda *_: {"image->text R@1": -1.0})
    assert leaderboard.retrieval(two_rows, two_rows / "clip" / "all", "test") == kept
    monkeypatch.setattr(clip_scores, "data_fingerprint", lambda _: "other data")
    assert leaderboard.retrieval(two_rows, two_rows / "clip" / "all", "test")["recalls"] == {"image->text R@1": -1.0}


def test_predictions_changed_by_hand_are_not_judged(two_rows):
    path = two_rows / "predictions" / "model1-board-a.json"
    write_json(path, {**read_json(path), next(iter(read_json(path))): ["别的话"]})
    with pytest.raises(InputError, match="is not what model1 wrote"):
        leaderboard.judged(two_rows, "model1", "board-a", two_rows / "clip" / "all")


def test_searched_weights_score_the_ensemble_that_the_settings_name_on_images_spread_over_all(tmp_path, monkeypatch):
    """Two untrained models whose captions are the references: every point is computed again."""
    models, loaded = {"one": random_model(21), "two": random_model(22)}, []
    tokenizer, names = models["one"].tokenizer, [f"{number:02}.png" for number in range(16)]
    photos = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in patches(16)]
    rows = Dataset.from_dict({"file_name": names, "image": photos})
    write_json(tmp_path / "data" / "manifest.json", {"drawn": True})
    said = [model.caption(photos, max_length=8) for model in models.values()]
    references = {name: list(pair) for name, pair in zip(names, zip(*said, strict=True), strict=True)}
    write_json(tmp_path / "data" / "references-val.json", references)
    monkeypatch.setattr(ensemble_weights, "load_prepared", lambda folder, split: rows)
    monkeypatch.setattr(ensemble_weights, "data_fingerprint", lambda folder: "data")
    monkeypatch.setattr(ensemble_weights.checkpoint, "about", lambda folder: {"fingerprint": folder.parent.name})
    monkeypatch.setattr(ensemble_weights.checkpoint, "load",
                        lambda folder: loaded.append(folder.parent.name) or models[folder.parent.name])
    config = replace(preset("miniature"), ensemble_rule="logits", beam_size=3, length_penalty=-2.0, max_length=8)

    def searched(**settings):
        found = ensemble_weights.search_weights(tmp_path, replace(config, **settings), list(models), 4, images=8)
        return found, read_json(tmp_path / "weights" / "one+two.json")["points"]

    def again(weights, rule, *search, **penalty):
        return decode.caption(Ensemble(list(models.values()), weights, rule), tokenizer, photos[::2], *search, **penalty)

    table, points = searched()
    assert table[["one", "two"]].to_numpy().tolist() == ensemble_weights.weightings(2, 4)
    with pytest.raises(InputError, match="steps of at least 1"):
        ensemble_weights.weightings(2, 0)
    assert len(set(table["CIDEr"])) > 2, "weights that change nothing would prove nothing"
    for (one, two, cider_found), point in zip(table.itertuples(index=False), points, strict=True):
        captions = dict(zip(names[::2], again([one, two], "logits", 3, 8, length_penalty=-2.0), strict=True))
        assert point["captions"] == {name: [caption] for name, caption in captions.items()}
        scores = metrics.score(point["captions"], {name: references[name] for name in captions}, metrics=("CIDEr",))
        assert cider_found == pytest.approx(scores.values["CIDEr"])
    right = again([0.75, 0.25], "logits", 3, 8, length_penalty=-2.0)
    for other in (again([0.25, 0.75], "logits", 3, 8, length_penalty=-2.0), again([0.75, 0.25], "logits", 3, 8),
                  again([0.75, 0.25], "logits", 1, 8), again([0.75, 0.25], "probabilities", 3, 8, length_penalty=-2.0)):
        assert other != right, "each setting must change something"

    assert loaded == ["one", "two"] and searched()[1] == points and loaded == ["one", "two"], "kept, and taken from there"
    changed = {}
    for setting in {"beam_size": 2}, {"length_penalty": 0.5}, {"max_length": 7}, {"ensemble_rule": "probabilities"}:
        before = len(loaded)
        searched(**changed | setting)
        assert len(loaded) == before + 2, f"searched again with {setting}"
        changed |= setting
