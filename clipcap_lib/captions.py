"""Captions in, tokens out: `{file: [captions]}` from dictionaries or JSON files, checked, and segmented for scoring."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipcap_lib.config import InputError

SEGMENTATIONS = {"jieba": "full stop dropped", "characters": "all dropped"}  # and what becomes of punctuation

Captions = Mapping[str, Sequence[str]]  # file name -> captions


def load_captions(path: str | Path) -> dict[str, list[str]]:
    """Read a `{"<file name>": ["<caption>", ..]}` JSON file, the form of res.json.

    Raises InputError naming the file and the image for whatever is not that: no such file, not UTF-8, not JSON, a name
    twice, another type, an image without captions, half of a surrogate pair.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        captions = json.loads(text, object_pairs_hook=functools.partial(_unique, path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a JSON file of captions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected {{\"<file name>\": [\"<caption>\"]}}") from error
    return checked_captions(captions, str(path))


def _unique(path: str | Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    # json.loads would keep the last of two entries without a word, and the score would be of an unknown mixture.
    captions = dict(pairs)
    if len(captions) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: '{_printable(twice)}' is there twice; keep one")
    return captions


def checked_captions(captions: object, source: str) -> dict[str, list[str]]:
    """The captions as lists, or InputError: naming `source` and the image for whatever is not `{file: [captions]}`."""
    if not isinstance(captions, Mapping):
        raise InputError(f"{source}: expected {{\"<file name>\": [\"<caption>\"]}}, found {type(captions).__name__}")
    for name, row in captions.items():
        if not isinstance(name, str):
            raise InputError(f"{source}: a file name is text, not {name!r}")
        if not isinstance(row, Sequence) or isinstance(row, str) or not all(isinstance(c, str) for c in row):
            raise InputError(f"{source}: '{_printable(name)}' must have a list of captions, each of them text")
        if not row:
            raise InputError(f"{source}: '{_printable(name)}' has no caption")
        for text in (name, *row):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(f"{source}: '{_printable(name)}' holds half of a surrogate pair at character "
                                 f"{error.start}; write the whole character") from error
    return {name: list(row) for name, row in captions.items()}


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def segment(captions: Sequence[str], segmentation: str) -> list[list[str]]:
    """Captions -> lists of tokens. Raises InputError for an unknown segmentation.

    "jieba": precise mode with new words from the hidden Markov model, after taking out the full stop 。 (as the AI
    Challenger scorer). "characters": every character but punctuation, symbols, space and control characters.
    """
    if segmentation not in SEGMENTATIONS:
        raise InputError(f"unknown segmentation '{segmentation}'; choose {' or '.join(SEGMENTATIONS)}")
    return [list(_segment(caption, segmentation)) for caption in captions]


@functools.lru_cache(maxsize=2**17)  # references come back with every system scored against them
def _segment(caption: str, segmentation: str) -> tuple[str, ...]:
    if segmentation == "characters":
        return tuple(c for c in caption if unicodedata.category(c)[0] not in "PSZC")
    return tuple(word for word in _jieba().cut(caption.replace("。", ""), HMM=True) if word.strip())


def word_spans(caption: str) -> list[tuple[str, int, int]]:
    """The words of a caption as jieba cuts it: (word, first character, end); together they are the whole caption."""
    words = _jieba().lcut(caption, HMM=True)
    ends = list(itertools.accumulate(map(len, words)))
    return [(word, end - len(word), end) for word, end in zip(words, ends, strict=True)]


# what words are made of that a whole sentence does not end in: particles of attributes, prepositions, conjunctions,
# numerals and measure words
FUNCTION_CHARACTERS = frozenset("的地得在和与跟及或并而把被从向对于为是这那一二三四五六七八九十两几个只条辆正些")


def broken_endings(captions: Sequence[str]) -> float:
    """The share of captions, 0 to 1, whose last word, by jieba, is a function word: what training on scores is prone to.

    草地 and 方向 are none, though their last characters are; 一只 and 三辆 are, for want of a noun.
    """
    bare = ["".join(_segment(caption, "characters")) for caption in captions]
    return sum(bool(text) and set(_segment(text, "jieba")[-1]) <= FUNCTION_CHARACTERS for text in bare) / max(1, len(bare))


def main_nouns(captions: Captions) -> dict[str, str]:
    """What each image is about, in a word: the noun (by jieba) that most of its captions hold, "-" if none holds one.

    Among several, the one that is commonest over all images.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jieba.posseg import POSTokenizer
    tagger = POSTokenizer(_jieba())
    nouns = {file: Counter(word for caption in row for word in {pair.word for pair in tagger.cut(caption)
                                                                if pair.flag.startswith("n")})
             for file, row in captions.items()}
    total = sum(nouns.values(), Counter())
    return {file: max(found, key=lambda word: (found[word], total[word], word), default="-")
            for file, found in nouns.items()}


@functools.cache
def _jieba():
    with warnings.catch_warnings():  # jieba imports a module that announces its own retirement
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(logging.WARNING)
    # A tokenizer of its own: words that a notebook adds to jieba's shared one must not change scores.
    return jieba.Tokenizer()
