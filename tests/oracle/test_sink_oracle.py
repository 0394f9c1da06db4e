"""The oracle of attention sinks, held to transformers where nothing is evicted, and to plain loops."""

import copy
import math
import random

import pytest
import torch

from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.oracle.compare import apart, relative_difference
from tests.support.oracle.sink_faults import CHUNK, SINKS, WINDOW, WRONG
from tests.support.oracle.sink_oracle import eviction_chunk, held_indices, sink_logits
from tests.support.oracle.variants import VARIANTS
from tests.support.rounding import LOUD, assert_apart

TOKENS = random.Random(7).choices(range(128), k=120)  # within the trained length of every variant
TWO_LAYERS = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(variant: str):
        if variant not in made:
            made[variant] = write_checkpoint(folder / variant, variant, **TWO_LAYERS)
        return made[variant]

    return get


def share_of_bound(model, logits, reference) -> float:
    """The largest difference, in those that another order of sums may make."""
    return float(relative_difference(logits, reference).max()) / apart(model, len(logits))


def assert_same(model, logits, reference) -> None:
    assert_apart(share_of_bound(model, logits, reference), 1.0)


@torch.no_grad()
def plain_logits(model) -> torch.Tensor:
    return model(torch.tensor([TOKENS]), use_cache=False).logits[0]


def test_schedule_by_hand():
    """A schedule by hand: 2 sinks, a window of 4, 3 evicted at once."""
    assert held_indices(11, sinks=2, window=4, chunk=3) == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 5, 6],
        [0, 1, 5, 6, 7],
        [0, 1, 5, 6, 7, 8],
        [0, 1, 8, 9],
        [0, 1, 8, 9, 10],
    ]


def test_chunk_by_hand():
    assert [eviction_chunk(40, size) for size in (1, 4, 8, 10, 16)] == [10, 8, 8, 10, 16]


@pytest.mark.parametrize("sinks, window, chunk", [(4, 40, 8), (0, 40, 16), (3, 8, 8), (5, 1, 1)])
def test_schedule_holds_the_sinks_and_the_newest(sinks, window, chunk):
    for token, held in enumerate(held_indices(300, sinks, window, chunk)):
        pinned, newest = held[:sinks], held[sinks:]
        assert pinned == list(range(min(sinks, token + 1)))
        assert newest == list(range(token - len(newest) + 1, token + 1))
        room = window - (chunk - 1)  # just evicted: this many at least, the token among them
        assert token < sinks + window or room <= len(newest) <= window


@pytest.mark.tolerance
@pytest.mark.parametrize("variant", VARIANTS)
def test_is_transformers_while_nothing_is_evicted(models, variant):
    """Compares with transformers; that also shows the rotation of every rope type, GQA and the layers' own windows,
    which count tokens that are held."""
    model, everything = models(variant), held_indices(len(TOKENS), 4, len(TOKENS) - 4, 16)
    logits = sink_logits(model, TOKENS, everything, layer_windows=True)
    assert_same(model, logits, plain_logits(model))


@pytest.mark.tolerance
def test_is_transformers_without_sinks_while_nothing_is_evicted(models):
    model = models("llama_gqa")
    logits = sink_logits(model, TOKENS, held_indices(len(TOKENS), 0, len(TOKENS), 16))
    assert_same(model, logits, plain_logits(model))


@pytest.mark.tolerance
def test_is_a_sliding_window_without_sinks_one_evicted_at_a_time(models):
    """Compares with transformers' own window of 16, rotated by positions in the sequence: only distances count."""
    model = models("mistral_window")
    logits = sink_logits(model, TOKENS, held_indices(len(TOKENS), 0, 16, 1))
    assert_same(model, logits, plain_logits(model))


def test_layer_windows_matter_only_where_more_is_held(models):
    model = models("mistral_window")
    few, many = held_indices(len(TOKENS), 2, 14, 4), held_indices(len(TOKENS), 2, 15, 4)
    differences = [
        share_of_bound(model, sink_logits(model, TOKENS, held, layer_windows=True), sink_logits(model, TOKENS, held))
        for held in (few, many)
    ]
    assert differences[0] == 0 and differences[1] > LOUD


@pytest.mark.tolerance
@pytest.mark.parametrize("variant", ["llama_gqa", "llama_yarn", "neox_partial_rotary"])
def test_positions_matter_only_with_sinks(models, variant):
    """Rotates by both counts. Without sinks the held tokens are neighbours, and their distances are the same by
    either."""
    model = models(variant)
    differences = []
    for sinks in (0, 4):
        held = held_indices(len(TOKENS), sinks, 40, 8)
        by_position = sink_logits(model, TOKENS, held, absolute_positions=True)
        differences.append(share_of_bound(model, by_position, sink_logits(model, TOKENS, held)))
    assert_apart(differences[0], 1.0)
    assert differences[1] > LOUD


class PlainLlama:
    """A Llama in fp64 that takes one token at a time, head by head and key by key, with only weights, norms and MLPs of
    transformers."""

    def __init__(self, model, sinks: int, window: int, chunk: int):
        self.model = copy.deepcopy(model).double()
        config = model.config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"]
        self.sinks, self.window, self.chunk = sinks, window, chunk
        self.caches = [[] for _ in self.model.model.layers]  # of each layer, in order of age: (keys, values) of a token

    @torch.no_grad()
    def feed(self, token: int) -> torch.Tensor:
        """Logits (vocab,) after one more token."""
        x = self.model.model.embed_tokens.weight[token]
        for layer, cache in zip(self.model.model.layers, self.caches):
            x = x + self._attention(layer.self_attn, cache, layer.input_layernorm(x))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(self.model.model.norm(x))

    def _attention(self, attn, cache: list, x):
        while len(cache) + 1 > self.sinks + self.window:
            for _ in range(min(self.chunk, len(cache) - self.sinks)):
                cache.pop(self.sinks)
        heads = [part(x).view(-1, self.head_dim) for part in (attn.q_proj, attn.k_proj, attn.v_proj)]
        queries, keys, values = heads
        cache.append((keys, values))
        each_head = [
            self._head(queries[h], h // (self.num_heads // self.num_kv_heads), cache) for h in range(len(queries))
        ]
        return attn.o_proj(torch.cat(each_head))

    def _head(self, query, kv_head: int, cache: list):
        query = self._rotated(query, len(cache) - 1)
        scores = [
            float(query @ self._rotated(keys[kv_head], position)) / math.sqrt(self.head_dim)
            for position, (keys, _) in enumerate(cache)
        ]
        weights = [math.exp(score - max(scores)) for score in scores]
        return sum(w / sum(weights) * values[kv_head] for w, (_, values) in zip(weights, cache))

    def _rotated(self, x, position: int):
        half = self.head_dim // 2
        turns = [position * self.theta ** (-i / half) for i in range(half)]
        cos, sin = (torch.tensor([f(turn) for turn in turns], dtype=x.dtype) for f in (math.cos, math.sin))
        first, second = x[:half], x[half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin])


@pytest.mark.parametrize("sinks, window, chunk", [(3, 10, 4), (0, 9, 2)])
def test_is_what_plain_loops_compute(models, sinks, window, chunk):
    """Compares past several evictions; the last of the 3 sinks has no page to itself."""
    model, tokens = models("llama_gqa"), TOKENS[:40]
    plain = PlainLlama(model, sinks, window, chunk)
    expected = torch.stack([plain.feed(token) for token in tokens])
    logits = sink_logits(model, tokens, held_indices(len(tokens), sinks, window, chunk))
    assert_same(model, logits, expected.float())


def test_leaves_the_model_as_it_was(models):
    model = models("llama_gqa")
    before = plain_logits(model)
    sink_logits(model, TOKENS, held_indices(len(TOKENS), 4, 20, 4))
    assert torch.equal(plain_logits(model), before)


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_change_the_logits(models, mistake):
    model = models("llama_gqa")
    logits = sink_logits(model, TOKENS, held_indices(len(TOKENS), SINKS, WINDOW, CHUNK))
    assert share_of_bound(model, WRONG[mistake](model, TOKENS), logits) > LOUD
