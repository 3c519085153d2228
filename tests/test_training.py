"""Parts of training against plain computations in float64: gradients in chunks and parts, negatives, averages, schedules."""

import copy
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clipcap_lib import checkpoint, cli, losses, optimisation, train
from clipcap_lib.config import InputError, ModelConfig, StageConfig, preset
from clipcap_lib.data import Batch, TrainingData
from clipcap_lib.losses import caption_loss, contrastive_loss, in_chunks, own_captions, running_statistics_kept
from clipcap_lib.model import ClipCap
from clipcap_lib.optimisation import Average, TrainingStep, learning_rate
from clipcap_lib.stages import CaptionStage, ClipStage, LanguageStage, ScstStage
from clipcap_lib.tokenizer import SPECIAL_TOKENS, build_tokenizer, build_vocabulary

VOCABULARY = 30
NARROW = {"channels": [16, 32, 64, 128]}  # a quarter of the usual width: the tests ask for no accuracy
TOY = ModelConfig(encoder="resnet10t", encoder_options=NARROW, image_size=32, image_tokens="grid", layers=2, width=32,
                  heads=2, context=12, vocab_size=VOCABULARY, dropout=0.0)
TOKENIZER = build_tokenizer([*SPECIAL_TOKENS, *map(chr, range(0x4E00, 0x4E00 + VOCABULARY - len(SPECIAL_TOKENS)))])


def toy_model(seed=0, **options) -> ClipCap:
    """In float64, BatchNorm in evaluation mode."""
    torch.manual_seed(seed)
    return ClipCap(replace(TOY, **options)).double().eval()


def toy_batch(images=8, each=1, seed=0) -> Batch:
    """Images with captions of 3 to 10 tokens; captions 1 and 5 are the same words."""
    random = np.random.default_rng(seed)
    ids = torch.zeros(images * each, 12, dtype=torch.long)
    for row in ids:
        length = int(random.integers(3, 11))
        row[:length] = torch.tensor([2, *random.integers(4, VOCABULARY, length - 2), 3])
    if each == 1 and images > 5:
        ids[5] = ids[1]
    texts = {}
    text_of = torch.tensor([texts.setdefault(tuple(row.tolist()), len(texts)) for row in ids])
    pixels = torch.from_numpy(random.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8))
    return Batch(pixels, ids, torch.arange(images).repeat_interleave(each), text_of)


def stage(kind=ClipStage, **options):
    """A stage without validation data."""
    made = object.__new__(kind)
    made.stage = StageConfig(epochs=1, batch_size=8, **options)
    return made


def gradients(model: ClipCap, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance=1e-8):
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


class Recorded:
    """In the place of a GPU's graph: what it was captured with stays, and only the inputs are copied."""

    def __init__(self, run, *inputs, warm, pool=None):
        assert warm == 0, "what comes before capturing are steps of the training"
        self.run, self.inputs, self.graph, self.calls = run, [one.clone() for one in inputs], self, 0

    def pool(self):
        return None

    def __call__(self, *inputs):
        for kept, one in zip(self.inputs, inputs, strict=True):
            kept.copy_(one)
        self.calls += 1
        return self.run(*self.inputs)


def test_a_shape_is_captured_after_its_first_steps_and_trains_as_before(monkeypatch):
    monkeypatch.setattr(optimisation, "Graph", Recorded)
    found = []
    for captures in (True, False):
        model = toy_model().train()
        accelerator = optimisation.accelerator("fp32")
        optimizer = accelerator.prepare_optimizer(optimisation.optimizer(model, stage().stage))
        step = TrainingStep(stage(), model, optimizer, accelerator)
        assert not step.captures, "on a CPU there is nothing to capture"
        step.captures = captures
        losses = []
        for turn in range(10):
            optimisation.set_learning_rate(optimizer, 1e-3 / (1 + turn))
            losses.append(step(toy_batch(images=4 + 4 * (turn % 2), seed=turn))[0])
        found.append(torch.cat([torch.stack(losses), *(p.detach().flatten() for p in model.parameters())]))
        # one graph of each shape
        assert [graph.calls for graph in step.graphs.values()] == [5 - TrainingStep.WARM] * (2 if captures else 0)
    assert torch.equal(*found)


def test_where_graphs_find_no_memory_steps_are_taken_without(monkeypatch):
    class Full(Recorded):
        def __init__(self, run, *inputs, warm, pool=None):
            raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(optimisation, "Graph", Full)
    model, accelerator = toy_model(), optimisation.accelerator("fp32")
    optimizer = accelerator.prepare_optimizer(optimisation.optimizer(model, stage().stage))
    step = TrainingStep(stage(), model, optimizer, accelerator)
    step.captures = True
    losses = [step(toy_batch())[0].item() for _ in range(5)]
    assert not step.captures and len(set(losses)) == 5 and losses[-1] < losses[0]


def test_one_process_may_train_in_one_precision_after_another():
    for precision in ("bf16", "fp32", "bf16"):
        with optimisation.accelerator(precision).autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.parametrize("options", [{"accumulation": 2}, {"chunk_size": 4}])
def test_steps_that_cannot_be_captured_are_not(options):
    pretended = SimpleNamespace(device=torch.device("cuda"), num_processes=1, scaler=None)
    assert TrainingStep(stage(), toy_model(), None, pretended).captures
    assert not TrainingStep(stage(**options), toy_model(), None, pretended).captures
    assert not TrainingStep(stage(ScstStage), toy_model(), None, pretended).captures
    for other in ({"num_processes": 2}, {"scaler": object()}):
        assert not TrainingStep(stage(), toy_model(), None, SimpleNamespace(**{**vars(pretended), **other})).captures


def test_gradient_caching_gives_the_loss_and_gradients_of_the_whole_batch():
    model, batch = toy_model(), toy_batch()
    whole, chunked = stage().loss(model, batch), stage(chunk_size=3).loss(model, batch)
    assert abs(whole.item() - chunked.item()) < 1e-8
    assert_same_gradients(gradients(model, stage(chunk_size=3).loss(model, batch)), gradients(model, whole))


def test_gradient_caching_encodes_chunks_and_keeps_no_activations():
    model, batch, sizes, kept = toy_model(), toy_batch(), [], []
    model.image_encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = stage(chunk_size=4).loss(model, batch)
    in_chunks_kept = sum(kept)
    assert sizes == [4, 4]
    loss.backward()
    assert sizes == [4, 4, 4, 4], "each chunk is encoded again on the way back"
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        stage().loss(model, batch)
    assert in_chunks_kept < sum(kept) / 20


def two_chunks_by_hand(model, batch):
    """The same chunks with all activations kept: what caching must replay."""
    image = torch.cat([model.encode_image(part) for part in batch.images.split(4)])
    text = torch.cat([model.encode_text(part) for part in batch.ids.split(4)])
    return contrastive_loss(image, text, model.scale(), own_captions(batch.image_of, batch.text_of))


def test_gradient_caching_replays_each_chunks_dropout(monkeypatch):
    model, batch = toy_model(dropout=0.3), toy_batch()
    model.gpt.train()
    model.image_head.train()
    torch.manual_seed(5)
    expected = gradients(model, two_chunks_by_hand(model, batch))
    torch.manual_seed(5)
    assert_same_gradients(gradients(model, stage(chunk_size=4).loss(model, batch)), expected)
    other = losses.checkpoint
    monkeypatch.setattr(losses, "checkpoint", lambda *a, **k: other(*a, **{**k, "preserve_rng_state": False}))
    torch.manual_seed(5)
    without = gradients(model, stage(chunk_size=4).loss(model, batch))
    assert any((without[name] - expected[name]).abs().max() > 1e-6 for name in expected), "the test sees dropout"


def test_gradient_caching_updates_running_statistics_once(monkeypatch):
    batch = toy_batch()
    by_hand, cached, twice = (toy_model().train() for _ in range(3))
    expected = gradients(by_hand, two_chunks_by_hand(by_hand, batch))
    assert_same_gradients(gradients(cached, stage(chunk_size=4).loss(cached, batch)), expected)

    def statistics(model):
        return {name: buffer for name, buffer in model.named_buffers() if "running" in name or "tracked" in name}

    for name, buffer in statistics(by_hand).items():
        torch.testing.assert_close(statistics(cached)[name], buffer, atol=0, rtol=0)
    assert all(module.momentum == 0.1 for module in cached.modules() if isinstance(module, torch.nn.BatchNorm2d))
    monkeypatch.setattr(losses, "running_statistics_kept", lambda model: nullcontext())
    stage(chunk_size=4).loss(twice, batch).backward()
    assert any(not torch.equal(statistics(twice)[name], buffer) for name, buffer in statistics(by_hand).items())


def test_gradient_caching_repeats_a_chunk_in_the_same_precision():
    model, batch = toy_model().float(), toy_batch()
    found = []
    for size in (0, 4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = stage(chunk_size=size).loss(model, batch)
        found.append(gradients(model, loss))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=0.02 * gradient.abs().max().item() + 1e-6, rtol=0)


def test_statistics_are_kept_only_within():
    layer = torch.nn.BatchNorm2d(2).train()
    with running_statistics_kept(layer):
        layer(torch.randn(4, 2, 3, 3))
    assert torch.equal(layer.running_mean, torch.zeros(2)) and layer.num_batches_tracked == 0
    layer(torch.randn(4, 2, 3, 3))
    assert not torch.equal(layer.running_mean, torch.zeros(2))


def test_small_inputs_are_not_cut():
    assert in_chunks(lambda x: x * 2, torch.ones(3), 0, None).tolist() == [2, 2, 2]
    assert in_chunks(lambda x: x * 2, torch.ones(3), 3, None).tolist() == [2, 2, 2]


def test_an_images_other_captions_are_no_negatives():
    """Images 7, 7, 9 with captions a b b: b of image 9 is one of image 7 too, and no negative of its rows."""
    own = own_captions(torch.tensor([7, 7, 9]), torch.tensor([0, 1, 1]))
    assert own.tolist() == [[True, True, True], [True, True, True], [False, True, True]]


def test_two_captions_of_an_image_do_not_push_each_other_away():
    model, batch = toy_model(), toy_batch(images=4, each=2)
    masked, unmasked = stage().loss(model, batch), stage(mask_duplicates=False).loss(model, batch)
    image = model.encode_image(batch.images).repeat_interleave(2, dim=0)
    logits = (model.scale() * image @ model.encode_text(batch.ids).mT).detach().numpy()
    total = 0.0
    for row in range(8):
        others = [i for i in range(8) if i // 2 != row // 2]  # negatives: captions and images of the other three
        total += np.log(np.exp(logits[row, [row, *others]]).sum()) - logits[row, row]
        total += np.log(np.exp(logits[[row, *others], row]).sum()) - logits[row, row]
    assert masked.item() == pytest.approx(total / 16, abs=1e-9)
    assert masked < unmasked - 0.1


def test_a_row_that_is_there_twice_is_no_negative_of_itself():
    """As in the shares of processes that do not divide a batch; the original's negatives are all others."""
    model, batch, rows = toy_model(), toy_batch(images=4), [0, 1, 2, 3, 0]
    twice = Batch(*(tensor[rows] for tensor in batch.tensors()))
    logits = (model.scale() * model.encode_image(batch.images) @ model.encode_text(batch.ids).mT).detach()
    total = 0.0
    for row in rows:
        for line in (logits[row], logits[:, row]):
            others = [line[other] for other in rows if other != row]
            total += torch.stack([line[row], *others]).logsumexp(0) - line[row]
    loss = stage(mask_duplicates=False).loss(model, twice)
    assert loss.item() == pytest.approx(total.item() / 10, abs=1e-9)


def test_the_originals_negatives_are_those_of_hualu():
    assert not preset("hualu").clip.mask_duplicates
    assert all(preset(name).clip.mask_duplicates for name in ("miniature", "flickr8k-small", "flickr8k"))


def test_the_temperature_ends_at_one_hundred():
    model = toy_model()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    assert model.scale().item() == pytest.approx(100)
    made, accelerator = stage(ClipStage), optimisation.accelerator("fp32")
    step = TrainingStep(made, model, accelerator.prepare_optimizer(optimisation.optimizer(model, made.stage)), accelerator)
    step(toy_batch())
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    model.scale().backward()
    assert model.logit_scale.grad != 0, "at the limit it can turn back: beyond, it would stay for ever"


def trained(settings: dict, kind=CaptionStage, steps: int = 2, plain: bool = False, **options) -> tuple[ClipCap, list]:
    """A model after some steps, and what each returned. plain: by gradient descent at rate 1, which shows the gradient."""
    model, made = toy_model(**options), stage(kind, **settings)
    accelerator = optimisation.accelerator("fp32")
    optimisation.freeze(model, made.stage.freeze)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0) if plain else optimisation.optimizer(model, made.stage)
    step = TrainingStep(made, model, accelerator.prepare_optimizer(optimizer), accelerator)
    found = []
    for turn in range(steps):
        if not plain:
            optimisation.set_learning_rate(optimizer, 1e-3)
        found.append(step(toy_batch(seed=turn)))
    return model, found


def moved(model: ClipCap, before: ClipCap) -> dict[str, float]:
    """How far the weights of each tensor moved at most."""
    old = dict(before.named_parameters())
    return {name: (p - old[name]).abs().max().item() for name, p in model.named_parameters()}


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(parts):
    (one, said), (other, told) = trained({}), trained({"accumulation": parts})
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, atol=1e-8, rtol=0, msg=name)
    assert torch.allclose(torch.stack([torch.stack(row) for row in said]), torch.stack([torch.stack(row) for row in told]))


def test_a_gradient_is_cut_to_its_largest_norm_and_its_own_is_told():
    before = toy_model()
    for largest in (0.01, 0.0):
        model, ((_, norm),) = trained({"clip_gradient": largest}, steps=1, plain=True)
        length = math.sqrt(sum(((p - q) ** 2).sum().item()
                               for p, q in zip(model.parameters(), before.parameters(), strict=True)))
        assert norm > 1 and length == pytest.approx(largest or norm.item(), rel=1e-3)


def test_the_image_encoder_has_its_own_rate_and_frozen_modules_none():
    model, _ = trained({"image_rate": 0.1, "freeze": ("conv1", "layer1"), "weight_decay": 0.0}, steps=1)
    far = moved(model, toy_model())
    assert far["gpt.transformer.h.0.mlp.c_fc.weight"] == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is the rate
    assert max(far[name] for name in far if name.startswith("image_encoder")) == pytest.approx(1e-4, rel=1e-3)
    frozen = [name for name in far if name.startswith(("image_encoder.backbone.conv1", "image_encoder.backbone.layer1"))]
    assert len(frozen) > 3 and not any(far[name] for name in frozen)
    with pytest.raises(InputError, match="freeze: the encoder resnet10t has no layer9; its modules are .*layer1"):
        optimisation.freeze(model, ["layer9"])


def test_matrices_decay_and_biases_norms_and_temperature_do_not():
    decaying, staying = (moved(trained({"weight_decay": decay}, ClipStage, steps=1)[0], toy_model()) for decay in (0.5, 0.0))
    for name, parameter in toy_model().named_parameters():
        expected = parameter.ndim >= 2 and decaying[name] > 0  # not what has no gradient at all
        assert (decaying[name] != staying[name]) == expected, name


def test_every_step_is_taken_at_the_rate_of_the_schedule(tmp_path, monkeypatch):
    rates = []

    class Noted(TrainingStep):
        def __call__(self, batch):
            rates.append([group["lr"] / group["factor"] for group in self.optimizer.param_groups])
            return super().__call__(batch)

    monkeypatch.setattr(train, "TrainingStep", Noted)
    settings = StageConfig(epochs=2, batch_size=8, learning_rate=1e-2, schedule="one-cycle", warmup=0.3, image_rate=0.5,
                           freeze=("conv1",))
    model = toy_model().float()
    model.tokenizer = TOKENIZER
    data = SimpleNamespace(steps_per_epoch=4, batches=lambda step: (toy_batch(seed=turn) for turn in range(step, 8)))
    config = replace(preset("miniature"), precision="fp32", language=settings)
    train.fit(LanguageStage(config, None), model, data, config, tmp_path / "run", {"seed": 1, "fingerprint": "a"},
              lambda line: None)
    assert rates == [pytest.approx([learning_rate(settings, step, 8)] * len(rates[0])) for step in range(8)]
    assert len({row[0] for row in rates}) > 4
    learning = [name for name, p in model.image_encoder.backbone.named_parameters() if p.requires_grad]
    assert learning[0] == "bn1.weight" and not any(name.startswith("conv1") for name in learning)


def fitted(folder, kind=LanguageStage, seed=1, **settings):
    """Two epochs of four steps on toy batches, each judged by `kind` -> the folder."""
    model = toy_model().float()
    model.tokenizer = TOKENIZER
    data = SimpleNamespace(steps_per_epoch=4, batches=lambda step: (toy_batch(seed=turn) for turn in range(step, 8)))
    config = replace(preset("miniature"), precision="fp32", language=StageConfig(epochs=2, batch_size=8, **settings))
    return train.fit(kind(config, None), model, data, config, folder, {"seed": seed, "fingerprint": "a"}, lambda line: None)


def judge(*scores):
    """A stage whose epochs get these scores; it notes the model that each was for, its weights, and the best one's."""
    class Judge(LanguageStage):
        best_by, models, weights, best, left = "score", [], [], [], list(scores)

        def validate(self, model):
            self.models.append(model)
            self.weights.append(copy.deepcopy(model.state_dict()))
            return {"score": self.left.pop(0)}

        def before(self, model):
            return {"score": 0.0}

        def after(self, best, before):
            self.best.append(best)
            return {}

    return Judge


def same(found, expected) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("scores, best", [((3.0, 2.0), 0), ((2.0, 3.0), 1), ((2.0, 2.0), 1)])
def test_the_checkpoint_of_the_highest_score_is_kept_and_is_what_is_judged_at_the_end(tmp_path, scores, best):
    kind = judge(*scores)
    folder = fitted(tmp_path / "run", kind)
    about, weights = checkpoint.about(folder / "best"), load_file(folder / "best" / "model.safetensors")
    assert (about["step"], about["best"], about["validation"]) == (4 + 4 * best, max(scores), {"score": max(scores)})
    assert not same(weights, kind.weights[1 - best]) and same(weights, kind.weights[best])
    assert same(kind.best[0].state_dict(), kind.weights[best]), "and not the last one"
    assert same(load_file(folder / "last" / "model.safetensors"), kind.weights[1])


def test_a_run_that_goes_on_remembers_its_best(tmp_path, monkeypatch):
    class Cut(TrainingStep):
        def __call__(self, batch):
            if epochs.left == [2.0]:  # in the second epoch
                raise KeyboardInterrupt
            return super().__call__(batch)

    epochs = judge(3.0, 2.0)
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(train, "TrainingStep", Cut)
        fitted(tmp_path / "run", epochs)
    folder = fitted(tmp_path / "run", epochs)
    assert epochs.left == [] and checkpoint.about(folder / "best")["step"] == 4
    assert json.loads((folder / "done.json").read_text())["best"] == 3.0


def test_averaged_weights_are_what_is_validated_and_kept_as_best(tmp_path, monkeypatch):
    made, kind = [], judge(3.0, 2.0)
    monkeypatch.setattr(train, "Average", lambda *a: made.append((Average(*a), a[0])) or made[0][0])
    folder = fitted(tmp_path / "run", kind, average=0.9)
    (average, model), = made
    assert [one is average.model for one in kind.models] == [True, True]
    assert same(load_file(folder / "best" / "model.safetensors"), kind.weights[0])
    last = load_file(folder / "last" / "model.safetensors")
    assert same(last, average.model.state_dict()) and not same(last, model.state_dict())


def test_each_steps_dropout_comes_from_seed_and_step(tmp_path, monkeypatch):
    seeds = []

    class Noted(TrainingStep):
        def __call__(self, batch):
            seeds.append(torch.initial_seed())
            return super().__call__(batch)

    monkeypatch.setattr(train, "TrainingStep", Noted)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        fitted(tmp_path / name, seed=seed)
    assert seeds[:8] == seeds[8:16] and len(set(seeds)) == 16, "of eight steps each"


def test_first_weights_come_from_the_seed():
    config = replace(preset("miniature"), model=TOY, max_length=8)
    one, again, two = (train.new_model(config, TOKENIZER, seed).state_dict() for seed in (1, 1, 2))
    assert same(one, again)
    for name in ("gpt.transformer.wte.weight", "image_encoder.backbone.layer4.0.conv1.weight", "image_head.mix.weight"):
        assert not torch.equal(one[name], two[name]), name


def test_a_steps_gradient_is_that_of_its_own_batch():
    after_one, _ = trained({}, steps=1, plain=True)
    expected = gradients(after_one, stage(CaptionStage).loss(after_one, toy_batch(seed=1)))
    _, (_, (_, norm)) = trained({}, steps=2, plain=True)
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in expected.values())), rel=1e-6)


def test_a_step_computes_in_the_precision_of_its_accelerator():
    kinds = []
    for precision in ("bf16", "fp32"):
        model, accelerator = toy_model().float(), optimisation.accelerator(precision)
        model.text_head.project.register_forward_hook(lambda *arguments: kinds.append(arguments[2].dtype))
        TrainingStep(stage(), model, torch.optim.SGD(model.parameters()), accelerator)(toy_batch())
    assert kinds == [torch.bfloat16, torch.float32]


def test_similarities_are_not_rounded_to_bf16():
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(16, 32), dim=-1) for _ in range(2))
    expected = contrastive_loss(image, text, torch.tensor(100.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, torch.tensor(100.0)), expected)


def test_smoothed_labels_share_with_all_of_the_vocabulary():
    logits, targets = torch.randn(2, 3, VOCABULARY).double(), torch.tensor([[4, 3, 0], [5, 6, 3]])
    values, total = logits.log_softmax(-1), 0.0
    for row, place in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):  # not the pad
        total -= 0.8 * values[row, place, targets[row, place]] + 0.2 * values[row, place].mean()
    assert caption_loss(logits, targets, 0, 0.2).item() == pytest.approx(total.item() / 2, abs=1e-9)
    model, batch = toy_model(), toy_batch()
    logits = model.caption_logits(model.prefix(batch.images), batch.ids[:, :-1])
    assert torch.equal(stage(CaptionStage, label_smoothing=0.2).loss(model, batch),
                       caption_loss(logits, batch.ids[:, 1:], 0, 0.2))


def test_fp16_is_for_gpus():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        optimisation.accelerator("fp16")


def test_a_stage_that_others_need_is_not_skipped():
    for name in ("clip", "caption"):
        with pytest.raises(InputError, match="at least one epoch"):
            replace(preset("miniature"), **{name: StageConfig(epochs=0)})


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(parts):
    model, batch, captioning = toy_model(), toy_batch(images=8, each=2), stage(CaptionStage, label_smoothing=0.1)
    expected = gradients(model, captioning.loss(model, batch))
    model.zero_grad()
    pieces = list(batch.parts(parts))
    for part in pieces:
        (captioning.loss(model, part) * (len(part.images) / 8)).backward()
    assert len(pieces) == parts and sum(len(part.ids) for part in pieces) == 16
    assert all(torch.equal(part.image_of.unique(), part.image_of[::2]) for part in pieces)
    assert_same_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


def test_a_contrastive_term_reaches_the_text_head_beside_the_caption_loss():
    model, batch = toy_model(), toy_batch(images=4, each=2)
    alone, term = stage(CaptionStage).loss(model, batch), stage(ClipStage).loss(model, batch)
    both = stage(CaptionStage, contrastive=0.3).loss(model, batch)
    assert both.item() == pytest.approx(alone.item() + 0.3 * term.item(), abs=1e-9)
    assert "text_head.mix.weight" in gradients(model, both)
    assert "text_head.mix.weight" not in gradients(model, stage(CaptionStage).loss(model, batch))


def test_the_average_covers_weights_and_buffers_and_averages_tied_weights_once():
    model = toy_model()
    average, plain = Average(model, 0.9), {name: t.clone() for name, t in model.state_dict().items()}
    for step in range(1, 40):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(step if tensor.is_floating_point() else 1)
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                plain[name] = decay * plain[name] + (1 - decay) * tensor
            else:
                plain[name] = tensor.clone()
        # tied: both names are one tensor
        assert average.model.gpt.lm_head.weight is average.model.gpt.transformer.wte.weight
    found = average.model.state_dict()
    assert any("running_mean" in name for name in found)
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())


def test_schedules_rise_and_fall_as_they_say():
    def rates(schedule):
        settings = StageConfig(epochs=1, learning_rate=1.0, schedule=schedule, warmup=0.1)
        return [learning_rate(settings, step, 100) for step in range(100)]

    for schedule in ("constant", "halving", "cosine", "one-cycle"):
        assert rates(schedule)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert rates(schedule)[10] == 1.0
    assert [rates("halving")[i] for i in (69, 70, 89, 90, 99)] == [1, 0.5, 0.5, 0.25, 0.25]
    assert rates("cosine")[55] == pytest.approx(0.55) and rates("cosine")[99] == pytest.approx(0.1, abs=1e-3)
    assert rates("one-cycle")[55] == pytest.approx(0.5) and rates("one-cycle")[99] == pytest.approx(0, abs=1e-3)
    with pytest.raises(InputError, match="unknown schedule 'step'; choose from constant, halving, cosine, one-cycle"):
        StageConfig(epochs=1, schedule="step")


@pytest.mark.parametrize("options", [{"accumulation": 0}, {"accumulation": 200}, {"chunk_size": -1}, {"average": 1.0},
                                     {"contrastive": -0.1}, {"clip_gradient": -1}, {"learning_rate": -1}, {"image_rate": -1},
                                     {"weight_decay": -1}, {"label_smoothing": -1}, {"label_smoothing": 2}, {"visits": 1.5},
                                     {"accumulation": 2.5}, {"epochs": 1.5}, {"batch_size": 8.0}])
def test_settings_of_training_are_checked(options):
    with pytest.raises(InputError):
        StageConfig(**{"epochs": 1, **options})


def test_settings_that_would_train_on_nothing_are_refused():
    for parts in (8, 5):
        with pytest.raises(InputError, match="a part has one image and no negatives; for memory, take chunk_size"):
            replace(preset("miniature"), clip=StageConfig(epochs=1, batch_size=8, accumulation=parts))
    with pytest.raises(InputError, match="validation_images must be positive"):
        replace(preset("miniature"), validation_images=0)
    assert StageConfig(epochs=1, freeze="layer1").freeze == ("layer1",)


@pytest.mark.parametrize("shapes, words", [
    ({"encoder": "resnet9999"}, "timm cannot make it"),
    ({"encoder": "resnet10t", "encoder_options": {"nonsense": 1}}, "timm cannot make it"),
    ({"encoder": "vit_tiny_patch16_224", "encoder_options": {}, "image_size": 32}, "takes encoder_options .'img_size': 32")])
def test_an_encoder_that_cannot_be_had_is_one_sentence(shapes, words):
    with pytest.raises(InputError, match=words):
        ClipCap(replace(toy_model().config, **{"image_tokens": "pooled", **shapes}))


def test_two_seeds_in_one_folder_train_one_after_the_other_and_a_captioner_says_whose_clip_it_begins_from(
        tmp_path, monkeypatch, capsys):
    from clipcap_lib import data

    (tmp_path / "miniature" / "data").mkdir(parents=True)
    (tmp_path / "miniature" / "data" / "manifest.json").write_text("{}")
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path))
    monkeypatch.setattr(data, "check_without", lambda *_: None)
    done = []

    def clip(config, run, seed, *_, **__):
        time.sleep(0.2)
        done.append(seed)

    def captioner(config, run, name, seed, *_, **__):
        time.sleep(0.2)
        done.append(seed)
        return run

    monkeypatch.setattr(train, "pretrain_clip", clip)
    monkeypatch.setattr(train, "finetune_captioner", captioner)
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(lambda seed: cli.main(["train", "--seed", str(seed)]), (1, 2)))
    assert codes == [0, 0] and done in ([1, 1, 2, 2], [2, 2, 1, 1]), "no other seed's CLIP came between"

    best = tmp_path / "miniature" / "clip" / "all" / "best"
    best.mkdir(parents=True)
    (best / "model.safetensors").touch()
    (best / "config.json").write_text('{"seed": 2}')
    for seed, told in ((1, True), (2, False)):
        capsys.readouterr()
        assert cli.main(["train", "--stage", "caption", "--seed", str(seed)]) == 0
        assert ("begins from the CLIP of seed 2" in capsys.readouterr().out) == told


@pytest.mark.parametrize("flags, words", [
    (["--seed", "-1"], "--seed -1: give a whole number from 0 to 4294967295"), (["--seed", str(2**32)], "--seed 4294967296"),
    (["--name", "../x"], "--name '../x': no plain name"), (["--name", ""], "--name '': no plain name"),
    (["--clip", "somewhere"], "--clip somewhere is what a captioner starts from; give --stage caption"),
    (["--clip", "somewhere", "--stage", "clip"], "give --stage caption")])
def test_a_training_that_could_not_go_on_is_refused_before_anything_is_prepared(tmp_path, monkeypatch, capsys, flags, words):
    def never(*_):
        raise AssertionError("prepared")

    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path))
    monkeypatch.setattr(cli, "_prepare", never)
    assert cli.main(["train", *flags]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_first_bad_step_is_named_and_overflow_under_fp16_is_not_one():
    from accelerate import Accelerator

    run = object.__new__(train._Run)
    run.accelerator, run.folder = Accelerator(cpu=True), "there"
    good = [torch.tensor(1.0)] * 4
    assert run.check(20, good, good) == (1.0, 1.0)
    broken = [torch.tensor(v) for v in (1.0, 2.0, math.inf, math.nan)]
    with pytest.raises(InputError, match="the gradient of step 19 is inf"):
        run.check(20, good, broken)
    with pytest.raises(InputError, match="the loss of step 19 is inf"):
        run.check(20, broken, broken)
    bad = [torch.tensor(math.nan)] * 4
    try:
        for scale, faulty in ((1024.0, False), (0.5, True)):  # it falls as long as gradients overflow
            run.accelerator.scaler = SimpleNamespace(get_scale=lambda scale=scale: scale)
            assert run.check(20, good, broken) == (1.0, 1.5), "the mean of the steps that were taken"
            with pytest.raises(InputError, match="the gradient of step 17 is nan") if faulty else nullcontext():
                assert run.check(20, good, bad) == (1.0, None)
    finally:
        run.accelerator.scaler = None


def test_a_lost_retrieval_is_said(monkeypatch):
    from clipcap_lib import stages

    captioning = stage(CaptionStage)
    captioning.validation = [None] * 300
    before = {"image->text R@1": 40.0, "text->image R@1": 38.0}
    for left, warns in ((5.0, True), (25.0, False)):
        monkeypatch.setattr(stages, "retrieval", lambda *_, left=left: dict.fromkeys(before, left))
        said = captioning.after(None, before)
        assert ("warning" in said) == warns and said["retrieval"]["after"]["image->text R@1"] == left
    monkeypatch.setattr(stages, "retrieval", lambda *_: dict.fromkeys(before, 0.1))
    assert "warning" not in captioning.after(None, dict.fromkeys(before, 0.4)), "chance level has nothing to lose"


def test_batches_move_and_are_cut_with_all_they_hold():
    batch = toy_batch(images=5, each=2)
    for name in ("images", "ids", "image_of", "text_of"):
        assert torch.equal(torch.cat([getattr(part, name) for part in batch.parts(3)]), getattr(batch, name))
    assert torch.equal(batch.to(torch.device("cpu")).text_of, batch.text_of)


def test_the_journal_is_cut_back_to_the_step_a_run_goes_on_from(tmp_path):
    from clipcap_lib.journal import Journal

    journal = Journal(tmp_path, 0)
    for step in (10, 20, 30):
        journal.write({"step": step, "loss": 1.0, "samples": {"a.jpg": "两只猫"}})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('\0\0\0\n[]\n{"loss": 1}\n{"step": 40, "lo')  # what a power failure leaves, and killed here
    Journal(tmp_path, 20).write({"step": 30, "loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_a_disk_that_is_full_ends_in_one_sentence(tmp_path):
    from clipcap_lib.journal import Journal

    journal = Journal(tmp_path, 0)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="metrics.jsonl: cannot be written.*make room"):
        journal.write({"step": 10, "loss": 1.0})


def test_the_board_gets_curves_and_samples(tmp_path, monkeypatch):
    from clipcap_lib import journal

    class Board:
        def __init__(self):
            self.said = []

        def __getattr__(self, name):
            return lambda *arguments: self.said.append((name, *arguments))

    board = Board()
    monkeypatch.setattr(journal, "_board", lambda folder, step: board)
    opened = journal.Journal(tmp_path, 0)
    opened.write({"step": 10, "loss": 1.5, "learning_rate": 0.1, "validation": {"CIDEr": 30.0}, "samples": {"a.jpg": "猫"}})
    opened.close()
    assert board.said == [("add_scalar", "train/loss", 1.5, 10), ("add_scalar", "train/learning_rate", 0.1, 10),
                          ("add_scalar", "validation/CIDEr", 30.0, 10), ("add_text", "samples/a.jpg", "猫", 10), ("close",)]


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is optional: pip install -e .[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from clipcap_lib.journal import Journal

    opened = Journal(tmp_path, 0)
    opened.write({"step": 10, "loss": 1.5, "validation": {"CIDEr": 30.0}})
    opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("validation/CIDEr")] == [(10, 30.0)]


def test_copies_of_a_model_train_apart_from_its_average():
    model = toy_model()
    average, kept = Average(model, 0.5), copy.deepcopy(model)
    with torch.no_grad():
        model.image_head.mix.weight.add_(1)
    assert torch.equal(average.model.image_head.mix.weight, kept.image_head.mix.weight)
    assert not torch.equal(model.image_head.mix.weight, kept.image_head.mix.weight)


def test_the_sum_of_recalls_chooses_and_not_the_ranks(monkeypatch):
    from clipcap_lib import metrics, stages

    similarity = np.random.default_rng(0).normal(size=(30, 30)) + 2 * np.eye(30)
    found = metrics.recall_at_k(similarity, np.arange(30))
    monkeypatch.setattr(stages, "retrieval", lambda *_: found)
    judged = ClipStage(preset("miniature"), None).validate(None)
    assert judged[ClipStage.best_by] == pytest.approx(
        sum(found[f"{way} R@{k}"] for way in ("image->text", "text->image") for k in (1, 5, 10)))
    assert sum(found.values()) > judged[ClipStage.best_by] + 1, "there are ranks to be left out"
    assert {**found, "recall_sum": judged["recall_sum"]} == judged


def test_validation_is_cider_of_greedy_captions_against_all_references(monkeypatch):
    from clipcap_lib import decode, metrics

    truth = [["一只狗在跑", "狗在草地上跑"], ["两只猫睡觉", "猫在睡觉"], ["红色的汽车", "一辆红汽车"],
             ["女孩在笑", "一个女孩笑了"]]
    said, asked = ["狗在草地上跑", "两只猫", "汽车在跑", "汽车在跑"], []

    def caption(stepper, tokenizer, images, *rest, **options):
        asked.append((rest, options))
        return [said[image] for image in images]

    monkeypatch.setattr(decode, "caption", caption)
    rows = datasets.Dataset.from_dict({"captions": truth, "file_name": ["a", "b", "c", "d"], "image": [0, 1, 2, 3]})
    config = replace(preset("miniature"), max_length=9)
    found = CaptionStage(config, rows).validate(SimpleNamespace(tokenizer=None))
    files = rows["file_name"][:]
    scored = metrics.score({file: [text] for file, text in zip(files, said, strict=True)},
                           dict(zip(files, truth, strict=True)), "characters", "CIDEr")
    assert found["CIDEr"] == pytest.approx(scored.values["CIDEr"]) and found["CIDEr"] > 10
    assert found["distinct"] == 3 and found["samples"] == dict(zip(files, said, strict=True))
    assert asked == [((), {"max_length": 9})]


def drawn(captions, seed=1, by_length=True, stage=None, **options) -> TrainingData:
    """Training data of these captions, one list an image, without pixels. options: of Config."""
    tokenizer = build_tokenizer(build_vocabulary(caption for row in captions for caption in row))
    config = replace(preset("miniature"), **options)
    return TrainingData(datasets.Dataset.from_dict({"captions": captions}), tokenizer, config,
                        stage or StageConfig(epochs=1, batch_size=2), seed, images=False, by_length=by_length)


def square(size: int, stored: int, **options) -> dict:
    """Settings that cut `size` pixels a side from `stored`."""
    model = replace(preset("miniature").model, image_size=size)
    return {"model": model, "train_resize": stored, "stored_size": stored, "colour_jitter": 0.0, **options}


PLACES = torch.stack([torch.arange(40).expand(40, 40), torch.arange(40)[:, None].expand(40, 40),
                      torch.zeros(40, 40)]).to(torch.uint8)  # a pixel's colour is its column and its row


def test_half_of_the_images_are_mirrored_but_none_whose_captions_say_left_or_right():
    settings = square(40, 40, smallest_crop=1.0, horizontal_flip=True)
    captions = [["狗", "猫在左边"], ["在右边的狗", "猫"], ["狗", "猫"]]
    for flip in (True, False):
        data, shares = drawn(captions, **{**settings, "horizontal_flip": flip}), []
        for image in range(3):
            shown = [data._augmented((epoch, 0, image), PLACES) for epoch in range(100)]
            mirrored = [torch.equal(one, PLACES.flip(-1)) for one in shown]
            assert all(other or torch.equal(one, PLACES) for one, other in zip(shown, mirrored, strict=True))
            shares.append(sum(mirrored))
        assert shares[:2] == [0, 0] and (35 < shares[2] < 65 if flip else shares[2] == 0)


def test_crops_without_resizing_lie_anywhere_and_are_a_samples_own():
    data = drawn([["狗"]] * 400, **square(37, 40, smallest_crop=1.0, horizontal_flip=False))
    crops = [data._augmented((0, 0, image), PLACES) for image in range(400)]
    corners = {tuple(crop[:2, 0, 0].tolist()) for crop in crops}
    assert corners == {(left, top) for left in range(4) for top in range(4)}
    for crop in crops[:20]:
        left, top = crop[:2, 0, 0].tolist()
        assert torch.equal(crop, PLACES[:, top:top + 37, left:left + 37])
    settings = square(20, 40, smallest_crop=0.3, colour_jitter=0.3)
    one, other = (drawn([["狗"]] * 2, seed=seed, **settings) for seed in (1, 2))
    shown = [one._augmented(sample, PLACES) for sample in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    shown.append(other._augmented((0, 0, 0), PLACES))
    assert torch.equal(one._augmented((0, 0, 0), PLACES), shown[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(shown) for b in shown[:i]), "seed, epoch, visit, image"


def test_all_captions_of_an_image_are_shown_before_any_comes_again():
    captions = [[chr(0x4E00 + 5 * image + i) for i in range(5)] for image in range(40)]
    twice = StageConfig(epochs=5, batch_size=8, visits=2, captions_per_visit=1)
    orders = {}
    for seed in (1, 2):
        data = drawn(captions, seed, stage=twice)
        shown = np.array([[data.captions((epoch, visit, image))[0] - 5 * image for epoch in range(5) for visit in range(2)]
                          for image in range(40)])
        assert (np.sort(shown.reshape(40, 2, 5)) == np.arange(5)).all()
        orders[seed, 0], orders[seed, 1] = shown[:, :5], shown[:, 5:]
    for key, order in orders.items():
        assert len({tuple(row) for row in order.tolist()}) > 20, "of 120, for 40 images"
        assert all((order != other).any(axis=1).sum() > 30 for place, other in orders.items() if place != key)


def test_batches_and_their_order_are_of_the_seed_and_the_epoch():
    captions = [["狗" * (1 + image)] for image in range(20)]  # of different lengths

    def epochs(by_length: bool) -> list[list[tuple[int, ...]]]:
        return [[tuple(image for *_, image in batch) for batch in data.epoch_batches(epoch)]
                for data in (drawn(captions, seed, by_length) for seed in (1, 2)) for epoch in (0, 1)]

    for order in epochs(True):  # the same batches each time, in another order
        assert sorted(order) == [(i, i + 1) for i in range(0, 20, 2)] != order
    assert len(set(map(tuple, epochs(True)))) == 4
    for order in epochs(False):
        assert sorted(image for batch in order for image in batch) == list(range(20))
    assert len({frozenset(map(frozenset, order)) for order in epochs(False)}) == 4, "other images side by side"
    two = drawn(captions, by_length=False, stage=StageConfig(epochs=1, batch_size=2, visits=2)).epoch_batches(0)
    sides = [{frozenset(image for *_, image in batch) for batch in two if batch[0][1] == visit} for visit in (0, 1)]
    assert len(two) == 20 and sides[0] != sides[1]
