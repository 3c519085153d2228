"""Checkpoints: safetensors, JSON and the tokenizer in a folder that is either whole or not there. Nothing is unpickled.

    <folder>/model.safetensors   weights and buffers          <folder>/config.json    Config and what made the weights
    <folder>/tokenizer.json ..   the character vocabulary     <folder>/optimizer.safetensors, trainer.json   of a run
                                                                  that goes on, as average.safetensors
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from clipcap_lib import processes
from clipcap_lib.config import Config, InputError, on_one_line, to_dict
from clipcap_lib.files import read_json, write_json, writing
from clipcap_lib.model import TIED, ClipCap
from clipcap_lib.tokenizer import load_tokenizer, vocabulary_of

TRAINER = "trainer.json"  # there only as long as a run can go on from the checkpoint


def save(folder: Path, model: ClipCap, config: Config, about: Mapping[str, Any],
         optimizer: torch.optim.Optimizer | None = None, average: ClipCap | None = None,
         scaler: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint beside its place and move it there. `about`: JSON on what made it (stage, seed, step, ..).

    optimizer, average (the weights' moving average) and scaler (of fp16) are what a run needs to go on. Learning rate, place
    in the data and random states follow from seed and step, and are not kept.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        save_file(_weights(model), beside / "model.safetensors")
        write_json(beside / "config.json", {"config": to_dict(config), "model": to_dict(model.config), **about})
        try:
            model.tokenizer.save_pretrained(beside)
        except Exception as error:  # plain ones, of a full disk too
            raise OSError(str(error)) from error
        if optimizer is not None:
            tensors, rest = _optimizer_state(optimizer)
            save_file(tensors, beside / "optimizer.safetensors")
            write_json(beside / TRAINER, {**rest, "scaler": scaler})
        if average is not None:
            save_file(_weights(average), beside / "average.safetensors")
        _move(beside, folder)
    except (OSError, SafetensorError) as error:  # a full disk, above all
        shutil.rmtree(beside, ignore_errors=True)
        raise InputError(f"{folder}: the checkpoint could not be written ({error}); the one before it is untouched. "
                         f"Free some space and run the same command again") from error
    return folder


def _weights(model: ClipCap) -> dict[str, torch.Tensor]:
    """Weights and buffers; the output layer shares the embedding's tensor and is tied again when loading."""
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != TIED}


def _move(beside: Path, folder: Path) -> None:
    """Put a finished folder in its place. Killed between the two renames, `_there` finds the one before."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _there(folder: Path) -> Path:
    """The folder, put back if a kill came between the two renames of `_move`."""
    folder = Path(folder)
    old = folder.parent / f".{folder.name}.old"  # `with_name` knows no folder "."
    if not folder.exists() and old.exists():
        os.replace(old, folder)
    return folder


def remove(folder: Path) -> None:
    """Take a checkpoint away, and what a kill may have left of the one before. Cut off in between, no run goes on here."""
    for one in (folder.with_name(f".{folder.name}.old"), folder):
        (one / TRAINER).unlink(missing_ok=True)
        shutil.rmtree(one, ignore_errors=True)


def exists(folder: Path) -> bool:
    """Whether a whole checkpoint lies there."""
    return (_there(folder) / "model.safetensors").is_file()


def about(folder: Path) -> dict[str, Any]:
    """What `save` was told, and the settings."""
    return read_json(_there(folder) / "config.json")


def load(folder: Path, device: str | torch.device = "cpu") -> ClipCap:
    """The model of a checkpoint with its tokenizer, in evaluation mode. Raises InputError on a damaged checkpoint."""
    folder = Path(folder)
    if not exists(folder):
        raise InputError(f"{folder}: no checkpoint here; train it first, or name one of {_neighbours(folder)}")
    processes.keep_freed_memory()
    try:
        model = ClipCap(about(folder)["model"], load_tokenizer(folder))
    except Exception as error:  # damaged in any way: not JSON, no such entry, shapes or an encoder that there are not
        raise InputError(f"{folder}: its config or tokenizer cannot be used ({type(error).__name__}: "
                         f"{on_one_line(error)}); delete the folder and train again") from error
    load_weights(model, folder)
    return model.to(device).eval()


def load_weights(model: ClipCap, folder: Path, parts: tuple[str, ...] | None = None,
                 file: str = "model.safetensors") -> None:
    """Put the weights of a checkpoint into `model`: all of them, or those of the named parts.

    Raises InputError where they do not fit; a vocabulary that differs is told apart from shapes that differ.
    """
    tokenizer = load_tokenizer(_there(folder))
    if model.tokenizer is not None and vocabulary_of(model.tokenizer) != vocabulary_of(tokenizer):
        raise InputError(f"{folder}: its vocabulary ({len(tokenizer)} tokens) is not the one of the prepared data "
                         f"({len(model.tokenizer)} tokens); train it anew, or prepare with its vocabulary, or give the "
                         f"--gpt-weights that it was trained with, if any")
    weights = _tensors(folder / file)
    if (tied := weights.get("gpt.transformer.wte.weight")) is not None:  # else it is told below
        weights[TIED] = tied
    if parts:
        weights = {name: tensor for name, tensor in weights.items() if name.split(".")[0] in parts}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(f"{folder}: its weights do not fit this model: {str(error).splitlines()[-1].strip()}"
                         ) from error
    missing = [name for name in missing if not parts or name.split(".")[0] in parts]
    if missing or unexpected:
        raise InputError(f"{folder}: its weights do not fit this model: {len(missing)} missing, {len(unexpected)} "
                         f"unexpected, such as {[*missing, *unexpected][0]}")


def resume(folder: Path, model: ClipCap, optimizer: torch.optim.Optimizer, average: ClipCap | None = None,
           scaler: Any = None) -> dict[str, Any]:
    """Put model, optimiser, moving average and scaler back to where `last` left them -> what `save` was told about it."""
    load_weights(model, folder)
    if average is not None:
        load_weights(average, folder, file="average.safetensors")
    state = _tensors(folder / "optimizer.safetensors")
    rest = read_json(folder / TRAINER)
    groups = optimizer.state_dict()["param_groups"]
    per_parameter: dict[int, dict[str, Any]] = {}
    for name, tensor in state.items():
        number, key = name.split(".", 1)
        per_parameter.setdefault(int(number), {})[key] = tensor
    for group, values in zip(groups, rest["groups"], strict=True):
        # every step sets the rate, and whether a step can be captured depends on the device
        group.update({name: value for name, value in values.items() if name not in ("lr", "capturable")})
    optimizer.load_state_dict({"state": per_parameter, "param_groups": groups})
    if scaler is not None and rest.get("scaler"):
        scaler.load_state_dict(rest["scaler"])
    return about(folder)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own kinds on truncated files
        raise InputError(f"{file}: cannot be read ({error}); delete the folder and train again") from error


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimiser's tensors by "<parameter number>.<name>", and its plain numbers by parameter group."""
    state = optimizer.state_dict()
    tensors = {f"{number}.{key}": tensor.contiguous() for number, values in state["state"].items()
               for key, tensor in values.items()}
    plain = [{key: value for key, value in group.items() if isinstance(value, (int, float)) and key != "params"}
             for group in state["param_groups"]]
    return tensors, {"groups": plain}


def _neighbours(folder: Path) -> str:
    """The runs in a folder or beside it, for an error message. Of <stage>/nix/best, <stage>/nix is missing as well."""
    for place in (folder, folder.parent, *([folder.parent.parent] if folder.name == "best" else [])):
        if found := sorted(path.parents[1].name for path in place.glob("*/best/model.safetensors")):
            return f"{', '.join(found)} in {place}"
    return f"what `python -m clipcap_lib train` writes to {folder.parent}"


def model_info(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The fields of ModelConfig that a tokenizer decides."""
    return {"vocab_size": len(tokenizer), "pad_id": tokenizer.pad_token_id, "start_id": tokenizer.cls_token_id,
            "end_id": tokenizer.sep_token_id}


# -- runs that give way to others -------------------------------------------------------------------------------------


def put_away(folder: Path, mark: str) -> Path | None:
    """Clear runs/<preset>/<stage>/<name> for the run of fingerprint `mark` -> where another one that stood there is now.

    A model of another seed or setting took its time to train, and nobody asked to lose it. None: there was no other, or it
    had no checkpoint yet.
    """
    found = _mark(folder)
    if found in (None, mark):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    kept = _kept(folder, found)
    with writing(kept):
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        folder.rename(kept)
    return kept


def take_back(folder: Path, mark: str) -> None:
    """Put the run of fingerprint `mark` into its place again, if it had to give way to another."""
    if (kept := _kept(folder, mark)).is_dir() and _mark(folder) != mark:
        put_away(folder, mark)
        with writing(folder):
            kept.rename(folder)


def _kept(folder: Path, mark: str) -> Path:
    return folder.parents[1] / "replaced" / f"{folder.parent.name}-{folder.name}-{mark}"


def _mark(folder: Path) -> str | None:
    """The fingerprint of the run whose folder this is; None before its first checkpoint."""
    return next((about(folder / name)["fingerprint"] for name in ("best", "last") if exists(folder / name)), None)
