"""Greedy decoding, sampling and beam search over a Stepper. This room knows no model: an ensemble looks like one model.

Scores follow transformers' `generate`, so that the two can be compared token for token: a hypothesis of n tokens, [SEP]
included, with summed log-probability s has the score s / n ** length_penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clipcap_lib.config import InputError

LOOK = 8  # tokens between a GPU's being asked what has ended: for each answer the host must wait
LEAVE = 8  # what has ended leaves the batch once it is an eighth of it: those that stay are moved together
_NEVER = -1.0e9  # a score that no hypothesis has
_FORBIDDEN = float("-inf")


class Stepper(Protocol):
    """What the searches need of a model. Rows are hypotheses; V is the size of the vocabulary."""

    start_id: int
    end_id: int
    pad_id: int

    def start(self, images: Any) -> tuple[Any, Tensor]:
        """Encode B images once and feed the start token -> a state of B rows, next-token logits (B, V)."""

    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Feed one token a row, tokens (R,) -> next-token logits (R, V), good until the next step. Changes the state."""

    def reorder(self, state: Any, rows: Tensor) -> None:
        """Make row r of the state what row rows[r] was; rows (R',) may repeat or drop rows."""


@dataclass(frozen=True)
class Options:
    """How captions are looked for. With the defaults: greedy. A temperature samples, a beam_size above 1 searches."""

    beam_size: int = 1  # open hypotheses an image
    max_length: int = 30  # most tokens, [SEP] included
    min_length: int = 0  # fewest tokens before [SEP]
    length_penalty: float = 1.0  # above 0 favours long captions
    early_stopping: bool = False  # beam search ends an image as soon as beam_size hypotheses are finished
    no_repeat_ngram: int = 0  # no n tokens in a row come twice; 0 lets them
    n_best: int = 1  # most hypotheses returned an image: the best ones, each once, or so many samples in the order drawn
    temperature: float = 0.0  # above 0: tokens are drawn, from log-probabilities divided by this
    top_k: int = 0  # sampling: only from the k most probable tokens; 0 is all
    top_p: float = 1.0  # sampling: only from the fewest tokens that have this probability together (nucleus)
    seed: int = 0  # of sampling
    groups: int = 1  # beam search: groups of beams that avoid each other's tokens
    diversity: float = 0.5  # how much a token loses, in nats, for each beam of an earlier group that takes it now
    suppress: tuple[int, ...] = ()  # tokens that are never written

    def __post_init__(self) -> None:
        object.__setattr__(self, "suppress", tuple(self.suppress))
        endless = [name for name, value in vars(self).items() if isinstance(value, float) and not math.isfinite(value)]
        for wrong, words in (
                (bool(endless), f"{' and '.join(endless)} must be finite"),
                (self.beam_size < 1, f"beam_size must be at least 1, not {self.beam_size}"),
                (self.max_length < 1, f"max_length must be at least 1, not {self.max_length}"),
                (not 0 <= self.min_length < self.max_length,
                 f"min_length must be from 0 to below max_length {self.max_length}, not {self.min_length}"),
                # below, scores would fall under what stands for "not there"; above, long captions' all become 0
                (not -3 <= self.length_penalty <= 10, f"length_penalty must be from -3 to 10, not {self.length_penalty}"),
                (self.no_repeat_ngram < 0, f"no_repeat_ngram must not be negative, but is {self.no_repeat_ngram}"),
                (self.temperature < 0, f"temperature must not be negative, but is {self.temperature}"),
                (self.temperature > 0 and self.beam_size > 1, "sample or search: give a temperature or a beam_size"),
                (self.top_k < 0 or not 0 < self.top_p <= 1,
                 f"top_k must not be negative and top_p be in (0, 1]; they are {self.top_k} and {self.top_p}"),
                (self.temperature == 0 and (self.top_k > 0 or self.top_p < 1),
                 "top_k and top_p limit sampling: give a temperature as well"),
                (self.seed < 0, f"seed must not be negative, but is {self.seed}"),
                (self.groups < 1 or self.beam_size % self.groups > 0,
                 f"beam_size {self.beam_size} is not divisible into {self.groups} groups"),
                (self.diversity < 0, f"diversity must not be negative, but is {self.diversity}"),
                (self.n_best < 1 or (not self.temperature and self.n_best > self.beam_size),
                 f"n_best must be from 1 to beam_size {self.beam_size}, not {self.n_best}; only samples can be more")):
            if wrong:
                raise InputError(words)


@dataclass(frozen=True)
class Hypothesis:
    """A generated caption: its tokens without [CLS] and [SEP], and its length-normalised score in nats."""

    tokens: tuple[int, ...]
    score: float


@torch.inference_mode()
def search(stepper: Stepper, images: Any, options: Options,
           numbers: Sequence[int] | None = None) -> list[list[Hypothesis]]:
    """B images -> `n_best` hypotheses of each, best first (samples: as drawn), fewer where no more were found. The one door
    to all strategies.

    numbers: of the images among all that are captioned (default: from 0). Samples depend on the seed and an image's number
    alone, so that the same images in other batches get the same captions.
    """
    if options.beam_size > 1:
        return _beams(stepper, images, options)
    return _rows(stepper, images, options, numbers)


def greedy(stepper: Stepper, images: Any, max_length: int = 30, suppress: Sequence[int] = ()) -> list[Hypothesis]:
    """The most probable token at every step, for B images -> B hypotheses; the score is the mean log-probability."""
    return [found[0] for found in search(stepper, images, Options(max_length=max_length, suppress=tuple(suppress)))]


def beam_search(stepper: Stepper, images: Any, beam_size: int = 5, max_length: int = 30, length_penalty: float = 1.0,
                early_stopping: bool = False, suppress: Sequence[int] = ()) -> list[list[Hypothesis]]:
    """Beam search for B images -> for each its `beam_size` best hypotheses, best first."""
    return search(stepper, images, Options(beam_size, max_length, length_penalty=length_penalty, n_best=beam_size,
                                           early_stopping=early_stopping, suppress=tuple(suppress)))


def caption(stepper: Stepper, tokenizer: Any, images: Any, beam_size: int = 1, max_length: int = 30,
            **options: Any) -> list[str]:
    """Images -> their best captions as text. options: further ones of `Options`."""
    chosen = Options(beam_size, max_length, **options)
    return [best[0][0] for best in captions(stepper, tokenizer, images, chosen)]


def captions(stepper: Stepper, tokenizer: Any, images: Any, options: Options,
             numbers: Sequence[int] | None = None) -> list[list[tuple[str, float]]]:
    """Images -> for each its `n_best` captions as text with their scores. Only [SEP] and characters are ever written.

    Raises InputError where the model gives no probabilities.
    """
    unwritten = {tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, *options.suppress}
    options = replace(options, suppress=tuple(sorted(unwritten)))
    found = search(stepper, images, options, numbers)
    if not all(math.isfinite(one.score) for image in found for one in image):
        raise InputError("a model's probabilities are no numbers (NaN): its weights are damaged, or overflow in this "
                         "precision; train it again, or caption in fp32")
    return [[("".join(tokenizer.convert_ids_to_tokens(list(one.tokens))), one.score) for one in image] for image in found]


def _looks(length: int, device: torch.device) -> bool:
    """Whether it is asked after so many tokens what has ended. What runs on in between changes no result."""
    return device.type == "cpu" or length % LOOK == 0


def _leave(still: Tensor, count: int) -> bool:
    """Whether those of `count` that have ended leave the batch now. still: the places of the others."""
    return count - len(still) >= count / LEAVE


def _log_probabilities(logits: Tensor, written: Tensor, options: Options, suppressed: Tensor, end_id: int) -> Tensor:
    """logits (R, V), tokens written so far (R, n) -> log-probabilities (R, V); what is forbidden gets minus infinity.

    A row in which everything is forbidden ends.
    """
    # at least float32: summed scores must not be rounded to a half-precision grid
    values = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    if len(suppressed):
        values.index_fill_(1, suppressed, _FORBIDDEN)
    if written.shape[1] < options.min_length:
        values[:, end_id] = _FORBIDDEN
    size = options.no_repeat_ngram
    if size and written.shape[1] >= size:
        ngrams = written.unfold(1, size, 1)  # (R, places, n)
        suffix = written[:, written.shape[1] - size + 1:]  # what the next token would complete
        again = (ngrams[..., :-1] == suffix[:, None]).all(-1)
        values.scatter_add_(1, ngrams[..., -1], torch.where(again, _FORBIDDEN, 0.0).to(values.dtype))
    if options.min_length or size:
        stuck = values.max(-1).values == _FORBIDDEN
        values[:, end_id] = torch.where(stuck, 0.0, values[:, end_id])
    return values


def _rows(stepper: Stepper, images: Any, options: Options, numbers: Sequence[int] | None) -> list[list[Hypothesis]]:
    """Greedy decoding and sampling: hypotheses that know nothing of each other. Rows that have ended leave the batch."""
    state, logits = stepper.start(images)
    batch, device, end_id = len(logits), logits.device, stepper.end_id
    copies = options.n_best if options.temperature else 1
    if copies > 1:
        spread = torch.arange(batch, device=device).repeat_interleave(copies)
        stepper.reorder(state, spread)
        logits = logits[spread]
    if options.temperature:
        drawn = np.concatenate([np.random.default_rng((options.seed, number)).random((copies, options.max_length))
                                for number in (range(batch) if numbers is None else numbers)])
        uniform = torch.from_numpy(drawn).to(device)
    suppressed = torch.tensor(options.suppress, dtype=torch.long).to(device, non_blocking=True)
    rows = torch.arange(batch * copies, device=device)  # which hypothesis each row of the state is
    tokens = torch.full((len(rows), options.max_length), stepper.pad_id, device=device)
    values_of = torch.zeros(tokens.shape, dtype=torch.float64, device=device)  # their log-probabilities
    written, gained = tokens.clone(), values_of.clone()  # of the state's rows
    for length in range(1, options.max_length + 1):
        values = _log_probabilities(logits, written[:, :length - 1], options, suppressed, end_id)
        if options.temperature:
            chosen = _draw(values, uniform[rows, length - 1], options)
            best = values.gather(1, chosen[:, None])[:, 0]
        else:
            best, chosen = values.max(dim=-1)
        written[:, length - 1], gained[:, length - 1] = chosen, best
        if length == options.max_length:
            break
        if _looks(length, device):
            still = (written[:, :length] != end_id).all(dim=1).nonzero().squeeze(-1)
            if len(still) == 0:
                break
            if _leave(still, len(rows)):
                tokens[rows], values_of[rows] = written, gained
                stepper.reorder(state, still)
                rows, chosen, written, gained = (kept[still] for kept in (rows, chosen, written, gained))
        logits = stepper.step(state, chosen)
    tokens[rows], values_of[rows] = written, gained
    made = [_hypothesis(row, values, options, end_id)
            for row, values in zip(tokens.tolist(), values_of.tolist(), strict=True)]
    return [made[i:i + copies] for i in range(0, len(made), copies)]


def _hypothesis(row: list[int], values: list[float], options: Options, end_id: int) -> Hypothesis:
    """Of a row that was written to its end, and its tokens' log-probabilities. Without [SEP] it was cut, and all count."""
    length = row.index(end_id) + 1 if end_id in row else len(row)
    return Hypothesis(_strip(row, end_id), sum(values[:length]) / length**options.length_penalty)


def _draw(values: Tensor, uniform: Tensor, options: Options) -> Tensor:
    """Log-probabilities (R, V) and a uniform number a row (R,) -> the tokens (R,) that the numbers fall on."""
    values = values.double()
    scaled = (values - values.max(-1, keepdim=True).values) / options.temperature  # however low: the best stays at 0
    if options.top_k:
        least = scaled.topk(min(options.top_k, scaled.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, _FORBIDDEN)
    if options.top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the tokens that are more probable
        beyond = (before >= options.top_p).scatter(1, order, before >= options.top_p)
        scaled = scaled.masked_fill(beyond, _FORBIDDEN)
    reached = scaled.softmax(-1).cumsum(-1)
    # the first token whose sum exceeds the number; tokens of no probability do not raise the sum and are passed over
    total = reached[:, -1:]
    goal = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return (reached > goal).int().argmax(-1)


def _beams(stepper: Stepper, images: Any, options: Options) -> list[list[Hypothesis]]:
    """Beam search; with several groups, diverse beam search (Vijayakumar et al. 2016, Hamming diversity).

    In a group, a hypothesis is finished when it takes [SEP] while among the group's best, or at `max_length`. The group
    is done when its best open beam, at its present length, can no longer beat its worst finished one, and with
    `early_stopping` as soon as as many hypotheses are finished as it has beams. Images whose groups are all done leave the
    batch.
    """
    state, logits = stepper.start(images)
    batch, device = len(logits), logits.device
    size, in_group = options.beam_size, options.beam_size // options.groups
    spread = torch.arange(batch, device=device).repeat_interleave(size)
    stepper.reorder(state, spread)
    logits = logits[spread]
    written = torch.empty(len(logits), 0, dtype=torch.long, device=device)
    suppressed = torch.tensor(options.suppress, dtype=torch.long).to(device, non_blocking=True)
    groups: list[_Group] = []
    left = torch.arange(batch, device=device)  # the images that are still in the batch
    found: dict[int, list[Hypothesis]] = {}  # of those that are not
    for length in range(1, options.max_length + 1):
        values = _log_probabilities(logits, written, options, suppressed, stepper.end_id).view(-1, size, len(logits[0]))
        groups = groups or [_Group(values, in_group, options, stepper) for _ in range(options.groups)]
        taken = torch.zeros_like(values[:, 0]) if options.groups > 1 else None  # (B, V): by beams of earlier groups, now
        for number, group in enumerate(groups):
            was_open = group.is_open()
            group.advance(values[:, number * in_group:(number + 1) * in_group], length, taken)
            if taken is not None:  # a group that is done takes no more tokens
                taken.scatter_add_(1, group.tokens[..., length - 1], was_open.expand(-1, in_group).to(taken.dtype))
        if length == options.max_length:
            break
        still = torch.arange(len(left), device=device)  # which of them stay
        if _looks(length, device):
            is_open = torch.cat([group.is_open() for group in groups], 1).any(1)
            open_ones = is_open.nonzero().squeeze(-1)
            if len(open_ones) == 0:
                break
            if _leave(open_ones, len(left)):
                gone, still = (~is_open).nonzero().squeeze(-1), open_ones
                found |= zip(left[gone].tolist(), _best(groups, gone, options.n_best), strict=True)
                left = left[still]
                for group in groups:
                    group.keep(still)
        origins = [number * in_group + group.origins for number, group in enumerate(groups)]
        stepper.reorder(state, (still[:, None] * size + torch.cat(origins, 1)).flatten())
        written = torch.cat([group.tokens[..., :length] for group in groups], 1).flatten(0, 1)
        logits = stepper.step(state, written[:, -1])
    found |= zip(left.tolist(), _best(groups, torch.arange(len(left), device=device), options.n_best), strict=True)
    return [found[image] for image in range(batch)]


def _best(groups: Sequence[_Group], images: Tensor, n_best: int) -> list[list[Hypothesis]]:
    """Of the images at these places of the batch (N,): the best that any group has finished, each caption once."""
    parts = zip(*(group.hypotheses(images) for group in groups), strict=True)
    found = []
    for image in parts:
        # two groups may come to the same caption; and beams that a small vocabulary leaves without a token of their own
        # repeat those that are there, far below them
        once: dict[tuple[int, ...], Hypothesis] = {}
        for one in sorted((one for part in image for one in part), key=lambda one: -one.score):
            once.setdefault(one.tokens, one)
        found.append(list(once.values())[:n_best])
    return found


class _Group:
    """K beams an image that compete with each other, for B images at once. Shapes are (B, K) and (B, K, max_length)."""

    def __init__(self, values: Tensor, size: int, options: Options, stepper: Stepper):
        batch, device = len(values), values.device
        self.size, self.options, self.end_id = size, options, stepper.end_id
        self.scores = torch.full((batch, size), _NEVER, device=device, dtype=values.dtype)  # of open beams
        self.scores[:, 0] = 0.0  # all beams are equal at first: only one may spread
        self.tokens = torch.full((batch, size, options.max_length), stepper.pad_id, device=device)
        self.origins = torch.zeros(batch, size, dtype=torch.long, device=device)  # the beam that each went on from
        self.done_scores, self.done_tokens = torch.full_like(self.scores, _NEVER), self.tokens.clone()
        self.is_done = torch.zeros(batch, size, dtype=torch.bool, device=device)
        self.may_improve = torch.ones(batch, 1, dtype=torch.bool, device=device)

    def advance(self, values: Tensor, length: int, taken: Tensor | None) -> None:
        """Take the `length`th token. values (B, K, V) log-probabilities; taken (B, V), see `diversity`."""
        options, vocabulary, width = self.options, values.shape[-1], self.tokens.shape[-1]
        totals = values + self.scores[..., None]
        # the paper's formula: log-probability of the whole beam, plus the diversity of the token that it takes now
        rank = totals if taken is None else totals - options.diversity * taken[:, None]
        # twice as many as there are beams: at most half of them can be [SEP]
        ranked, places = rank.flatten(1).topk(min(2 * self.size, rank[0].numel()))
        scores = ranked if taken is None else totals.flatten(1).gather(1, places)
        beams, chosen = places // vocabulary, places % vocabulary
        tokens = self.tokens.gather(1, beams[..., None].expand(-1, -1, width)).clone()
        tokens[:, :, length - 1] = chosen
        ends = chosen == self.end_id

        # finished: only those that end among the best
        finishing = ends | (length == options.max_length)
        finishing[:, self.size:] = False
        finishing &= self.is_open()
        finished = torch.where(finishing, scores / length**options.length_penalty, _NEVER)
        self.done_scores, best = torch.cat([self.done_scores, finished], 1).topk(self.size)
        self.done_tokens = torch.cat([self.done_tokens, tokens], 1).gather(1, best[..., None].expand(-1, -1, width))
        self.is_done = torch.cat([self.is_done, finishing], 1).gather(1, best)

        # open: the best that have not ended
        best = ranked.masked_fill(ends, _NEVER).topk(self.size).indices
        self.scores = scores.masked_fill(ends, _NEVER).gather(1, best)
        self.tokens = tokens.gather(1, best[..., None].expand(-1, -1, width))
        self.origins = beams.gather(1, best)
        worst = torch.where(self.is_done, self.done_scores.min(-1, keepdim=True).values, _NEVER)
        highest = self.scores.max(-1, keepdim=True).values / length**options.length_penalty
        self.may_improve = self.may_improve & (highest > worst).any(-1, keepdim=True)

    def is_open(self) -> Tensor:
        """Of which images (B, 1) the result may still change."""
        if self.options.early_stopping:
            return self.may_improve & ~self.is_done.all(-1, keepdim=True)
        return self.may_improve

    def keep(self, images: Tensor) -> None:
        """Only the images at these places (N,)."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[images])

    def hypotheses(self, images: Tensor) -> list[list[Hypothesis]]:
        """The finished ones of the images at these places (N,), best first."""
        parts = (self.done_tokens, self.done_scores, self.is_done)
        kept = zip(*(part[images].tolist() for part in parts), strict=True)
        return [[Hypothesis(_strip(row, self.end_id), score) for row, score, there in zip(*image, strict=True) if there]
                for image in kept]


def _strip(tokens: Sequence[int], end_id: int) -> tuple[int, ...]:
    """The tokens before [SEP]."""
    return tuple(tokens[:tokens.index(end_id)] if end_id in tokens else tokens)
