"""The benchmark's files: rows, ratios, one entry a device and preset. What is measured here is a toy, and no claim."""

import json
from pathlib import Path

import pytest
import torch

from clipcap_lib import bench_decode, bench_train, decode, timing
from clipcap_lib.bench import bench, device_name, markdown
from clipcap_lib.captioner import Captioner
from clipcap_lib.config import InputError, preset
from clipcap_lib.data import Batch
from clipcap_lib.stages import ClipStage
from clipcap_lib.timing import Variant, measure

ROWS = {
    "train": {"plain", "ours", "with_data", "without_data", "encoder_only", "encoder, channels first",
              "encoder, channels last"},
    "memory": {"clip: always", "clip: an image", "clip: largest batch", "caption: largest batch"},
    "decode": {"plain", "single", "batched_greedy", "batched_beam5", "generate", "generate_batched",
               "generate_beam5", "ensemble3", "bound", "batched_encoder"},
    "score": {"ours", "ours_prepared"},  # a tiny run starts no Java
    "prepare": {"bare_loop", "ours", "ours_half", "ours_quarter", "ours peak memory"},
}
RATIOS = {
    "train": {"ours/plain", "ours/encoder_only", "with_data/without_data"},
    "memory": set(),
    "decode": {"single/plain", "batched_greedy/plain", "single/generate", "ensemble3/single", "single/bound",
               "batched_greedy/generate_batched", "batched_beam5/generate_beam5"},
    "score": set(),
    "prepare": {"ours/bare_loop", "ours/ours_half", "ours/ours_quarter"},
}


def run(what, folder):
    return bench(what, preset("miniature"), folder, tiny=True, report=lambda line: None)


@pytest.mark.parametrize("what", ROWS)
def test_a_benchmark_writes_its_rows_and_ratios(what, tmp_path):
    entry = run(what, tmp_path)
    assert json.loads((tmp_path / f"bench-{what}.json").read_text(encoding="utf-8")) == [entry]
    assert set(entry) == {"device", "torch", "preset", "commit", "date", "rows", "ratios"}
    rows = {row["name"]: row for row in entry["rows"]}
    assert ROWS[what] <= set(rows) and RATIOS[what] <= set(entry["ratios"])
    assert all(set(row) == {"name", "value", "unit"} and row["value"] > 0 for row in rows.values())
    for name, ratio in entry["ratios"].items():
        a, b = (rows[part] for part in name.split("/"))
        assert a["unit"] == b["unit"]
        speed_up = a["value"] / b["value"] if a["unit"].endswith("/s") else b["value"] / a["value"]
        assert ratio == pytest.approx(speed_up, rel=1e-3)
    text = (tmp_path / f"bench-{what}.md").read_text(encoding="utf-8")
    assert "how many times faster a is than b" in text
    assert all(f"| {name} | " in text for name in [*rows, *entry["ratios"]])


def test_a_device_has_one_entry_a_preset_and_others_keep_theirs(tmp_path):
    other = {"device": "another", "torch": "2.0", "preset": "miniature-tiny", "date": "2020-01-01",
             "rows": [{"name": "ours", "value": 1.5, "unit": "ms an image"}], "ratios": {}}
    full = {**other, "device": device_name(accelerated=False), "preset": "miniature"}
    (tmp_path / "bench-score.json").write_text(json.dumps([other, full]), encoding="utf-8")
    run("score", tmp_path)
    entry = run("score", tmp_path)
    assert json.loads((tmp_path / "bench-score.json").read_text(encoding="utf-8")) == [other, full, entry]
    text = (tmp_path / "bench-score.md").read_text(encoding="utf-8")
    assert text.count("## another\n") == 1 and text.count(f"## {entry['device']}\n") == 2


def test_the_tables_that_are_kept_are_those_of_their_json():
    for path in (Path(__file__).parents[1] / "figures").glob("bench-*.json"):
        expected = markdown(path.stem.removeprefix("bench-"), json.loads(path.read_text(encoding="utf-8")))
        assert path.with_suffix(".md").read_text(encoding="utf-8") == expected


def test_an_unknown_benchmark_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'speed'.*train, memory, decode, score, prepare"):
        bench("speed", preset("miniature"), tmp_path)


def test_variants_take_turns_and_the_median_counts(monkeypatch):
    monkeypatch.setattr(timing, "AT_LEAST", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clock, turns = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def variant(name, seconds):
        durations = iter(seconds)

        def call():
            turns.append(name)
            clock[0] += next(durations)

        return call

    found = measure({"a": Variant(variant("a", [9, 1, 2, 3, 90, 4]), before=lambda: turns.append("before")),
                     "b": Variant(variant("b", [9, 8, 8, 8, 8, 8]), images=4, before=lambda: None)})
    assert found == {"a": 3, "b": 2}  # the first call only warms up
    assert turns == ["before", "a", "b"] * 6


def test_every_decoder_that_is_timed_writes_the_same_characters():
    model, pixels = bench_train.random_model(preset("miniature"))
    model.eval()
    images = pixels(1)
    plain = torch.stack(bench_decode._plain_greedy(model, images, 6), dim=1)
    assert plain.tolist() == bench_decode._generate(model, images, 6).tolist()
    for stepper in (model, Captioner(model), Captioner(model, fixed=True)):
        single = decode.greedy(stepper, images, 6, [model.end_id])[0]
        assert plain.tolist() == [list(single.tokens)]


def test_the_plain_step_has_the_loss_of_ours():
    model, pixels = bench_train.random_model(preset("miniature"))
    model.eval()
    torch.nn.init.zeros_(model.gpt.transformer.wpe.weight)  # ours counts positions from behind the image's
    images, ids = pixels(3), torch.tensor([[2, 9, 3, 0, 0], [2, 7, 8, 3, 0], [2, 5, 6, 7, 3]]).to(model.logit_scale.device)
    ours = ClipStage(preset("miniature"), None).loss(model, Batch(images, ids, torch.arange(3), torch.arange(3)))
    plain = bench_train._plain_clip_loss(model, images, torch.nn.functional.pad(ids, (0, 95)))
    assert plain.item() == pytest.approx(ours.item(), abs=1e-3)
