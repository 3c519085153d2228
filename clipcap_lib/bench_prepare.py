"""Preparing a corpus, beside a bare loop that only decodes, resizes and encodes the same photos."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from clipcap_lib import prepare
from clipcap_lib.bench_memory import peak_memory
from clipcap_lib.config import Config
from clipcap_lib.corpora import read_corpora
from clipcap_lib.files import read_json
from clipcap_lib.images import bare_jpeg
from clipcap_lib.timing import Report, Rows, Variant, measure


def measure_prepare(config: Config, tiny: bool, report: Report, data_root: Path | None) -> Rows:
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
            images = read_json(Path(folder) / name / "data" / "manifest.json")["images"]
            variants[name] = Variant(partial(ours, share), sum(images.values()))
        seconds = measure(variants, tiny, report)
        rows = {name: (1 / value, "images/s") for name, value in seconds.items()}
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
