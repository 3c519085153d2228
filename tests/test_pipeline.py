"""The line end to end at a toy size: prepare, train, cut off and resume, predict, score, and bad input."""

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training import NARROW

from clipcap_lib import checkpoint, cli, leaderboard, stages, train
from clipcap_lib import data as data_module
from clipcap_lib.captions import segment
from clipcap_lib.choose import consensus
from clipcap_lib.cider import document_frequencies
from clipcap_lib.config import ENSEMBLES, MODELS, InputError, ModelConfig, preset
from clipcap_lib.corpora import miniature, things
from clipcap_lib.data import TrainingData, load_prepared
from clipcap_lib.ensemble_weights import weightings
from clipcap_lib.files import read_json, writing
from clipcap_lib.prepare import prepare
from clipcap_lib.stages import ImageStage, LanguageStage
from clipcap_lib.tokenizer import load_tokenizer, vocabulary_of

IMAGES = {"flickr8k-cn": {"train": 24, "val": 6, "test": 4}, "hualu": {"train": 16, "board-a": 8, "board-b": 8},
          "coco-cn": {"train": 16, "val": 4, "test": 4}}


def toy():
    """The miniature preset, shrunk: two steps a stage."""
    base = preset("miniature")
    stages = {name: replace(getattr(base, name), epochs=2, batch_size=16, visits=1)
              for name in ("image", "language", "clip", "caption")}
    model = ModelConfig(encoder="resnet10t", encoder_options=NARROW, image_size=32, image_tokens="grid", layers=1, width=32,
                        heads=2, context=30)
    return replace(base, name="miniature", model=model, stored_size=36, train_resize=36, max_length=8, **stages)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    return miniature.write_corpora(tmp_path_factory.mktemp("corpora"), images=IMAGES, processes=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpora) -> Path:
    """All four models trained at the toy size."""
    run = tmp_path_factory.mktemp("runs") / "miniature"
    prepare(toy(), run / "data", corpora, processes=1, report=lambda line: None)
    for without in {system.without for system in MODELS}:
        train.pretrain_clip(toy(), run, 1, without)
    for system in MODELS:
        train.finetune_captioner(toy(), run, system.name, system.seed, system.without)
    return run


def test_prepared_files_load_with_plain_datasets(run):
    import datasets

    shards = [str(p) for p in sorted((run / "data").glob("*-train-*.parquet"))]
    rows = datasets.load_dataset("parquet", data_files=shards, split="train", cache_dir=str(run / "plain"))
    assert len(rows) == 56
    assert rows[0]["image"].size == (36, 36)
    assert rows.features["captions"].feature.dtype == "string"


def test_prepare_is_done_once_and_again_when_its_input_changes(run, corpora, tmp_path):
    said = []
    prepare(toy(), tmp_path / "data", corpora, processes=1, report=said.append)
    first = read_json(tmp_path / "data" / "manifest.json")
    prepare(toy(), tmp_path / "data", corpora, processes=1, report=said.append)
    assert "nothing has changed" in said[-1]
    prepare(replace(toy(), vocabulary_minimum=3), tmp_path / "data", corpora, processes=1, report=said.append)
    assert read_json(tmp_path / "data" / "manifest.json")["fingerprint"] != first["fingerprint"]
    assert first["fingerprint"] == read_json(run / "data" / "manifest.json")["fingerprint"], "same input, same result"


def test_a_model_without_coco_never_sees_it(run):
    assert set(load_prepared(run / "data", "train", ("coco-cn",))["corpus"][:]) == {"flickr8k-cn", "hualu"}
    assert checkpoint.about(run / "caption" / "model1" / "best")["images"] == 40
    assert checkpoint.about(run / "caption" / "model4" / "best")["images"] == 56


def test_batches_depend_on_seed_epoch_and_image_alone(run):
    tokenizer, rows = load_tokenizer(run / "data" / "tokenizer"), load_prepared(run / "data", "train")
    data = TrainingData(rows, tokenizer, toy(), toy().caption, seed=7)
    whole = [batch for _, batch in zip(range(9), data.batches(), strict=False)]
    assert len({batch.ids.shape[1] for batch in whole}) > 1
    assert all((batch.ids[:, -1] != data.pad_id).any() for batch in whole), "padded to their own longest caption"
    later = next(data.batches(6))
    assert torch.equal(whole[6].images, later.images) and torch.equal(whole[6].ids, later.ids)
    other = next(TrainingData(rows, tokenizer, toy(), toy().caption, seed=8).batches(6))
    assert whole[6].images.shape != other.images.shape or not torch.equal(whole[6].images, other.images)
    with_workers = next(TrainingData(rows, tokenizer, toy(), toy().caption, seed=7, workers=1).batches(6))
    assert torch.equal(with_workers.images, later.images)


def test_the_image_stage_learns_kinds_and_colours_in_mixed_batches(run):
    tokenizer, rows = load_tokenizer(run / "data" / "tokenizer"), load_prepared(run / "data", "labelled")
    stage = ImageStage(toy(), rows, tokenizer, rows)
    columns = [sorted(set(column)) for column in zip(*rows["captions"][:], strict=True)]
    assert columns[0] == sorted(kind.chinese for kind in things.KINDS.values()) and "红色" in columns[1]

    def lengths(by_length: bool) -> list[set[int]]:
        data = TrainingData(rows, tokenizer, toy(), stage.stage, 7, by_length=by_length)
        return [{max(len(data.ids(c)) for c in data.captions(s)) for s in batch} for batch in data.epoch_batches(0)]

    assert not ImageStage.by_length and sum(map(len, lengths(False))) > sum(map(len, lengths(True))) + 1

    data = TrainingData(rows, tokenizer, toy(), stage.stage, 7, by_length=False)
    batch, model = next(data.batches()), train.new_model(toy(), tokenizer, 1).eval()
    features = model.image_encoder(batch.images)[0]
    logits = features @ model.image_head.project.weight.T + model.image_head.project.bias
    losses, start = [], 0
    for place, column in enumerate(columns):
        targets = [column.index(rows[int(image)]["captions"][place]) for image in batch.image_of[::2]]
        part = logits[:, start:start + len(column)]
        losses.append(-part.log_softmax(dim=1)[range(len(part)), targets].mean())
        start += len(column)
    torch.testing.assert_close(stage.loss(model, batch), losses[0] + 0.3 * losses[1])


def test_labelled_images_that_do_not_say_their_colour_are_told_of(corpora, tmp_path):
    shutil.copytree(corpora, tmp_path / "corpora")
    first = min((tmp_path / "corpora" / "labelled" / "dog").iterdir())
    first.rename(first.with_name("dog 0000.jpg"))
    with pytest.raises(InputError, match=r"dog 0000.jpg: does not say which kind and colour .* are drawn again"):
        prepare(toy(), tmp_path / "data", tmp_path / "corpora", processes=1, report=lambda line: None)


def test_decoded_images_are_kept_and_are_those_that_are_not_kept(run, monkeypatch):
    tokenizer, rows = load_tokenizer(run / "data" / "tokenizer"), load_prepared(run / "data", "train")

    def first() -> torch.Tensor:
        return next(TrainingData(rows, tokenizer, toy(), toy().caption, seed=7, data=run / "data").batches()).images

    kept = first()
    assert len(list((run / "data" / "cache").glob("pixels-*.bin"))) >= 2, "of both training sets, by the stages before"
    monkeypatch.setattr(data_module.Pixels, "_decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(first(), kept)
    monkeypatch.setattr(data_module, "MOST_KEPT", 0)
    assert torch.equal(first(), kept)


@pytest.mark.parametrize("place", ["DataLoader", "exclusive"])
def test_a_full_disk_costs_time_and_no_run(run, monkeypatch, place):
    rows = load_prepared(run / "data", "train").select(range(5))

    def full(*_, **__):
        with writing(run):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_module, place, full)
    pixels = data_module.Pixels(rows, 32, run / "data")
    assert pixels.file is None and not list((run / "data" / "cache").glob(".pixels-*"))
    assert torch.equal(pixels.read([3])[0], data_module.to_pixels(rows[3]["image"], 32))


def test_crops_cover_the_share_that_is_asked_for_and_colours_change_on_request():
    place = torch.arange(64, dtype=torch.uint8) * 4
    picture = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64), place.expand(64, 64)])  # x, y, x
    config = replace(toy(), train_resize=64, stored_size=64, model=replace(toy().model, image_size=32), smallest_crop=0.25)
    shares = []
    for seed in range(200):
        crop = data_module.augment(picture, config, np.random.default_rng(seed), False).float()
        assert crop.shape == (3, 32, 32) and torch.equal(crop[0], crop[2])
        across, down = (crop[0, 0, -1] - crop[0, 0, 0]).item(), (crop[1, -1, 0] - crop[1, 0, 0]).item()
        shares.append((across / 252) * (down / 252) * (32 / 31) ** 2)
    assert min(shares) < 0.35 and max(shares) > 0.85 and min(shares) > 0.2
    plain = replace(config, smallest_crop=1.0, train_resize=32)
    halves = torch.tensor([[90, 60, 60], [110, 80, 80]], dtype=torch.uint8).mT[:, None].repeat_interleave(16, dim=2)
    halves = halves.expand(3, 32, 32)  # reddish: the left half darker
    assert torch.equal(data_module.augment(halves, plain, np.random.default_rng(0), False), halves)
    changed = [data_module.augment(halves, replace(plain, colour_jitter=0.3), np.random.default_rng(seed), False).float()
               for seed in range(100)]
    brightness = [one.mean().item() / 80 for one in changed]
    contrast = [(one[0, 0, -1] - one[0, 0, 0]).item() / one.mean().item() * 4 for one in changed]
    saturation = [(one[0] - one[1]).mean().item() / one.mean().item() * 80 / 30 for one in changed]  # contrast is in it
    for factors, least, most in ((brightness, 0.65, 1.35), (contrast, 0.6, 1.45), (saturation, 0.45, 1.75)):
        assert least < min(factors) < 0.85 and 1.15 < max(factors) < most


def test_a_stage_that_does_not_look_at_images_reads_none(run, monkeypatch):
    tokenizer, rows = load_tokenizer(run / "data" / "tokenizer"), load_prepared(run / "data", "train")
    monkeypatch.setattr(data_module, "to_pixels", lambda *_: pytest.fail("an image was read"))
    assert not LanguageStage.sees_images
    batch = next(TrainingData(rows, tokenizer, toy(), toy().language, seed=7, images=False).batches())
    assert batch.images.shape[1:] == (3, 0, 0) and len(batch.ids) == len(batch.images)


def test_a_batch_says_which_image_and_which_words_a_caption_has(run):
    tokenizer, rows = load_tokenizer(run / "data" / "tokenizer"), load_prepared(run / "data", "train")
    batch = next(TrainingData(rows, tokenizer, toy(), replace(toy().clip, captions_per_visit=6, batch_size=56), 7).batches())
    assert batch.image_of.tolist() == [n for n in batch.image_of[::6].tolist() for _ in range(6)]
    assert len(set(batch.image_of.tolist())) == 56
    same = (batch.ids[:, None] == batch.ids[None]).all(dim=-1)
    assert torch.equal(batch.text_of[:, None] == batch.text_of[None], same)
    assert same.sum() > len(same), "of five captions six are shown, so that one is there twice"


def test_five_visits_show_each_caption_once(run):
    tokenizer, rows = load_tokenizer(run / "data" / "tokenizer"), load_prepared(run / "data", "train")
    data = TrainingData(rows, tokenizer, toy(), replace(toy().caption, visits=5, captions_per_visit=1), seed=7)
    shown = [caption for visit in range(5) for caption in data.captions((0, visit, 3))]
    assert sorted(shown) == list(range(15, 20))


class Killed(BaseException):
    pass


def test_a_run_that_was_cut_off_ends_with_the_same_bits(run, monkeypatch):
    """Cut off in the second epoch, after the first one's checkpoint, then started again with the same command."""
    starts = [(run / "clip" / "all" / "best", None)]
    whole = train.train_stage("caption", toy(), run, "whole", 5, (), starts)

    def interrupt(line):
        if line.get("step") == train_steps - 1:
            raise Killed

    monkeypatch.setattr(train, "LOG_EVERY", 1)
    train_steps = read_json(whole / "done.json")["step"]
    with pytest.raises(Killed):
        train.train_stage("caption", toy(), run, "cut", 5, (), starts, interrupt)
    assert not (run / "caption" / "cut" / "done.json").exists()
    events = []
    cut = train.train_stage("caption", toy(), run, "cut", 5, (), starts, events.append)
    assert events[0]["event"] == "resumed" and events[0]["step"] == train_steps // 2
    for place in ("best", "last"):
        assert (cut / place / "model.safetensors").read_bytes() == (whole / place / "model.safetensors").read_bytes(), place
    again = []
    train.train_stage("caption", toy(), run, "cut", 5, (), starts, again.append)
    assert [line["event"] for line in again] == ["done before"]
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "what was trained twice is logged once"


def test_the_averaged_weights_are_validated_and_kept(run):
    config, starts = toy(), [(run / "clip" / "all" / "best", None)]
    averaged = replace(config, caption=replace(config.caption, average=0.999))
    kept = train.train_stage("caption", averaged, run, "averaged", 5, (), starts)
    plain = train.train_stage("caption", config, run, "plain", 5, (), starts)
    weights = [load_file(folder / "last" / "model.safetensors") for folder in (kept, plain)]
    begun = load_file(run / "clip" / "all" / "best" / "model.safetensors")
    for name in ("grid_head.mix.weight", "image_encoder.backbone.bn1.running_mean"):
        moved = [(w[name] - begun[name]).norm() for w in weights]
        assert 0 < moved[0] < moved[1], f"{name}: an average lags behind"


BROKEN = {"loss": lambda logits, *_: logits.sum() * float("nan"),
          "gradient": lambda logits, *_: (logits * 0).sum().sqrt()}  # 0, with a slope that is infinite times 0


@pytest.mark.parametrize("what", BROKEN)
def test_a_loss_or_gradient_that_is_not_a_number_stops_the_run(what, run, monkeypatch):
    monkeypatch.setattr(stages, "caption_loss", BROKEN[what])
    with pytest.raises(InputError, match=f"the {what} of step 1 is nan"):
        train.train_stage("caption", toy(), run, "broken", 1, (), [(run / "clip" / "all" / "best", None)])
    assert not (run / "caption" / "broken" / "best").exists()


def test_accumulation_takes_a_batch_in_parts_and_steps_once(run, monkeypatch):
    sizes, loss = [], stages.CaptionStage.loss
    monkeypatch.setattr(stages.CaptionStage, "loss", lambda self, model, batch: (
        sizes.append(len(batch.images)), loss(self, model, batch))[1])
    config = toy()
    config = replace(config, caption=replace(config.caption, accumulation=2, epochs=1))
    folder = train.train_stage("caption", config, run, "parts", 1, (), [(run / "clip" / "all" / "best", None)])
    assert sorted(sizes) == [4, 4, 8, 8, 8, 8, 8, 8]
    assert read_json(folder / "done.json")["step"] == 4


def test_a_captioner_starts_from_a_run_or_from_its_checkpoint(run, monkeypatch):
    started = []
    monkeypatch.setattr(train, "train_stage", lambda *given: started.append(given[6]))
    for clip in (None, run / "clip" / "all", run / "clip" / "all" / "best"):
        train.finetune_captioner(toy(), run, "any", clip=clip)
    assert started == [[(run / "clip" / "all" / "best", None)]] * 3
    with pytest.raises(InputError, match="no CLIP checkpoint here"):
        train.finetune_captioner(toy(), run, "any", clip=run / "clip")


def test_a_run_of_another_seed_gives_way_and_comes_back(run, monkeypatch):
    """Neither a finished run nor one that was cut off is lost when another takes its name."""
    events, starts = [], [(run / "clip" / "all" / "best", None)]
    folder = train.train_stage("caption", toy(), run, "mine", 1, (), starts)
    first = (folder / "best" / "model.safetensors").read_bytes()

    def interrupt(line):
        if line["event"] == "step" and line["epoch"] > 1:
            raise Killed

    monkeypatch.setattr(train, "LOG_EVERY", 1)
    with pytest.raises(Killed):
        train.train_stage("caption", toy(), run, "mine", 2, (), starts, interrupt)
    assert checkpoint.about(folder / "best")["seed"] == 2
    train.train_stage("caption", toy(), run, "mine", 1, (), starts, events.append)
    assert [line["event"] for line in events] == ["done before"]
    assert (folder / "best" / "model.safetensors").read_bytes() == first
    events.clear()
    train.train_stage("caption", toy(), run, "mine", 2, (), starts, events.append)
    assert events[0]["event"] == "resumed" and read_json(folder / "done.json")["seed"] == 2
    assert len(list((run / "replaced").iterdir())) == 1
    changed = replace(toy(), caption=replace(toy().caption, learning_rate=1e-4, epochs=1))
    train.train_stage("caption", changed, run, "mine", 2, (), starts, events.append)
    replaced, = [line["kept"] for line in events if line["event"] == "replaces"]
    assert (Path(replaced) / "done.json").is_file() and len(list((run / "replaced").iterdir())) == 2


def test_the_table_comes_from_prediction_files_and_can_be_verified(run):
    """Captioners of one's own names stand behind the planned ones."""
    systems = [system.name for system in MODELS]
    others = sorted({path.name for path in (run / "caption").iterdir() if (path / "done.json").is_file()} - {*systems})
    assert leaderboard.systems(run) == [*systems, *others, *ENSEMBLES]
    rows = leaderboard.evaluate(run, toy(), [*systems, *others[:1], *ENSEMBLES], report=lambda line: None)
    assert list(dict.fromkeys(row["system"] for row in rows)) == [*systems, *others[:1], *ENSEMBLES, *leaderboard.BASELINES]
    assert leaderboard.verify(run) == []
    table = leaderboard.formatted(leaderboard.table(run))
    assert list(table.loc["model4", ["original board-a", "original board-b"]]) == ["-", "19.78"]
    path = run / "predictions" / "model1-board-a.json"
    kept = path.read_text(encoding="utf-8")
    predictions = json.loads(kept)
    predictions[next(iter(predictions))] = ["一只红色的狗在草地上"]
    path.write_text(json.dumps(predictions, ensure_ascii=False), encoding="utf-8")
    assert any("model1 on board-a" in problem for problem in leaderboard.verify(run))
    with pytest.raises(InputError, match="is not what model1 wrote"):
        leaderboard.score_system(run, "model1", "board-a")
    path.unlink()
    assert any("is not there" in problem for problem in leaderboard.verify(run))
    assert "model1" not in {row for row in leaderboard.table(run)["board-a CIDEr"].dropna().index}, "no file, no number"
    path.write_text(kept, encoding="utf-8")
    scores = run / "scores" / "model1-board-a.json"
    row = scores.read_text(encoding="utf-8")
    scores.write_text(json.dumps({**json.loads(row), "extra": 1}), encoding="utf-8")
    assert leaderboard.verify(run) == ["model1 on board-a: extra is not what its prediction file gives"]
    scores.write_text(row, encoding="utf-8")
    grid = leaderboard.search_weights(run, toy(), ("model1", "model2"), steps=1, images=4)
    assert len(grid) == 2 and leaderboard.verify(run) == []
    drawn = leaderboard.search_weights(run, toy(), ("model1", "model2", "model4"), images=4, samples=3, seed=5)
    weights = drawn[["model1", "model2", "model4"]].to_numpy()
    assert len(drawn) == 3 and np.allclose(weights.sum(axis=1), 1) and (weights > 0).all()
    assert weights.tolist() == weightings(3, samples=3, seed=5) != weightings(3, samples=3, seed=6)
    assert leaderboard.verify(run) == []
    found = read_json(run / "weights" / "model1+model2.json")
    found["points"][0]["CIDEr"] += 1
    (run / "weights" / "model1+model2.json").write_text(json.dumps(found), encoding="utf-8")
    assert len(leaderboard.verify(run)) == 1


def test_predictions_come_from_the_search_that_the_settings_name(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("predictions", "scores"))
    lengths = []
    for penalty in (-3.0, 3.0):  # short captions, then long ones
        config = replace(toy(), beam_size=4, length_penalty=penalty)
        found = leaderboard.predict(tmp_path / "run", config, "model1", "val", report=lambda line: None)
        lengths.append(sum(len(caption) for caption, in found.values()))
    assert lengths[0] < lengths[1]


def test_results_are_verified_without_the_corpus_that_they_came_with(run, tmp_path):
    results = tmp_path / "results"
    (results / "predictions").mkdir(parents=True)
    with pytest.raises(InputError, match="no predictions kept here"), leaderboard.kept_results(results, run):
        pass
    for system in ("model1", "1+2+3"):
        for path in (run / "predictions").glob(f"{system}-board-a*.json"):
            shutil.copy(path, results / "predictions")
    with leaderboard.kept_results(results, run) as kept:
        leaderboard.score_kept(kept)
        assert [row["system"] for row in leaderboard.rows(kept)] == ["model1", "1+2+3"] and leaderboard.verify(kept) == []
        assert list(leaderboard.table(kept).index) == ["model1", "1+2+3"]
    assert {path.name for path in results.iterdir()} == {"predictions", "scores"}
    scores = results / "scores" / "model1-board-a.json"
    row = read_json(scores)
    row["jieba"]["values"]["CIDEr"] *= 1 + 1e-12  # as another order of sums would have it
    scores.write_text(json.dumps(row), encoding="utf-8")
    with leaderboard.kept_results(results, run) as kept:
        assert leaderboard.verify(kept) == []
    row["jieba"]["values"]["CIDEr"] += 0.001
    scores.write_text(json.dumps(row), encoding="utf-8")
    with leaderboard.kept_results(results, run) as kept:
        assert leaderboard.verify(kept) == ["model1 on board-a: jieba is not what its prediction file gives"]


def test_the_command_scores_and_verifies_kept_results_and_leaves_the_run_alone(run, tmp_path, monkeypatch, capsys):
    """By data of its own, here those of the toy run: drawing the preset's would take a minute."""
    from clipcap_lib import prepare as prepare_module

    results = tmp_path / "results"
    (results / "predictions").mkdir(parents=True)
    for path in (run / "predictions").glob("model1-board-a*.json"):
        shutil.copy(path, results / "predictions")
    places = []

    def prepared(config, output, data_root=None):
        places.append(output)
        if not output.is_dir():
            shutil.copytree(run / "data", output)

    monkeypatch.setattr(prepare_module, "prepare", prepared)
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path / "runs"))
    command = ["leaderboard", "--results", str(results)]
    assert cli.main([*command, "--verify"]) == 2 and f"{results}: no scores to verify" in capsys.readouterr().err
    assert cli.main(command) == 0 and cli.main([*command, "--verify"]) == 0
    assert "1 rows recomputed, all equal" in capsys.readouterr().out and (results / "leaderboard.md").is_file()
    assert set(places) == {tmp_path / "runs" / "miniature-kept" / "data"}
    scores = results / "scores" / "model1-board-a.json"
    scores.write_text(scores.read_text(encoding="utf-8").replace('"images": 8', '"images": 9'), encoding="utf-8")
    assert cli.main([*command, "--verify"]) == 1 and "images is not what" in capsys.readouterr().out


def test_scores_are_made_again_when_the_references_change(run):
    before = leaderboard.score_system(run, "model1", "board-a")
    path = run / "data" / "references-board-a.json"
    kept = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({name: row[:2] for name, row in json.loads(kept).items()}), encoding="utf-8")
    try:
        after = leaderboard.score_system(run, "model1", "board-a")
        assert "refs:2" in after["characters"]["signature"] and "refs:5" in before["characters"]["signature"]
    finally:
        path.write_text(kept, encoding="utf-8")
    assert leaderboard.score_system(run, "model1", "board-a")["characters"] == before["characters"]


def test_shuffling_gives_every_image_another_ones_caption():
    predictions = {f"{i}.jpg": [str(i)] for i in range(50)}
    control = leaderboard.shuffled(predictions)
    assert sorted(c[0] for c in control.values()) == sorted(c[0] for c in predictions.values())
    assert all(control[file] != predictions[file] for file in predictions)


def command(run: Path, capsys, monkeypatch, *arguments: str) -> tuple[int, str]:
    """The command line in-process, on this run -> exit code, what it said."""
    monkeypatch.setenv("CLIPCAP_RUNS", str(run.parent))
    monkeypatch.delenv("CLIPCAP_DATA", raising=False)
    try:
        code = cli.main(arguments)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    return code, said.out + said.err


def test_predict_and_ensemble_write_the_originals_form(run, capsys, monkeypatch, tmp_path):
    code, _ = command(run, capsys, monkeypatch, "predict", "--model", "model1", "--set", "board-a")
    found = json.loads((run / "res.json").read_text(encoding="utf-8"))
    assert code == 0 and len(found) == 8
    assert all(name.endswith(".jpg") and len(c) == 1 and isinstance(c[0], str) for name, c in found.items())
    code, _ = command(run, capsys, monkeypatch, "ensemble", "--models", "model1", "model2", "model4", "--weights", "0.5",
                      "0.3", "0.2", "--rule", "logits", "--set", "board-a")
    assert code == 0 and json.loads((run / "res_ensemble.json").read_text(encoding="utf-8")).keys() == found.keys()
    code, _ = command(run, capsys, monkeypatch, "ensemble", "--models", "model1", "model2", "--consensus", "--beam-size",
                      "2", "--rerank", str(run / "clip" / "all" / "best"), "--set", "board-a", "--output",
                      str(tmp_path / "agreed.json"), "--jsonl", str(tmp_path / "agreed.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "agreed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert code == 0 and all(2 <= len(row["captions"]) <= 4 for row in rows) and len(rows) == 8
    code, _ = command(run, capsys, monkeypatch, "predict", "--consensus", "--temperature", "0.6", "--n-best", "6", "--set",
                      "board-a", "--output", str(tmp_path / "samples.json"), "--jsonl", str(tmp_path / "samples.jsonl"))
    command(run, capsys, monkeypatch, "predict", "--temperature", "0.6", "--n-best", "6", "--set", "board-a", "--output",
            str(tmp_path / "drawn.json"), "--jsonl", str(tmp_path / "drawn.jsonl"))
    drawn, agreed = ([list(zip(row["captions"], row["scores"], strict=True)) for row in
                      map(json.loads, (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())]
                     for name in ("drawn", "samples"))
    rows, segmentation = load_prepared(run / "data", "train")["captions"], leaderboard.main_segmentation(run)
    frequency = document_frequencies([segment(row, segmentation) for row in rows])
    expected = consensus([drawn], frequency, segmentation)
    assert code == 0 and len(agreed) == 8 and drawn != agreed
    for said, known in zip(agreed, expected, strict=True):
        assert [text for text, _ in said] == [text for text, _ in known]
        assert [score for _, score in said] == pytest.approx([score for _, score in known], abs=1e-5)
    code, _ = command(run, capsys, monkeypatch, "ensemble", "--models", "model1", "model1", "--consensus", "--temperature",
                      "1.5", "--n-best", "6", "--set", "board-a", "--jsonl", str(tmp_path / "twice.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "twice.jsonl").read_text(encoding="utf-8").splitlines()]
    assert code == 0 and any(len(row["captions"]) > 6 for row in rows), "each member draws for itself"
    for flags, words in ((("--temperature", "0.6", "--n-best", "1"), "--consensus chooses among captions"),
                         (("--beam-size", "3", "--rerank", str(run / "clip" / "all" / "best")), "both choose")):
        code, said = command(run, capsys, monkeypatch, "predict", "--consensus", *flags)
        assert code == 2 and words in said
    code, said = command(run, capsys, monkeypatch, "validate-submission", str(tmp_path / "agreed.json"), "--set", "board-a")
    assert code == 0 and "a caption of each of 8 images" in said
    code, said = command(run, capsys, monkeypatch, "score", "--predictions", str(run / "res.json"), "--set", "board-a",
                         "--segmentation", "characters")
    assert code == 0 and "CIDEr" in said and "characters" in said
    code, said = command(run, capsys, monkeypatch, "score", "--predictions", str(run / "res.json"), "--set", "board-a",
                         "--compare", str(run / "res_ensemble.json"), "--output", str(tmp_path / "scores.json"))
    kept = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert code == 0 and "paired bootstrap" in said and "document frequencies of the full set" in said
    assert set(kept["compared"]) == set(kept["values"]) and len(kept["per_image"]) == 8
    before = (run / "res_ensemble.json").read_bytes()
    for place, words in ((run / "res_ensemble.json", "one of the files to be scored"),
                         (run / "res.json" / "scores.json", "cannot be written")):
        code, said = command(run, capsys, monkeypatch, "score", "--predictions", str(run / "res.json"), "--set", "board-a",
                             "--compare", str(run / "res_ensemble.json"), "--output", str(place))
        assert code == 2 and words in said and "Traceback" not in said
    assert (run / "res_ensemble.json").read_bytes() == before


BAD = {
    "an unknown preset": (["train", "--preset", "huge"], "unknown preset 'huge'"),
    "a preset without its corpora": (["prepare", "--preset", "flickr8k"], "needs real corpora"),
    "a data root that is not there": (["prepare", "--data-root", "/nowhere"], "/nowhere: no such folder"),
    "an unknown corpus": (["prepare", "--data-root", "{corpora}", "--corpora", "imagenet"], "unknown corpus 'imagenet'"),
    "a missing corpus": (["prepare", "--data-root", "{corpora}", "--corpora", "aic-icc"], "aic-icc.*not there"),
    "a corpus left out that is not there": (["train", "--without", "coco_cn"], "no such corpus was prepared; there are"),
    "another root than the prepared one": (["train", "--data-root", "/nowhere"], "was prepared from .*; run `prepare"),
    "an unknown model": (["predict", "--model", "model9", "--set", "board-a"], "model9.*no checkpoint"),
    "an unknown set": (["predict", "--model", "model1", "--set", "board-z"], "no prepared images for 'board-z'"),
    "a pattern for a set": (["validate-submission", "x.json", "--set", "board-*"], r"no prepared images for 'board-\*'"),
    "a folder without images": (["predict", "--images", "{empty}"], "holds no .jpg"),
    "a truncated image": (["predict", "--images", "{truncated}", "--strict"], "bad.jpg: image cannot be read"),
    "too few weights": (["ensemble", "--models", "model1", "model2", "--weights", "1", "--set", "board-a"],
                        "as many weights"),
    "results that are not there": (["leaderboard", "--results", "/nowhere", "--data-root", "{corpora}"],
                                   "/nowhere: no predictions kept here"),
    "predictions that are not there": (["score", "--predictions", "/nowhere.json", "--set", "board-a"], "/nowhere.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_sentence_and_exit_code_2(case, run, corpora, capsys, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "truncated").mkdir()
    image = next((corpora / "hualu" / "board-a").glob("*.jpg")).read_bytes()
    (tmp_path / "truncated" / "bad.jpg").write_bytes(image[:len(image) // 3])
    arguments, words = BAD[case]
    places = {"corpora": corpora, "empty": tmp_path / "empty", "truncated": tmp_path / "truncated"}
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    code, said = command(run, capsys, monkeypatch, *(a.format(**places) for a in arguments))
    assert code == 2, said
    assert re.search(words, said), said
    assert said.startswith("clipcap: ") and said.count("\n") == 1 and "Traceback" not in said
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def damage_line(corpus: Path) -> None:
    path = corpus / "flickr8k-cn" / "data" / "flickr8kzhc.caption.txt"
    path.write_text("no key here\n" + path.read_text(encoding="utf-8"), encoding="utf-8")


def damage_caption(corpus: Path) -> None:
    path = corpus / "flickr8k-cn" / "data" / "flickr8kzhc.caption.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0].split(" ")[0] + " ", *lines[1:]]) + "\n", encoding="utf-8")


def damage_image(corpus: Path) -> None:
    path = sorted((corpus / "flickr8k-cn" / "Flicker8k_Dataset").glob("*.jpg"))[0]
    path.write_bytes(path.read_bytes()[:300])


def remove_image(corpus: Path) -> None:
    sorted((corpus / "flickr8k-cn" / "Flicker8k_Dataset").glob("*.jpg"))[0].unlink()


@pytest.mark.parametrize("damage, words, may_skip", [
    (damage_line, r"flickr8kzhc.caption.txt:1", False), (damage_caption, r"flickr8kzhc.caption.txt:1", True),
    (damage_image, r"\.jpg: image cannot be read", True), (remove_image, r"\.jpg", True)])
def test_a_damaged_corpus_is_refused_and_can_be_used_without_what_is_damaged(damage, words, may_skip, tmp_path):
    corpus = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 8, "val": 3, "test": 2}},
                                     processes=1)
    damage(corpus)
    with pytest.raises(InputError, match=words):
        prepare(toy(), tmp_path / "data", corpus, processes=1, report=lambda line: None)
    assert not (tmp_path / "data" / "manifest.json").exists(), "nothing that passes for whole"
    if may_skip:
        data = prepare(toy(), tmp_path / "data", corpus, processes=1, skip_damaged=True, report=lambda line: None)
        assert sum(read_json(data / "manifest.json")["left_out"].values()) >= 1


def test_a_checkpoint_of_another_vocabulary_is_refused(run, corpora, tmp_path):
    prepare(replace(toy(), vocabulary_minimum=40), tmp_path / "data", corpora, processes=1, report=lambda line: None)
    assert len(vocabulary_of(load_tokenizer(tmp_path / "data" / "tokenizer"))) < len(
        vocabulary_of(load_tokenizer(run / "data" / "tokenizer")))
    with pytest.raises(InputError, match="vocabulary"):
        train.finetune_captioner(toy(), tmp_path, "model1", clip=run / "clip" / "all")


def test_the_rooms_import_only_rooms_above_them():
    """DESIGN's order: dependencies point one way."""
    order = ["config", "files", "tokenizer", "corpora", "images", "checks", "shards", "validator", "prepare", "data",
             "decode", "ensemble", "gpt", "graphs", "processes", "losses", "model", "captioner", "captions", "meteor",
             "rouge", "cider", "choose", "bootstrap", "retrieval", "metrics", "checkpoint", "embeddings", "journal",
             "optimisation", "pretrained", "stages", "train", "systems", "results", "clip_scores", "ensemble_weights",
             "leaderboard", "scst_gain", "ablation", "attention", "localisation", "timing", "bench_memory", "bench_train",
             "bench_decode", "bench_score", "bench_prepare", "bench", "style", "matrices", "panels", "overlays",
             "spaces", "live", "diagrams", "charts", "plots", "controls", "stepping", "monitor", "widgets", "explorer",
             "predict", "submission", "commands", "cli"]
    package = Path(cli.__file__).parent
    rooms = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"} | {"corpora"}
    assert rooms == set(order)
    for room in order:
        files = [package / f"{room}.py"] if room != "corpora" else list((package / "corpora").glob("*.py"))
        for file in files:
            text = file.read_text(encoding="utf-8")
            used = {name for line in re.findall(r"^\s*from clipcap_lib import (.+?)(?: as .+)?$", text, re.M)
                    for name in re.split(r",\s*", line)} | set(re.findall(r"^\s*from clipcap_lib\.(\w+)", text, re.M))
            above = set(order[:order.index(room) + (room == "corpora")])
            assert used <= above, f"{file.name} imports {used - above}"


def test_the_package_is_the_list_of_dependencies():
    """environment.yml brings only what pip cannot: the rest is pyproject's, and the lock pins all of it."""
    root = Path(cli.__file__).parents[1]
    conda = re.findall(r"^  - ([a-z]+)", (root / "environment.yml").read_text(), re.M)
    assert set(conda) == {"conda", "python", "pip", "make", "openjdk"}
    assert "- -e ." in (root / "environment.yml").read_text()
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = (project["dependencies"], project["optional-dependencies"]["test"])  # other extras are not installed by make
    names = [re.split(r"[<>=\[]", item)[0] for group in groups for item in group]
    pinned = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (root / "requirements.lock").read_text(), re.M))
    assert {name.lower() for name in names} <= {name.lower() for name in pinned}
    assert "index" not in re.sub(r"#.*", "", (root / "requirements.lock").read_text())


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_committed_notebook_is_executed_small_and_without_complaints(path):
    assert path.stat().st_size < 300_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"], "the state of widgets is not kept"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.get("name", output["output_type"]) for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stdout", "display_data", "execute_result"}, "a warning or an error"


def test_validation_images_are_of_every_corpus(run, monkeypatch):
    """Rows lie corpus by corpus: the first few would be of one only."""
    seen = []
    monkeypatch.setattr(train, "fit", lambda stage, *_: seen.extend(stage.validation["corpus"]))
    train.train_stage("clip", replace(toy(), validation_images=8), run, "some", 1)
    everything = load_prepared(run / "data", "val")["corpus"]
    assert len(seen) == 8 < len(everything) and set(seen) == set(everything)


def test_a_model_takes_over_the_parts_of_its_starts(run, monkeypatch):
    """All else is as `new_model` makes it."""
    fitted = []
    monkeypatch.setattr(train, "fit", lambda stage, model, *_: fitted.append(model.state_dict()))
    start = run / "clip" / "all" / "best"
    given = checkpoint.load(start).state_dict()
    new = train.new_model(toy(), load_tokenizer(run / "data" / "tokenizer"), 9).state_dict()
    own = [name for name in new if name.startswith(("gpt.", "image_encoder."))]
    for parts in (None, ("gpt",), ("image_encoder",)):
        train.train_stage("clip", toy(), run, "parts", 9, (), [(start, parts)])
        for name, tensor in fitted.pop().items():
            taken = not parts or name.split(".")[0] in parts
            assert torch.equal(tensor, (given if taken else new)[name]), (parts, name)
    assert any(not torch.equal(given[name], new[name]) for name in own)


def test_each_stage_gets_the_batches_that_it_asks_for_and_validates_on_its_own_corpora(run, monkeypatch):
    found = {}
    monkeypatch.setattr(train, "fit", lambda stage, model, data, *_: found.update({stage.name: (stage, data)}))
    without = ("coco-cn",)
    for name in ("image", "language", "clip", "caption"):
        train.train_stage(name, toy(), run, "asked", 9, without if name != "image" else ())
        stage, data = found[name]
        assert data.by_length == (name != "image") and (data.pixels is None) == (name == "language"), name
        corpora = {"flickr8k-cn", *(["coco-cn"] if name == "image" else [])}
        assert set(stage.validation["corpus"][:]) == corpora, name
    assert set(train.validation_rows(toy(), run)["corpus"][:]) == {"flickr8k-cn", "coco-cn"}
    assert set(train.validation_rows(toy(), run, without)["corpus"][:]) == {"flickr8k-cn"}


@pytest.fixture
def done_at_once(monkeypatch):
    """In the place of `fit`: a run that is over, until the test is."""
    made = set()

    def fit(stage, model, data, config, folder, about, progress):
        folder.mkdir(parents=True)
        made.add(folder)
        (folder / "done.json").write_text(json.dumps({"fingerprint": about["fingerprint"]}), encoding="utf-8")
        return folder

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "load_prepared", functools.cache(load_prepared))  # which takes most of the time
    yield
    for folder in made:
        shutil.rmtree(folder)


def test_a_run_is_done_only_for_what_it_was_trained_with(run, done_at_once):
    """What only concerns captioning asks for no other run."""
    starts = [(run / "clip" / "all" / "best", None)]

    def is_done(config, stage="caption", seed=1, without=(), starts=starts) -> bool:
        return train.train_stage(stage, config, run, "asked", seed, without, starts, begin=False) is not None

    for stage in ("caption", "scst"):
        train.train_stage(stage, toy(), run, "asked", 1, (), starts)
    kept = {"beam_size": 7, "length_penalty": 0.5, "ensemble_rule": "logits", "scst_temperature": 0.9,
            "scst_cross_entropy": 0.5}
    assert is_done(toy()) and is_done(replace(toy(), **kept)) and is_done(toy(), "scst")
    changes = {"smallest_crop": 0.5, "colour_jitter": 0.1, "train_resize": 34, "horizontal_flip": False, "max_length": 9,
               "validation_images": 299, "precision": "fp32", "sync_batchnorm": True, "compile": True,
               "caption": replace(toy().caption, learning_rate=1e-5), "model": replace(toy().model, dropout=0.2)}
    assert [name for name, value in changes.items() if is_done(replace(toy(), **{name: value}))] == []
    assert not is_done(replace(toy(), scst_temperature=0.9), "scst")
    assert not is_done(replace(toy(), scst_cross_entropy=0.5), "scst")
    assert not is_done(toy(), seed=2) and not is_done(toy(), without=("coco-cn",))
    assert not is_done(toy(), starts=[(run / "clip" / "without-coco-cn" / "best", None)]), "of another fingerprint"
    assert not is_done(toy(), starts=[(starts[0][0], ("gpt",))])


def test_decoded_images_of_another_size_are_not_read(run):
    rows = load_prepared(run / "data", "train").select(range(3))
    for size in (36, 24, 32):
        pixels = data_module.Pixels(rows, size, run / "data")
        assert pixels.file and torch.equal(pixels.read([2])[0], data_module.to_pixels(rows[2]["image"], size))
