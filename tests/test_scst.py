"""Self-critical training: its loss against numpy, its reward against CIDEr-D, and that it teaches what is rewarded."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_pipeline import IMAGES, toy
from test_training import TOY, toy_batch, toy_model

from clipcap_lib import decode, train
from clipcap_lib.captions import broken_endings
from clipcap_lib.cider import cider_d, document_frequencies
from clipcap_lib.cli import main
from clipcap_lib.config import InputError, StageConfig, preset
from clipcap_lib.corpora import miniature
from clipcap_lib.data import pad
from clipcap_lib.files import read_json
from clipcap_lib.losses import self_critical_loss
from clipcap_lib.prepare import prepare
from clipcap_lib.scst_gain import self_critical_gain
from clipcap_lib.stages import CaptionStage, ClipStage, ScstStage
from clipcap_lib.tokenizer import build_tokenizer, build_vocabulary

TEXTS = [["一只狗在跑", "狗在草地上跑"], ["两只猫睡觉", "猫在睡觉"], ["红色的汽车", "一辆红汽车"],
         ["女孩在笑", "一个女孩笑了"]]


def scst(temperature: float = 1.0, **options) -> tuple[ScstStage, torch.nn.Module]:
    """The stage on four images, and a toy model of its vocabulary."""
    tokenizer = build_tokenizer(build_vocabulary(text for row in TEXTS for text in row))
    config = replace(preset("miniature"), model=replace(TOY, vocab_size=len(tokenizer)), max_length=8,
                     scst_temperature=temperature,
                     scst=StageConfig(epochs=1, batch_size=4, **{"captions_per_visit": 5, **options}))
    stage = ScstStage(config, {"captions": TEXTS}, tokenizer, {"captions": TEXTS})
    return stage, toy_model(vocab_size=len(tokenizer), initializer_range=0.2)


def ids(stage, text: str, end: bool = True) -> list[int]:
    flat = [(caption, tokens) for row, truth in zip(TEXTS, stage.truth, strict=True)
            for caption, tokens in zip(row, truth, strict=True)]
    numbers = {character: int(number) for caption, tokens in flat
               for character, number in zip(caption, tokens[:-1], strict=True)}
    return [numbers[character] for character in text] + [3] * end


def test_the_loss_is_minus_advantage_times_log_probability():
    random = np.random.default_rng(0)
    scores, rewards, lengths = -random.random((3, 4, 6)), random.random((3, 4)), random.integers(1, 7, (3, 4))
    expected = 0.0
    for n in range(3):
        for k in range(4):
            others = [rewards[n, j] for j in range(4) if j != k]
            expected -= (rewards[n, k] - sum(others) / 3) * scores[n, k, :lengths[n, k]].sum()
    found = self_critical_loss(*map(torch.from_numpy, (scores, lengths, rewards)))
    assert found.item() == pytest.approx(expected / lengths.sum(), abs=1e-12)


def test_captions_that_earn_the_same_teach_nothing():
    scores = torch.randn(2, 3, 4, requires_grad=True)
    self_critical_loss(scores, torch.full((2, 3), 4), torch.full((2, 3), 0.7)).backward()
    assert scores.grad.abs().max() < 1e-7


def test_the_reward_is_cider_of_the_written_tokens_with_their_end():
    stage, _ = scst()
    said = [[ids(stage, "一只狗在跑"), ids(stage, "一只狗在跑", end=False), ids(stage, "两只猫睡觉")]]
    whole, cut, wrong = stage.rewards([0], said)[0].tolist()
    tokens = [[[*text, "end"] for text in row] for row in TEXTS]
    frequency = document_frequencies(tokens)
    assert whole == pytest.approx(cider_d([[*"一只狗在跑", "end"]], [tokens[0]], frequency)[0], rel=1e-6)
    assert whole > 1.1 * cut > 0 and cut > wrong, "a caption that breaks off loses"


def test_frequencies_are_those_of_the_training_split():
    stage, _ = scst()
    one = stage.rewards([1], [[ids(stage, "两只猫睡觉"), ids(stage, "猫在睡觉")]])
    among_others = stage.rewards([1, 0], [[ids(stage, "两只猫睡觉"), ids(stage, "猫在睡觉")],
                                          [ids(stage, "狗在跑"), ids(stage, "狗在跑")]])
    assert one.min() > 0 and torch.equal(one[0], among_others[0]), "with a mini-batch's own frequencies, one image earns 0"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_sample_counts_with_the_log_probability_that_the_model_gives_it(monkeypatch, temperature):
    """Against one caption at a time without packing, pads or caches, at the stage's temperature and renormalised."""
    stage, model = scst(temperature=temperature)
    seen = {}
    monkeypatch.setattr("clipcap_lib.stages.self_critical_loss",
                        lambda scores, lengths, rewards: seen.update(scores=scores, lengths=lengths) or scores.sum())
    search = decode.search
    monkeypatch.setattr(decode, "search", lambda *a: seen.setdefault("said", search(*a)))
    batch = toy_batch(images=4, each=2)
    stage.loss(model, batch)
    assert len({one.tokens for found in seen["said"] for one in found}) > 5
    for row, found in enumerate(seen["said"]):
        for column, one in enumerate(found):
            tokens = [*one.tokens, 3][:8]
            prefix = model.prefix(batch.images[row:row + 1])
            logits = model.caption_logits(prefix, torch.tensor([[2, *tokens[:-1]]]))[0]
            logits[:, [0, 1, 2]] = -torch.inf
            expected = (logits / temperature).log_softmax(-1)[range(len(tokens)), tokens].sum()
            length = int(seen["lengths"][row, column])
            assert length == len(tokens)
            assert seen["scores"][row, column, :length].sum().item() == pytest.approx(expected.item(), abs=1e-4)


def test_samples_are_those_of_the_weights_as_they_are_now(monkeypatch):
    monkeypatch.setattr("clipcap_lib.gpt.packs", lambda device, dtype: dtype is torch.float32)  # a copy, if it were done
    stage, model = scst(0.1)
    prefix = model.float().eval().prefix(toy_batch(images=4, each=2).images)
    stage._samples(model, prefix)
    with torch.no_grad():
        model.gpt.transformer.wte.weight.copy_(model.gpt.transformer.wte.weight.roll(1, 0))
        model.gpt.transformer.ln_f.weight.zero_()
        model.gpt.transformer.ln_f.bias.copy_(100 * model.gpt.transformer.wte.weight[model.end_id])
    assert stage._samples(model, prefix) == [[[model.end_id]] * stage.stage.captions_per_visit] * len(prefix)


def test_samples_are_drawn_at_the_temperature():
    """Each first token as often as the distribution at 0.5 says, which is another one than at 1."""
    stage, model = scst(temperature=0.5, captions_per_visit=1000)
    batch = toy_batch(images=4, each=2)
    torch.manual_seed(0)
    prefix = model.eval().prefix(batch.images)
    said = stage._samples(model, prefix)
    logits = model.caption_logits(prefix, torch.full((4, 1), 2))[:, 0].detach()
    logits[:, [0, 1, 2]] = -torch.inf
    expected, flat = (logits / 0.5).softmax(-1), logits.softmax(-1)
    drawn = torch.stack([torch.bincount(torch.tensor([tokens[0] for tokens in row]), minlength=logits.shape[1])
                         for row in said]) / 1000
    assert (drawn - expected).abs().max() < 0.04 and (flat - expected).abs().max() > 0.08


def test_the_mean_reward_is_told_once(monkeypatch):
    """Over all images and samples since it was last told, whatever the sizes of the parts."""
    stage, model = scst()
    rewards = iter([torch.tensor([[1.0, 2, 3, 4, 5]]), torch.full((3, 5), 7.0), torch.full((4, 5), 0.5)])
    monkeypatch.setattr(ScstStage, "rewards", lambda self, images, said: next(rewards))
    for images in (1, 3):
        stage.loss(model, toy_batch(images=images, each=2))
    assert stage.told() == {"reward": pytest.approx((15 + 15 * 7) / 20)}
    stage.loss(model, toy_batch(images=4, each=2))
    assert stage.told() == {"reward": pytest.approx(0.5)}


def test_dropout_is_off_and_batch_statistics_stay():
    stage, model = scst()
    noisy = toy_model(vocab_size=model.config.vocab_size, initializer_range=0.2, dropout=0.5).train()
    before, losses = copy.deepcopy(dict(noisy.named_buffers())), []
    for one in (model, noisy):  # of the same weights
        torch.manual_seed(4)
        losses.append(stage.loss(one, toy_batch(images=4, each=2)).item())
    assert losses[0] == losses[1] != 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in noisy.named_buffers())


def test_a_contrastive_term_is_added_to_the_loss():
    captions = [[2, *map(int, tokens)] for row in scst()[0].truth for tokens in row]
    batch = replace(toy_batch(images=4, each=2), ids=pad(captions, 0))
    losses = []
    for weight in (0.0, 0.3):
        stage, model = scst(contrastive=weight)
        torch.manual_seed(4)
        losses.append(stage.loss(model, batch).item())
    joint = ClipStage(replace(stage.config, clip=StageConfig(epochs=1, batch_size=4)), None).loss(model, batch).item()
    assert losses[1] == pytest.approx(losses[0] + 0.3 * joint, abs=1e-6) and joint > 0.1


def test_cross_entropy_of_the_training_captions_is_added_a_token(monkeypatch):
    """Under its weight, with pads that do not count; its own gradient reaches the image as well."""
    captions = [[2, *map(int, tokens)] for row in scst()[0].truth for tokens in row]
    batch = replace(toy_batch(images=4, each=2), ids=pad(captions, 0))
    losses = []
    for weight in (0.0, 0.5):
        stage, model = scst()
        stage.config = replace(stage.config, scst_cross_entropy=weight)
        torch.manual_seed(4)
        losses.append(stage.loss(model, batch))
    one_by_one = [model.caption_logits(model.prefix(batch.images[i // 2:i // 2 + 1]), torch.tensor([tokens[:-1]]))[0]
                  .log_softmax(-1)[range(len(tokens) - 1), tokens[1:]] for i, tokens in enumerate(captions)]
    expected = -torch.cat(one_by_one).mean().item()
    assert len(set(map(len, captions))) > 1 and expected > 1
    assert losses[1].item() == pytest.approx(losses[0].item() + 0.5 * expected, abs=1e-5)
    monkeypatch.setattr(ScstStage, "rewards", lambda self, images, said: torch.ones(len(said), len(said[0])))
    stage.loss(model, batch).backward()  # equal rewards teach nothing: what is left is cross-entropy's
    assert all(p.grad.abs().max() > 1e-6 for p in model.image_head.parameters())


def mean_reward(stage, model, batch) -> float:
    torch.manual_seed(123)
    said = [row for _ in range(20) for row in stage._samples(model, model.eval().prefix(batch.images))]
    return stage.rewards(list(range(4)) * 20, said).mean().item()


def taught(stage, model, batch, kind, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.gpt.parameters(), lr=rate)
    for step in range(steps):
        torch.manual_seed(step)
        loss = kind.loss(stage, model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_it_teaches_what_is_rewarded(monkeypatch):
    """After a little cross-entropy, as in the recipe; without a difference between rewards nothing is learned."""
    stage, model = scst(captions_per_visit=16)
    flat = [[2, *map(int, tokens)] for row in stage.truth for tokens in row]
    batch = replace(toy_batch(images=4, each=2), ids=pad(flat, 0))
    taught(stage, model, batch, CaptionStage, 25, 3e-3)
    before = mean_reward(stage, model, batch)
    weights = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as equal:
        equal.setattr(ScstStage, "rewards", lambda self, images, said: torch.ones(len(said), len(said[0])))
        taught(stage, model, batch, ScstStage, 1, 1e-3)
        assert stage.loss(model, batch).item() == 0
    model.load_state_dict(weights)
    taught(stage, model, batch, ScstStage, 40, 1e-3)
    assert mean_reward(stage, model, batch) > 1.1 * before > 1


def test_a_step_is_the_same_again_for_the_same_seed():
    stage, model = scst()
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(stage.loss(model, toy_batch(images=4, each=2)).item())
    torch.manual_seed(5)
    assert found[0] == found[1] != stage.loss(model, toy_batch(images=4, each=2)).item()


def test_an_alarm_says_that_validation_fell(monkeypatch):
    stage, model = scst()
    values = iter([80.0, 81.0, 79.5])
    monkeypatch.setattr("clipcap_lib.stages.CaptionStage.validate", lambda self, model: {"CIDEr": next(values)})
    monkeypatch.setattr("clipcap_lib.stages.CaptionStage.before", lambda self, model: {})
    stage.before(model)
    assert "warning" not in stage.validate(model)
    assert "79.5, below the 80.0" in stage.validate(model)["warning"]


def test_broken_endings_are_captions_that_end_in_a_function_word():
    assert broken_endings(["一只狗在", "一只狗。", "红色的。", "一个男人和一个"]) == 0.75
    assert broken_endings(["一只狗跑过草地。", "他看着前面的方向", "桌上有一盘面条", "路边停着车辆", "", "！"]) == 0
    assert broken_endings(["沙滩上有一只", "路边停着三辆", "草地上有一些"]) == 1
    assert broken_endings([]) == 0


def test_a_preset_without_the_stage_and_a_run_without_captioner_say_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path))
    with pytest.raises(InputError, match="no captioner here"):
        train.self_critical(preset("miniature"), tmp_path, "model1")
    monkeypatch.setattr("clipcap_lib.checkpoint.exists", lambda folder: True)
    with pytest.raises(InputError, match="'hualu' has no self-critical stage"):
        train.self_critical(preset("hualu"), tmp_path, "model1")
    monkeypatch.undo()
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path))
    with pytest.raises(InputError, match="at least 2"):
        replace(preset("miniature"), scst=StageConfig(epochs=1, captions_per_visit=1))
    with pytest.raises(InputError, match="scst_temperature must be positive"):
        replace(preset("miniature"), scst_temperature=0.0)
    with pytest.raises(InputError, match="scst_cross_entropy must not be negative"):
        replace(preset("miniature"), scst_cross_entropy=-0.1)
    (tmp_path / "miniature" / "data").mkdir(parents=True)
    (tmp_path / "miniature" / "data" / "manifest.json").write_text("{}")
    assert main(["train", "--stage", "scst"]) == 2
    assert "--stage caption" in capsys.readouterr().err


def test_the_gain_is_told_against_cross_entropy_for_as_many_steps(tmp_path, monkeypatch, capsys):
    corpora = miniature.write_corpora(tmp_path / "corpora", images=IMAGES, processes=1)
    few = StageConfig(epochs=2, batch_size=28, captions_per_visit=2)
    config = replace(toy(), clip=few, caption=replace(few, learning_rate=1e-3),
                     scst=replace(few, captions_per_visit=3, freeze=("layer1",), image_rate=0.5),
                     image=StageConfig(epochs=0), language=StageConfig(epochs=0), beam_size=2)
    run = tmp_path / "miniature"
    prepare(config, run / "data", corpora, processes=1, report=lambda line: None)
    train.pretrain_clip(config, run)
    train.finetune_captioner(config, run, "model1")
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path))
    monkeypatch.setattr("clipcap_lib.cli.preset", lambda name: config)
    assert main(["train", "--stage", "scst", "--compare", "--seed", "1"]) == 0
    said, found = capsys.readouterr().out, read_json(run / "scst" / "model1-gain.json")
    assert [row["beams"] for row in found] == [1, 2] and said.count("SCST minus cross-entropy") == 2
    for row in found:
        assert row["steps"]["SCST"] == row["steps"]["cross-entropy"] > 0
        assert row["difference"] == pytest.approx(row["SCST"] - row["cross-entropy"]) and row["low"] <= row["high"]
        assert set(row["broken"]) == set(row["distinct"]) == {"before", "SCST", "cross-entropy"}
    told = [json.loads(line)["reward"] for line in (run / "scst" / "model1" / "metrics.jsonl").read_text().splitlines()]
    assert said.count("  reward ") == config.scst.epochs and all(0 <= reward <= 10 for reward in told)
    settings = [read_json(run / stage / name / "best" / "config.json")["config"]["caption"] for stage, name in
                (("scst", "model1"), ("caption", "model1-longer"))]
    for setting, value in (("learning_rate", config.scst.learning_rate), ("freeze", ["layer1"]), ("image_rate", 0.5)):
        assert settings[1][setting] == value != settings[0][setting]
    (run / "scst" / "model1-gain.json").unlink()
    monkeypatch.setattr("clipcap_lib.processes.rank", lambda: 1)
    monkeypatch.setattr(train, "self_critical", lambda *_, **__: run / "scst" / "model1")
    monkeypatch.setattr(train, "train_stage", lambda *_, **__: run / "caption" / "model1-longer")
    assert self_critical_gain(config, run, "model1", 1) == [], "one process compares, and writes"
    assert not (run / "scst" / "model1-gain.json").exists()
    monkeypatch.undo()
    assert main(["train", "--compare"]) == 2 and "--stage scst" in capsys.readouterr().err
