"""What `predict`, `ensemble` and `validate-submission` do: from arguments to captions, or to what is wrong with them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcap_lib.config import MODELS, Config, InputError

if TYPE_CHECKING:  # the command line is read by commands that need no torch, too
    from clipcap_lib.decode import Options
    from clipcap_lib.model import ClipCap
    from clipcap_lib.predict import Images, Said

FLAGS = {  # the fields of decode.Options that are flags: type, help
    "beam_size": (int, "open hypotheses an image; 1 is greedy (default: the preset's)"),
    "max_length": (int, "most characters, the end included (default: the preset's)"),
    "min_length": (int, "fewest characters"),
    "length_penalty": (float, "above 0 favours long captions (default: the preset's)"),
    "early_stopping": (bool, "beam search: stop at beam-size finished captions"),
    "no_repeat_ngram": (int, "no so many characters in a row come twice"),
    "n_best": (int, "captions an image in the JSON lines"),
    "temperature": (float, "above 0: sample instead of searching"),
    "top_k": (int, "sample from the k most probable characters"),
    "top_p": (float, "sample from the fewest characters with this probability together"),
    "seed": (int, "of sampling, nothing else depends on it (default: 0)"),
    "groups": (int, "groups of beams that avoid each other's characters (diverse beam search)"),
    "diversity": (float, "how much they do, in nats (default: 0.5)")}


IMAGES = ("a folder, a list of paths (a text file, relative to where it lies), or - for paths on standard input (default: "
          "the prepared set --set)")


def add_arguments(parser: argparse.ArgumentParser, several: bool) -> None:
    """The flags of predict, or of ensemble (several)."""
    if several:
        parser.add_argument("--models", nargs="+", default=[m.name for m in MODELS[:3]],
                            help=f"as --model of predict (default: {' '.join(m.name for m in MODELS[:3])})")
        parser.add_argument("--weights", nargs="+", type=float, help="one a model (default: equal)")
        parser.add_argument("--rule", help="what is averaged: probabilities, log-probabilities or logits")
    else:
        parser.add_argument("--model", default="model1",
                            help="a name under runs/<preset>/caption, or a folder (default: model1)")
    parser.add_argument("--images", help=IMAGES)
    parser.add_argument("--set", default="test", help="board-a, board-b, test or val (default: test)")
    result = "res_ensemble.json" if several else "res.json"
    parser.add_argument("--output", type=Path, help=f"the file of captions (default: runs/<preset>/{result})")
    parser.add_argument("--jsonl", type=Path, help="all captions with their scores, and what was left out, a line an image")
    parser.add_argument("--strict", action="store_true", help="stop at an image that cannot be read; else it is left out")
    parser.add_argument("--batch-size", type=int, default=32, help="images a batch (default: 32)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(default: bf16 on a GPU that has it, else fp32)")
    whose = "all members' beams or samples, instead of averaging" if several else "the beams or samples"
    parser.add_argument("--consensus", action="store_true",
                        help=f"of {whose}, take the caption with the highest expected CIDEr-D if the truth were one of them")
    parser.add_argument("--rerank", type=Path, metavar="CLIP",
                        help="take the n-best caption that this checkpoint finds nearest to the image: a name under "
                             "runs/<preset>/clip, or a folder")
    for name, (kind, text) in FLAGS.items():
        parser.add_argument("--" + name.replace("_", "-"), help=text,
                            **({"action": "store_true"} if kind is bool else {"type": kind}))


def caption(arguments: argparse.Namespace, config: Config, run: Path) -> None:
    """predict and ensemble: one model or several, on images of a folder, a list, standard input or a prepared set."""
    from clipcap_lib import checkpoint, predict
    from clipcap_lib.captioner import Captioner
    from clipcap_lib.data import data_fingerprint
    from clipcap_lib.ensemble import Ensemble
    from clipcap_lib.optimisation import pick_precision

    if arguments.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    process, processes, wait, device = _shared_out()
    names = [arguments.model] if arguments.command == "predict" else arguments.models
    folders = [_checkpoint(name, run / "caption" / name / "best") for name in names]
    on_gpu = device.type == "cuda"
    precision = arguments.precision or ("bf16" if on_gpu and pick_precision("auto") == "bf16" else "fp32")
    members = [Captioner(_load_captioner(folder, device), precision, compiled=config.compile) for folder in folders]
    stepper: Any = members[0]
    if arguments.command == "ensemble":
        stepper = Ensemble(members, arguments.weights, arguments.rule or config.ensemble_rule, names)
    voters = stepper.members if arguments.command == "ensemble" else members  # members of no weight have no vote
    options = _options(arguments, config, min(m.config.context for m in members), len(voters))
    about: dict[str, Any] = {"models": [predict.identity(f) for f in folders], "precision": precision,
                             "options": vars(options), "device": device.type, "consensus": arguments.consensus}
    if arguments.command == "ensemble":
        about |= {"weights": stepper.weights, "rule": stepper.rule}
    judging = _checkpoint(arguments.rerank, run / "clip" / arguments.rerank / "best") if arguments.rerank else None
    judge = checkpoint.load(judging, device) if judging else None
    readers = [*voters, judge] if judge else voters
    images = _images(arguments, run, sorted({reader.config.image_size for reader in readers}))
    say = _say(arguments, run, voters, stepper, options, judge)
    if arguments.consensus:
        about["data"] = data_fingerprint(run / "data")  # whose captions count how common words are
    if judging:
        about["rerank"] = predict.identity(judging)
    output = arguments.output or run / ("res.json" if arguments.command == "predict" else "res_ensemble.json")
    progress = predict.Progress(-(-len(images.names) // processes), arguments.command)
    began = time.perf_counter()
    counted = predict.predict(say, images, output, about, arguments.batch_size, arguments.strict, arguments.jsonl, process,
                              processes, wait, progress)
    progress.close()
    if process == 0:
        rate = f"{processes * progress.done / (time.perf_counter() - began):.1f} images a second"
        left_out = f", {counted['left_out']} images left out" if counted["left_out"] else ""
        print(f"{arguments.command}: {counted['captioned']} captions{left_out}, {rate} -> {output}")


def _checkpoint(given: str | Path, named: Path | None = None) -> Path:
    """The checkpoint that is meant by its folder, by the folder of the run whose `best` it is, or by the name of `named`."""
    from clipcap_lib import checkpoint

    path = Path(given)
    found = next(filter(checkpoint.exists, filter(None, (path, path / "best", named))), None)
    if found is None and named and len(path.parts) == 1 and not path.exists():
        return named
    return found or path  # where none is, `checkpoint.load` says so


def _load_captioner(folder: Path, device: Any) -> ClipCap:
    """A model that was trained to write captions, or one by `save_pretrained`, which says nothing of its training."""
    from clipcap_lib import checkpoint

    model = checkpoint.load(folder, device)
    if (stage := checkpoint.about(folder).get("stage", "caption")) not in ("caption", "scst"):
        raise InputError(f"{folder} is a checkpoint of stage {stage}; give a captioner, such as "
                         "runs/<preset>/caption/model1/best")
    return model


def _options(arguments: argparse.Namespace, config: Config, context: int, voters: int = 1) -> Options:
    """The preset's options with those that were given. context: tokens that all models have positions for; voters: models
    that make a list each."""
    from clipcap_lib.decode import Options

    given = {name: value for name in FLAGS if (value := getattr(arguments, name)) is not None and value is not False}
    sampling = given.get("temperature", 0) > 0
    if "diversity" in given and given.get("groups", 1) < 2:
        raise InputError("--diversity is between groups of beams: give --groups as well")
    searched = {} if sampling else {"beam_size": config.beam_size, "length_penalty": config.length_penalty}
    options = {**searched, "max_length": min(config.max_length, context), **given}
    if options["max_length"] > context:
        raise InputError(f"--max-length {options['max_length']}: the model has positions for {context} tokens at most")
    if arguments.rerank or arguments.consensus:
        if "n_best" not in given:  # something to choose from
            options["n_best"] = 5 if sampling else options["beam_size"]
        if arguments.command == "predict" and arguments.rerank and arguments.consensus:
            raise InputError("--rerank and --consensus both choose among the captions; give one of them")
        if options["n_best"] < 2 and not (arguments.consensus and voters > 1):
            flag = "--rerank" if arguments.rerank else "--consensus"
            raise InputError(f"{flag} chooses among captions: give a --beam-size, or a --temperature with --n-best")
    return Options(**options)


def _say(arguments: argparse.Namespace, run: Path, voters: Sequence[Any], stepper: Any, options: Options,
         judge: Any) -> Callable[[list[Any], Sequence[int]], Sequence[Said]]:
    """What captions a batch: the stepper's n-best list, or what consensus or a CLIP takes from lists."""
    from clipcap_lib import choose, decode
    from clipcap_lib.cider import document_frequencies

    tokenizer = voters[0].tokenizer
    frequency, segmentation = None, "characters"
    if arguments.consensus:
        from clipcap_lib.captions import segment
        from clipcap_lib.data import load_prepared
        from clipcap_lib.systems import main_segmentation

        rows, segmentation = load_prepared(run / "data", "train")["captions"][:], main_segmentation(run)
        frequency = document_frequencies([segment(row, segmentation) for row in rows])
    # each voter draws for itself: with the same numbers, members that are alike would mostly say the same
    own_options = [replace(options, seed=options.seed + (place << 32)) for place in range(len(voters))]

    def say(images: list[Any], numbers: Sequence[int]) -> Sequence[Said]:
        if frequency is not None:
            lists = [decode.captions(voter, tokenizer, images, one, numbers)
                     for voter, one in zip(voters, own_options, strict=True)]
            found = choose.consensus(lists, frequency, segmentation, getattr(stepper, "weights", None))
        else:
            found = decode.captions(stepper, tokenizer, images, options, numbers)
        return choose.rerank(judge, images, found) if judge is not None else found

    return say


def _shared_out() -> tuple[int, int, Callable[[], object], Any]:
    """This process among those of `accelerate launch` or torchrun: number, count, a barrier, its device."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return state.process_index, state.num_processes, state.wait_for_everyone, state.device
    return 0, 1, lambda: None, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _images(arguments: argparse.Namespace, run: Path, sizes: Sequence[int]) -> Images:
    from clipcap_lib import predict
    from clipcap_lib.data import data_fingerprint, load_prepared

    if arguments.images is None:
        return predict.prepared(load_prepared(run / "data", arguments.set), [arguments.set, data_fingerprint(run / "data")])
    if not arguments.images:  # of a variable of the shell that is not set
        raise InputError("--images is empty; give a folder, a list of paths or -, or leave it out for the prepared set")
    if arguments.images == "-":
        return predict.listed(_standard_input(), Path(), sizes, "standard input")
    path = Path(arguments.images)
    if path.is_file():
        found = predict.listed(path.read_bytes(), path.parent, sizes, str(path))
        return replace(found, files=[*found.files, path])
    return predict.in_folder(path, sizes)


def _standard_input() -> bytes:
    """All of it, which the first of several processes reads and gives to the others."""
    from clipcap_lib import processes

    return processes.of_main(None if processes.rank() else sys.stdin.buffer.read())


def validate(arguments: argparse.Namespace, run: Path) -> int:
    """validate-submission -> exit code: 1 if the file cannot be handed in."""
    from clipcap_lib import submission

    names = _images(arguments, run, [1]).names
    found = submission.problems(arguments.submission, names)
    print("\n".join(found) or f"validate-submission: {arguments.submission} has a caption of each of {len(names)} images")
    return 1 if found else 0
