"""Every speed and memory claim, measured as ratios against a plain loop of the original's shape and against the limit.

`bench("train" | "memory" | "decode" | "score" | "prepare", config, folder)` writes `<folder>/bench-<what>.json`, a list with
one entry per device and preset, and `<folder>/bench-<what>.md`, the same as tables. Variants take turns; values are medians.
"""

from __future__ import annotations

import copy
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipcap_lib import captions, decode, metrics, optimisation, prepare
from clipcap_lib.bench_memory import measure_memory, peak_memory
from clipcap_lib.captioner import Captioner
from clipcap_lib.config import Config, InputError, preset
from clipcap_lib.corpora import read_corpora
from clipcap_lib.data import Batch, pad
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.images import bare_jpeg
from clipcap_lib.model import ClipCap
from clipcap_lib.optimisation import parameter_groups
from clipcap_lib.stages import ClipStage

REPEATS = 5  # timings of each variant
AT_LEAST = 0.5  # seconds a timing lasts: what is faster is called several times
PLAIN_TOKENS = 100  # the original pads every caption to this
VOCABULARY = 5000  # characters, about those of all corpora together
LEXICON = (  # of made-up captions: one of each
    "一个 两个 一群 几只", "穿红衣服的 戴帽子的 年轻的 高大的 笑着的", "男人 女人 孩子 小狗 运动员 骑手",
    "傍晚 雨中 阳光下 正 一起", "在草地上 在海边 在舞台上 在街道上 在雪山前", "跑步 唱歌 踢足球 看书 休息 拍照 跳舞 等车",
    " ，天空很蓝 ，身后有一棵树 ，手里拿着东西 ，旁边停着一辆汽车")
CHARACTERS = 14  # of a caption in `train`: about the mean of real ones; with [CLS] and [SEP] a multiple of 8
UNITS = {"train": "pairs/s", "memory": "GiB", "decode": "ms an image", "score": "ms an image", "prepare": "images/s"}
MEANING = {  # the rows, and what each is
    "train": {"plain": "CLIP step of the original's shape: fp32, every caption padded to 100 tokens",
              "ours": f"CLIP step as `train` takes it: autocast, {CHARACTERS} characters a caption, fused AdamW",
              "encoder_only": "the limit: image encoder alone, forward and backward, at the precision of ours"},
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
    "train": "ours/plain ours/encoder_only", "memory": "",
    "prepare": "ours/bare_loop ours/ours_half ours/ours_quarter",
    "decode": "single/plain single_bf16/plain batched_greedy/plain batched_greedy_bf16/plain single/generate "
              "batched_greedy/generate_batched batched_beam5/generate_beam5 ensemble3/single single/bound "
              "batched_greedy/batched_encoder",
    "score": "ours/jar_pipeline ours_prepared/jar_pipeline"}
Rows = dict[str, tuple[float, str]]  # name -> value, unit
Report = Callable[[str], None]


def bench(what: str, config: Config, folder: Path, tiny: bool = False, report: Report = print,
          data_root: Path | None = None) -> dict[str, Any]:
    """Measure `what`, put the result among those of `<folder>/bench-<what>.json` and `.md`, and return it.

    An entry of the same device and preset is replaced. tiny: a toy model, few images and one timing, to see that it
    runs; its preset is called `<name>-tiny`. data_root: corpora whose photos "prepare" reads instead of drawn ones.
    Raises InputError for an unknown `what`, or a data root without corpora.
    """
    if what not in UNITS:
        raise InputError(f"nothing to measure is called '{what}'; choose from {', '.join(UNITS)}")
    if tiny:
        model = replace(preset("miniature").model, image_size=32, layers=1, width=32, heads=2)
        config = replace(config, name=f"{config.name}-tiny", model=model)
    run = {"train": _train, "memory": measure_memory, "decode": _decode, "score": _score,
           "prepare": partial(_prepare, data_root=data_root)}[what]
    found: Rows = run(config, tiny, report)
    rows = [{"name": name, "value": float(f"{value:.4g}"), "unit": unit} for name, (value, unit) in found.items()]
    speeds = {row["name"]: row["value"] if row["unit"].endswith("/s") else 1 / row["value"] for row in rows}
    ratios = {name: float(f"{speeds[a] / speeds[b]:.4g}") for name in RATIOS[what].split()
              for a, b in [name.split("/")] if {a, b} <= set(speeds)}
    entry = {"device": device_name(what in ("train", "memory", "decode")), "torch": torch.__version__, "preset": config.name,
             "date": time.strftime("%Y-%m-%d"), "rows": rows, "ratios": ratios}
    path = Path(folder) / f"bench-{what}.json"
    entries = prepare.read_json(path) if path.is_file() else []
    entries = [e for e in entries if (e["device"], e["preset"]) != (entry["device"], entry["preset"])] + [entry]
    prepare.write_json(path, entries)
    path.with_suffix(".md").write_text(markdown(what, entries), encoding="utf-8")
    report(f"bench {what}: " + ", ".join(f"{name} {value:g}" for name, value in ratios.items()))
    return entry


def device_name(accelerated: bool = True) -> str:
    """What the numbers were measured on: the GPU if there is one and `accelerated` work is meant, else the processor."""
    if accelerated and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def markdown(what: str, entries: list[dict[str, Any]]) -> str:
    """The entries as Markdown tables."""
    lines = [f"# bench {what}", "", "A ratio `a/b` says how many times faster a is than b: above 1, a is the faster one. "
             f"Variants took turns in one run; values are medians of {REPEATS} timings (one in a `-tiny` run)."]
    for entry in entries:
        lines += ["", f"## {entry['device']}", "", f"Preset {entry['preset']}, torch {entry['torch']}, {entry['date']}",
                  "", "| row | value | unit | what |", "|---|---|---|---|"]
        lines += [f"| {row['name']} | {row['value']:g} | {row['unit']} | {MEANING[what].get(row['name'], '')} |"
                  for row in entry["rows"]]
        lines += ["", "| ratio | times faster |", "|---|---|"]
        lines += [f"| {name} | {value:g} |" for name, value in entry["ratios"].items()]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Variant:
    """Something to be timed."""

    call: Callable[[], object]
    images: int = 1  # images, pairs or bytes a call works on
    before: Callable[[], object] | None = None  # done before every call, not timed


def measure(variants: Mapping[str, Variant], tiny: bool = False, report: Report = lambda line: None) -> dict[str, float]:
    """Time the variants in turns -> median seconds an image of each."""
    calls = {}
    for name, variant in variants.items():
        for _ in range(2 if torch.cuda.is_available() else 1):  # a GPU's first call chooses kernels
            seconds = _seconds(variant, 1)
        calls[name] = 1 if tiny or variant.before else min(100, math.ceil(AT_LEAST / seconds))
        report(f"  {name}: {seconds:.3g} s at first")
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(1 if tiny else REPEATS):
        for name, variant in variants.items():
            found[name].append(_seconds(variant, calls[name]) / variant.images)
        report(f"  turn {turn + 1} is over")
    return {name: statistics.median(values) for name, values in found.items()}


def _seconds(variant: Variant, calls: int) -> float:
    """Wall-clock seconds a call, all work that the GPU was given included."""
    if variant.before:
        variant.before()
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        variant.call()
    wait()
    return (time.perf_counter() - start) / calls


def _model(config: Config) -> tuple[ClipCap, Callable[[int], Tensor]]:
    """A model with random weights, they take as long as trained ones, and a function that makes so many images for it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = max(config.model.context, PLAIN_TOKENS)  # room for the original's shape in every preset
    model = ClipCap(replace(config.model, vocab_size=VOCABULARY, context=context)).to(device)
    size = config.model.image_size
    return model, lambda count: torch.randint(256, (count, 3, size, size), dtype=torch.uint8, device=device)


def _train(config: Config, tiny: bool, report: Report) -> Rows:
    """One CLIP step, on batches that already lie on the device."""
    model, pixels = _model(config)
    size = 4 if tiny else config.clip.batch_size if torch.cuda.is_available() else min(16, config.clip.batch_size)
    images, draw = pixels(size), random.Random(0)
    captions = [[model.start_id, *draw.choices(range(4, VOCABULARY), k=CHARACTERS), model.end_id] for _ in range(size)]
    padded = pad(captions, model.pad_id).to(images.device)
    padded_to_100 = F.pad(padded, (0, PLAIN_TOKENS - padded.shape[1]), value=model.pad_id)
    stage, batch = ClipStage(config, None), Batch(images, padded, torch.arange(size), torch.arange(size)).to(images.device)
    accelerator = optimisation.accelerator(config.precision)
    optimizer = accelerator.prepare_optimizer(
        torch.optim.AdamW(parameter_groups(model, config.clip), lr=config.clip.learning_rate, fused=True))
    plain_optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def plain() -> None:
        _plain_clip_loss(model, images, padded_to_100).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    def ours() -> None:
        with accelerator.autocast():
            loss = stage.loss(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.clip.clip_gradient or math.inf)
        optimizer.step()
        optimizer.zero_grad()

    def encoder_only() -> None:
        with accelerator.autocast():
            pooled = model.image_encoder(images)[0]
        pooled.float().sum().backward()
        model.zero_grad()

    seconds = measure({f.__name__: Variant(f, size) for f in (plain, ours, encoder_only)}, tiny, report)
    rows: Rows = {name: (1 / value, UNITS["train"]) for name, value in seconds.items()}
    for step in (plain, ours) if torch.cuda.is_available() else ():
        before = torch.cuda.memory_allocated()  # weights, and the moments of both optimisers
        torch.cuda.reset_peak_memory_stats()
        step()
        own = 3 * sum(p.nbytes for p in model.parameters())  # weights and the moments of one
        rows[f"{step.__name__} peak memory"] = (torch.cuda.max_memory_allocated() - before + own) / 2**30, "GiB"
    return rows


def _plain_clip_loss(model: ClipCap, images: Tensor, ids: Tensor) -> Tensor:
    """The original's step written down plainly: channels first, and a GPT that reads every pad. See `ClipStage.loss`."""
    encoder, rows = model.image_encoder, torch.arange(len(ids), device=ids.device)
    image = model.image_head(encoder.backbone((images.float() - encoder.mean) / encoder.deviation))
    hidden = model.gpt.transformer(input_ids=ids, use_cache=False)[0]
    text = model.text_head(hidden[rows, (ids == model.end_id).int().argmax(dim=1)])
    logits = model.logit_scale.exp() * F.normalize(image) @ F.normalize(text).mT
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.mT, rows)) / 2


def _decode(config: Config, tiny: bool, report: Report) -> Rows:
    """Captions of a forced length, from uint8 images in the host's memory on: every variant writes as many characters.

    bf16 only where the hardware computes in it: elsewhere it is emulated, and says nothing.
    """
    model, pixels = _model(config)
    model.eval()
    length, batch = (4, 4) if tiny else (20, 256 if torch.cuda.is_available() else 32)
    one, many = pixels(1).cpu(), pixels(batch).cpu()
    captioner = Captioner(model)
    # copies, so that each member reads weights of its own
    three = [captioner, *(Captioner(copy.deepcopy(model)) for _ in range(2))]
    ensemble = Ensemble(three, rule=config.ensemble_rule)
    device = model.logit_scale.device
    memory = torch.ones(2**20 if tiny else 2**27, device=device)  # 512 MiB: more than any cache holds
    forced = dict(max_length=length, suppress=[model.end_id])
    encode = torch.inference_mode()(lambda images: model.begin(model.preprocess(images)))
    variants = {
        "plain": Variant(lambda: _plain_greedy(model, one, length)),
        "single": Variant(lambda: decode.greedy(captioner, one, **forced)),
        "batched_greedy": Variant(lambda: decode.greedy(captioner, many, **forced), batch),
        "batched_beam5": Variant(lambda: decode.beam_search(captioner, many, 5, **forced), batch),
        "generate": Variant(lambda: _generate(model, one, length)),
        "generate_batched": Variant(lambda: _generate(model, many, length), batch),
        "generate_beam5": Variant(lambda: _generate(model, many, length, 5), batch),
        "ensemble3": Variant(lambda: decode.greedy(ensemble, one, **forced)),
        "encoder": Variant(lambda: encode(one)), "batched_encoder": Variant(lambda: encode(many), batch),
        "bandwidth": Variant(memory.sum, memory.nbytes)}
    if optimisation.pick_precision("auto") == "bf16":
        half = Captioner(model, "bf16")
        variants |= {"single_bf16": Variant(lambda: decode.greedy(half, one, **forced)),
                     "batched_greedy_bf16": Variant(lambda: decode.greedy(half, many, **forced), batch),
                     "batched_beam5_bf16": Variant(lambda: decode.beam_search(half, many, 5, **forced), batch)}
    else:
        report("  without bf16: this hardware does not compute in it")
    seconds = measure(variants, tiny, report)
    a_byte = seconds.pop("bandwidth")
    weights = sum(p.nbytes for p in [*model.gpt.transformer.h.parameters(), model.gpt.lm_head.weight])
    position = 2 * config.model.layers * config.model.width * model.logit_scale.element_size()  # of keys and values
    cached = sum(position * (model.prefix_length + written) for written in range(1, length + 1))
    seconds["bound"] = seconds["encoder"] + (length * weights + cached) * a_byte
    rows: Rows = {name: (1000 * value, UNITS["decode"]) for name, value in seconds.items()}
    return rows | {"bandwidth": (1e-9 / a_byte, "GB/s")}


@torch.no_grad()
def _plain_greedy(model: ClipCap, images: Tensor, length: int) -> list[Tensor]:
    """Greedy decoding that runs over everything again for every token -> `length` times (N,)."""
    embedded, tokens = model.begin(model.preprocess(images)), []
    for _ in range(length):
        logits = model.gpt(inputs_embeds=embedded, use_cache=False).logits[:, -1]
        logits[:, model.end_id] = float("-inf")
        tokens.append(logits.argmax(dim=-1))
        embedded = torch.cat([embedded, model.gpt.transformer.wte(tokens[-1])[:, None]], dim=1)
    return tokens


@torch.inference_mode()
def _generate(model: ClipCap, images: Tensor, length: int, beam_size: int = 1) -> Tensor:
    """transformers' own decoding -> (N, length)."""
    embedded = model.begin(model.preprocess(images))
    return model.gpt.generate(inputs_embeds=embedded, attention_mask=torch.ones_like(embedded[..., 0], dtype=torch.long),
                              max_new_tokens=length, do_sample=False, use_cache=True, suppress_tokens=[model.end_id],
                              pad_token_id=model.pad_id, num_beams=beam_size)


def _score(config: Config, tiny: bool, report: Report) -> Rows:
    """All metrics of made-up captions against five references each, segmented by jieba."""
    draw, images = random.Random(0), 8 if tiny else 5000
    texts = ["".join(draw.choice(part.split(" ")) for part in LEXICON) + "。" for _ in range(6 * images)]
    predictions = {f"{i}.jpg": texts[6 * i:6 * i + 1] for i in range(images)}
    references = {f"{i}.jpg": texts[6 * i + 1:6 * i + 6] for i in range(images)}

    prepared = metrics.prepare_references(references, "jieba")
    ours = partial(metrics.score, predictions, references, "jieba")
    ours_prepared = partial(metrics.score, predictions, prepared)
    ours_prepared()  # what metrics need of the references is kept from the first system on
    jar_pipeline, forget = partial(_jar_pipeline, predictions, references), captions._segment.cache_clear
    variants = {"jar_pipeline": Variant(jar_pipeline, images, forget), "ours": Variant(ours, images, forget),
                "ours_prepared": Variant(ours_prepared, images, forget)}
    if tiny or shutil.which("java") is None:
        report("  without the Java pipeline: " + ("a tiny run" if tiny else "no java on PATH"))
        del variants["jar_pipeline"]
    seconds = measure(variants, tiny, report)
    rows: Rows = {name: (1000 * value, UNITS["score"]) for name, value in seconds.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("res.json", "references.json")]
        for path, content in zip(paths, (predictions, references), strict=True):
            prepare.write_json(path, content)
        # not resource.getrusage: its peak begins with that of the process which started this one
        code = ("import sys; from clipcap_lib import metrics; metrics.score(*sys.argv[1:], 'jieba'); "
                "print(open('/proc/self/status').read())")
        if Path("/proc/self/status").is_file():
            said = subprocess.check_output([sys.executable, "-c", code, *map(str, paths)], text=True)
            rows["ours peak memory"] = int(re.search(r"VmHWM:\s+(\d+) kB", said)[1]) / 2**20, "GiB"
    return rows


def _jar_pipeline(predictions: captions.Captions, references: captions.Captions) -> dict[str, float]:
    """What scorers of Chinese captions usually do: jieba, then pycocoevalcap's tokenizer and its four scorers."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    given, said = (PTBTokenizer().tokenize({name: [{"caption": " ".join(tokens)} for tokens in metrics.segment(row, "jieba")]
                                            for name, row in texts.items()}) for texts in (references, predictions))
    jar = Meteor()
    try:
        scores = {"METEOR": jar.compute_score(given, said)[0]}
    except Exception:
        jar.lock.release()  # its destructor would wait for it forever
        raise
    scores["BLEU-4"] = Bleu(4).compute_score(given, said, verbose=0)[0][3]
    return scores | {"ROUGE-L": Rouge().compute_score(given, said)[0], "CIDEr": Cider().compute_score(given, said)[0]}


def _prepare(config: Config, tiny: bool, report: Report, data_root: Path | None) -> Rows:
    """The whole of `prepare` on a data root, or on made-up photos, by as many processes as there are cores."""
    size, processes = config.stored_size, 1 if tiny else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        root = data_root or _noise_photos(Path(folder) / "corpora", 8 if tiny else 1000 * processes)
        readings = read_corpora(root).values()
        photos = [record.image for reading in readings for record in reading.records]
        splits = Counter(record.split for reading in readings for record in reading.records)

        def whole(share: int, output: Path) -> None:
            prepare.prepare(config, output / "data", root, limit={s: -(-n // share) for s, n in splits.items()},
                            skip_damaged=True, processes=processes, report=lambda line: None)

        def ours(share: int = 1) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as output:
                whole(share, Path(output))

        def bare_loop() -> None:
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                for _ in pool.map(partial(bare_jpeg, size=size), photos, chunksize=50):
                    pass

        variants = {"bare_loop": Variant(bare_loop, len(photos)), "ours": Variant(ours, len(photos))}
        for name, share in (("ours_half", 2), ("ours_quarter", 4)):
            whole(share, Path(folder) / name)  # what a limit keeps is spread over the corpora: counted, not computed
            images = prepare.read_json(Path(folder) / name / "data" / "manifest.json")["images"]
            variants[name] = Variant(partial(ours, share), sum(images.values()))
        seconds = measure(variants, tiny, report)
        rows = {name: (1 / value, UNITS["prepare"]) for name, value in seconds.items()}
        # in a process of its own, as the command line starts it: this one has torch in memory
        arguments = (config, Path(folder) / "memory" / "data", root)
        # `str` reports nothing, and a function of this room would bring torch into that process
        peak = peak_memory(prepare.prepare, arguments, dict(skip_damaged=True, processes=processes, report=str))
    return rows | ({"ours peak memory": (peak / 2**20, "MiB")} if peak else {})


def _noise_photos(root: Path, count: int) -> Path:
    """Files of a photo's size, about 100 kB each, and all different, as a corpus in the Hualu Cup's layout."""
    folder = root / "hualu" / "train"
    folder.mkdir(parents=True)
    rows = ["images,captions"]
    for i in range(count):
        Image.merge("RGB", [Image.effect_noise((500, 375), 25) for _ in range(3)]).save(folder / f"{i}.jpg", quality=90)
        rows += [f"{i}.jpg,一只小狗在草地上"] * 5
    (root / "hualu" / "train.csv").write_text("\n".join(rows), encoding="utf-8")
    return root
