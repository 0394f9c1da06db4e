"""Sampling on the device, from logits to tokens: penalties, temperature, filters, one draw.

A draw is the Gumbel-max trick: the argmax of logits / temperature + G, with G independent Gumbel(0, 1) noise, falls on
token v with probability softmax(logits / temperature)[v]. The noise is a function of (seed, position, token id), by
philox, so a row's token depends neither on its row, nor on the batch, nor on tp_size. Three rules keep that bitwise:
  - ties go to the lowest id; torch.argmax and torch.topk do not promise that on CUDA
  - probabilities are summed as integers. The bits of an fp32 sum or cumsum depend on the shape of the batch,
    and on CUDA also on how a row is aligned; integer addition is associative
  - a stage runs if a row asks for it, and leaves alone the bits of rows that do not
On a GPU a stage is a kernel or two that read the logits where they lie, and cost only the rows that ask. So a call may
run more stages than were asked for, and one that runs all of them can be captured for every batch.

It knows nothing of requests, stop conditions or text. A call waits for nothing and uploads nothing: what each row asks
for lies on the device as well.

R rows, V vocab (whole, not this rank's part), N most likely tokens.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from penstock.engine.compute.inputs import to_device
from penstock.engine.kernels.argmax import Owners, argmax_rows, reads_in_place
from penstock.engine.kernels.draw import Noise, draw_rows
from penstock.engine.kernels.filter import KEEP_ALL, Filters, Limits, find_limits
from penstock.engine.kernels.logprobs import Logprobs, packed_width, score_rows
from penstock.engine.kernels.occurrences import note_tokens
from penstock.engine.kernels.penalty import Penalised, Penalties, penalise_rows
from penstock.engine.model.steps import COPIED_ROWS
from penstock.scheduler.batching.batch import History
from penstock.scheduler.batching.request import MAX_LOGPROBS, RowSampling
from torch import Tensor

GREEDY = RowSampling(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, 0, -1)
EMPTY: Mapping[int, History] = MappingProxyType({})
STAGES = ("penalty", "draw", "filter", "logprobs")
Params = Mapping[str, Tensor]  # by name, a value a row
NAN_LOGITS = "the logits are NaN: the weights hold NaN or inf, or activations overflow in this dtype"
CHUNK_ELEMENTS = 1 << 22  # of logits copied at a time: bounds temporaries to about 40 bytes times this


@dataclass(frozen=True)
class Asked:
    """Holds what the rows of a batch ask for, all together: the stages that have to run."""

    stages: frozenset[str] = frozenset()


EVERYTHING = Asked(frozenset(STAGES))


@dataclass(frozen=True)
class SampleOutput:
    """Sampled `tokens` (R,) int64, each 0..V-1, or -1 where the row's logits hold a NaN: no token could be drawn, and
    the row's log probabilities mean nothing. `scores` (R, packed_width(N)) int32 are Logprobs; None if no row asked.
    `prompt_scores` (M, packed_width(N)) int32 are those of the prompts' tokens for which rows asked, likewise."""

    tokens: Tensor
    scores: Tensor | None
    prompt_scores: Tensor | None = None

    @functools.cached_property
    def logprobs(self) -> Logprobs | None:
        return None if self.scores is None else Logprobs.of(self.scores)

    @functools.cached_property
    def prompt_logprobs(self) -> Logprobs | None:
        return None if self.prompt_scores is None else Logprobs.of(self.prompt_scores)

    def map(self, change: Callable[[Tensor], Tensor]) -> "SampleOutput":
        """The same with each tensor changed."""
        scores = (None if one is None else change(one) for one in (self.scores, self.prompt_scores))
        return SampleOutput(change(self.tokens), *scores)


class PendingSample:
    """A SampleOutput on its way to pinned host memory. In an eager pass the copies stand on the compute lane right
    behind the sampler, before the pass is joined: the host prepares the next pass while weights for it are still on the
    link."""

    def __init__(self, output: SampleOutput):
        self._event = torch.cuda.Event() if output.tokens.is_cuda else None
        self._output = output.map(self._to_host)
        if self._event is not None:
            self._event.record()

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._event is None:
            return tensor.clone()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    @property
    def has_come(self) -> bool:
        """Tells whether the output is on the host."""
        return self._event is None or self._event.query()

    def wait(self, expected_s: float = 0.0) -> SampleOutput:
        """The output on the host; other threads of Python run meanwhile, whenever it is expected."""
        if self._event is not None:
            self._event.synchronize()
        return self._output


class Sampler:
    """Sampling parameters and penalty state of max_num_seqs rows, on the device; all rows start as greedy.

    `last_tokens` (max_num_seqs + 1,) int64 is each row's last sampled token; the last entry is that of `pad_row`. It is
    0 where a NaN left no token: a pass that was submitted ahead computes it for nothing.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str):
        self.vocab_size = vocab_size
        self.scores_width = packed_width(min(MAX_LOGPROBS, vocab_size))
        self.device = torch.device(device)
        self.pad_row = max_num_seqs  # always greedy, and nobody's: that of a bucket's padding, which gets token 0
        max_num_seqs += 1
        self.last_tokens = self._zeros(max_num_seqs, dtype=torch.int64)
        self.asked_by = [_stages(GREEDY)] * max_num_seqs  # the host's copy: branching needs no sync
        floats, ints = _device_values(GREEDY, vocab_size)
        self.floats = torch.tensor([[value] * max_num_seqs for value in floats.values()], device=self.device)
        self.ints = torch.tensor([[value] * max_num_seqs for value in ints.values()], device=self.device)
        self.params = dict(zip((*floats, *ints), (*self.floats, *self.ints), strict=True))  # (max_num_seqs + 1,) each
        self.occurrences = self._zeros(max_num_seqs, vocab_size, dtype=torch.int32)  # penalty.py

    def asked(self, host_rows: Sequence[int]) -> Asked:
        """Says what these rows ask for together."""
        return Asked(frozenset().union(*set(map(self.asked_by.__getitem__, host_rows))))

    def set_rows(self, samplings: Mapping[int, RowSampling], histories: Mapping[int, History] = EMPTY) -> None:
        """Gives rows to requests, before their first chunks; what the rows' former owners left is dropped. `histories`
        are the tokens that came before, of rows with penalties."""
        if not samplings:
            return
        for row, sampling in samplings.items():
            self.asked_by[row] = _stages(sampling)
        values = [_device_values(sampling, self.vocab_size) for sampling in samplings.values()]
        rows = to_device(list(samplings), torch.int64, self.device)
        self.floats[:, rows] = to_device([list(floats.values()) for floats, _ in values], torch.float32, self.device).T
        self.ints[:, rows] = to_device([list(ints.values()) for _, ints in values], torch.int64, self.device).T
        if penalised := [row for row in samplings if "penalty" in self.asked_by[row]]:
            self.occurrences.index_fill_(0, to_device(penalised, torch.int64, self.device), 0)
            for row in penalised:
                self._recall(row, histories.get(row, History()))

    def _recall(self, row: int, history: History) -> None:
        for ids, sampled in ((history.cached, False), (history.outputs, True)):
            if ids:
                tokens = to_device(list(ids), torch.int64, self.device)
                rows = torch.full_like(tokens, row)
                note_tokens(self.occurrences, self.params["asks_penalty"], rows, tokens, sampled)

    def observe(self, rows: Tensor, token_ids: Tensor) -> None:
        """Notes computed tokens (T,) int64 of 0..V-1 and their rows (T,) for the repetition penalty; it is to be called
        where a row asks for that.

        A prompt's tokens must be noted. An output's may be noted here again: what counts is whether a token occurred.
        """
        note_tokens(self.occurrences, self.params["asks_penalty"], rows, token_ids, sampled=False)

    def __call__(self, logits: Tensor, rows: Tensor, positions: Tensor, asked: Asked) -> SampleOutput:
        """Samples a token a row from logits (R, V) of any float dtype.

        `rows` (R,) int64 are different, but for the pad row, whose logits are not read. `positions` (R,) int64 are
        those of the tokens that are being sampled (the length of the prompt for a request's first). `asked` is what
        the rows ask for together, or more.
        """
        own = self._params_of(rows) if asked.stages else {}
        chunks = self._chunks(logits, asked.stages)
        parts = [self._sample(logits[c], rows[c], positions[c], own, c, asked.stages) for c in chunks]
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
        if "penalty" in asked.stages:
            note_tokens(self.occurrences, self.params["asks_penalty"], rows, tokens, sampled=True)
        self.last_tokens[rows] = tokens.clamp(min=0)
        scores = self.score(logits, tokens, own["num_logprobs"]) if "logprobs" in asked.stages else None
        return SampleOutput(tokens, scores)

    def score(self, logits: Tensor, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Logprobs, packed, of tokens (R,) under logits (R, V or more), of rows that want so many of the most likely
        tokens: `wanted` (R,) int64, -1 for no log probabilities."""
        scores = self._zeros(len(logits), self.scores_width, dtype=torch.int32)
        for c in self._chunks(logits, frozenset()):
            score_rows(logits[c], self.vocab_size, tokens[c], wanted[c], scores[c])
        return scores

    def penalise(self, logits: Tensor, rows: Tensor) -> Penalised:
        """Logits (R, V or more) after the penalties of the rows that ask for them."""
        return self._penalise(logits, rows, self._params_of(rows))

    def limits(self, logits: Tensor, rows: Tensor) -> Limits:
        """Says what the rows' filters keep of logits (R, V)."""
        return self._limits(logits, self._params_of(rows), None)

    def _sample(
        self, logits: Tensor, rows: Tensor, positions: Tensor, own: Params, chunk: slice, stages: frozenset[str]
    ) -> Tensor:
        own = {name: values[chunk] for name, values in own.items()}
        penalised = self._penalise(logits, rows, own) if "penalty" in stages else None
        owners = Owners(rows, self.pad_row)
        if not stages & {"penalty", "draw"}:
            return argmax_rows(logits, self.vocab_size, owners)
        noise = Noise(own["temperature"], own["seed"], positions)
        limits = self._limits(logits, own, penalised) if "filter" in stages else None
        return draw_rows(logits, self.vocab_size, noise, limits, penalised, owners)

    def _penalise(self, logits: Tensor, rows: Tensor, own: Params) -> Penalised:
        penalties = Penalties(*(own[name] for name in Penalties._fields))
        return penalise_rows(logits, self.vocab_size, self.occurrences, rows, penalties)

    def _limits(self, logits: Tensor, own: Params, penalised: Penalised | None) -> Limits:
        filters = Filters(*(own[name] for name in Filters._fields))
        return find_limits(logits, self.vocab_size, own["temperature"], filters, penalised)

    def _params_of(self, rows: Tensor) -> Params:
        """The parameters of rows (R,), each (R,) and contiguous, in two launches. Each begins at a multiple of 16
        bytes, whatever R is, since a kernel is compiled anew for what does not."""
        num_rows, columns = len(rows), []
        for values in (self.floats, self.ints):
            own = values.new_empty(len(values), -(-num_rows // 4) * 4)[:, :num_rows]
            columns += torch.index_select(values, 1, rows, out=own)
        return dict(zip(self.params, columns, strict=True))

    def _chunks(self, logits: Tensor, stages: frozenset[str]) -> list[slice]:
        """Rows to take at a time: all that kernels read in place; fewer where stages make float32 copies."""
        if reads_in_place(logits):
            size = COPIED_ROWS if stages & {"penalty", "filter"} else max(len(logits), 1)
        else:
            size = max(1, CHUNK_ELEMENTS // self.vocab_size)
        return [slice(start, start + size) for start in range(0, len(logits), size) or (0,)]

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


def _device_values(sampling: RowSampling, vocab_size: int) -> tuple[dict[str, float], dict[str, int]]:
    floats = {
        "temperature": sampling.temperature,
        "drop_mass": 1.0 - sampling.top_p if sampling.top_p < 1.0 else KEEP_ALL,
        "log_min_p": math.log(sampling.min_p) if sampling.min_p else -math.inf,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    ints = {
        "top_k": min(sampling.top_k, vocab_size) or vocab_size,
        "seed": sampling.seed - 2**64 if sampling.seed >= 2**63 else sampling.seed,
        "asks_penalty": int("penalty" in _stages(sampling)),
        "num_logprobs": sampling.num_logprobs,
    }
    return floats, ints


def _stages(sampling: RowSampling) -> frozenset[str]:
    draw, limited = sampling.temperature > 0.0, sampling.top_k or sampling.top_p < 1.0 or sampling.min_p
    asks = {
        "penalty": sampling.has_penalty,
        "draw": draw,
        "filter": draw and limited,
        "logprobs": sampling.num_logprobs >= 0,
    }
    return frozenset(stage for stage in STAGES if asks[stage])
