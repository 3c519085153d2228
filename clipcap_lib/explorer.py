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
from PIL import Image, ImageOps

from clipcap_lib import decode, plots
from clipcap_lib.config import InputError
from clipcap_lib.data import pad
from clipcap_lib.model import ClipCap
from clipcap_lib.style import Picture
from clipcap_lib.tokenizer import encode
from clipcap_lib.train import embed

Hypothesis = tuple[tuple[str, ...], tuple[float, ...], float]  # characters and [SEP], their probabilities, score in nats


def open_image(source: str | Path | bytes) -> Image.Image:
    """A file, or the bytes of an uploaded one -> an upright RGB image. Raises InputError for what is no image."""
    name = "the upload" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise InputError(f"{name}: not an image that can be read ({error}); give a JPEG, PNG or WebP file") from error


@torch.inference_mode()
def hypotheses(stepper: Any, image: Image.Image, beam_size: int = 5, max_length: int = 30) -> list[Hypothesis]:
    """The best captions of a beam search, best first, with the probability of each character given those before it."""
    tokenizer = getattr(stepper, "members", [stepper])[0].tokenizer
    suppress = sorted({tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id})
    found = decode.beam_search(stepper, [image], beam_size, max_length, suppress=suppress)[0]
    rows = [[*hypothesis.tokens, stepper.end_id] for hypothesis in found]
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

    The box has `.image`, the image that is shown. Saved pictures are <folder>/explorer-<name>.png.
    """
    import ipywidgets

    slider = ipywidgets.IntSlider(value=number, min=1, max=len(rows), description="image", continuous_update=False)
    upload = ipywidgets.FileUpload(accept="image/*", multiple=False, description="own image")
    save = ipywidgets.Button(description="save picture", tooltip=f"as a file in {folder}")
    message = ipywidgets.Label()
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="900px", max_width="100%"))
    box = ipywidgets.VBox([ipywidgets.HBox([slider, upload, save, message],
                                           layout=ipywidgets.Layout(flex_flow="row wrap")), picture])
    shown: dict[str, Any] = {}

    def show(image: Image.Image, name: str) -> None:
        box.image, figure = image, draw(image)
        shown.update(figure=figure, name=name)
        picture.value, picture.alt = plots.png_bytes(figure, small=False), figure.alt

    def choose(change: Any = None) -> None:
        row = rows[slider.value - 1]
        message.value = ""
        show(row["image"], Path(str(row["file_name"])).stem)

    def take(change: Any) -> None:
        if not upload.value:
            return
        file, = upload.value
        try:
            show(open_image(bytes(file["content"])), Path(file["name"]).stem)
            message.value = file["name"]
        except InputError as error:
            message.value = str(error)

    def keep(_: Any) -> None:
        path = plots.save(shown["figure"], folder, f"explorer-{shown['name']}")
        message.value = f"saved: {path.name}"

    slider.observe(choose, "value")
    upload.observe(take, "value")
    save.on_click(keep)
    box.controls = {"image": slider, "upload": upload, "save": save}
    box.picture, box.message = picture, message
    choose()
    return box


def says(steppers: Mapping[str, tuple[Any, int]], image: Image.Image, max_length: int = 30) -> dict[str, str]:
    """The caption of an image by each of {name: (stepper, beam size)}."""
    return {name: decode.caption(stepper, getattr(stepper, "members", [stepper])[0].tokenizer, [image], beam, max_length)[0]
            for name, (stepper, beam) in steppers.items()}
