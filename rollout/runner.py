"""Runs one batch on one rank: tokens in, sampled tokens and their log-probabilities out.

A batch is launched and its results are read later: in between, the next batch is launched, whose input tokens may be those that
this one samples. They stay on the device for it (`Launched.tokens`).
"""

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from kernels.collectives import TreeGroup
from kernels.model import (
    Delta,
    Layout,
    ModelConfig,
    PagedCache,
    Parameter,
    Weight,
    decoder_layer,
    forward,
    head_logits,
    layer_weights,
    on_device,
    outer_weights,
    position_table,
    served,
)
from kernels.ops import Mixture, Truncation, gumbel_argmax, vocab_logprob, vocab_nodes
from kernels.weights.digest import Leaves, slice_digests
from rollout.graphs import DecodeGraphs, Row
from rollout.held import put, views, weight_memory
from rollout.memory import Reclaimable
from rollout.sampling import SamplingParams, Top
from rollout.sequence import NO_NUMBER, RunnerError, Sequence, Span

_SCORED_ROWS = 256  # prompt tokens whose logits are in memory at once
_RANKED_ROWS = 16  # rows of a whole vocabulary that are ranked at once, at some 24 bytes a token


class Scores(NamedTuple):
    """Holds log-probs float32 [R] of the tokens of R rows; of the A rows that ask for them the K most likely ids int64 [A, K]
    and their log-probs float32 [A, K], -inf where a filter keeps fewer."""

    logprobs: torch.Tensor
    ids: torch.Tensor | None = None
    likely: torch.Tensor | None = None

    def to_host(self) -> "Scores":
        """Starts the way there."""
        return Scores(_to_host(self.logprobs), *(None if t is None else _to_host(t) for t in self[1:]))

    def read(self, spans: Many[Span]) -> list[tuple[float, Top]]:
        """Returns (log-prob, what its request asks for) of each row, a log-prob perhaps NaN; `spans`: whose row it is."""
        logprobs = self.logprobs.tolist()
        if self.ids is None or self.likely is None:
            return [(logprob, ()) for logprob in logprobs]
        ranked = zip(self.ids.tolist(), self.likely.tolist(), strict=True)
        tops: list[Top] = []
        for span in spans:
            ids, likely = next(ranked) if span.sequence.request.top else ((), ())
            pairs = list(zip(ids, likely, strict=True))[: span.sequence.request.top]
            tops.append(tuple((i, logprob) for i, logprob in pairs if logprob > -math.inf))
        return list(zip(logprobs, tops, strict=True))


Drawn = tuple[int, float, Top]
"""A token, -1 where no logit is a number, its log-prob, and the most likely ones where they are asked for."""


@dataclass(frozen=True)
class Launched:
    """Holds a batch that may still run. Its results are the same on every rank."""

    spans: list[Span]
    sampling: list[Span]  # those of them that sample, in order
    tokens: torch.Tensor  # int64 [len(sampling)], on the device
    host: torch.Tensor  # the same, on its way to the host
    scores: list[Scores]  # likewise: of `sampling`, then of the prompt tokens of each span that scores
    ready: torch.cuda.Event | None  # when these are there; None: they are

    @cached_property
    def guesses(self) -> bool:
        """Says whether it has guesses: how many tokens it brings is not known before its results."""
        return any(span.guess is not None for span in self.sampling)

    @cached_property
    def decodes(self) -> bool:
        """Says whether it is a step of decoding and nothing else."""
        return all(span.guess is not None or span.decodes for span in self.spans)

    def row(self, sequence: Sequence) -> int:
        """Finds which of `tokens` is a sequence's."""
        return self._rows[id(sequence)]

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {id(span.sequence): row for row, span in enumerate(self.sampling)}

    def results(self) -> tuple[list[Drawn | None], list[list[tuple[float, Top]]]]:
        """Waits. What each span that samples draws, None where a guess up to it is wrong, and (log-prob, most likely ones) of
        the prompt tokens of each that scores. RunnerError where one of these is no number; the draws may be none."""
        if self.ready:
            self.ready.synchronize()
        drawn, *given = self.scores
        sampled: list[Drawn | None] = []
        before: Drawn | None = None  # of the row above: that of the token before a guess
        for span, token, score in zip(self.sampling, self.host.tolist(), drawn.read(self.sampling), strict=True):
            right = span.guess is None or (before is not None and before[0] == span.guess)
            before = (token, *score) if right else None
            sampled.append(before)
        scoring = [span for span in self.spans if span.scored]
        scored = [g.read([span] * len(span.scored)) for g, span in zip(given, scoring, strict=True)]
        for span, scores in zip(scoring, scored, strict=True):
            if any(math.isnan(logprob) for logprob, _ in scores):
                raise RunnerError(f"request {span.sequence.request.id}: {NO_NUMBER}")
        return sampled, scored


class Runner:
    """Holds one shard's weights and key-value rows. No gradients."""

    def __init__(
        self,
        config: ModelConfig,
        group: TreeGroup,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        graphs_of: int = 0,
        graph_rows: int = 0,
    ) -> None:
        """`graphs_of`: capture decode steps of up to so many sequences (0: none), which with their guesses are up to
        `graph_rows` rows."""
        config.check_shards(group.shard.size)
        config.check_dtype(dtype)
        self.config, self.group, self.page_size = config, group, page_size
        self.dtype, self.device = dtype, device
        rows = (pages + (graphs_of > 0)) * page_size  # one page to spare for the rows that pad a graph's batch
        shape = (config.layers, rows, config.kv_heads // group.shard.size, config.head_dim)
        self.page_memory = Reclaimable({"keys": shape, "values": shape}, dtype, device)
        self.cache = PagedCache(**self.page_memory.tensors)
        cosine, sine = position_table(config)
        self.table = (cosine.to(device), sine.to(device))
        self.weight_memory = weight_memory(config, group.shard, dtype, device)
        self.weights = views(config, self.weight_memory.tensors)
        self.outer = outer_weights(self.weights)
        self.layers = [layer_weights(self.weights, i) for i in range(config.layers)]
        self.graphs: DecodeGraphs | None = None
        if graphs_of:
            most = graphs_of, max(graphs_of, graph_rows)
            self.graphs = DecodeGraphs(self._decode, *most, page_size, pages, config.max_positions, device)

    def load(self, parameter: Parameter, whole: Weight) -> None:
        """Replaces this shard's part of one parameter, in place, rounded to the engine's dtype, or in the model's format."""
        put(self.config, parameter, self.weights[parameter.name], whole, self.group.shard)

    def of_first_rank(self, numbers: list[float]) -> list[float]:
        """Returns those that the first rank of the group gives, as float32. A collective; it waits for what runs."""
        return self.group.all_gather(self._put(numbers, torch.float32))[0].tolist()

    def digests(self) -> Leaves:
        """Computes the SHA-256 of every slice held."""
        out: Leaves = {}
        for p in served(self.config):
            out |= slice_digests(self.config, p, self.weights[p.name], self.group.shard)
        return out

    @torch.no_grad()
    def launch(self, spans: list[Span], before: Launched | None = None) -> Launched:
        """Launches a batch. `before`: the batch launched before this one, if its results have not been read."""
        sampling = [s for s in spans if s.samples]
        if self.graphs and all(s.guess is not None or _decodes(s) for s in spans):
            last = before.tokens if before and any(s.pending for s in spans) else None
            tokens, logprobs = self.graphs.launch([_row(s, before) for s in spans], last)
            return self._launched(spans, sampling, tokens, [Scores(logprobs)])
        spans = sorted(spans, key=lambda s: Layout.kind((s.start, s.stop)))
        sampling = [s for s in spans if s.samples]
        layout = Layout.paged(
            [(s.start, s.stop) for s in spans], [s.sequence.pages for s in spans], self.page_size, self.device
        )
        ends = list(accumulate(s.stop - s.start for s in spans))
        brief = not any(s.scored for s in spans)
        if brief:  # what the last layer makes of tokens inside a prompt is not read
            layout = replace(layout, wanted=self._put([end - 1 for end in ends]))
        hidden = self._hidden(self._ids(spans, before), layout)
        scored = [self._scores(hidden, end - s.stop, s) for end, s in zip(ends, spans, strict=True) if s.scored]
        if not sampling:
            nothing = hidden.new_empty(0, dtype=torch.int64)
            return self._launched(spans, sampling, nothing, [Scores(nothing), *scored])
        drawn = [i if brief else end - 1 for i, (s, end) in enumerate(zip(spans, ends, strict=True)) if s.samples]
        params = [s.sequence.request.sampling for s in sampling]
        temperature = self._put([p.scale for p in params], torch.float32)
        seeds, positions = self._put([s.sequence.seed for s in sampling]), self._put([s.stop for s in sampling])
        greedy = self._put([p.greedy for p in params], torch.uint8)
        hidden, cut = hidden[self._put(drawn)], self._truncation(params)
        tokens, logprobs, logits, nodes = self._draw(hidden, temperature, seeds, positions, greedy, cut)
        drawn_scores = Scores(logprobs)
        if asking := [i for i, s in enumerate(sampling) if s.sequence.request.top]:
            rows, most = self._put(asking), max(s.sequence.request.top for s in sampling)
            drawn_scores = Scores(logprobs, *self._ranked(logits[rows], nodes[rows], temperature[rows], most))
        return self._launched(spans, sampling, tokens, [drawn_scores, *scored])

    def _truncation(self, params: list[SamplingParams]) -> Truncation:
        """Of the rows that are cut; the others are left out."""
        cut = [(i, *p.filters) for i, p in enumerate(params) if p.truncated]
        rows, top_k, top_p, min_p = zip(*cut, strict=True) if cut else ((), (), (), ())
        real = torch.float32
        return Truncation(self._put(rows), self._put(top_k), self._put(top_p, real), self._put(min_p, real))

    def _ids(self, spans: list[Span], before: Launched | None) -> torch.Tensor:
        """int64 [T]: the input tokens, those that are pending from the batch before."""
        ids: list[int] = []
        at: list[int] = []
        rows: list[int] = []
        for s in spans:
            ids += s.sequence.tokens[s.start : s.stop] if s.guess is None else [s.guess]
            if s.pending:
                assert before, "a pending token is sampled by the batch before"
                at.append(len(ids))
                rows.append(before.row(s.sequence))
                ids.append(0)
        out = self._put(ids)
        if before and at:
            out[self._put(at)] = before.tokens[self._put(rows)]
        return out

    def _put(self, values: Many[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """To the device, without waiting for it."""
        return on_device(torch.tensor(values, dtype=dtype), self.device)

    def _launched(
        self, spans: list[Span], sampling: list[Span], tokens: torch.Tensor, scores: list[Scores]
    ) -> Launched:
        """Starts the way of the results to the host."""
        if tokens.device.type == "cpu":
            return Launched(spans, sampling, tokens, tokens, scores, None)
        scores = [s.to_host() for s in scores]
        host, ready = _to_host(tokens), torch.cuda.Event()
        ready.record()
        return Launched(spans, sampling, tokens, host, scores, ready)

    def _scores(self, hidden: torch.Tensor, offset: int, span: Span) -> Scores:
        """Of its prompt tokens `span.scored`; position p is row `offset + p` of `hidden`."""
        scale, top, out = span.sequence.request.sampling.scale, span.sequence.request.top, []
        for first in range(span.scored.start, span.scored.stop, _SCORED_ROWS):
            places = range(first, min(first + _SCORED_ROWS, span.scored.stop))
            rows = self._put([offset + place - 1 for place in places])
            targets = self._put([span.sequence.tokens[place] for place in places])
            out.append(self._given(hidden[rows], targets, self._put([scale] * len(places), torch.float32), top))
        return Scores(*(torch.cat(parts) for parts in zip(*out, strict=True)))

    def _given(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, top: int
    ) -> tuple[torch.Tensor, ...]:
        """Scores of tokens that are given: as `_draw`, where the rank that holds a token is its winner."""
        logits = head_logits(self.config, self.outer, hidden, self.group.shard)
        shard, (rows, width) = self.group.shard, logits.shape
        leaves = self.config.leaves // shard.size
        nodes = vocab_nodes(logits, temperature, leaves)
        local = (targets - shard.rank * width).clamp(0, width - 1)
        parts = self.group.all_gather(torch.cat([logits.gather(1, local[:, None]), nodes.view(rows, 2 * leaves)], 1))
        nodes = parts[:, :, 1:].transpose(0, 1).reshape(rows, self.config.leaves, 2)
        picked = parts[targets // width, torch.arange(rows, device=self.device), 0]
        logprobs = vocab_logprob(nodes, picked.contiguous(), temperature)[0]
        return (logprobs, *self._ranked(logits, nodes, temperature, top)) if top else (logprobs,)

    def _ranked(
        self, logits: torch.Tensor, nodes: torch.Tensor, temperature: torch.Tensor, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `most` most likely tokens of each row and their log-probs, (int64, float32) [R, most]: the first of all ranks'
        first ones. logits float32 [R, V / S], nodes float32 [R, leaves, 2] of all ranks, temperature float32 [R]."""
        shard, (rows, width) = self.group.shard, logits.shape
        ids = torch.arange(width, device=logits.device)
        few = min(most, width)
        best = torch.cat([_order(part, ids).topk(few).indices for part in logits.split(_RANKED_ROWS)])
        first = torch.stack([logits.gather(1, best), (best + shard.rank * width).int().view(torch.float32)], 2)
        first = self.group.all_gather(first).transpose(0, 1).reshape(rows, -1, 2)
        logits, ids = first[:, :, 0].contiguous(), first[:, :, 1].contiguous().view(torch.int32).long()
        best = _order(logits, ids).topk(most).indices
        picked, of_each = logits.gather(1, best), (t.repeat_interleave(most, 0) for t in (nodes, temperature))
        nodes, temperature = of_each
        logprobs = vocab_logprob(nodes, picked.view(-1), temperature)[0]
        return ids.gather(1, best), logprobs.view(rows, most)

    def _hidden(self, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
        def run_layer(i: int, x: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
            return decoder_layer(self.config, self.group, self.layers[i], i, x, delta, layout, self.cache, self.table)

        return forward(self.config, self.group, self.outer, run_layer, ids, layout, self.dtype)

    def _decode(
        self,
        ids: torch.Tensor,
        layout: Layout,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        greedy: torch.Tensor,
        truncation: Truncation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A step in which every sequence has one token; nothing of it leaves the device."""
        hidden = self._hidden(ids, layout)
        tokens, logprobs, *_ = self._draw(hidden, temperature, seeds, layout.positions.long() + 1, greedy, truncation)
        return tokens, logprobs

    def _draw(
        self,
        hidden: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        greedy: torch.Tensor,
        truncation: Truncation,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(token int64 [R], log-prob float32 [R], this rank's logits, -inf where they are cut, the nodes of all ranks); a token
        of -1 where no logit was a number. Every rank draws from its part of the vocabulary; the parts meet in one gather of
        winners and of the leaves of the log-sum-exp."""
        logits = head_logits(self.config, self.outer, hidden, self.group.shard)
        self._cut(logits, temperature, truncation)
        shard, (rows, width) = self.group.shard, logits.shape
        score, token, logit = gumbel_argmax(logits, temperature, seeds, positions, greedy, shard.rank * width)
        leaves = self.config.leaves // shard.size
        nodes = vocab_nodes(logits, temperature, leaves)
        if shard.size == 1:
            return token, vocab_logprob(nodes, logit, temperature)[0], logits, nodes
        winner = torch.stack([score, logit, token.int().view(torch.float32)], 1)
        parts = self.group.all_gather(torch.cat([winner, nodes.view(rows, 2 * leaves)], 1))
        nodes = parts[:, :, 3:].transpose(0, 1).reshape(rows, self.config.leaves, 2)
        best = parts[0, :, :3]
        for other in parts[1:, :, :3]:  # a tie stays with the lower rank: the lowest token id
            best = torch.where((other[:, 0] > best[:, 0])[:, None], other, best)
        logprobs, _ = vocab_logprob(nodes, best[:, 1], temperature)
        return best[:, 2].contiguous().view(torch.int32).long(), logprobs, logits, nodes

    def _cut(self, logits: torch.Tensor, temperature: torch.Tensor, truncation: Truncation) -> None:
        """In place: -inf for what may not be drawn of this rank's part of the vocabulary. The filters look at whole rows, so
        the rows that are cut are gathered, a few at a time."""
        rank, width = self.group.shard.rank, logits.shape[1]
        for part in truncation.parts():
            mine = logits[part.rows]
            whole = self.group.all_gather(mine).transpose(0, 1).reshape(len(part), -1)
            kept = part.kept(whole, temperature)[:, rank * width : (rank + 1) * width]
            logits[part.rows] = mine.masked_fill(kept == 0, -torch.inf)


def _order(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64: a larger number for a larger logit and, among equals, for a lower id. No two are equal."""
    bits = (logits + 0.0).view(torch.int32)  # -0 is 0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.long() << 32) + (0x7FFFFFFF - ids)


def _to_host(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)


def _decodes(span: Span) -> bool:
    """Whether a graph of the decode step does all that is asked of it."""
    return span.decodes and not span.sequence.request.top


def _row(span: Span, before: Launched | None) -> Row:
    sequence = span.sequence
    if span.guess is not None:
        return Row(span.guess, -1, span.start, sequence.pages, sequence.seed, sequence.request.sampling)
    source = before.row(sequence) if span.pending and before else -1
    token = sequence.tokens[span.start] if source < 0 else 0
    return Row(token, source, span.start, sequence.pages, sequence.seed, sequence.request.sampling)
