"""What the miniature run must show, checked on the files that `make workbook` wrote."""

import os
from pathlib import Path

import pytest

from clipcap_lib import leaderboard
from clipcap_lib.config import MODELS, runs_folder
from clipcap_lib.prepare import read_json

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
        assert 0 <= row["slots"][slot] <= 1 or row["slots"][f"{slot}_n"] == 0


def test_an_ensemble_is_no_worse_than_its_members(rows):
    assert cider(rows, "1+2+3", "board-a") >= max(cider(rows, m, "board-a") for m in WITHOUT_COCO) - 1


def test_board_b_is_harder_without_coco_and_coco_repairs_it(rows, run):
    for system in WITHOUT_COCO:
        assert cider(rows, system, "board-b") < cider(rows, system, "board-a")
        assert cider(rows, "model4", "board-b") > cider(rows, system, "board-b")
    assert cider(rows, "1+2+4", "board-b") >= cider(rows, "1+2+3", "board-b")
    difference = leaderboard.compare(run, "1+2+4", "1+2+3", "board-b")
    assert difference.low <= difference.difference <= difference.high


def test_every_row_of_the_table_is_what_its_prediction_file_gives(run):
    assert leaderboard.verify(run) == []
