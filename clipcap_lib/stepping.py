"""Writing a caption by hand: the model proposes, the reader chooses, goes back and branches. torch is imported when used."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipcap_lib import controls, plots


class CaptionPath:
    """The tokens chosen so far for one image, and what the model thinks of every continuation. Any `decode.Stepper`.

    The image is encoded once; each path's distribution is kept, and a branch runs again from the encoded image. It is a
    Stepper of one row itself, which goes on from what was chosen.
    """

    def __init__(self, model: Any, image: Any, max_length: int = 30):
        import torch

        members = getattr(model, "members", [model])
        for member in members:
            member.eval()
        self.model, self.max_length, self.tokenizer = model, max_length, members[0].tokenizer
        self.start_id, self.end_id, self.pad_id = model.start_id, model.end_id, model.pad_id
        self.tokens: tuple[int, ...] = ()
        self._never = sorted({self.tokenizer.pad_token_id, self.tokenizer.unk_token_id, self.tokenizer.cls_token_id})
        with torch.inference_mode():
            self._start, logits = model.start([image])
        self._known: dict[tuple[int, ...], np.ndarray] = {}  # path -> log-probabilities (V,) of what comes next
        self._keep((), logits)
        self._state, self._at = None, ()  # a state, and the path that it has read

    def _keep(self, path: tuple[int, ...], logits: Any) -> None:
        import torch

        values = torch.log_softmax(logits[0].to(torch.promote_types(logits.dtype, torch.float32)), dim=-1).cpu().numpy()
        values[self._never] = -np.inf  # only [SEP] and characters are ever written
        self._known[path] = values

    def log_probabilities(self, length: int) -> np.ndarray:
        """What may follow the first `length` tokens: log-probabilities (V,)."""
        import torch

        path = self.tokens[:length]
        if path in self._known:
            return self._known[path]
        if path[:len(self._at)] != self._at:
            self._at = ()
        with torch.inference_mode():
            if not self._at:
                self._state = copy.deepcopy(self._start)
            for token in path[len(self._at):]:
                logits = self.model.step(self._state, torch.tensor([token], device=self._device()))
                self._at = (*self._at, token)
                self._keep(self._at, logits)
        return self._known[path]

    def _device(self) -> Any:
        return next(getattr(self.model, "members", [self.model])[0].parameters()).device

    def take(self, length: int, token: int) -> None:
        """Put `token` at place `length` (from 0); what stood from there on is gone."""
        self.tokens = (*self.tokens[:length], token)

    def take_back(self, length: int | None = None) -> None:
        """Keep the first `length` tokens; all but the last unless it is given."""
        self.tokens = self.tokens[:-1] if length is None else self.tokens[:length]

    def greedy(self, length: int) -> None:
        """Go on from the first `length` tokens with the likeliest each, up to [SEP] or the longest caption."""
        from clipcap_lib import decode

        self.tokens = self.tokens[:length]
        if not self.over:
            begun = self.tokens
            written = decode.greedy(self, None, self.max_length - len(begun))[0].tokens
            self.tokens = (*begun, *written, self.end_id)[:self.max_length]

    def start(self, images: Any) -> tuple[None, Any]:
        """See decode.Stepper: one row that has read the image and the tokens chosen so far. `images` is not looked at."""
        import torch

        return None, torch.from_numpy(self.log_probabilities(len(self.tokens))[None].copy())

    def step(self, state: None, tokens: Any) -> Any:
        """See decode.Stepper."""
        self.take(len(self.tokens), int(tokens[0]))
        return self.start(None)[1]

    def reorder(self, state: None, rows: Any) -> None:
        """See decode.Stepper: there is but one row."""

    @property
    def over(self) -> bool:
        """Nothing can follow: it ends in [SEP], or is as long as a caption may be."""
        return self.tokens[-1:] == (self.end_id,) or len(self.tokens) >= self.max_length

    def choices(self, length: int, top: int) -> list[tuple[int, float]]:
        """The `top` likeliest tokens at place `length` with their probabilities; [SEP] is always among them."""
        values = self.log_probabilities(length)
        best = np.argsort(-values, kind="stable")[:top].tolist()
        if self.model.end_id not in best:
            best[-1] = self.model.end_id
        return [(token, float(np.exp(values[token]))) for token in best]

    def words(self, tokens: Sequence[int] | None = None) -> list[str]:
        """Tokens as text, all that were chosen unless others are given."""
        return self.tokenizer.convert_ids_to_tokens(list(self.tokens if tokens is None else tokens))

    def score(self) -> float:
        """The summed log-probability of the path, in nats."""
        return float(sum(self.log_probabilities(i)[token] for i, token in enumerate(self.tokens)))


def decoding_stepper(model: Any, image: Any, top: int = 8, max_length: int = 30) -> Any:
    """Write a caption of `image` (PIL) by choosing among the `top` next characters of a model or an ensemble.

    A button a character; "place" goes back to an earlier one, and another choice there begins a branch. Captions that were
    finished stay below, to compare. The box has `.path`, a CaptionPath.
    """
    path = CaptionPath(model, image, max_length)
    finished: dict[tuple[int, ...], str] = {}
    place = controls.slider("place", 1)
    offers = [controls.button("", lambda rank=rank: change(lambda: path.take(place.value - 1, offered[rank][0])),
                              "put this character there", "90px") for rank in range(top)]
    offered: list[tuple[int, float]] = []
    labels: list[str] = []

    def draw(place: int) -> Any:
        offered[:] = path.choices(place - 1, top)
        shown = list(zip(path.words([token for token, _ in offered]), (share for _, share in offered), strict=True))
        labels[:] = [f"{word} {share:.0%}" for word, share in shown]
        score, number = path.score(), len(path.tokens)
        if path.over:
            finished.pop(path.tokens, None)
            finished[path.tokens] = f"{score / number:6.2f} nats a character: {''.join(path.words())}".replace("-", "−")
        about = (f"place {place} of {max(number, place)} · log-probability of all that is written {score:.2f} nats"
                 + (f", {score / number:.2f} a character" if number else "")).replace("-", "−")
        return plots.next_characters(image, path.words(), place - 1, shown, about, list(finished.values()))

    def relabel(_: Any = None) -> None:
        for offer, label in zip(offers, labels, strict=True):
            offer.description = label

    def change(act: Any) -> None:
        with box.together():
            act()
            place.max = len(path.tokens) + (not path.over)
            place.value = place.max

    box = controls.panel({"place": place}, draw, "Numbers on the buttons: probability of the character. Orange: what "
                         "stands there now. Below: captions that were ended, the likeliest has the value nearest 0.")
    box.path = path
    relabel()
    box.picture.observe(relabel, "value")  # after the picture, which then need not wait for the buttons
    controls.add(box, undo=controls.button("one back", lambda: change(path.take_back), "take the last character away"),
                 restart=controls.button("start over", lambda: change(lambda: path.take_back(0)), "an empty caption"),
                 greedy=controls.button("greedy to the end", lambda: change(lambda: path.greedy(place.value - 1)),
                                        "the likeliest character each time"))
    return controls.add(box, **{f"offer{rank}": offer for rank, offer in enumerate(offers, 1)})
