"""Does self-critical training pay? Against cross-entropy for as many steps more, from the same captioner.

    runs/<preset>/scst/<name>            self-critical          runs/<preset>/caption/<name>-longer   cross-entropy
    runs/<preset>/scst/<name>-gain.json  the rows of `self_critical_gain`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipcap_lib import checkpoint, decode, metrics, processes, train
from clipcap_lib.captions import broken_endings
from clipcap_lib.config import Config, InputError
from clipcap_lib.data import image_batches, load_prepared
from clipcap_lib.files import read_json, write_json
from clipcap_lib.systems import boards, main_segmentation


def self_critical_gain(config: Config, run: Path, name: str, seed: int, without: tuple[str, ...] = (),
                       progress: Callable[[dict[str, Any]], None] = lambda line: None) -> list[dict[str, Any]]:
    """Train both ways, caption the first board with both -> two rows, greedy and with the preset's beams.

    A row: beams; CIDEr (characters for drawn corpora, else jieba) "before", after "SCST" and after "cross-entropy"; of the
    difference of the last two the value, its 95 % paired bootstrap interval and p; and of each how many different captions
    it wrote ("distinct") and the share of captions that end in a function word ("broken", %). Both ways take the same
    images a step, as many steps and the same learning rate, and train the same part of the model. Where several processes
    train, the main one compares, and the others return no row.
    Raises InputError as `train.self_critical` does, and where there is no such set.
    """
    run = Path(run)
    if not boards(run):
        raise InputError(f"{run}: no set to compare on; prepare a corpus with a test split or a board")
    began = run / "caption" / name
    rewarded = train.self_critical(config, run, name, seed, without, progress=progress)
    same_steps = replace(config.caption, epochs=config.scst.epochs, visits=config.scst.visits, warmup=config.scst.warmup,
                         batch_size=config.scst.batch_size, learning_rate=config.scst.learning_rate,
                         schedule=config.scst.schedule, freeze=config.scst.freeze, image_rate=config.scst.image_rate)
    longer = train.train_stage("caption", replace(config, caption=same_steps), run, f"{name}-longer", seed, without,
                               [(began / "best", None)], progress)
    if processes.rank():  # several trained; one compares
        return []
    board, segmentation = boards(run)[0], main_segmentation(run)
    rows = load_prepared(run / "data", board)
    references = metrics.prepare_references(read_json(run / "data" / f"references-{board}.json"), segmentation)
    models = {way: checkpoint.load(folder / "best")
              for way, folder in (("before", began), ("SCST", rewarded), ("cross-entropy", longer))}
    found = []
    for beams in (1, config.beam_size):
        said = {way: {file: [text] for files, images in image_batches(rows) for file, text in
                      zip(files, decode.caption(model, model.tokenizer, images, beams, config.max_length,
                                                length_penalty=config.length_penalty), strict=True)}
                for way, model in models.items()}
        scored = {way: metrics.score(captions, references, metrics=("CIDEr",)) for way, captions in said.items()}
        paired = metrics.paired_bootstrap(scored["SCST"], scored["cross-entropy"], "CIDEr")
        found.append({"set": board, "beams": beams, **{way: one.values["CIDEr"] for way, one in scored.items()},
                      **vars(paired), "signature": scored["SCST"].signature,
                      "steps": {way: checkpoint.about(folder)["step"]
                                for way, folder in (("SCST", rewarded / "last"), ("cross-entropy", longer / "last"))},
                      "distinct": {way: len({one for one, in captions.values()}) for way, captions in said.items()},
                      "broken": {way: 100 * broken_endings([one for one, in captions.values()])
                                 for way, captions in said.items()}})
    write_json(run / "scst" / f"{name}-gain.json", found)
    return found
