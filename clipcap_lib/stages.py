"""The stages of training: each a loss, a validation, and which of its numbers chooses the best checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from clipcap_lib import decode, metrics
from clipcap_lib.captioner import Captioner
from clipcap_lib.captions import broken_endings
from clipcap_lib.cider import CiderD, document_frequencies
from clipcap_lib.config import Config, InputError
from clipcap_lib.data import Batch, image_batches, pad
from clipcap_lib.embeddings import retrieval
from clipcap_lib.losses import caption_loss, in_chunks, joint_contrastive_loss, self_critical_loss
from clipcap_lib.model import ClipCap
from clipcap_lib.tokenizer import encode

COLOUR_WEIGHT = 0.3  # of the image stage's colour labels: at 1, colours drove kinds of objects out (86 % right, not 97 %)
SAMPLES = 6  # validation captions shown while the captioner learns
RECALL = ("image->text R@1", "text->image R@1")


class Stage:
    """What the loop asks of a stage."""

    name: str  # also its settings in Config
    sees_images = True
    by_length = True  # batches hold captions of similar length, which saves padding
    capturable = True  # its loss only asks the device for work, so that a GPU's steps can be captured
    best_by: str | None = None  # the number of `validate` that chooses the best checkpoint; None: the latest is the best

    def __init__(self, config: Config, validation: Any, *_: Any):
        self.stage, self.config, self.validation = getattr(config, self.name), config, validation

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        """The scalar to be made smaller."""
        raise NotImplementedError

    def told(self) -> dict[str, float]:
        """What the journal is told beside the loss: means over this process's images since it was last asked."""
        return {}

    def validate(self, model: ClipCap) -> dict[str, Any]:
        """Numbers on validation images, and perhaps "samples": {file: caption} and a "warning"."""
        return {}

    def before(self, model: ClipCap) -> dict[str, float]:
        """What is measured before the first step, on the weights that training starts from."""
        return {}

    def after(self, best: ClipCap, before: dict[str, float]) -> dict[str, Any]:
        """What is said of the best checkpoint when all is over, perhaps with a "warning"."""
        return {}


class ImageStage(Stage):
    """The image encoder alone learns to name labelled objects: the stand-in for weights pretrained on ImageNet.

    An image's captions are its labels: first its class, then its colour, so that the features keep colours apart as well.
    Classes are read off the first dimensions of the image head's first layer, which CLIP pretraining then learns anew.
    Batches are mixed: by length of the label, each would hold few classes.
    """

    name, by_length = "image", False

    def __init__(self, config: Config, validation: Any, tokenizer: PreTrainedTokenizerFast, rows: Any):
        super().__init__(config, validation)
        names = [sorted(set(column)) for column in zip(*rows["captions"][:], strict=True)]  # classes, then colours
        words, self.sizes = [name for column in names for name in column], [len(column) for column in names]
        self.stage = replace(self.stage, captions_per_visit=len(names))  # an image shows all its labels each time
        self.labels = pad(encode(tokenizer, words, config.model.context), tokenizer.pad_token_id)  # (labels, T)
        if len(words) > config.model.width or len(self.labels.unique(dim=0)) < len(words):
            raise InputError(f"{len(words)} labels of images cannot be told apart by this model and vocabulary")

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        self.labels = self.labels.to(batch.ids.device)  # once: a step that is captured must not copy
        length = max(batch.ids.shape[1], self.labels.shape[1])  # a batch may be padded further than the longest label
        ids, labels = (F.pad(rows, (0, length - rows.shape[1]), value=model.pad_id) for rows in (batch.ids, self.labels))
        targets = (ids[:, None] == labels).all(dim=-1).int().argmax(dim=1).view(len(batch.images), -1)  # (N, labels each)
        logits = model.image_head.project(model.image_encoder(batch.images)[0])[:, :len(self.labels)].float()
        total, start = 0.0, 0
        for weight, part, target in zip((1.0, COLOUR_WEIGHT), logits.split(self.sizes, dim=1), targets.T, strict=False):
            total = total + weight * F.cross_entropy(part, target - start)
            start += part.shape[1]
        return total


class LanguageStage(Stage):
    """The GPT alone learns to write captions: the stand-in for a GPT pretrained on other text."""

    name, sees_images = "language", False

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        return caption_loss(model.language_logits(batch.ids[:, :-1]), batch.ids[:, 1:], model.pad_id)


class ClipStage(Stage):
    """Both encoders learn the joint space."""

    name, best_by = "clip", "recall_sum"

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        size = self.stage.chunk_size
        image = in_chunks(model.encode_image, batch.images, size, model)
        text = in_chunks(model.encode_text, batch.ids, size, model)
        return _contrastive(model, image, text, batch, self.stage.mask_duplicates)

    def validate(self, model: ClipCap) -> dict[str, float]:
        recalls = retrieval(model, self.validation)
        return {**recalls, "recall_sum": sum(value for name, value in recalls.items() if "R@" in name)}


class CaptionStage(Stage):
    """The same GPT learns to continue the image's prefix; the best checkpoint is the one with the best CIDEr.

    Fine-tuning on captions alone may cost the joint space what CLIP pretraining gave it: recall is measured before and
    after, and a contrastive term (`StageConfig.contrastive`) keeps it.
    """

    name, best_by = "caption", "CIDEr"

    def __init__(self, config: Config, validation: Any, *_: Any):
        super().__init__(config, validation)
        self.references = [metrics.segment(captions, "characters") for captions in validation["captions"][:]]
        self.frequencies = metrics.document_frequencies(self.references)

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        prefix = model.prefix(batch.images)
        loss = caption_loss(model.caption_logits(prefix, batch.ids[:, :-1]), batch.ids[:, 1:], model.pad_id,
                            self.stage.label_smoothing)
        return loss + self._kept_joint(model, prefix, batch)

    def _kept_joint(self, model: ClipCap, prefix: Tensor, batch: Batch) -> Tensor | float:
        """The contrastive term of the prefix and the batch's captions, if the settings want one."""
        if not self.stage.contrastive:
            return 0.0
        image = F.normalize(prefix[:, 0], dim=-1)  # the first prefix token is the embedding of stage one
        return self.stage.contrastive * _contrastive(model, image, model.encode_text(batch.ids), batch,
                                                     self.stage.mask_duplicates)

    @torch.inference_mode()
    def validate(self, model: ClipCap) -> dict[str, Any]:
        captions = [caption for _, images in image_batches(self.validation)
                    for caption in decode.caption(model, model.tokenizer, images, max_length=self.config.max_length)]
        values = metrics.cider_d(metrics.segment(captions, "characters"), self.references, self.frequencies)
        samples = dict(zip(self.validation["file_name"][:SAMPLES], captions, strict=False))
        return {"CIDEr": 100 * float(np.mean(values)), "distinct": len(set(captions)),
                "broken endings": 100 * broken_endings(captions), "samples": samples}

    def before(self, model: ClipCap) -> dict[str, float]:
        return retrieval(model, self.validation)

    def after(self, best: ClipCap, before: dict[str, float]) -> dict[str, Any]:
        found = retrieval(best, self.validation)
        chance = 100 / len(self.validation)
        had, left = (sum(recalls[name] for name in RECALL) / len(RECALL) for recalls in (before, found))
        said: dict[str, Any] = {"retrieval": {"before": before, "after": found}}
        if had > 2 * chance and left < had / 2:  # weights that never found anything have nothing to lose
            said["warning"] = (f"retrieval did not survive caption fine-tuning: recall@1, mean of both ways, fell from "
                               f"{had:.1f} % to {left:.1f} %; a contrastive term keeps it (caption stage, contrastive=0.1)")
        return said


class ScstStage(CaptionStage):
    """Self-critical sequence training: the captioner's own samples, those that score above its others made more probable.

    The reward is CIDEr-D (0 to 10) against all captions of the image, by the tokens that the model writes, [SEP] included:
    without it, captions that break off lose nothing. Document frequencies are those of the training split. Dropout is off
    and BatchNorm in evaluation mode, so that what is sampled is what is trained, but for precision: samples are drawn in
    that of the weights. They are drawn, and trained, at `Config.scst_temperature`: at 1, samples of a captioner fresh from
    cross-entropy were far worse than what it writes greedily, and training narrowed it to few captions (README). Where
    images are few, the training captions' own loss beside it (`Config.scst_cross_entropy`) keeps captions apart.
    """

    name, capturable = "scst", False

    def __init__(self, config: Config, validation: Any, tokenizer: PreTrainedTokenizerFast, rows: Any):
        super().__init__(config, validation)
        captions = rows["captions"][:]
        encoded = iter(encode(tokenizer, [caption for row in captions for caption in row], config.model.context))
        # tokens are strings to the scorer: ids in decimal are as good
        self.truth = [[[str(token) for token in next(encoded)[1:]] for _ in row] for row in captions]
        self.training_frequencies = document_frequencies(self.truth)
        self.unwritten = sorted({tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id})
        self.writer: _Writer | None = None
        self.began = -math.inf  # validation CIDEr of the weights it started from
        self.earned: list[Tensor] = []  # rewards since they were last told

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        model.eval()
        prefix = model.prefix(batch.images)
        said = self._samples(model, prefix)  # N x K x tokens
        rewards = self.rewards(batch.image_of.view(len(said), -1)[:, 0].tolist(), said)
        self.earned.append(rewards.flatten())
        lengths = torch.tensor([[len(tokens) for tokens in row] for row in said], device=batch.ids.device)
        ids = pad([tokens for row in said for tokens in row], model.pad_id).to(batch.ids.device)  # (N * K, T)
        logits = model.caption_logits(prefix, F.pad(ids[:, :-1], (1, 0), value=model.start_id)).float()
        logits = logits / self.config.scst_temperature
        logits[..., self.unwritten] = -torch.inf  # as they were sampled
        chosen = torch.where(ids == model.pad_id, model.end_id, ids)  # pads do not count, but must have a number
        scores = logits.log_softmax(dim=-1).gather(2, chosen[..., None]).view(*lengths.shape, -1)  # (N, K, T)
        loss = self_critical_loss(scores, lengths, rewards.to(scores.device)) + self._kept_joint(model, prefix, batch)
        if weight := self.config.scst_cross_entropy:
            logits, targets = model.caption_logits(prefix, batch.ids[:, :-1]), batch.ids[:, 1:]
            true = caption_loss(logits, targets, model.pad_id, self.stage.label_smoothing)
            loss = loss + weight * true * len(targets) / (targets != model.pad_id).sum()  # a token's, as the rewards' is
        return loss

    def _samples(self, model: ClipCap, prefix: Tensor) -> list[list[list[int]]]:
        """prefix (N, P, D) -> K captions an image as token ids, [SEP] last unless they were cut at the longest allowed."""
        if self.writer is None or self.writer.model is not model:
            self.writer = _Writer(model, pack=False)  # which reads weights as they are trained
        longest = self.config.max_length
        options = decode.Options(max_length=longest, temperature=self.config.scst_temperature, suppress=self.unwritten,
                                 n_best=self.stage.captions_per_visit, seed=int(torch.randint(2**31, ())))
        with torch.autocast(prefix.device.type, enabled=False):  # which would cast all weights at each step
            found = decode.search(self.writer, model.begin_from(prefix.detach()), options)
        return [[[*one.tokens, model.end_id][:longest] for one in row] for row in found]

    def told(self) -> dict[str, float]:
        earned, self.earned = self.earned, []
        return {"reward": torch.cat(earned).mean().item()}

    def rewards(self, images: list[int], said: list[list[list[int]]]) -> Tensor:
        """CIDEr-D of N x K token lists, captions of the training images of these numbers -> (N, K)."""
        judge = CiderD([self.truth[number] for number in images], self.training_frequencies)
        columns = [judge([[str(token) for token in tokens] for tokens in column]) for column in zip(*said, strict=True)]
        return torch.from_numpy(np.stack(columns, axis=1)).float()

    def before(self, model: ClipCap) -> dict[str, float]:
        self.began = super().validate(model)["CIDEr"]
        return super().before(model)

    def validate(self, model: ClipCap) -> dict[str, Any]:
        found = super().validate(model)
        if found["CIDEr"] < self.began:
            found["warning"] = (f"validation CIDEr is {found['CIDEr']:.1f}, below the {self.began:.1f} that self-critical "
                                "training began with; lower its learning rate, or raise scst_cross_entropy")
        return found


class _Writer(Captioner):
    """A Stepper over weights that are being trained, which starts from what captions begin with instead of images."""

    start = Captioner.start_from


def _contrastive(model: ClipCap, image: Tensor, text: Tensor, batch: Batch, mask: bool) -> Tensor:
    """The loss of images (N, D) and all their captions (N * C, D), over all processes."""
    image = image.repeat_interleave(len(text) // len(image), dim=0)
    return joint_contrastive_loss(image, text, model.scale(), batch.image_of, batch.text_of, mask)


STAGES = {kind.name: kind for kind in (ImageStage, LanguageStage, ClipStage, CaptionStage, ScstStage)}
