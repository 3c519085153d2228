"""The data cards: metadata that the Hub would take, the sections, and counts that the reader finds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard
from published import flickr8k

from clipcap_lib.corpora import CORPORA, cards

ROOT = Path(__file__).parents[1]
SECTIONS = ["Summary", "Structure", "Source and licence", "Translation", "Known defects", "How it is used here"]
REQUIRED = {"pretty_name", "language", "license", "task_categories", "annotations_creators", "language_creators",
            "multilinguality", "size_categories", "source_datasets"}


def card_of(corpus: str) -> DatasetCard:
    return DatasetCard.load(ROOT / "data_cards" / f"{corpus}.md")


def vocabulary(name: str) -> dict | list:
    """A list of the values that the Hub takes, as `datasets` carries it."""
    path = Path(datasets.__file__).parent / "utils" / "resources" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_is_one_card_for_each_corpus():
    assert {path.stem for path in (ROOT / "data_cards").glob("*.md")} == set(CORPORA)


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_card_has_metadata_of_the_values_that_the_hub_takes(corpus):
    """`DatasetCard.validate` posts the card to the Hub. Offline, what it looks at is looked at here.

    The card parses, no field is missing or misspelt, and values are of the lists that `datasets` carries.
    """
    card = card_of(corpus)
    data = card.data.to_dict()
    assert set(data) == REQUIRED and all(data.values())
    assert DatasetCard(str(card)).data.to_dict() == data, "it survives being written and read again"
    assert data["language"] == ["zh"] and data["language"][0] in vocabulary("languages")
    assert data["license"] == "unknown", "a licence of the Hub's list that says that none is known"
    assert data["task_categories"] == ["image-to-text"]
    assert set(data["annotations_creators"]) <= set(vocabulary("creators")["annotations"])
    assert set(data["language_creators"]) <= set(vocabulary("creators")["language"])
    assert set(data["multilinguality"]) <= set(vocabulary("multilingualities"))
    assert set(data["size_categories"]) <= set(vocabulary("size_categories"))
    assert set(data["source_datasets"]) <= {"original", "extended"}


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_card_has_its_sections_an_excerpt_and_says_where_its_counts_are_from(corpus):
    text = card_of(corpus).text
    assert re.findall(r"^## (.+)$", text, re.M) == SECTIONS
    parts = dict(zip(SECTIONS, re.split(r"^## .+$", text, flags=re.M)[1:], strict=True))
    assert all(len(part.strip()) > 40 for part in parts.values())
    excerpt = re.search(r"```\n(.+?)```", parts["Structure"], re.S)
    assert excerpt and re.search(r"[\u4e00-\u9fff]{5}", excerpt[1])
    assert ("computed by the reader" in parts["Structure"]) != ("as published" in parts["Structure"])


def test_the_counts_of_flickr8k_cn_are_what_its_reader_finds(real_data_root):
    sets = cards.read_sets("flickr8k-cn", real_data_root / "flickr8k-cn", ["zhc", "zhb", "zhm"])
    assert cards.counts_table(sets) in card_of("flickr8k-cn").text


def test_the_excerpt_of_flickr8k_cn_is_of_its_file(real_data_root):
    lines = (real_data_root / "flickr8k-cn/data/flickr8kzhc.caption.txt").read_text(encoding="utf-8").split("\n")
    excerpt = re.search(r"```\n(.+?)```", card_of("flickr8k-cn").text, re.S)[1].strip().split("\n")
    assert len(excerpt) == 3 and set(excerpt) <= set(lines)


def test_the_counted_table_has_a_row_for_each_set_and_split(tmp_path: Path):
    table = cards.counts_table(cards.read_sets("flickr8k-cn", flickr8k(tmp_path), ["zhc", "zhm"])).split("\n")
    assert len(table) == 2 + 3 + 1
    assert table[2] == "| zhc | none | train | 1 | 2 | 2 | 11.0 | 15 |"
    assert table[5].startswith("| zhm | human | test | 1 | 1 | 1 |")
