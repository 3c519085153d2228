"""Killed at any step and started again, a run ends with the same bits as one left alone."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_pipeline import toy

from clipcap_lib import checkpoint
from clipcap_lib.corpora import miniature
from clipcap_lib.files import read_json
from clipcap_lib.prepare import prepare

IMAGES = {"flickr8k-cn": {"train": 28, "val": 4, "test": 2}}
STEPS = 14
TOLD = "retrieval is said\n"  # what a captioner lost of it, when all is over
SAVED = (3, 6, 7, 9, 12, 14)  # steps with a checkpoint: every third one, and the ends of epochs
# What is killed: a process that trains, started again and again. Starting Python each time would take ten seconds, so one
# process that has imported everything forks for each attempt; the forked one dies by SIGKILL as any other.
ATTEMPTS = """
import json, os, resource, signal, sys
from pathlib import Path
import datasets, pandas, scipy, torch  # all that a training imports
torch.set_num_threads(1)
from clipcap_lib import checkpoint, train
from clipcap_lib.config import Config, InputError, from_dict

config, run = from_dict(Config, json.loads(sys.argv[1])), Path(sys.argv[2])
train.LOG_EVERY, train.SAVE_EVERY = 1, 3

def attempt(kill, name):
    def progress(line):
        if line["event"] == "resumed":
            print("resumed", line["step"], flush=True)
        if "retrieval" in line:
            print("retrieval is said", flush=True)
        if line["event"] == "step" and line["step"] == kill.get("step"):
            os.kill(os.getpid(), signal.SIGKILL)
    if "between renames" in kill:  # of the checkpoint so numbered
        replace, left = os.replace, [2 * kill["between renames"] - 1]
        def counted(*arguments):
            if Path(arguments[1]).name in ("last", ".last.old"):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
            replace(*arguments)
        checkpoint.os.replace = counted
    if "behind" in kill:  # a file that was put in its place
        move = os.replace
        def watched(*arguments):
            move(*arguments)
            if Path(arguments[1]).name == kill["behind"]:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = watched
    if "bytes" in kill:  # the disk takes no larger file
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill["bytes"], kill["bytes"]))
    try:
        train.train_stage("caption", config, run, name, 5, progress=progress)
    except InputError as error:
        print(error, flush=True)
        os._exit(2)
    os._exit(0)

for line in sys.stdin:
    kill = json.loads(line)
    child = os.fork()
    if not child:
        attempt(kill, kill["name"])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"code": code}), flush=True)
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A function that trains under a name until it is killed as told -> its exit code (-9 by SIGKILL), what it said."""
    corpora = miniature.write_corpora(tmp_path_factory.mktemp("corpora"), images=IMAGES, processes=1)
    run = tmp_path_factory.mktemp("runs") / "miniature"
    base = toy()
    # dropout, a moving average and two parts a batch: all that a run must carry along
    config = replace(base, model=replace(base.model, dropout=0.1),
                     caption=replace(base.caption, epochs=2, batch_size=4, average=0.9, accumulation=2, contrastive=0.1))
    prepare(config, run / "data", corpora, processes=1, report=lambda line: None)
    from clipcap_lib.config import to_dict

    command = [sys.executable, "-c", ATTEMPTS, json.dumps(to_dict(config)), str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def train(name, **kill):
            process.stdin.write(json.dumps({"name": name, **kill}) + "\n")
            process.stdin.flush()
            said = []
            while not (line := process.stdout.readline()).startswith('{"code"'):
                assert line, "the trainer ended"
                said.append(line)
            return json.loads(line)["code"], "".join(said)

        train.run = run / "caption"
        yield train
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(trainer) -> Path:
    """A run left alone."""
    assert trainer("whole") == (0, TOLD)
    assert read_json(trainer.run / "whole" / "done.json")["step"] == STEPS
    return trainer.run / "whole"


def same_bits(one: Path, other: Path) -> None:
    for name in ("best", "last"):
        assert (one / name / "model.safetensors").read_bytes() == (other / name / "model.safetensors").read_bytes()
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
             for folder in (one, other)]
    for rows in lines:
        for row in rows:
            row.pop("images_per_second")
    assert lines[0] == lines[1]
    done = [read_json(folder / "done.json") for folder in (one, other)]
    assert done[0]["best"] == done[1]["best"] and done[0]["retrieval"] == done[1]["retrieval"]


def test_killed_at_five_random_steps_it_ends_with_the_same_bits(trainer, whole):
    steps = sorted(random.Random().sample(range(1, STEPS + 1), 5))
    for step in steps:
        assert trainer("killed", step=step)[0] == -9, f"steps {steps}"
        assert not (trainer.run / "killed" / "done.json").exists()
    before = max((step for step in SAVED if step < steps[-1]), default=0)
    assert trainer("killed") == (0, (f"resumed {before}\n" if before else "") + TOLD), f"steps {steps}"
    same_bits(trainer.run / "killed", whole)


def test_killed_between_the_two_renames_of_a_checkpoint_it_ends_with_the_same_bits(trainer, whole):
    for number in (2, 3):  # the first has nothing to move away
        assert trainer("renamed", **{"between renames": number})[0] == -9
        assert not (trainer.run / "renamed" / "last").exists()
    code, said = trainer("renamed")
    assert code == 0 and said.startswith("resumed "), "the checkpoint that was moved away is found"
    same_bits(trainer.run / "renamed", whole)


def test_killed_behind_its_last_step_it_ends_as_one_left_alone(trainer, whole):
    assert trainer("finished", behind="done.json")[0] == -9
    assert (trainer.run / "finished" / "last" / "trainer.json").is_file()
    assert trainer("finished") == (0, f"resumed {STEPS}\n" + TOLD)
    same_bits(trainer.run / "finished", whole)
    assert not (trainer.run / "finished" / "last" / "trainer.json").exists()
    assert trainer("finished") == (0, ""), "it is done"


def test_nothing_comes_back_of_a_checkpoint_that_is_taken_away(tmp_path):
    for name in ("last", ".last.old", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    checkpoint.remove(tmp_path / "last")
    assert not checkpoint.exists(tmp_path / "last") and [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_later(trainer, whole):
    assert trainer("full", step=8)[0] == -9
    before = (trainer.run / "full" / "last" / "model.safetensors").read_bytes()
    code, said = trainer("full", bytes=40_000)
    assert code == 2 and "could not be written" in said and "Free some space" in said
    assert (trainer.run / "full" / "last" / "model.safetensors").read_bytes() == before
    assert not list((trainer.run / "full").glob("*.partial"))
    state = trainer.run / "full" / "last" / "optimizer.safetensors"
    sound = state.read_bytes()
    state.write_bytes(sound[:50])
    code, said = trainer("full")
    assert code == 2 and "optimizer.safetensors: cannot be read" in said and "Traceback" not in said
    state.write_bytes(sound)
    assert trainer("full") == (0, "resumed 7\n" + TOLD)
    same_bits(trainer.run / "full", whole)


def test_a_run_keeps_its_last_and_its_best_weights(whole):
    assert checkpoint.about(whole / "last")["step"] == STEPS
    assert checkpoint.exists(whole / "best")
    assert not (whole / "last" / "optimizer.safetensors").exists(), "what is over needs no optimiser"
    assert read_json(whole / "done.json")["retrieval"].keys() == {"before", "after"}


def test_the_lines_of_a_captioner_show_what_it_writes(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = [line for line in lines if "validation" in line]
    assert len(shown) == 2 and all(len(line["samples"]) == 4 and "samples" not in line["validation"] for line in shown)
    assert all(isinstance(caption, str) and file.endswith(".jpg") for file, caption in shown[0]["samples"].items())
    from clipcap_lib.widgets import read_metrics

    assert {"CIDEr", "distinct", "loss"} <= set(read_metrics(whole / "metrics.jsonl").columns)
