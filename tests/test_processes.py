"""Several processes that train one model, with gloo on a CPU: loss and gradients of one, and only one of them writes."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
from test_pipeline import IMAGES, toy
from test_training import stage, toy_batch, toy_model

from clipcap_lib import checkpoint, optimisation, processes, train
from clipcap_lib.config import InputError
from clipcap_lib.corpora import miniature
from clipcap_lib.data import Batch, TrainingData, load_prepared
from clipcap_lib.files import read_json
from clipcap_lib.prepare import prepare
from clipcap_lib.stages import CaptionStage, ClipStage
from clipcap_lib.tokenizer import load_tokenizer

STAGES = {"clip": (ClipStage, {}), "clip in chunks": (ClipStage, {"chunk_size": 2}),
          "caption and contrastive": (CaptionStage, {"contrastive": 0.5})}


def two_steps(share) -> dict[str, torch.Tensor]:
    """The weights after two steps of CLIP, of which this process takes its share."""
    model, made, accelerator = toy_model(), stage(), optimisation.accelerator("fp32")
    optimizer = accelerator.prepare_optimizer(optimisation.optimizer(model, made.stage))
    step = optimisation.TrainingStep(made, model, optimizer, accelerator)
    for seed in (1, 2):
        step(share(toy_batch(seed=seed)))
    return model.state_dict()


def steps_and_a_training(folder, config, run, progress):
    """In each of two processes: loss and gradients of its half of the batch -> <folder>/<stage>-<process>.pt; then CLIP.

    One function, because starting processes takes longer than all that they do.
    """
    processes.start()
    each = 4
    rows = slice(processes.rank() * each, (processes.rank() + 1) * each)
    whole = toy_batch()
    half = Batch(whole.images[rows], whole.ids[rows], whole.image_of[rows], whole.text_of[rows])
    for name, (kind, options) in STAGES.items():
        model = toy_model()
        loss = stage(kind, **options).loss(model, half)
        loss.backward()
        processes.average_gradients(model.parameters())
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": loss.detach(), "gradients": found}, folder / f"{name}-{processes.rank()}.pt")
    with torch.no_grad():
        model.image_encoder.backbone.bn1.running_mean.fill_(float(processes.rank()))
    judged = object.__new__(train._Run)  # the weights, and their moving average, which is what is kept
    judged.model, judged.averaged = model, copy.deepcopy(model)
    judged._share_statistics()
    progress({"rank": processes.rank(), "means": [one.image_encoder.backbone.bn1.running_mean[0].item()
                                                  for one in (judged.model, judged.averaged)]})
    torch.save(two_steps(lambda batch: Batch(*(tensor[rows] for tensor in batch.tensors()))),
               folder / f"steps-{processes.rank()}.pt")
    return processes.count(), train.pretrain_clip(config, run, seed=2, progress=progress)


@pytest.fixture(scope="module", autouse=True)
def forked():
    """Processes fork from one that has imported everything: starting Python takes each of them longer than its work.

    The test of torchrun starts them from nothing.
    """
    set_forkserver_preload(["clipcap_lib.train", "datasets"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "START", "forkserver")
        yield


def finds_nothing(progress):
    processes.start()
    raise InputError("this process found nothing")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Prepared data of 56 training images."""
    corpora = miniature.write_corpora(tmp_path_factory.mktemp("corpora"), images=IMAGES, processes=1)
    run = tmp_path_factory.mktemp("runs") / "miniature"
    prepare(toy(), run / "data", corpora, processes=1, report=lambda line: None)
    return run


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, run):
    """What two processes found, what they said, and the folder of their CLIP."""
    folder, said = tmp_path_factory.mktemp("two"), []
    count, clip = train.launch(steps_and_a_training, folder, toy(), run=run, gpus=2, progress=said.append)
    assert count == 2
    found = {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)] for name in STAGES}
    return found, said, clip, [torch.load(folder / f"steps-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_give_the_loss_and_gradients_of_one_with_the_joined_batch(name, of_two):
    kind, options = STAGES[name]
    model, found = toy_model(), of_two[0][name]
    loss = stage(kind, **options).loss(model, toy_batch())
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert abs(sum(one["loss"].item() for one in found) / 2 - loss.item()) < 1e-8
    for one in found:
        assert one["gradients"].keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(one["gradients"][parameter], gradient, atol=1e-8, rtol=0)


def test_a_process_alone_would_give_other_gradients(of_two):
    """The comparison above sees the other process's negatives: half of the batch alone has another loss."""
    alone = stage().loss(toy_model(), next(toy_batch().parts(2)))
    assert abs(alone.item() - of_two[0]["clip"][0]["loss"].item()) > 0.1


def test_running_statistics_become_the_mean_of_the_processes(of_two):
    assert sorted((line["rank"], line["means"]) for line in of_two[1] if "rank" in line) == [(0, [0.5] * 2), (1, [0.5] * 2)]


def test_weights_stay_the_same_in_all_processes_and_are_those_of_one(of_two):
    expected = two_steps(lambda batch: batch)
    for weights in of_two[3]:
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-8, rtol=0, msg=name)


def test_the_words_of_a_process_that_fails_come_back():
    with pytest.raises(InputError, match="this process found nothing"):
        processes.launch(finds_nothing, gpus=1)


def test_statistics_are_synchronised_but_not_on_a_cpu():
    with pytest.raises(InputError, match="GPUs only"):
        processes.synchronised(toy_model())
    elsewhere = processes.synchronised(toy_model().to("meta"))
    kinds = {type(module) for module in elsewhere.modules()}
    assert torch.nn.SyncBatchNorm in kinds and torch.nn.BatchNorm2d not in kinds


def test_processes_share_every_batch_equally(run):
    rows, tokenizer = load_prepared(run / "data", "train"), load_tokenizer(run / "data" / "tokenizer")
    settings = replace(toy().clip, batch_size=7)
    whole = TrainingData(rows, tokenizer, toy(), settings, 1).epoch_batches(0)
    shares = [TrainingData(rows, tokenizer, toy(), settings, 1, process=p, processes=2) for p in (0, 1)]
    for samples in whole:
        halves = [one.share(samples) for one in shares]
        assert len(halves[0]) == len(halves[1])
        assert set(halves[0]) | set(halves[1]) == set(samples)
    first = [next(one.batches()) for one in shares]
    assert first[0].images.shape == first[1].images.shape


def test_torchrun_trains_both_stages_and_one_process_writes(run, tmp_path):
    """`torchrun -m clipcap_lib train` with two processes, as on a machine with GPUs."""
    shutil.copytree(run / "data", tmp_path / "miniature-debug" / "data")
    environment = {**os.environ, "CLIPCAP_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", str(processes._free_port()), "-m", "clipcap_lib", "train", "--debug", "--seed", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "miniature-debug" / "caption" / "model1"
    assert read_json(folder / "done.json")["processes"] == 2
    assert done.stdout.count("the captioner is in") == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert checkpoint.load(folder / "best").caption([load_prepared(run / "data", "val")[0]["image"]])


def test_a_notebook_trains_with_two_processes_and_hears_of_it(run, of_two):
    _, said, folder, _ = of_two
    assert folder == run / "clip" / "all" and checkpoint.exists(folder / "best")
    assert {line["stage"] for line in said if line.get("event") == "step"} == {"image", "language", "clip"}
    again = []
    train.pretrain_clip(toy(), run, seed=2, progress=again.append)
    assert [line["event"] for line in again] == ["done before"] * 3


def side_by_side(run, seeds, said):
    calls = [partial(train.train_stage, "language", toy(), run, f"side-{seed}", seed) for seed in seeds]
    return train.side_by_side(calls, progress=said.append)


@pytest.fixture
def two_threads():
    had = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(had)


def test_models_side_by_side_are_those_of_a_core_alone_and_what_is_done_starts_no_process(run, two_threads, monkeypatch):
    said = []
    folders = side_by_side(run, (4, 5, 6), said)
    assert folders == [run / "language" / f"side-{seed}" for seed in (4, 5, 6)]
    assert {line["name"] for line in said} == {"side-4", "side-5", "side-6"}
    together = [(folder / "best" / "model.safetensors").read_bytes() for folder in folders]
    assert len(set(together)) == 3
    torch.set_num_threads(1)
    for seed, folder, weights in zip((4, 5, 6), folders, together, strict=True):
        shutil.rmtree(folder)
        train.train_stage("language", toy(), run, f"side-{seed}", seed)
        assert (folder / "best" / "model.safetensors").read_bytes() == weights
    torch.set_num_threads(2)
    monkeypatch.setattr(processes, "_listen", None)
    again = []
    assert side_by_side(run, (4, 5, 6), again) == folders
    assert [line["event"] for line in again] == ["done before"] * 3


def test_of_models_side_by_side_that_fail_the_words_come_back_and_the_others_are_kept(run, two_threads):
    side_by_side(run, (7,), [])
    with pytest.raises(InputError, match="this process found nothing"):
        processes.side_by_side([partial(train.train_stage, "language", toy(), run, "side-7", 7), never_begun])
    assert (run / "language" / "side-7" / "done.json").is_file()


def never_begun(progress, begin=True):
    if begin:
        raise InputError("this process found nothing")


def test_one_training_at_a_time_works_on_an_output_and_many_in_a_run(tmp_path):
    def work(output: str) -> tuple[float, float]:
        with processes.alone(tmp_path, "language", output):
            began = time.monotonic()
            time.sleep(0.3)
            return began, time.monotonic()

    with ThreadPoolExecutor() as pool:
        mine, again, other = pool.map(work, ("mine", "mine", "theirs"))
    first, second = sorted((mine, again))
    assert second[0] >= first[1] and other[0] < first[1]
