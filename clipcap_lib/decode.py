"""Greedy and beam search over a Stepper. This room knows no model: one model and an ensemble look the same from here.

Scores follow transformers' `generate`, so that the two can be compared token for token: a hypothesis of n tokens, [SEP]
included, with summed log-probability s has the score s / n ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from clipcap_lib.config import InputError

_NEVER = -1.0e9  # a score that no hypothesis has


class Stepper(Protocol):
    """What the searches need of a model. Rows are hypotheses; V is the size of the vocabulary."""

    start_id: int
    end_id: int
    pad_id: int

    def start(self, images: Any) -> tuple[Any, Tensor]:
        """Encode B images once and feed the start token -> a state of B rows, next-token logits (B, V)."""

    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Feed one token a row, tokens (R,) -> next-token logits (R, V). Changes the state."""

    def reorder(self, state: Any, rows: Tensor) -> None:
        """Make row r of the state what row rows[r] was; rows (R',) may repeat or drop rows."""


@dataclass(frozen=True)
class Hypothesis:
    """A generated caption: its tokens without [CLS] and [SEP], and its length-normalised score in nats."""

    tokens: tuple[int, ...]
    score: float


def _log_probabilities(logits: Tensor, suppress: Sequence[int]) -> Tensor:
    """logits (R, V) -> log-probabilities (R, V) in at least float32; suppressed tokens get minus infinity."""
    values = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    if suppress:
        values[:, list(suppress)] = float("-inf")
    return values


@torch.inference_mode()
def greedy(stepper: Stepper, images: Any, max_length: int = 30, suppress: Sequence[int] = ()) -> list[Hypothesis]:
    """The most probable token at every step, for a batch of B images -> B hypotheses of at most `max_length` tokens.

    Rows that have ended leave the batch; the score is the mean log-probability a token, [SEP] included.
    """
    state, logits = stepper.start(images)
    tokens: list[list[int]] = [[] for _ in range(len(logits))]
    totals = [0.0] * len(logits)
    rows = torch.arange(len(logits), device=logits.device)  # which image each row of the state belongs to
    for length in range(1, max_length + 1):
        values, chosen = _log_probabilities(logits, suppress).max(dim=-1)
        for image, token, value in zip(rows.tolist(), chosen.tolist(), values.tolist(), strict=True):
            tokens[image].append(token)
            totals[image] += value
        open_rows = (chosen != stepper.end_id).nonzero().squeeze(-1)
        if len(open_rows) == 0 or length == max_length:
            break
        if len(open_rows) < len(rows):
            stepper.reorder(state, open_rows)
            rows, chosen = rows[open_rows], chosen[open_rows]
        logits = stepper.step(state, chosen)
    return [Hypothesis(_strip(row, stepper.end_id), total / len(row)) for row, total in zip(tokens, totals, strict=True)]


@torch.inference_mode()
def beam_search(stepper: Stepper, images: Any, beam_size: int = 5, max_length: int = 30, length_penalty: float = 1.0,
                early_stopping: bool = False, suppress: Sequence[int] = ()) -> list[list[Hypothesis]]:
    """Beam search for B images -> for each its `beam_size` best hypotheses, best first.

    A hypothesis is finished when it takes [SEP] while among the `beam_size` best, or at `max_length`. An image is done
    when its best open beam, at its present length, can no longer beat its worst finished one; with `early_stopping`,
    as soon as `beam_size` hypotheses are finished.
    """
    if beam_size < 1:
        raise InputError(f"beam_size must be at least 1, not {beam_size}")
    state, logits = stepper.start(images)
    batch, vocabulary = logits.shape
    device, kept = logits.device, 2 * beam_size  # twice as many: at most half of them can be [SEP]
    first_rows = torch.arange(batch, device=device) * beam_size
    stepper.reorder(state, torch.arange(batch, device=device).repeat_interleave(beam_size))
    logits = logits.repeat_interleave(beam_size, dim=0)

    log_probabilities = _log_probabilities(logits, suppress)
    open_scores = torch.full((batch, beam_size), _NEVER, device=device, dtype=log_probabilities.dtype)
    open_scores[:, 0] = 0.0  # all beams are equal at first: only one may spread
    open_tokens = torch.full((batch, beam_size, max_length), stepper.pad_id, device=device)
    done_scores = torch.full_like(open_scores, _NEVER)
    done_tokens = open_tokens.clone()
    is_done = torch.zeros(batch, beam_size, dtype=torch.bool, device=device)
    may_improve = torch.ones(batch, 1, dtype=torch.bool, device=device)

    for length in range(1, max_length + 1):
        totals = (log_probabilities.view(batch, beam_size, vocabulary) + open_scores[..., None]).flatten(1)
        scores, places = totals.topk(kept)  # (B, kept)
        beams, chosen = places // vocabulary, places % vocabulary
        tokens = open_tokens.gather(1, beams[..., None].expand(-1, -1, max_length)).clone()
        tokens[:, :, length - 1] = chosen
        ends = (chosen == stepper.end_id) | (length == max_length)

        # finished: only those that end among the beam_size best
        finishing = ends.clone()
        finishing[:, beam_size:] = False
        closed = ~may_improve | (is_done.all(-1, keepdim=True) & early_stopping)
        finished = torch.where(finishing & ~closed, scores / length**length_penalty, _NEVER)
        done_scores, best = torch.cat([done_scores, finished], 1).topk(beam_size)
        done_tokens = torch.cat([done_tokens, tokens], 1).gather(1, best[..., None].expand(-1, -1, max_length))
        is_done = torch.cat([is_done, finishing & ~closed], 1).gather(1, best)

        # open: the beam_size best that have not ended
        open_scores, best = scores.masked_fill(ends, _NEVER).topk(beam_size)
        open_tokens = tokens.gather(1, best[..., None].expand(-1, -1, max_length))
        worst = torch.where(is_done, done_scores.min(-1, keepdim=True).values, _NEVER)
        may_improve = may_improve & (open_scores[:, :1] / length**length_penalty > worst).any(-1, keepdim=True)
        if length == max_length or not may_improve.any() or (early_stopping and is_done.all()):
            break
        stepper.reorder(state, (first_rows[:, None] + beams.gather(1, best)).flatten())
        log_probabilities = _log_probabilities(stepper.step(state, open_tokens[:, :, length - 1].flatten()), suppress)

    return [[Hypothesis(_strip(row, stepper.end_id), score)
             for row, score, there in zip(rows, scores, done, strict=True) if there]
            for rows, scores, done in zip(done_tokens.tolist(), done_scores.tolist(), is_done.tolist(), strict=True)]


def caption(stepper: Stepper, tokenizer: Any, images: Any, beam_size: int = 1, max_length: int = 30,
            length_penalty: float = 1.0) -> list[str]:
    """Images -> their best captions as text; greedy if beam_size is 1. Only [SEP] and characters are ever written."""
    suppress = sorted({tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id})
    if beam_size == 1:
        best = greedy(stepper, images, max_length, suppress)
    else:
        best = [found[0] for found in beam_search(stepper, images, beam_size, max_length, length_penalty,
                                                  suppress=suppress)]
    return ["".join(tokenizer.convert_ids_to_tokens(list(hypothesis.tokens))) for hypothesis in best]


def _strip(tokens: Sequence[int], end_id: int) -> tuple[int, ...]:
    """The tokens before [SEP]. Without one the hypothesis was cut at `max_length`, and all of them count."""
    return tuple(tokens[:tokens.index(end_id)] if end_id in tokens else tokens)


class Ensemble:
    """Several Steppers as one: their next-token distributions are averaged, with weights that sum to one.

    rule "probabilities": log of the weighted mean of probabilities; "log-probabilities": weighted mean of
    log-probabilities; "logits": weighted mean of raw logits (what the original did). All three return log-probabilities.
    Raises InputError on wrong weights, an unknown rule, or members whose vocabularies differ.
    """

    def __init__(self, members: Sequence[Any], weights: Sequence[float] | None = None, rule: str = "probabilities"):
        weights = [1.0] * len(members) if weights is None else list(weights)
        if not members or len(weights) != len(members):
            raise InputError(f"an ensemble of {len(members)} models needs as many weights; got {len(weights)}")
        if min(weights) < 0 or not sum(weights) > 0:
            raise InputError(f"ensemble weights must not be negative and not all zero; got {weights}")
        if rule not in ("probabilities", "log-probabilities", "logits"):
            raise InputError(f"unknown ensemble rule '{rule}'; choose probabilities, log-probabilities or logits")
        kinds = {(m.start_id, m.end_id, m.pad_id, m.config.vocab_size) for m in members}
        if len(kinds) > 1:
            raise InputError("the members of an ensemble must share one vocabulary; theirs have sizes "
                             + ", ".join(str(m.config.vocab_size) for m in members))
        counted = [(m, w / sum(weights)) for m, w in zip(members, weights, strict=True) if w > 0]
        self.members, self.weights, self.rule = [m for m, _ in counted], [w for _, w in counted], rule
        self.start_id, self.end_id, self.pad_id = members[0].start_id, members[0].end_id, members[0].pad_id

    def _combine(self, logits: list[Tensor]) -> Tensor:
        """One (R, V) a member -> log-probabilities (R, V)."""
        stacked = torch.stack(logits).to(torch.promote_types(logits[0].dtype, torch.float32))
        weights = stacked.new_tensor(self.weights)[:, None, None]
        if self.rule == "logits":
            return torch.log_softmax((weights * stacked).sum(0), dim=-1)
        log_probabilities = torch.log_softmax(stacked, dim=-1)
        if self.rule == "probabilities":
            return torch.logsumexp(log_probabilities + weights.log(), dim=0)
        return torch.log_softmax((weights * log_probabilities).sum(0), dim=-1)

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
