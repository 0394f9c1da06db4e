"""The paged KV cache of one rank: every layer's keys and values, at address = page * S + offset.

Shapes: P pages, S page size, K local KV heads, E head dim.
Which pages a row has is the scheduler's business; page 0 belongs to nobody.
"""

import torch
from penstock.engine.compute.inputs import CachedLayer
from penstock.engine.planning.engine_plan import EnginePlan
from torch import Tensor


class KVCache:
    """One allocation (layers, 2, P * S, K, E), created once and never moved. `margin` and `key_rope` are those of
    every layer (CachedLayer)."""

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        margin: int = 0,
        key_rope: Tensor | None = None,
    ):
        self.page_size, self.margin, self.key_rope = page_size, margin, key_rope
        shape = (num_layers, 2, num_pages * page_size, num_kv_heads, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [CachedLayer(*both, page_size, margin, key_rope) for both in self.data]

    @property
    def pages(self) -> Tensor:
        """The cache by page: (P, 2 * layers, S * K * E), strided."""
        num_layers, two, num_tokens, *heads = self.data.shape
        num_pages = num_tokens // self.page_size
        return self.data.view(num_layers * two, num_pages, -1).transpose(0, 1)

    @property
    def serves_chunks(self) -> bool:
        """Tells whether chunks may attend to pages where they lie, whose keys must be rotated."""
        return self.key_rope is None

    def layer(self, layer_idx: int) -> CachedLayer:
        return self._layers[layer_idx]


def make_cache(plan: EnginePlan, page_size: int, num_kv_heads: int, rope: Tensor) -> KVCache:
    """The cache of a plan, on the device and in the dtype of its rotations `rope` (2, L, F)."""
    sizes = (plan.spec.num_layers, plan.residency.num_pages, page_size, num_kv_heads, plan.spec.head_dim)
    key_rope = None if plan.retention.max_cached is None else rope
    return KVCache(*sizes, rope.dtype, rope.device, plan.retention.margin, key_rope)
