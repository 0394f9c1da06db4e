"""A channel that lets the device side see permuted tensors: token rows in the linear layers, head_dim in attention.

OBFUSCATION FOR RESEARCH, NOT CONFIDENTIALITY. An attacker who knows the weights finds the prompt in such states:
attacks recover 97 to 100 % of prompts ("Hidden No More: Attacking and Defending Private Third-Party LLM Inference",
ICML 2025, arXiv:2505.18332), and scripts/research/permutation_attack.py does the same here. These are not hidden at
all: token ids (the embedding sees them, in another order), their number, which call and request a tensor belongs to,
the one row of a decode pass, the row that the head gets, scores and probabilities.

The key stays in this process. A permutation is a function of the key, the request's number, the site and where the pass
starts in the sequence, so that no two requests, sites or passes share one; q and k of a call have to.

Shapes: T tokens of a pass or of a row of it, C context tokens of the row, H/G heads as they cross, E head dim.
"""

import hashlib
import itertools
import struct
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from penstock.engine.split.channel import Channel
from penstock.engine.split.transfers import HEAD_DIM, ROWS
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.batching.batch import Batch
from torch import Tensor

NOTICE = (
    "obfuscation for research, not confidentiality: published attacks recover 97 to 100 % of prompts from such states"
    " when the weights are known"
)
# For each tensor of an attention call, the answer last: the matmul whose permutation of head_dim it is put in. A matmul
# over head_dim needs the same permutation on both sides; if it is over another dim, its result keeps the permutation.
_OF_SCORES, _OF_VALUES = "attention_scores", "attention_values"
_MATMULS = {
    "attention_scores": (_OF_SCORES, _OF_SCORES, None),  # q, k -> scores
    "attention_values": (None, _OF_VALUES, _OF_VALUES),  # probabilities, v -> heads
    "attention": (_OF_SCORES, _OF_SCORES, _OF_VALUES, _OF_VALUES),  # q, k, v -> heads
}
_INPUT = struct.Struct("<QhQ")  # request number, layer_idx, start


def permutation(key: bytes, request: int, site: Site, start: int, size: int) -> Tensor:
    """A permutation (size,) int64 of 0..size-1, for the pass of a request that starts at position `start`: words of 64
    bits expanded by SHAKE-256, argsorted."""
    prefix = struct.pack("<Q", len(key)) + key  # with the length, no key's input begins with another's
    seed = prefix + _INPUT.pack(request, site.layer_idx, start) + site.operation.encode("ascii")
    words = torch.frombuffer(bytearray(hashlib.shake_256(seed).digest(8 * size)), dtype=torch.int64)
    return words.argsort(stable=True)


class Segment(NamedTuple):
    """The token rows of a request in a pass."""

    request: int
    start: int
    num_tokens: int


class PermutedChannel:
    """A Channel over another one, which it owns: it permutes what is sent and restores the order of what comes back.
    Calls and bytes are the other channel's. `permute` holds some of PERMUTED."""

    def __init__(self, channel: Channel, permute: Collection[str], key: bytes):
        self.channel, self._permute, self._key = channel, frozenset(permute), key
        self._numbers = itertools.count()
        self._request_in: dict[int, int] = {}  # the number of the request in each row of the batch
        self._segments: list[Segment] = []  # of the pass, in the order of its rows
        self._num_attended: Counter[Site] = Counter()

    @property
    def ledger(self) -> TransferLedger:
        return self.channel.ledger

    def begin_pass(self, batch: Batch) -> None:
        """Notes, before the calls of a pass, which request each row belongs to. Each request gets a number of its
        own."""
        for row in batch.rows:
            if row.sampling is not None:  # the request's first pass
                self._request_in[row.index] = next(self._numbers)
        self._segments = [Segment(self._request_in[row.index], row.start, len(row.tokens)) for row in batch.rows]
        self._num_attended.clear()

    def call(self, site: Site, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Makes a call with permuted tensors. Raises RuntimeError as the other channel does."""
        call = self.channel.call
        if site.operation in _MATMULS:
            call = self._attend if HEAD_DIM in self._permute else call
        elif site.operation != "head":  # to which a request sends one row at most
            call = self._call_by_rows if ROWS in self._permute else call
        call(site, tensors, out)

    def close(self) -> None:
        self.channel.close()

    def _call_by_rows(self, site: Site, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Makes a call on tensors (T, ...), with the rows of each request permuted among themselves."""
        orders, first = [], 0
        for request, start, num_tokens in self._segments:
            orders.append(first + permutation(self._key, request, site, start, num_tokens))
            first += num_tokens
        order = torch.cat(orders)  # (T,)
        answer = out.new_empty(out.shape)
        self.channel.call(site, [tensor[order] for tensor in tensors], answer)
        out[order] = answer

    def _attend(self, site: Site, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Makes an attention call, which is for one row; rows of a pass attend one after the other. All heads share a
        permutation."""
        request, start, _ = self._segments[self._num_attended[site]]
        self._num_attended[site] += 1
        *of_tensors, of_out = _MATMULS[site.operation]
        head_dim = tensors[-1].shape[-1]  # of k or v

        def order(matmul: str) -> Tensor:  # (E,)
            return permutation(self._key, request, Site(matmul, site.layer_idx), start, head_dim)

        sent = [tensor[..., order(name)] if name else tensor for tensor, name in zip(tensors, of_tensors, strict=True)]
        if of_out is None:
            self.channel.call(site, sent, out)
            return
        answer = out.new_empty(out.shape)
        self.channel.call(site, sent, answer)
        out[..., order(of_out)] = answer
