"""The counts in `data_cards/`, as the readers find them where a corpus is at hand.

    python -m clipcap_lib.corpora.cards flickr8k-cn <folder of the corpus>      prints the table for its card
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from clipcap_lib.corpora import CORPORA, SPLITS, Reading


def counts_table(sets: Mapping[str, Reading]) -> str:
    """Images, captions and their lengths in characters by set of captions and split, as a Markdown table."""
    lines = ["| captions | translated | split | images | captions | distinct | mean length | longest |", "|" + "---|" * 8]
    for name, reading in sets.items():
        for split in SPLITS:
            records = [record for record in reading.records if record.split == split]
            texts = [caption for record in records for caption in record.captions]
            if not records:
                continue
            how = " and ".join(sorted({record.translated for record in records}))
            lengths = [len(text) for text in texts]
            figures = [f"{sum(lengths) / len(texts):.1f}", f"{max(lengths)}"] if texts else ["-", "-"]
            lines.append(f"| {name} | {how} | {split} | {len(records):,} | {len(texts):,} | {len(set(texts)):,} | "
                         f"{' | '.join(figures)} |")
    return "\n".join(lines)


def read_sets(corpus: str, folder: Path, names: list[str] | None = None) -> dict[str, Reading]:
    """A corpus read with each of its sets of captions, or with those named. Raises InputError as its reader does."""
    module = importlib.import_module(f"clipcap_lib.corpora.{CORPORA[corpus]}")
    if not hasattr(module, "CAPTIONS"):
        return {"all": module.read(folder)}
    return {name: module.read(folder, name) for name in names or module.CAPTIONS}


if __name__ == "__main__":
    print(counts_table(read_sets(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])))
