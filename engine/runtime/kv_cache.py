"""The paged KV cache of one rank: every layer's keys and values, addressed by place = page * S + offset.

Shapes: P pages, S page size, C places asked for, T tokens, K local KV heads, E head dim.
Which pages a row has is the scheduler's business; page 0 belongs to nobody.
"""

import torch
from torch import Tensor


class KVCache:
    """One allocation (layers, 2, P * S, K, E), created once and never moved."""

    def __init__(
        self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype, device
    ):
        self.page_size = page_size
        shape = (num_layers, 2, num_pages * page_size, num_kv_heads, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, layer_idx: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes k and v (T, K, E) to `places` (T,)."""
        self.data[layer_idx, 0].index_copy_(0, places, k)
        self.data[layer_idx, 1].index_copy_(0, places, v)

    def gather(self, layer_idx: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at `places` (C,): two tensors (C, K, E)."""
        return self.data[layer_idx, 0].index_select(0, places), self.data[layer_idx, 1].index_select(0, places)
