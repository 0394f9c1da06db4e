"""Describes what a step sees: what belongs to the model, the same in every pass, and what belongs to the pass that
runs.

Shapes: T tokens in the batch, N sampled rows, H/K local query/KV heads, E head dim, V local vocab, D hidden, L
positions of the rotation table, F its width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from penstock.engine.compute.inputs import PassInputs
from penstock.engine.compute.kv_cache import KVCache
from penstock.engine.compute.sampler import Asked, SampleOutput, Sampler
from penstock.engine.kernels.stored_linear import StoredRun
from penstock.engine.model.spec import ModelSpec
from penstock.parallel.collectives import Collectives
from torch import Tensor

Embedding = Tensor | StoredRun  # (V, D) floats, or V rows as they are stored


@dataclass(frozen=True)
class ModelContext:
    """One rank's part of a model, but for the weights that the groups of its plan hold."""

    spec: ModelSpec
    num_heads: int  # H
    num_kv_heads: int  # K
    first_vocab: int  # first token id of this rank's part of the vocabulary
    embed: Embedding  # on the device or in registered host memory
    rope: Tensor  # (2, L, F)
    kv: KVCache
    sampler: Sampler
    collectives: Collectives


@dataclass
class PassContext:
    """One pass: `act` holds the activations, cut to its T or N rows; `asked` is what its rows ask the sampler for;
    `take` gets what they sampled and what was scored of prompts, if there is either, before the pass ends."""

    model: ModelContext
    inputs: PassInputs
    act: Mapping[str, Tensor]
    asked: Asked
    take: Callable[[SampleOutput], None]
    prompt_scores: Tensor | None = None  # (M, packed_width) int32, once they are there

    def heads(self) -> Tensor:
        """The activation attn as (T, H + 2K, E): q, k and v."""
        attn, model = self.act["attn"], self.model
        return attn.view(len(attn), model.num_heads + 2 * model.num_kv_heads, model.spec.head_dim)
