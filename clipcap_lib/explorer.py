"""One image, perhaps one's own, in the eyes of what was trained: captions, alternatives, neighbours, and a control for it.

Steppers are models or ensembles, see `decode`. Embeddings are those of a CLIP checkpoint; a captioner's joint space is what
fine-tuning left of it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from clipcap_lib import controls, decode, plots
from clipcap_lib.config import InputError
from clipcap_lib.data import pad
from clipcap_lib.images import FORMATS, as_seen
from clipcap_lib.model import ClipCap
from clipcap_lib.style import Picture
from clipcap_lib.tokenizer import encode
from clipcap_lib.train import embed

# characters, and [SEP] if it ended; their probabilities; score in nats
Hypothesis = tuple[tuple[str, ...], tuple[float, ...], float]


def open_image(source: str | Path | bytes) -> Image.Image:
    """A file, or the bytes of an uploaded one -> an upright RGB image. Raises InputError for what is no image."""
    name = "the upload" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            return as_seen(image)
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise InputError(f"{name}: not an image that can be read; give a JPEG, PNG or WebP file") from error
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise InputError(f"{name}: not an image that can be read ({error}); give a JPEG, PNG or WebP file") from error


@torch.inference_mode()
def hypotheses(stepper: Any, image: Image.Image, beam_size: int = 5, max_length: int = 30) -> list[Hypothesis]:
    """The best captions of a beam search, best first, with the probability of each character given those before it."""
    tokenizer = getattr(stepper, "members", [stepper])[0].tokenizer
    suppress = sorted({tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id})
    found = decode.beam_search(stepper, [image], beam_size, max_length, suppress=suppress)[0]
    # what was cut at the longest length has no end
    rows = [[*hypothesis.tokens, stepper.end_id][:max_length] for hypothesis in found]
    ids = pad(rows, stepper.pad_id)  # (beams, T)
    state, logits = stepper.start([image])
    stepper.reorder(state, torch.zeros(len(rows), dtype=torch.long, device=logits.device))
    logits, probabilities = logits.expand(len(rows), -1), []
    for position in range(ids.shape[1]):
        if position:
            logits = stepper.step(state, ids[:, position - 1].to(logits.device))
        probabilities.append(logits.float().softmax(dim=-1).cpu().gather(1, ids[:, position, None])[:, 0])
    by_row = torch.stack(probabilities, dim=1).tolist()
    return [(tuple(tokenizer.convert_ids_to_tokens(row)), tuple(values[:len(row)]), hypothesis.score)
            for row, values, hypothesis in zip(rows, by_row, found, strict=True)]


@dataclass(frozen=True)
class Pool:
    """Prepared images with their captions, as a CLIP sees them: unit-norm embeddings (I, D) and (I, D), first captions."""

    model: ClipCap
    rows: Any
    captions: tuple[str, ...]
    images: np.ndarray
    texts: np.ndarray

    @classmethod
    def of(cls, model: ClipCap, rows: Any) -> Pool:
        """Embed all images of `rows` and the first caption of each."""
        captions = tuple(row[0] for row in rows["captions"][:])
        images, texts, _ = embed(model.eval(), rows, [[caption] for caption in captions])
        return cls(model, rows, captions, images.cpu().numpy(), texts.cpu().numpy())

    def nearest_images(self, query: Image.Image | str, k: int = 5) -> list[tuple[Image.Image, str, float]]:
        """The k images nearest to an image or a text: (image, its first caption, cosine), best first."""
        cosines = self.images @ self._embedding(query)
        return [(self.rows[int(i)]["image"], self.captions[i], float(cosines[i])) for i in _best(cosines, k)]

    def nearest_captions(self, query: Image.Image | str, k: int = 5) -> list[tuple[str, float]]:
        """The k different captions nearest to an image or a text: (caption, cosine), best first."""
        cosines, found = self.texts @ self._embedding(query), {}
        for i in _best(cosines, len(cosines)):
            found.setdefault(self.captions[i], float(cosines[i]))
            if len(found) == k:
                break
        return list(found.items())

    @torch.inference_mode()
    def _embedding(self, query: Image.Image | str) -> np.ndarray:
        if isinstance(query, str):
            ids = pad(encode(self.model.tokenizer, [query], self.model.config.context), self.model.pad_id)
            return self.model.encode_text(ids.to(self.model.logit_scale.device))[0].float().cpu().numpy()
        return self.model.encode_image(self.model.preprocess([query]))[0].float().cpu().numpy()


def _best(values: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-values, kind="stable")[:k]


def image_explorer(rows: Sequence[Any], draw: Callable[[Image.Image], Picture], folder: Path, number: int = 1) -> Any:
    """A control that shows `draw(image)` for an image of `rows`, or for one that is uploaded, and saves what is shown.

    Whichever was chosen last is shown; `.shown` of the box has it, and a button goes back from an upload to the image of
    the slider. A file that is no image is named in `.message` and changes nothing. Saved pictures are
    <folder>/explorer-<name>.png.
    """
    import ipywidgets

    slider = controls.slider("image", len(rows), number)
    upload = ipywidgets.FileUpload(accept="image/*", multiple=False, description="own image",
                                   tooltip="a file of your own; it stays on this machine")
    message = ipywidgets.Label()
    shown: dict[str, Any] = {"upload": (), "number": None, "figure": None}

    def picture(image: int, upload: Sequence[Mapping[str, Any]]) -> Picture:
        chosen, name = None, ""
        if upload and upload is not shown["upload"]:
            try:
                chosen, name = open_image(bytes(upload[0]["content"])), Path(upload[0]["name"]).stem
                message.value = upload[0]["name"]
            except InputError as error:
                message.value = str(error).replace("the upload", upload[0]["name"])
        elif image != shown["number"]:
            row = rows[image - 1]
            chosen, name, message.value = row["image"], Path(str(row["file_name"])).stem, ""
        shown.update(upload=upload, number=image)
        if chosen is not None:
            shown.update(image=chosen, name=name, figure=draw(chosen))
        return shown["figure"]

    def back() -> None:
        shown["number"] = None
        box.redraw()

    def keep() -> None:
        message.value = f"saved: {plots.save(shown['figure'], folder, 'explorer-' + shown['name']).name}"

    box = controls.panel({"image": slider, "upload": upload}, picture)
    controls.add(box, back=controls.button("slider's image", back, "back from an upload to the image of the slider"),
                 save=controls.button("save picture", keep, f"as a file in {folder.name}/"), message=message)
    box.message, box.shown = message, shown
    return box


def says(steppers: Mapping[str, tuple[Any, int]], image: Image.Image, max_length: int = 30) -> dict[str, str]:
    """The caption of an image by each of {name: (stepper, beam size)}."""
    return {name: decode.caption(stepper, getattr(stepper, "members", [stepper])[0].tokenizer, [image], beam, max_length)[0]
            for name, (stepper, beam) in steppers.items()}
