"""Embeddings of prepared rows and their captions, and what follows from them: similarity, recall, nearest captions.

Models are put into evaluation mode: in training, BatchNorm would take the images into its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipcap_lib import metrics
from clipcap_lib.data import image_batches, pad
from clipcap_lib.model import ClipCap
from clipcap_lib.tokenizer import encode


@torch.inference_mode()
def embed(model: ClipCap, rows: Any, captions: list[list[str]]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Unit-norm embeddings of prepared rows and their captions: images (I, D), texts (T, D), image of each text (T,)."""
    image_of_text = np.repeat(np.arange(len(captions)), [len(row) for row in captions])
    return embed_images(model, rows), embed_texts(model, [c for row in captions for c in row]), image_of_text


@torch.inference_mode()
def embed_images(model: ClipCap, rows: Any) -> Tensor:
    """Unit-norm embeddings of prepared rows: (I, D) float32."""
    model.eval()
    return torch.cat([model.encode_image(model.preprocess(images)) for _, images in image_batches(rows)]).float()


@torch.inference_mode()
def embed_texts(model: ClipCap, texts: Sequence[str]) -> Tensor:
    """Unit-norm embeddings of texts: (T, D) float32."""
    ids, device = encode(model.eval().tokenizer, list(texts), model.config.context), model.logit_scale.device
    parts = (pad(ids[i:i + 256], model.pad_id).to(device) for i in range(0, len(ids), 256))
    return torch.cat([model.encode_text(part) for part in parts]).float()


def retrieval(model: ClipCap, rows: Any, captions_per_image: int = 1) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent and median ranks, both ways, over all images of `rows` and their captions."""
    return retrieval_of_set(model, rows, dict(zip(rows["file_name"][:], rows["captions"][:], strict=True)),
                            captions_per_image)


def retrieval_of_set(model: ClipCap, rows: Any, references: Mapping[str, list[str]],
                     captions_per_image: int = 1) -> dict[str, float]:
    """The same with captions from elsewhere: a board's are held apart from its images."""
    captions = [references[file][:captions_per_image] for file in rows["file_name"][:]]
    images, texts, image_of_text = embed(model, rows, captions)
    return metrics.recall_at_k((images @ texts.mT).cpu().numpy(), image_of_text)


def similarities(model: ClipCap, rows: Any, captions: list[list[str]]) -> np.ndarray:
    """Cosine similarities (I, T) of prepared rows and texts, in order."""
    images, texts, _ = embed(model, rows, captions)
    return (images @ texts.mT).cpu().numpy()


def nearest_captions(model: ClipCap, rows: Any, references: Mapping[str, list[str]], queries: Sequence[int],
                     k: int = 3) -> dict[str, list[str]]:
    """For some of the rows, the k different captions of the whole set that are most similar -> {file: captions}."""
    files = rows["file_name"][:]
    pool = list(dict.fromkeys(references[file][0] for file in files))
    found = similarities(model, rows.select(list(queries)), [pool])
    return {files[query]: [pool[i] for i in np.argsort(-row, kind="stable")[:k]]
            for query, row in zip(queries, found, strict=True)}
