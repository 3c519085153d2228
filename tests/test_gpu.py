"""What only a GPU can show: steps that do not wait for it, and captured graphs that write what the plain model writes."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from clipcap_lib import captioner as captioner_module
from clipcap_lib import decode, optimisation
from clipcap_lib.captioner import Captioner
from clipcap_lib.config import ModelConfig, preset
from clipcap_lib.data import Batch
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.graphs import Graph
from clipcap_lib.model import ClipCap
from clipcap_lib.optimisation import TrainingStep
from clipcap_lib.stages import STAGES
from clipcap_lib.tokenizer import SPECIAL_TOKENS, build_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

SHAPE = ModelConfig(encoder="resnet10t", image_size=64, image_tokens="grid", vocab_size=60, layers=2, width=64, heads=4,
                    context=24, dropout=0.0, initializer_range=0.4)


@pytest.fixture(scope="module")
def model() -> ClipCap:
    """Random weights that write different tokens; in float64, so that another order of sums changes no choice."""
    torch.manual_seed(0)
    return ClipCap(SHAPE).double().cuda().eval()


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, SHAPE.image_size, SHAPE.image_size), dtype=torch.uint8, generator=random)


def test_a_graph_that_was_made_in_inference_mode_is_called_outside_of_it():
    with torch.inference_mode():
        double = Graph(lambda numbers: 2 * numbers, torch.ones(3, device="cuda"))
    assert double(torch.full((3,), 4.0)).tolist() == [8.0] * 3


def stage_of(name: str, tokens: str = "grid", dropout: float = 0.1):
    config = replace(preset("flickr8k"), max_length=16, model=replace(SHAPE, image_tokens=tokens, dropout=dropout))
    torch.manual_seed(0)
    model = ClipCap(config.model).cuda().train()
    tokenizer = build_tokenizer([*SPECIAL_TOKENS, *map(chr, range(0x4E00, 0x4E00 + SHAPE.vocab_size - len(SPECIAL_TOKENS)))])
    captions = {"captions": [["一", "丁"], ["七", "丁"], ["一", "丂"]]}  # for the image stage: of two classes, two colours
    stage = STAGES[name](config, captions, tokenizer, captions)
    accelerator = optimisation.accelerator("auto")
    optimizer = accelerator.prepare_optimizer(optimisation.optimizer(model, stage.stage))
    return model, TrainingStep(stage, model, optimizer, accelerator)


def batch_of(length: int = 16, seed: int = 0, each: int = 5) -> Batch:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 60, (8 * each, length), generator=random)
    ids[:, 0], ids[:, -1] = 2, 3
    if each == 2:  # labels, each a character: a class 一 or 七, a colour 丁 or 丂
        labels = torch.tensor([4, 7, 5, 6]).view(2, 2)[torch.arange(16) % 2]
        ids[:, 1] = labels.gather(1, torch.randint(2, (16, 1), generator=random))[:, 0]
        ids[:, 2], ids[:, 3:] = 3, 0
    return Batch(pixels(8, seed), ids, torch.arange(8 * each) // each, torch.arange(8 * each)).pin_memory()


def captions_of(name: str) -> int:
    """Captions an image in a batch of the stage."""
    return 2 if name == "image" else 5


@pytest.mark.parametrize("name", ["image", "language", "clip", "caption"])
@pytest.mark.parametrize("tokens", ["pooled", "grid"])
def test_a_training_step_never_waits_for_the_gpu(name, tokens):
    _, step = stage_of(name, tokens)
    batch = batch_of(each=captions_of(name))
    for turn in range(6):
        torch.cuda.synchronize()
        # libraries may wait on their first calls, and so does capturing
        may_wait = turn in (0, TrainingStep.WARM)
        torch.cuda.set_sync_debug_mode("default" if may_wait else "error")
        try:
            optimisation.set_learning_rate(step.optimizer, 1e-4 * turn)
            loss, norm = step(batch.to(step.accelerator.device))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(step.graphs) == 1 and math.isfinite(loss.item()) and norm.item() > 0


@pytest.mark.parametrize("name", ["image", "language", "clip", "caption"])
def test_captured_steps_train_like_plain_ones(name):
    """Of two shapes in turn, at rates that change, without dropout; bf16 and the order of sums leave a little."""
    found = []
    for captures in (True, False):
        model, step = stage_of(name, dropout=0.0)
        step.captures &= captures
        losses = []
        for turn in range(12):
            optimisation.set_learning_rate(step.optimizer, 3e-3 / (1 + turn))
            batch = batch_of(16 if turn % 2 else 24, turn, captions_of(name))
            losses.append(step(batch.to(step.accelerator.device))[0])
        assert len(step.graphs) == 2 * captures
        found.append((torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])))
    (losses, weights), (expected, plain) = found
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)
    model, _ = stage_of(name, dropout=0.0)
    began = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (weights - plain).norm() < 0.1 * (plain - began).norm()


def test_captured_steps_draw_new_dropout_by_the_seed():
    _, step = stage_of("language", dropout=0.5)
    optimisation.set_learning_rate(step.optimizer, 0.0)  # the weights stay: losses differ by dropout alone
    batch, losses = batch_of(), []
    for seed in (1, 1, 1, 2, 1, 2):
        torch.manual_seed(seed)
        losses.append(step(batch.to(step.accelerator.device))[0].item())
    assert len(step.graphs) == 1 and losses[2] == losses[4] != losses[3] == losses[5]


WAYS = {"greedy": {}, "beams": {"beam_size": 3, "n_best": 3}, "diverse beams": {"beam_size": 4, "groups": 2, "n_best": 4},
        "samples": {"temperature": 1.0, "n_best": 3, "top_k": 20}}


@pytest.mark.parametrize(("reach", "compiled"), [(8, False), (32, False), (32, True)])
@pytest.mark.parametrize("way", WAYS)
def test_graphs_write_what_the_plain_model_writes(model, way, reach, compiled, monkeypatch):
    """reach 8: steps read more and more of the memory; 32 is more than there is."""
    monkeypatch.setattr(captioner_module, "REACH", reach)
    captioner, options = Captioner(model, compiled=compiled), decode.Options(max_length=16, **WAYS[way])
    for count in (5, 1, 37, 1, 12):  # more rows than before, then fewer
        images = pixels(count, seed=count)
        expected, found = (decode.search(stepper, images, options) for stepper in (model, captioner))
        assert [[one.tokens for one in row] for row in found] == [[one.tokens for one in row] for row in expected]
        assert [one.score for row in found for one in row] == pytest.approx([one.score for row in expected for one in row])
    assert len({one.tokens for row in expected for one in row}) > 5


def test_an_ensemble_of_graphs_writes_what_the_plain_one_writes(model):
    torch.manual_seed(1)
    other = ClipCap(replace(SHAPE, layers=1, width=32)).double().cuda().eval()
    images, options = pixels(20), decode.Options(beam_size=3, max_length=16)
    expected, found = (decode.search(Ensemble([make(model), make(other)], [0.6, 0.4]), images, options)
                       for make in (copy.copy, Captioner))
    assert [row[0].tokens for row in found] == [row[0].tokens for row in expected]


def test_keys_and_values_stay_where_they_are(model):
    captioner = Captioner(model)
    places = set()
    for count in (12, 3, 12, 7):
        state, logits = captioner.start(pixels(count))
        for _ in range(4):
            captioner.reorder(state, torch.arange(count, device="cuda").flip(0))
            logits = captioner.step(state, logits.argmax(-1))
            places.add(state.memory.data_ptr())
    assert len(places) == 1


def test_a_compiled_encoder_trains_like_the_plain_one():
    torch.manual_seed(0)
    plain = ClipCap(SHAPE).cuda().train()
    compiled = copy.deepcopy(plain)
    compiled.image_encoder.compile_for(8)
    size, run = compiled.image_encoder.compiled
    sizes: list[int] = []
    compiled.image_encoder.compiled = size, lambda images: sizes.append(len(images)) or run(images)
    for count in (8, 3):
        outputs = [one.encode_image(pixels(count).cuda()) for one in (plain, compiled)]
        torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-3)
        for one in outputs:
            one[:, 0].sum().backward()
    assert sizes == [8], "only batches of the size that it was compiled for"
    mine, theirs = (torch.cat([p.grad.flatten() for p in one.image_encoder.parameters()]) for one in (plain, compiled))
    assert (mine - theirs).norm() < 0.02 * mine.norm()
    mine, theirs = (one.image_encoder.backbone.bn1.running_mean for one in (plain, compiled))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    compiled.eval().encode_image(pixels(8).cuda())
    assert sizes == [8], "and only in training"
