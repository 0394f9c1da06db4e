"""From logits to tokens, on the device: penalties, temperature, filters, one draw.

A draw is the Gumbel-max trick: the argmax of scores + G, with G independent Gumbel(0, 1) noise, falls on
token v with probability softmax(scores)[v]. The noise is a function of (seed, position, token id), by philox,
so a row's token depends neither on its row, nor on the batch, nor on tp_size. Three rules keep that bitwise:
  - ties go to the lowest id; torch.argmax and torch.topk do not promise that on CUDA
  - probabilities are summed as integers. The bits of an fp32 sum or cumsum depend on the shape of the batch,
    and on CUDA also on how a row is aligned; integer addition is associative
  - a stage runs on the rows that ask for it and leaves the bits of all others alone

What it does not know: requests, stop conditions, text. Nothing here waits for the device; when all rows of a
batch take the same stages no index is uploaded either, so that such a call can be captured.

R rows, V vocab (whole, not this rank's part), N most likely tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.argmax import argmax_rows
from engine.kernels.philox import uniform
from engine.runtime.logits import KEEP_ALL, Logprobs, kept, logprobs
from scheduler.request import RowSampling

GREEDY = RowSampling(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, 0, -1)
CHUNK_ELEMENTS = 1 << 22  # of logits taken at a time: bounds temporaries to about 40 bytes times this


@dataclass(frozen=True)
class SampleOutput:
    """`tokens` (R,) int64 lie in 0..V-1 whatever the logits; `logprobs` is None if no row asked for them."""

    tokens: Tensor
    logprobs: Logprobs | None


class PendingSample:
    """A SampleOutput on its way to pinned host memory. The copies stand on the compute lane right behind the sampler,
    before the pass is joined: so the next pass is prepared while the copies for it are still on the link."""

    def __init__(self, output: SampleOutput, num_nan_rows: Tensor):
        self._event = torch.cuda.Event() if output.tokens.is_cuda else None
        logprobs = None if output.logprobs is None else Logprobs(*map(self._to_host, output.logprobs))
        self._output = SampleOutput(self._to_host(output.tokens), logprobs)
        self._num_nan_rows = self._to_host(num_nan_rows)
        if self._event is not None:
            self._event.record()

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._event is None:
            return tensor.clone()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def wait(self) -> SampleOutput:
        """The output on the host. Raises ValueError if logits were NaN: a token drawn from them means nothing."""
        if self._event is not None:
            self._event.synchronize()
        refuse_nan(self._num_nan_rows)
        return self._output


def refuse_nan(num_nan_rows: Tensor) -> None:
    """Raises ValueError if `num_nan_rows`, one integer on the host, is not 0."""
    if num_nan_rows.item():
        raise ValueError("the logits are NaN: the weights hold NaN or inf, or activations overflow in this dtype")


class Sampler:
    """Sampling parameters and penalty state of max_num_seqs rows, on the device; all rows start as greedy.

    `last_tokens` (max_num_seqs + 1,) int64 is each row's last sampled token, the last that of `pad_row`.
    `num_nan_rows` () int64 counts rows sampled from logits with a NaN; they give token 0, and whoever reads the tokens
    has to look and raise.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str):
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.pad_row = max_num_seqs  # always greedy, and nobody's: padded rows of a bucket are sampled into it
        max_num_seqs += 1
        self.last_tokens = self._zeros(max_num_seqs, dtype=torch.int64)
        self.num_nan_rows = self._zeros(dtype=torch.int64)
        self.num_logprobs = [-1] * max_num_seqs  # this and `asks` are the host's: branching needs no sync
        self.asks = {stage: [asks] * max_num_seqs for stage, asks in _stages(GREEDY).items()}
        self.params = {
            name: self._zeros(max_num_seqs, dtype=torch.int64 if isinstance(value, int) else torch.float32)
            for name, value in _device_values(GREEDY, vocab_size).items()
        }
        self.prompt_seen: Tensor | None = None  # (max_num_seqs, V) bool
        self.output_counts: Tensor | None = None  # (max_num_seqs, V) int32

    def is_greedy(self, host_rows: Sequence[int]) -> bool:
        """Whether these rows take the most likely token, nothing else is asked, and so no stage runs."""
        return all(
            self.num_logprobs[row] < 0 and not any(asks[row] for asks in self.asks.values()) for row in host_rows
        )

    def set_row(self, row: int, sampling: RowSampling) -> None:
        """Gives the row to a request, before its first chunk; what the row's former owner left is dropped."""
        self.num_logprobs[row] = sampling.num_logprobs
        for stage, asks in _stages(sampling).items():
            self.asks[stage][row] = asks
        for name, value in _device_values(sampling, self.vocab_size).items():
            self.params[name][row].fill_(value)
        if self.asks["penalty"][row] and self.prompt_seen is None:
            shape = (self.pad_row, self.vocab_size)
            self.prompt_seen = self._zeros(*shape, dtype=torch.bool)
            self.output_counts = self._zeros(*shape, dtype=torch.int32)
        if self.asks["penalty"][row]:
            self.prompt_seen[row].zero_()
            self.output_counts[row].zero_()

    def observe(self, row: int, token_ids: Tensor) -> None:
        """Notes computed tokens (any shape, int64, on the device, 0..V-1) for the repetition penalty.

        A prompt's have to be noted; an output's may be once more: only whether a token came matters.
        """
        if self.asks["penalty"][row]:
            self.prompt_seen[row].index_fill_(0, token_ids.flatten(), True)

    def __call__(self, logits: Tensor, rows: Tensor, host_rows: list[int], positions: Tensor) -> SampleOutput:
        """Samples a token a row from logits (R, V) of any float dtype.

        rows (R,) int64 on the device and host_rows are the same, no row twice; positions (R,) int64 are those
        of the tokens that are being sampled (the length of the prompt for a request's first).
        """
        if self.is_greedy(host_rows):
            tokens = argmax_rows(logits, self.vocab_size, self.num_nan_rows)
            self.last_tokens[rows] = tokens
            return SampleOutput(tokens, None)
        num_top = max((self.num_logprobs[row] for row in host_rows), default=-1)
        size = max(1, CHUNK_ELEMENTS // self.vocab_size)
        parts = []
        for c in (slice(start, start + size) for start in range(0, len(host_rows), size) or (0,)):
            raw = logits[c].float()  # (R, V)
            tokens = self._sample(raw, rows[c], host_rows[c], positions[c])
            parts.append((tokens, *logprobs(raw, tokens, num_top)) if num_top >= 0 else (tokens,))
        tokens, *others = (torch.cat(part) for part in zip(*parts, strict=True))
        self.last_tokens[rows] = tokens
        return SampleOutput(tokens, Logprobs(*others) if others else None)

    def process(self, scores: Tensor, rows: Tensor, host_rows: list[int]) -> Tensor:
        """Penalties, temperature and filters as transformers' on scores (R, V) float32; dropped ones -inf."""
        scores = self._stage("penalty", self._penalise, host_rows, scores, rows)
        scores = self._stage("draw", self._temper, host_rows, scores, rows)
        return self._stage("filter", self._filter, host_rows, scores, rows)

    def _sample(self, raw: Tensor, rows: Tensor, host_rows: list[int], positions: Tensor) -> Tensor:
        scores = self.process(raw, rows, host_rows)
        scores = self._stage("draw", self._add_noise, host_rows, scores, rows, positions)
        tokens = argmax_rows(scores, self.vocab_size, self.num_nan_rows)  # (R,)
        where = self._where("penalty", host_rows)
        if where is not None:
            index = rows[where] * self.vocab_size + tokens[where]
            self.output_counts.view(-1).scatter_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        return tokens

    def _stage(self, name: str, run: Callable, host_rows: list[int], scores: Tensor, *rest: Tensor) -> Tensor:
        """Runs a stage on the rows that ask for it; scores (R, V) and the rest (R,) are its arguments."""
        where = self._where(name, host_rows)
        if where is None:
            return scores
        changed = run(scores[where], *(tensor[where] for tensor in rest))
        return changed if isinstance(where, slice) else scores.index_copy(0, where, changed)

    def _where(self, stage: str, host_rows: list[int]) -> Tensor | slice | None:
        """An index of the places whose row asks: None for no place, a slice for all of them."""
        places = [place for place, row in enumerate(host_rows) if self.asks[stage][row]]
        if len(places) in (0, len(host_rows)):
            return slice(None) if places else None
        index = torch.tensor(places)
        return index if self.device.type == "cpu" else index.pin_memory().to(self.device, non_blocking=True)

    def _penalise(self, scores: Tensor, rows: Tensor) -> Tensor:
        counts = self.output_counts[rows]  # (R, V)
        seen = self.prompt_seen[rows] | (counts > 0)  # (R, V)
        repetition = self._param("repetition_penalty", rows)
        penalised = torch.where(scores < 0, scores * repetition, scores / repetition)
        scores = torch.where(seen, penalised, scores)
        scores = scores - self._param("frequency_penalty", rows) * counts
        return scores - self._param("presence_penalty", rows) * (counts > 0)

    def _temper(self, scores: Tensor, rows: Tensor) -> Tensor:
        return scores / self._param("temperature", rows)

    def _filter(self, scores: Tensor, rows: Tensor) -> Tensor:
        limits = (self._param(name, rows) for name in ("top_k", "drop_mass", "min_p"))
        return scores.masked_fill(~kept(scores, *limits), -torch.inf)

    def _add_noise(self, scores: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        # 1 - u is as uniform as u, and log1p takes the noise's long upper tail from u near 0, where u is fine
        u = uniform(self.params["seed"][rows], positions, self.vocab_size)  # (R, V)
        return scores - u.neg_().log1p_().neg_().log_()

    def _param(self, name: str, rows: Tensor) -> Tensor:
        return self.params[name][rows][:, None]  # (R, 1)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


def _device_values(sampling: RowSampling, vocab_size: int) -> dict[str, float | int]:
    return {
        "temperature": sampling.temperature,
        "top_k": min(sampling.top_k, vocab_size) or vocab_size,
        "drop_mass": 1.0 - sampling.top_p if sampling.top_p < 1.0 else KEEP_ALL,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed - 2**64 if sampling.seed >= 2**63 else sampling.seed,
    }


def _stages(sampling: RowSampling) -> dict[str, bool]:
    penalties = (sampling.repetition_penalty - 1.0, sampling.presence_penalty, sampling.frequency_penalty)
    draw, limited = sampling.temperature > 0.0, sampling.top_k or sampling.top_p < 1.0 or sampling.min_p
    return {"penalty": any(penalties), "draw": draw, "filter": draw and bool(limited)}
