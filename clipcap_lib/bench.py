"""Every speed and memory claim, measured as ratios against a plain loop of the original's shape and against the limit.

`bench("train" | "memory" | "decode" | "score" | "prepare", config, folder)` writes `<folder>/bench-<what>.json`, a list with
one entry per device and preset, and `<folder>/bench-<what>.md`, the same as tables. Variants take turns; values are medians.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipcap_lib.bench_decode import measure_decode
from clipcap_lib.bench_memory import measure_memory
from clipcap_lib.bench_prepare import measure_prepare
from clipcap_lib.bench_score import measure_score
from clipcap_lib.bench_train import CHARACTERS, measure_train
from clipcap_lib.config import Config, InputError, preset
from clipcap_lib.files import read_json, write_json
from clipcap_lib.systems import commit
from clipcap_lib.timing import REPEATS, Report, Rows

MEANING = {  # the rows, and what each is
    "train": {"plain": "CLIP step of the original's shape: fp32, every caption padded to 100 tokens",
              "ours": f"CLIP step as `train` takes it: autocast, {CHARACTERS} characters a caption, fused AdamW",
              "with_data": "the same with images read, decoded and cropped by `TrainingData`, none kept; timed apart",
              "without_data": "the same as `ours`, timed right before and behind `with_data`",
              "encoder_only": "the limit: image encoder alone, forward and backward, as set for ours",
              **{f"encoder, {form}{way}": f"the same with activations stored {form}{way}"
                 for form in ("channels first", "channels last") for way in ("", ", compiled")}},
    "memory": {f"{stage}: {row}": text for stage in ("clip", "caption") for row, text in {
        "always": "weights, gradients and moments, whatever the batch (on a CPU the whole process)",
        "an image": "that each image of a batch adds", "largest batch": "on this device (on a CPU an estimate)"}.items()},
    "decode": {"plain": "the original's shape: greedy, batch of one, fp32, no key-value cache",
               "single": "greedy, batch of one", "batched_greedy": "greedy, batch of 32 (GPU: 256)",
               "batched_beam5": "five beams, same batch", "ensemble3": "three models, greedy, batch of one",
               "single_bf16": "the same as `single` in bf16", "batched_greedy_bf16": "greedy, same batch, bf16",
               "batched_beam5_bf16": "five beams, same batch, bf16",
               "generate": "transformers' generate with its cache, batch of one",
               "generate_batched": "transformers' generate, same batch",
               "generate_beam5": "transformers' generate, five beams, same batch",
               "bound": "limit of `single`: `encoder`, and at `bandwidth` the GPT's weights, once a character, and cache",
               "encoder": "image encoder and heads alone, batch of one",
               "batched_encoder": "image encoder and heads alone, same batch", "bandwidth": "of reading memory"},
    "score": {"jar_pipeline": "pycocoevalcap with its tokenizer and METEOR in Java, segmentation and start-up included",
              "ours": "`metrics.score`", "ours_prepared": "`metrics.score`, the references prepared for the system before",
              "ours peak memory": "of a process that scores two files of these captions and does nothing else"},
    "prepare": {"bare_loop": "the limit: a process pool that only decodes, resizes and encodes the same photos",
                "ours": "all of `prepare`: reads, checks, finds copies, writes; start of its processes included in both",
                "ours_half": "the same on half of the images", "ours_quarter": "the same on a quarter of them",
                "ours peak memory": "of all its processes together, as PSS: what they share counts once"},
}
RATIOS = {
    "train": "ours/plain ours/encoder_only with_data/without_data", "memory": "",
    "prepare": "ours/bare_loop ours/ours_half ours/ours_quarter",
    "decode": "single/plain single_bf16/plain batched_greedy/plain batched_greedy_bf16/plain single/generate "
              "batched_greedy/generate_batched batched_beam5/generate_beam5 ensemble3/single single/bound "
              "batched_greedy/batched_encoder",
    "score": "ours/jar_pipeline ours_prepared/jar_pipeline"}


def bench(what: str, config: Config, folder: Path, tiny: bool = False, report: Report = print,
          data_root: Path | None = None) -> dict[str, Any]:
    """Measure `what`, put the result among those of `<folder>/bench-<what>.json` and `.md`, and return it.

    An entry of the same device and preset is replaced. tiny: a toy model, few images and one timing, to see that it
    runs; its preset is called `<name>-tiny`. data_root: corpora whose photos "prepare" reads instead of drawn ones.
    Raises InputError for an unknown `what`, or a data root without corpora.
    """
    if what not in MEANING:
        raise InputError(f"nothing to measure is called '{what}'; choose from {', '.join(MEANING)}")
    if tiny:
        model = replace(preset("miniature").model, image_size=32, layers=1, width=32, heads=2)
        config = replace(config, name=f"{config.name}-tiny", model=model)
    run = {"train": measure_train, "memory": measure_memory, "decode": measure_decode, "score": measure_score,
           "prepare": partial(measure_prepare, data_root=data_root)}[what]
    found: Rows = run(config, tiny, report)
    rows = [{"name": name, "value": float(f"{value:.4g}"), "unit": unit} for name, (value, unit) in found.items()]
    speeds = {row["name"]: row["value"] if row["unit"].endswith("/s") else 1 / row["value"] for row in rows}
    ratios = {name: float(f"{speeds[a] / speeds[b]:.4g}") for name in RATIOS[what].split()
              for a, b in [name.split("/")] if {a, b} <= set(speeds)}
    entry = {"device": device_name(what in ("train", "memory", "decode")), "torch": torch.__version__, "preset": config.name,
             "commit": commit(), "date": time.strftime("%Y-%m-%d"), "rows": rows, "ratios": ratios}
    path = Path(folder) / f"bench-{what}.json"
    entries = read_json(path) if path.is_file() else []
    entries = [e for e in entries if (e["device"], e["preset"]) != (entry["device"], entry["preset"])] + [entry]
    write_json(path, entries)
    path.with_suffix(".md").write_text(markdown(what, entries), encoding="utf-8")
    report(f"bench {what}: " + ", ".join(f"{name} {value:g}" for name, value in ratios.items()))
    return entry


def device_name(accelerated: bool = True) -> str:
    """What the numbers were measured on: the GPU if there is one and `accelerated` work is meant, else the processor and its
    widest instructions, since one name is sold with several.
    """
    if accelerated and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    kinds = [kind.upper() for kind in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(kind)]
    widest = [*kinds, torch.backends.cpu.get_cpu_capability()][0]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {widest}"


def markdown(what: str, entries: list[dict[str, Any]]) -> str:
    """The entries as Markdown tables."""
    lines = [f"# bench {what}", "", "A ratio `a/b` says how many times faster a is than b: above 1, a is the faster one. "
             f"Variants took turns in one run; values are medians of {REPEATS} timings (one in a `-tiny` run)."]
    for entry in entries:
        lines += ["", f"## {entry['device']}", "",
                  f"Preset {entry['preset']}, torch {entry['torch']}, {entry['date']}"
                  + (f", commit {entry['commit']}" if entry.get("commit") else ""),
                  "", "| row | value | unit | what |", "|---|---|---|---|"]
        lines += [f"| {row['name']} | {row['value']:g} | {row['unit']} | {MEANING[what].get(row['name'], '')} |"
                  for row in entry["rows"]]
        lines += ["", "| ratio | times faster |", "|---|---|"]
        lines += [f"| {name} | {value:g} |" for name, value in entry["ratios"].items()]
    return "\n".join(lines) + "\n"
