"""Character tokenizer: a transformers fast tokenizer over a vocabulary of characters.

A caption is `[CLS] c1 .. cn [SEP]`; ids 0 to 3 are `[PAD] [UNK] [CLS] [SEP]`, as in the original's vocab_cn.json, unless the
vocabulary is a pretrained GPT's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipcap_lib.config import InputError

if TYPE_CHECKING:  # imported where it is used: it brings torch along, and `prepare` checks captions long before
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def normalise_caption(caption: str) -> str:
    """The caption as models see it: no white space, no full stop at the end. It says nothing about the image."""
    return "".join(caption.split()).rstrip("。.")


def build_vocabulary(captions: Iterable[str], minimum: int = 1) -> list[str]:
    """Special tokens, then the characters that occur at least `minimum` times, most frequent first (ties by code)."""
    counts = Counter("".join(map(normalise_caption, captions)))
    characters = sorted((c for c, n in counts.items() if n >= minimum), key=lambda c: (-counts[c], c))
    return [*SPECIAL_TOKENS, *characters]


def build_tokenizer(vocabulary: Sequence[str], lower_case: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose token ids are the places in `vocabulary`. Raises InputError if special tokens are not among them.

    lower_case: reads A as a, as a pretrained GPT's own may.
    They are 0 to 3 in vocabularies made here and in the original's, elsewhere in a pretrained GPT's.
    """
    _check_vocabulary(vocabulary, "the vocabulary")
    ids = {token: number for number, token in enumerate(vocabulary)}
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    if lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", bos_token="[CLS]", eos_token="[SEP]",
                                   clean_up_tokenization_spaces=False)


def read_vocabulary(path: Path) -> list[str]:
    """Read the original's vocab_cn.json: a list of tokens, or a mapping from token to id (or from id to token)."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON vocabulary ({error})") from error
    if isinstance(content, dict) and content and all(isinstance(value, str) for value in content.values()):
        content = {token: number for number, token in content.items()}
    if isinstance(content, dict):
        try:
            ids = {int(number): token for token, number in content.items()}
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: ids must be whole numbers") from error
        if sorted(ids) != list(range(len(content))):
            raise InputError(f"{path}: ids must run from 0 to {len(content) - 1} without a gap")
        content = [ids[number] for number in range(len(ids))]
    if not (isinstance(content, list) and all(isinstance(token, str) for token in content)):
        raise InputError(f"{path}: expected a list of tokens or a mapping from token to id")
    _check_vocabulary(content, str(path))
    return content


def _check_vocabulary(vocabulary: Sequence[str], source: str) -> None:
    if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
        raise InputError(f"{source}: a vocabulary holds {' '.join(SPECIAL_TOKENS)}; this one has no {' '.join(missing)}")
    if len(set(vocabulary)) != len(vocabulary):
        raise InputError(f"{source}: holds a token twice")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder` by `save_pretrained`. Raises InputError if there is none."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise InputError(f"{folder}: holds no tokenizer.json; run `python -m clipcap_lib prepare` first")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """All tokens in the order of their ids."""
    return tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def encode(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], context: int) -> list[list[int]]:
    """Token ids `[CLS] c1 .. cn [SEP]` of each caption, cut to `context` with [SEP] kept.

    `split_special_tokens` keeps a caption that contains the text "[SEP]" from ending there.
    """
    return tokenizer([normalise_caption(caption) for caption in captions], truncation=True, max_length=context,
                     split_special_tokens=True)["input_ids"]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    """The text up to the first [SEP], without special tokens."""
    text = []
    for number in ids:
        if number == tokenizer.sep_token_id:
            break
        if number not in (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id):
            text.append(tokenizer.convert_ids_to_tokens(int(number)))
    return "".join(text)
