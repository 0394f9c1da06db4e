"""The paged KV cache of one rank: every layer's keys and values, addressed by place = page * S + offset.

Shapes: P pages, S page size, K local KV heads, E head dim.
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

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, (P * S, K, E) each."""
        return self.data[layer_idx, 0], self.data[layer_idx, 1]
