"""Several Steppers as one. Like `decode`, this room knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipcap_lib.config import InputError
from clipcap_lib.tokenizer import vocabulary_of

RULES = ("probabilities", "log-probabilities", "logits")


class Ensemble:
    """Several Steppers as one: their next-token distributions are averaged, with weights that sum to one.

    rule "probabilities": log of the weighted mean of probabilities; "log-probabilities": weighted mean of
    log-probabilities; "logits": weighted mean of raw logits (what the original did). All three return log-probabilities.
    Members may differ in image encoder, image size and size of the GPT. Raises InputError on wrong weights, an unknown
    rule, or a member whose vocabulary is not the first one's; `names` are what they are called then.
    """

    def __init__(self, members: Sequence[Any], weights: Sequence[float] | None = None, rule: str = "probabilities",
                 names: Sequence[str] | None = None):
        weights = [1.0] * len(members) if weights is None else list(weights)
        names = names or [f"member {number}" for number in range(1, len(members) + 1)]
        if not members or len(weights) != len(members):
            raise InputError(f"an ensemble of {len(members)} models needs as many weights; got {len(weights)}")
        if not all(0 <= weight < float("inf") for weight in weights) or not 0 < sum(weights) < float("inf"):
            raise InputError(f"ensemble weights must not be negative, not all zero and not immense; got {weights}")
        if rule not in RULES:
            raise InputError(f"unknown ensemble rule '{rule}'; choose probabilities, log-probabilities or logits")
        for name, member in zip(names, members, strict=True):
            _check_vocabulary(members[0], names[0], member, name)
        counted = [(m, w / sum(weights)) for m, w in zip(members, weights, strict=True) if w > 0]
        self.members, self.weights, self.rule = [m for m, _ in counted], [w for _, w in counted], rule
        self._weights: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.start_id, self.end_id, self.pad_id = members[0].start_id, members[0].end_id, members[0].pad_id
        self.tokenizer = getattr(members[0], "tokenizer", None)

    def _combine(self, logits: list[Tensor]) -> Tensor:
        """One (R, V) a member -> log-probabilities (R, V)."""
        stacked = torch.stack(logits).to(torch.promote_types(logits[0].dtype, torch.float32))
        weights = self._weights_like(stacked)
        if self.rule == "logits":
            return torch.log_softmax((weights * stacked).sum(0), dim=-1)
        log_probabilities = torch.log_softmax(stacked, dim=-1)
        if self.rule == "probabilities":
            return torch.logsumexp(log_probabilities + weights.log(), dim=0)
        return torch.log_softmax((weights * log_probabilities).sum(0), dim=-1)

    def _weights_like(self, logits: Tensor) -> Tensor:
        """(members, 1, 1). Kept: to bring them to a GPU makes the host wait for it, at every token."""
        kind = logits.dtype, logits.device
        if kind not in self._weights:
            self._weights[kind] = logits.new_tensor(self.weights)[:, None, None]
        return self._weights[kind]

    def start(self, images: Any) -> tuple[list[Any], Tensor]:
        """Every member encodes the images in its own size. See Stepper."""
        states, logits = zip(*(member.start(images) for member in self.members), strict=True)
        return list(states), self._combine(list(logits))

    def step(self, state: list[Any], tokens: Tensor) -> Tensor:
        """See Stepper."""
        return self._combine([m.step(s, tokens) for m, s in zip(self.members, state, strict=True)])

    def reorder(self, state: list[Any], rows: Tensor) -> None:
        """See Stepper."""
        for member, member_state in zip(self.members, state, strict=True):
            member.reorder(member_state, rows)


def _check_vocabulary(first: Any, first_name: str, other: Any, name: str) -> None:
    """Raise InputError, naming both and the first token that differs, unless tokens mean the same to both."""
    mine, theirs = first.config.vocab_size, other.config.vocab_size
    if mine != theirs:
        raise InputError(f"{name} has a vocabulary of {theirs} tokens and {first_name} one of {mine}; the members of an "
                         "ensemble must share one vocabulary: train them on the same prepared data")
    tokenizers = [getattr(one, "tokenizer", None) for one in (first, other)]
    words = [vocabulary_of(t) if t is not None else [] for t in tokenizers]
    different = next((i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b), None)
    if different is not None:
        raise InputError(f"{name} does not have the vocabulary of {first_name}: token {different} is "
                         f"'{words[1][different]}' there and '{words[0][different]}' here; the members of an ensemble must "
                         "share one vocabulary: train them on the same prepared data")
    if (first.start_id, first.end_id, first.pad_id) != (other.start_id, other.end_id, other.pad_id):
        raise InputError(f"{name} and {first_name} begin, end or pad captions with different tokens of their vocabulary; "
                         "the members of an ensemble must share it")
