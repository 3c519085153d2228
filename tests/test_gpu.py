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
from clipcap_lib.model import ClipCap
from clipcap_lib.optimisation import parameter_groups
from clipcap_lib.stages import STAGES

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


@pytest.mark.parametrize("name", ["clip", "caption", "language"])
@pytest.mark.parametrize("tokens", ["pooled", "grid"])
def test_a_training_step_never_waits_for_the_gpu(name, tokens):
    config = replace(preset("flickr8k"), max_length=16, model=replace(SHAPE, image_tokens=tokens, dropout=0.1))
    model = ClipCap(config.model).cuda().train()
    stage = STAGES[name](config, {"captions": [["一"]]})
    accelerator = optimisation.accelerator("auto")
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(parameter_groups(model, stage.stage), fused=True))
    ids = torch.randint(4, 60, (8 * 5, 16))
    ids[:, 0], ids[:, -1] = 2, 3
    batch = Batch(pixels(8), ids, torch.arange(40) // 5, torch.arange(40)).pin_memory()
    for turn in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if turn else "default")  # libraries may wait on their first calls
        try:
            moved = batch.to(accelerator.device)
            with accelerator.autocast():
                loss = stage.loss(model, moved)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.item())


WAYS = {"greedy": {}, "beams": {"beam_size": 3, "n_best": 3}, "diverse beams": {"beam_size": 4, "groups": 2, "n_best": 4},
        "samples": {"temperature": 1.0, "n_best": 3, "top_k": 20}}


@pytest.mark.parametrize("reach", [8, 32])
@pytest.mark.parametrize("way", WAYS)
def test_graphs_write_what_the_plain_model_writes(model, way, reach, monkeypatch):
    """reach 8: steps read more and more of the memory; 32 is more than there is."""
    monkeypatch.setattr(captioner_module, "REACH", reach)
    captioner, options = Captioner(model), decode.Options(max_length=16, **WAYS[way])
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
