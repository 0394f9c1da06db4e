"""Sampling on the device, from logits to tokens: penalties, temperature, filters, one draw.

A draw is the Gumbel-max trick: the argmax of logits / temperature + G, with G independent Gumbel(0, 1) noise, falls on
token v with probability softmax(logits / temperature)[v]. The noise is a function of (seed, position, token id), by
philox, so a row's token depends neither on its row, nor on the batch, nor on tp_size. Three rules keep that bitwise:
  - ties go to the lowest id; torch.argmax and torch.topk do not promise that on CUDA
  - probabilities are summed as integers. The bits of an fp32 sum or cumsum depend on the shape of the batch,
    and on CUDA also on how a row is aligned; integer addition is associative
  - a stage runs if a row asks for it, and leaves alone the bits of rows that do not
On a GPU filters and draws read the logits where they lie, a few times; only penalties and logprobs make copies.

It knows nothing of requests, stop conditions or text. A call waits for nothing and uploads nothing: what each row asks
for lies on the device as well, so that a call can be captured with the stages that it was asked for.

R rows, V vocab (whole, not this rank's part), N most likely tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from penstock.engine.compute.inputs import to_device
from penstock.engine.compute.logits import Logprobs, logprobs
from penstock.engine.kernels.argmax import argmax_rows, reads_in_place
from penstock.engine.kernels.draw import Noise, draw_rows
from penstock.engine.kernels.filter import KEEP_ALL, Filters, Limits, find_limits
from penstock.scheduler.batching.batch import History
from penstock.scheduler.batching.request import RowSampling
from torch import Tensor

GREEDY = RowSampling(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, 0, -1)
EMPTY: Mapping[int, History] = MappingProxyType({})
STAGES = ("penalty", "draw", "filter")
NAN_LOGITS = "the logits are NaN: the weights hold NaN or inf, or activations overflow in this dtype"
CHUNK_ELEMENTS = 1 << 22  # of logits copied at a time: bounds temporaries to about 40 bytes times this


@dataclass(frozen=True)
class Asked:
    """Holds what the rows of a batch ask for, all together: the stages that have to run, and the most logprobs (-1:
    none)."""

    stages: frozenset[str] = frozenset()
    num_logprobs: int = -1


@dataclass(frozen=True)
class SampleOutput:
    """Sampled `tokens` (R,) int64, each 0..V-1, or -1 where the row's logits hold a NaN: no token could be drawn, and
    the row's `logprobs` mean nothing. `logprobs` is None if no row asked for them."""

    tokens: Tensor
    logprobs: Logprobs | None


class PendingSample:
    """A SampleOutput on its way to pinned host memory. In an eager pass the copies stand on the compute lane right
    behind the sampler, before the pass is joined: the host prepares the next pass while weights for it are still on the
    link."""

    def __init__(self, output: SampleOutput):
        self._event = torch.cuda.Event() if output.tokens.is_cuda else None
        logprobs = None if output.logprobs is None else Logprobs(*map(self._to_host, output.logprobs))
        self._output = SampleOutput(self._to_host(output.tokens), logprobs)
        if self._event is not None:
            self._event.record()

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._event is None:
            return tensor.clone()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def wait(self) -> SampleOutput:
        """The output on the host."""
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
        self.device = torch.device(device)
        self.pad_row = max_num_seqs  # always greedy, and nobody's: padded rows of a bucket are sampled into it
        max_num_seqs += 1
        self.last_tokens = self._zeros(max_num_seqs, dtype=torch.int64)
        self.asked_by = [Asked()] * max_num_seqs  # the host's copy: branching needs no sync
        floats, ints = _device_values(GREEDY, vocab_size)
        self.floats = torch.tensor([[value] * max_num_seqs for value in floats.values()], device=self.device)
        self.ints = torch.tensor([[value] * max_num_seqs for value in ints.values()], device=self.device)
        self.params = dict(zip((*floats, *ints), (*self.floats, *self.ints), strict=True))  # (max_num_seqs + 1,) each
        self.prompt_seen: Tensor | None = None  # (max_num_seqs, V) bool
        self.output_counts: Tensor | None = None  # (max_num_seqs, V) int32

    def asked(self, host_rows: Sequence[int]) -> Asked:
        """Says what these rows ask for together."""
        each = [self.asked_by[row] for row in host_rows]
        stages = frozenset().union(*(asked.stages for asked in each))
        return Asked(stages, max((asked.num_logprobs for asked in each), default=-1))

    def set_rows(self, samplings: Mapping[int, RowSampling], histories: Mapping[int, History] = EMPTY) -> None:
        """Gives rows to requests, before their first chunks; what the rows' former owners left is dropped. `histories`
        are the tokens that came before, of rows with penalties."""
        if not samplings:
            return
        for row, sampling in samplings.items():
            self.asked_by[row] = Asked(_stages(sampling), sampling.num_logprobs)
        values = [_device_values(sampling, self.vocab_size) for sampling in samplings.values()]
        rows = to_device(list(samplings), torch.int64, self.device)
        self.floats[:, rows] = to_device([list(floats.values()) for floats, _ in values], torch.float32, self.device).T
        self.ints[:, rows] = to_device([list(ints.values()) for _, ints in values], torch.int64, self.device).T
        penalised = [row for row in samplings if "penalty" in self.asked_by[row].stages]
        if penalised and self.output_counts is None:  # it is made last: an interrupt before it leaves both to be made
            self.prompt_seen = self._zeros(self.pad_row + 1, self.vocab_size, dtype=torch.bool)
            self.output_counts = self._zeros(self.pad_row + 1, self.vocab_size, dtype=torch.int32)
        for row in penalised:
            self.prompt_seen[row].zero_()
            self.output_counts[row].zero_()
            self._recall(row, histories.get(row, History()))

    def _recall(self, row: int, history: History) -> None:
        cached, outputs = (to_device(list(tokens), torch.int64, self.device) for tokens in history)
        self.prompt_seen[row, cached] = True
        self.output_counts[row].scatter_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))

    def observe(self, rows: Tensor, token_ids: Tensor) -> None:
        """Notes computed tokens (T,) int64 of 0..V-1 and their rows (T,) for the repetition penalty; it is to be called
        where a row asks for that.

        A prompt's tokens must be noted. An output's may be noted here again: what counts is whether a token occurred.
        """
        seen, index = self.prompt_seen.view(-1), rows * self.vocab_size + token_ids
        seen[index] = seen[index] | self._asks_penalty(rows)

    def __call__(self, logits: Tensor, rows: Tensor, positions: Tensor, asked: Asked) -> SampleOutput:
        """Samples a token a row from logits (R, V) of any float dtype.

        `rows` (R,) int64 are different, but for the pad row; `positions` (R,) int64 are those of the tokens that are
        being sampled (the length of the prompt for a request's first). `asked` is what the rows ask for together, or
        more.
        """
        if "penalty" not in asked.stages and reads_in_place(logits):
            tokens = self._sample(logits, rows, positions, asked.stages)
        else:
            parts = (self._sample(logits[c], rows[c], positions[c], asked.stages) for c in self._chunks(logits))
            tokens = torch.cat(list(parts))
        self.last_tokens[rows] = tokens.clamp(min=0)
        return SampleOutput(tokens, self.score(logits, tokens, asked.num_logprobs) if asked.num_logprobs >= 0 else None)

    def score(self, logits: Tensor, tokens: Tensor, num_logprobs: int) -> Logprobs:
        """Log probabilities of tokens (R,), and of the most likely ones, under logits (R, V or more)."""
        raw, tokens = logits[:, : self.vocab_size], tokens.clamp(min=0)
        parts = (logprobs(raw[c].float(), tokens[c], num_logprobs) for c in self._chunks(raw))
        return Logprobs(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def penalise(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logits (R, V) float32 after the penalties of the rows that ask for them."""
        counts = self.output_counts[rows]  # (R, V)
        seen = self.prompt_seen[rows] | (counts > 0)  # (R, V)
        repetition = self._param("repetition_penalty", rows)
        penalised = torch.where(logits < 0, logits * repetition, logits / repetition)
        penalised = torch.where(seen, penalised, logits)
        penalised = penalised - self._param("frequency_penalty", rows) * counts
        penalised = penalised - self._param("presence_penalty", rows) * (counts > 0)
        return torch.where(self._asks_penalty(rows)[:, None], penalised, logits)

    def limits(self, logits: Tensor, rows: Tensor) -> Limits:
        """Says what the rows' filters keep of logits (R, V)."""
        filters = Filters(*(self.params[name][rows] for name in Filters._fields))
        return find_limits(logits, self.vocab_size, self.params["temperature"][rows], filters)

    def _sample(self, logits: Tensor, rows: Tensor, positions: Tensor, stages: frozenset[str]) -> Tensor:
        if "penalty" in stages:
            logits = self.penalise(logits.float(), rows)
        if "draw" in stages:
            noise = Noise(self.params["temperature"][rows], self.params["seed"][rows], positions)
            limits = self.limits(logits, rows) if "filter" in stages else None
            tokens = draw_rows(logits, self.vocab_size, noise, limits)  # (R,)
        else:
            tokens = argmax_rows(logits, self.vocab_size)
        if "penalty" in stages:
            came = self._asks_penalty(rows).int()
            self.output_counts.view(-1).scatter_add_(0, rows * self.vocab_size + tokens.clamp(min=0), came)
        return tokens

    def _chunks(self, logits: Tensor) -> list[slice]:
        """Rows to take at a time where float32 copies of logits are made."""
        size = max(1, CHUNK_ELEMENTS // self.vocab_size)
        return [slice(start, start + size) for start in range(0, len(logits), size) or (0,)]

    def _asks_penalty(self, rows: Tensor) -> Tensor:
        return self.params["asks_penalty"][rows] > 0  # (R,)

    def _param(self, name: str, rows: Tensor) -> Tensor:
        return self.params[name][rows][:, None]  # (R, 1)

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
    }
    return floats, ints


def _stages(sampling: RowSampling) -> frozenset[str]:
    draw, limited = sampling.temperature > 0.0, sampling.top_k or sampling.top_p < 1.0 or sampling.min_p
    asks = {"penalty": sampling.has_penalty, "draw": draw, "filter": draw and limited}
    return frozenset(stage for stage in STAGES if asks[stage])
