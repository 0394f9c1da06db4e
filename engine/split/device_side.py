"""The untrusted side of a split execution: it holds the large weights and computes what it is asked, one call at a
time. It sees every tensor that it is sent, and keeps nothing between calls.

Shapes: T tokens of a pass or a row, C context tokens of the row, N sampled rows, D hidden, H query heads, E head dim,
G KV heads as they cross (K, or H where they were repeated).
"""

from collections.abc import Sequence

import torch
from penstock.engine.compute.attention import attend_chunks_, attend_paged
from penstock.engine.compute.inputs import CachedLayer, Chunks, PagedContext, RowRange
from penstock.engine.compute.ops import project
from penstock.engine.config import EngineConfig
from penstock.engine.kernels.decode_work import make_work, reaches_of
from penstock.engine.kernels.embedding import embed_rows
from penstock.engine.kernels.prompt_attention import list_blocks
from penstock.engine.model.group_layout import Weight
from penstock.engine.model.layout import select_weights
from penstock.engine.model.shard import ShardKind
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.planning.find_model import find_model
from penstock.engine.planning.step_cost import MATRICES
from penstock.engine.runtime.start import open_source
from penstock.engine.split.transfers import is_call, site
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.host_store import LoadedWeights, load_weights
from penstock.engine.weights.views import views
from penstock.parallel.ledger import Site
from torch import Tensor

CPU = torch.device("cpu")


class DeviceSide:
    """Loads all weights but the norms, and computes calls. Raises ValueError naming the file and tensor that cannot be
    loaded."""

    def __init__(self, config: EngineConfig, plan: EnginePlan):
        self.spec, self.dtype = plan.spec, getattr(torch, plan.dtype)
        self._weights, named = load_part(config, plan, trusted=False)
        head = named[plan.layout.groups[-1].id]
        self._embed = head["head"] if plan.spec.tied else named[plan.layout.embed.id]["embed"]  # (V, D)
        self._linear = {
            site(step): (next(name for name in MATRICES[step.step] if name in named[step.group]), named[step.group])
            for step in plan.pass_plan.steps
            if is_call(step) and step.step in MATRICES
        }

    @torch.inference_mode()
    def run(self, site: Site, tensors: Sequence[Tensor]) -> Tensor:
        """The result of one call, in the compute dtype. Raises ValueError for an operation that is not known."""
        tensors = [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
        if site in self._linear:
            return self._project(*self._linear[site], *tensors)
        if site.operation not in _OPERATIONS:
            raise ValueError(f"no operation {site}")
        return _OPERATIONS[site.operation](self, site.layer_idx, *tensors)

    def _project(self, name: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        out = x.new_empty(len(x), len(weights[name]))
        project(weights, name, x, out, len(x))
        return out

    def _embedding(self, layer_idx: int, tokens: Tensor) -> Tensor:
        out = self._embed.new_empty(len(tokens), self.spec.hidden_size)
        embed_rows(self._embed, tokens, 0, out)
        return out

    def _attention(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention (T, H, E) of q (T, H, E), the last T of C tokens, over k and v (C, G, E)."""
        out, window = q.clone(), self.spec.windows[layer_idx]
        if len(q) == 1:  # as the engine computes rows of one token
            attend_paged(out, CachedLayer(k, v, page_size=len(k)), _one_page(len(k)), window, out)
        else:
            attend_chunks_(out, k, v, _one_row(len(q), len(k)), window)
        return out

    def _scores(self, layer_idx: int, q: Tensor, k: Tensor) -> Tensor:
        """Scores (H, T, C) of q (T, H, E) and k (C, G, E), neither scaled nor masked."""
        (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
        grouped = q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)  # (G, H / G * T, E)
        return torch.bmm(grouped, k.permute(1, 2, 0)).view(num_heads, num_tokens, len(k))

    def _values(self, layer_idx: int, probabilities: Tensor, v: Tensor) -> Tensor:
        """The product (T, H, E) of probabilities (H, T, C) and v (C, G, E)."""
        (num_heads, num_tokens, num_context), num_kv_heads = probabilities.shape, v.shape[1]
        grouped = probabilities.reshape(num_kv_heads, -1, num_context)  # (G, H / G * T, C)
        return torch.bmm(grouped, v.transpose(0, 1)).view(num_heads, num_tokens, -1).transpose(0, 1)

    def close(self) -> None:
        self._embed, self._linear = None, {}
        self._weights.close()


_OPERATIONS = {
    "embedding": DeviceSide._embedding,
    "attention": DeviceSide._attention,
    "attention_scores": DeviceSide._scores,
    "attention_values": DeviceSide._values,
}


def load_part(config: EngineConfig, plan: EnginePlan, trusted: bool) -> tuple[LoadedWeights, dict]:
    """The weights of one side, on the CPU: the norms are the trusted side's, all others the device side's. Returns the
    memory that holds them, and for each group its views by name."""

    def is_wanted(weight: Weight) -> bool:
        return (weight.kind == ShardKind.REPLICATED) == trusted

    layout = select_weights(plan.layout, plan.spec, is_wanted)
    source = open_source(config, find_model(config.model), plan)
    loaded = load_weights(source, layout, set(), embed_on_host=False, device=CPU)
    if isinstance(source, Checkpoint):
        source.close()
    groups = (*layout.groups, layout.embed)
    return loaded, {group.id: views(group, loaded.resident[group.id]) for group in groups}


def _one_page(num_context: int) -> PagedContext:
    """One row, whose context is the first page."""
    page_table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([num_context], dtype=torch.int32)
    segment, windows = max(num_context, 1), (None,)
    work = make_work(1, segment, 1, windows, reaches_of(windows, CPU), torch.empty(0))  # which kernels alone read
    return PagedContext(page_table, lengths, work)


def _one_row(num_queries: int, num_context: int) -> Chunks:
    row = RowRange(0, num_queries, 0, num_context)
    return Chunks(0, num_queries, torch.tensor(list_blocks([row]), dtype=torch.int32), (row,))
