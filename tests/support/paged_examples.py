"""Inputs of paged decode attention: random pages, with poison where nothing may be read.

Shapes: R rows, Q tokens a row, H/K query/KV heads, E head dim, P pages, S page size.
"""

from dataclasses import dataclass, replace

import torch
from penstock.engine.kernels import decode_attention as kernels
from penstock.engine.kernels import decode_work, segments
from penstock.engine.kernels.decode_work import DecodeWork
from torch import Tensor

from tests.support.kernel_proof import DEVICE, poisoned
from tests.support.rounding import attention_apart

PAGE_SIZE = 16


@dataclass
class Example:
    """The inputs of one call; `q` is a view into `attn` (T, (H + 2K) E), as the engine has it."""

    attn: Tensor
    q: Tensor  # (R, Q, H, E)
    keys: Tensor  # (P * S, K, E)
    values: Tensor
    page_table: Tensor  # (R, max pages)
    context_lens: Tensor  # (R,)
    window: int | None = None
    margin: int = 0
    key_rope: Tensor | None = None  # (2, L, F)

    @property
    def arguments(self) -> tuple:
        """The arguments that follow q, and those that follow out."""
        caches = (self.keys, self.values, self.page_table, self.context_lens)
        return caches, (self.q.shape[-1] ** -0.5, self.window, PAGE_SIZE)

    @property
    def reading(self) -> dict:
        """The arguments that say how keys are read."""
        return {"margin": self.margin, "key_rope": self.key_rope}

    def run(self, segment: int, room: int = 1) -> Tensor:
        """Runs the kernel in place, on a copy of attn, with a poisoned workspace and room for `room` times as many
        items as there are. Returns (R, Q, H, E)."""
        q = as_queries(self.attn.clone(), self.q.shape)
        caches, shared = self.arguments
        work = work_of(q, self.context_lens, segment, self.window, room)
        kernels._decode_attention_triton(q, *caches, q, *shared, work, **self.reading)
        return q

    def reference(self, dtype: torch.dtype = torch.float64) -> Tensor:
        out = self.q.to(dtype, copy=True)
        caches, shared = self.arguments
        kernels.decode_attention_reference(self.q, *caches, out, *shared, dtype, **self.reading)
        return out

    def apart(self) -> Tensor:
        """The largest difference (R, 1, 1, 1) that two ways to the result may have."""
        bounds, group = [], self.q.shape[2] // self.keys.shape[1]
        for row, (q, length) in enumerate(zip(self.q, self.context_lens.tolist())):
            addresses = self.page_table[row].long().repeat_interleave(PAGE_SIZE) * PAGE_SIZE
            addresses = (addresses + torch.arange(len(addresses), device=addresses.device) % PAGE_SIZE)[self.margin :][
                :length
            ]
            keys, values = (cache[addresses].nan_to_num(0.0).abs() for cache in (self.keys, self.values))
            if self.key_rope is not None:  # a rotated pair is at most as large as both together
                keys = keys + keys.roll(self.key_rope.shape[2], dims=-1) + keys.roll(-self.key_rope.shape[2], dims=-1)
            largest = float(values.max()) if length else 0.0
            heads = q.abs().unflatten(1, (-1, group)).movedim(1, 0).flatten(1, 2)  # (K, Q * H / K, E)
            parts = zip(heads, keys.transpose(0, 1)) if length else ()
            scale = q.shape[-1] ** -0.5
            bounds.append(max((attention_apart(*part, largest, scale, q.dtype) for part in parts), default=0.0))
        return torch.tensor(bounds, dtype=torch.float64, device=self.q.device)[:, None, None, None]

    def row(self, row: int) -> "Example":
        """The example of a row alone, in a batch of one."""
        num_queries = self.q.shape[1]
        attn = self.attn[row * num_queries : (row + 1) * num_queries].clone()
        alone = {"page_table": self.page_table[row : row + 1], "context_lens": self.context_lens[row : row + 1]}
        return replace(self, attn=attn, q=as_queries(attn, (1, *self.q.shape[1:])), **alone)


def work_of(q: Tensor, lengths: Tensor, segment: int, window: int | None = None, room: int = 1) -> DecodeWork:
    """The work of q (R, Q, H, E) in segments of so many tokens, listed by the kernel, with poisoned partials."""
    num_rows, num_queries, num_heads, head_dim = q.shape
    capacity = room * max(segments.count_items(lengths.tolist(), segment), 1)
    size = segments.partials_size(capacity, num_heads, head_dim, num_queries)
    partials, reaches = torch.full((size,), float("nan"), device=q.device), decode_work.reaches_of((window,), q.device)
    work = decode_work.make_work(num_rows, segment, capacity, (window,), reaches, partials)
    decode_work._list_work_triton(lengths, work, num_queries)
    return work


def as_queries(attn: Tensor, shape: tuple) -> Tensor:
    num_rows, num_queries, num_heads, head_dim = shape
    return attn[:, : num_heads * head_dim].view(num_rows, num_queries, num_heads, head_dim)


def example(
    device: str,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    context: int | list[int],
    *,
    num_queries: int = 1,
    window: int | None = None,
    margin: int = 0,
    pairs: int = 0,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Example:
    """Makes random inputs. Pages lie in random order, unused addresses hold NaN, unused entries of the table name any
    page. `pairs`: how many of a key's pairs are rotated when it is read."""
    contexts = context if isinstance(context, list) else [context] * num_rows
    used = [-(-(length + margin) // PAGE_SIZE) if length else 0 for length in contexts]
    num_pages, widest = sum(used) + 2, max(*used, 1) + 2
    generator = torch.Generator(device).manual_seed(seed)
    order = 1 + torch.randperm(num_pages - 1, generator=generator, device=device)
    page_table = torch.randint(num_pages, (num_rows, widest), generator=generator, device=device, dtype=torch.int32)
    shape = (num_pages * PAGE_SIZE, num_kv_heads, head_dim)
    keys, values = (torch.full(shape, float("nan"), device=device, dtype=dtype) for _ in range(2))
    for row, (length, first) in enumerate(zip(contexts, torch.tensor([0, *used]).cumsum(0).tolist())):
        page_table[row, : used[row]] = order[first : first + used[row]]
        addresses = (
            order[first : first + used[row], None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)
        ).flatten()
        seen = addresses[margin:][0 if window is None else max(0, length - num_queries + 1 - window) : length]
        for cache in (keys, values):
            cache[seen] = torch.randn((len(seen), *shape[1:]), generator=generator, device=device).to(dtype)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    attn = torch.randn((num_rows * num_queries, width), generator=generator, device=device).to(dtype)
    q = as_queries(attn, (num_rows, num_queries, num_heads, head_dim))
    context_lens = torch.tensor(contexts, dtype=torch.int32, device=device)
    angles = 100 * torch.rand((max(contexts), pairs), generator=generator, device=device)
    key_rope = torch.stack([angles.cos(), angles.sin()]).to(dtype) if pairs else None
    return Example(attn, q, keys, values, page_table, context_lens, window, margin, key_rope)


def make(heads: tuple, context: list, **options) -> Example:
    num_heads, num_kv_heads, head_dim = heads
    return example(DEVICE, len(context), num_heads, num_kv_heads, head_dim, context, **options)


def addresses_of(inputs: Example, row: int) -> Tensor:
    """The addresses of the row's context in the cache, in order."""
    entry = torch.arange(int(inputs.context_lens[row]), device=DEVICE) + inputs.margin
    return inputs.page_table[row].long()[entry // PAGE_SIZE] * PAGE_SIZE + entry % PAGE_SIZE


def tensors_of(inputs: Example) -> dict[str, Tensor]:
    """The arguments of a kernel, by name; the result lies apart and is poisoned."""
    names = ("keys", "values", "page_table", "context_lens")
    out = poisoned(inputs.q.shape, inputs.q.dtype)
    return {"q": inputs.q.clone(), "out": out, **dict(zip(names, inputs.arguments[0]))}
