"""The demands of an engine on one rank's memory: the input of search.py and decide.py. Torch-free. Sizes are in bytes,
lengths in tokens."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from penstock.scheduler.batching.retention import KeepAll, Retention
from penstock.scheduler.cost.pass_work import GATHERED_TOKENS
from penstock.scheduler.passes.build import default_ring_bytes
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.units import GIB

KV_LEN = 2048  # tokens of each sequence that the KV cache must hold before weights may stay
CPU_KV_BYTES = GIB  # KV cache where no memory budget and no num_pages are given
KV_PARTS = 64  # one part of so many of the KV cache may go to what lets more rows or tokens enter a pass

Claims = tuple[tuple[str, int], ...]  # named parts of a device's memory


@dataclass(frozen=True)
class Split:
    """The groups that stay, the groups that are kept compressed (on the device or on the host), and whether the
    embedding stays."""

    resident: frozenset[GroupId]
    compressed: frozenset[GroupId]
    embed_resident: bool


@dataclass(frozen=True)
class Demand:
    """The demands of an engine on one rank's memory. Sizes are bytes a rank, lengths are tokens.

    `groups` are in the order of a pass, the head last, and those of one name count as alike; their bytes are those as
    stored. `embed_bytes` is 0 for a tied embedding, which uses the head's bytes. `compressed` gives the compressed
    bytes of the groups that may be compressed, and `decompressed` the bytes that decompressing one of them writes: all
    of it, if it is not given. `quantised` are the names of groups that are stored quantised; `buffer_bytes` gives the
    size of the decompression buffer for groups of these names. `floats` are the quantised groups that are floats where
    they stay, with the bytes that they have then.
    `fixed` are named claims that no split changes (activations, workspace, context ...); `fixed_of` gives them for
    another number of sequences. With `plans_num_seqs` that number is planned, up to `max_num_seqs`, and up to
    `most_let_in` shorter sequences may run at once. `memory_bytes` None stands for plain host memory (a CPU), which has
    no limit here. `max_model_len` None allows the trained length, as far as it fits; `len_option` names the option that
    sets it. `retention` says how many pages a sequence needs: enough for all of its tokens, if it is not given. What
    one sequence has cached, or several that are short, may be there once more, in `gathered_page_bytes` a page.
    Attention over a page's tokens leaves `partials_page_bytes` for a while.
    """

    groups: tuple[tuple[GroupId, int], ...]
    embed_bytes: int
    page_bytes: int
    page_size: int
    max_num_seqs: int
    max_position: int
    resident: str | float = "auto"
    compressed: Mapping[GroupId, int] = field(default_factory=dict)
    decompressed: Mapping[GroupId, int] = field(default_factory=dict)
    quantised: frozenset[str] = frozenset()
    floats: Mapping[GroupId, int] = field(default_factory=dict)
    buffer_bytes: Callable[[frozenset[str]], int] = lambda names: 0
    memory_bytes: int | None = None
    fixed: Claims = ()
    fixed_of: Callable[[int], Claims] | None = None
    plans_num_seqs: bool = False
    most_let_in: int = 0
    ring_bytes: int | None = None
    max_model_len: int | None = None
    len_option: str = "max_model_len"
    num_pages: int | None = None
    retention: Retention | None = None
    gathered_page_bytes: int = 0
    partials_page_bytes: int = 0

    def planned_for(self, num_seqs: int) -> "Demand":
        """The demand with this number of sequences if it is planned, or unchanged if a number was asked for."""
        return self.asked_for(num_seqs) if self.plans_num_seqs else self

    def asked_for(self, num_seqs: int) -> "Demand":
        """The demand with this number of sequences."""
        fixed = self.fixed if self.fixed_of is None else self.fixed_of(num_seqs)
        return replace(self, max_num_seqs=num_seqs, fixed=fixed, plans_num_seqs=False)

    @property
    def fixed_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.fixed)

    @property
    def full_len(self) -> int:
        """Tokens of the longest sequence that is wanted."""
        return self.max_model_len or self.max_position

    @property
    def least_len(self) -> int:
        """Tokens of the longest sequence that must fit: an unset max_model_len may shrink to this."""
        return self.max_model_len or min(self.max_position, KV_LEN)

    @property
    def kv_len(self) -> int:
        """Tokens that each of several sequences is taken to have."""
        longest = self.full_len if self.num_pages is None else min(self.full_len, self.tokens_in(self.num_pages))
        return max(min(longest, KV_LEN), 1)

    def pages(self, num_tokens: int) -> int:
        return (self.retention or KeepAll(self.page_size)).num_pages(num_tokens)

    def tokens_in(self, num_pages: int) -> int:
        """Tokens of one sequence that `num_pages` hold, one of which is the reserved page."""
        return (num_pages - 1) * self.page_size - (self.retention.margin if self.retention else 0)

    def seqs_in(self, num_pages: int) -> int:
        """Sequences of kv_len tokens that so many pages hold at once, at most max_num_seqs."""
        return min(self.max_num_seqs, (num_pages - 1) // self.pages(self.kv_len))

    def wanted_pages(self, num_seqs: int) -> int:
        """Pages of so many sequences of kv_len tokens, of one full sequence at least, and the reserved one."""
        return self.num_pages or max(num_seqs * self.pages(self.kv_len), self.pages(self.full_len)) + 1

    @property
    def most_gathered(self) -> int:
        """The most pages of which there is a copy: those of the longest sequence that is wanted, or of several."""
        return self.pages(max(self.full_len, GATHERED_TOKENS))

    def gathered_bytes(self, num_pages: int) -> int:
        """Bytes of such a copy where there are so many pages."""
        return min(num_pages, self.most_gathered) * self.gathered_page_bytes

    def kv_bytes(self, num_pages: int) -> int:
        """Bytes of so many pages, of the copy, and of what attention leaves."""
        return num_pages * (self.page_bytes + self.partials_page_bytes) + self.gathered_bytes(num_pages)

    def pages_in(self, nbytes: int) -> int:
        """The most pages whose kv_bytes are no more than `nbytes`."""
        most_copied = nbytes - self.most_gathered * self.gathered_page_bytes
        each = self.page_bytes + self.partials_page_bytes
        return max(most_copied // each, nbytes // (each + self.gathered_page_bytes))

    @property
    def least_pages(self) -> int:
        return self.num_pages or self.pages(self.least_len) + 1

    def size(self, group: GroupId, nbytes: int, split: Split) -> int:
        """Bytes of a group as it is kept, compressed or not; `nbytes` are those of the plain group."""
        return self.compressed[group] if group in split.compressed else nbytes

    def decompressed_bytes(self, groups: Iterable[GroupId]) -> int:
        """Bytes that decompressing these groups writes."""
        sizes = {**dict(self.groups), **self.decompressed}
        return sum(sizes[group] for group in groups)

    def streamed(self, split: Split) -> list[tuple[GroupId, int]]:
        """The groups that stream, with their bytes, in the order of a pass."""
        return [(g, self.size(g, nbytes, split)) for g, nbytes in self.groups if g not in split.resident]

    def weights_bytes(self, split: Split) -> int:
        """Device bytes of the weights that stay."""
        sizes = [(group, self.size(group, nbytes, split)) for group, nbytes in self.groups if group in split.resident]
        groups = sum(self.floats.get(group, nbytes) for group, nbytes in sizes)
        return groups + (self.embed_bytes if split.embed_resident else 0)

    def claims(self, split: Split) -> Claims:
        """The claims beside ring, weights and KV cache."""
        compressed, floats = {group.name for group in split.compressed}, split.resident & self.floats.keys()
        quantised = {group.name for group, _ in self.groups if group not in floats} & self.quantised
        names = frozenset(compressed | quantised)
        return (*self.fixed, ("decompression buffer", self.buffer_bytes(names))) if names else self.fixed

    def buffer_for(self, names: frozenset[str]) -> int:
        """Bytes of the decompression buffer if groups of these names are compressed, beside the quantised ones."""
        names |= self.quantised
        return self.buffer_bytes(names) if names else 0

    def claims_bytes(self, split: Split) -> int:
        return sum(nbytes for _, nbytes in self.claims(split))

    def usual_ring_bytes(self, split: Split) -> int:
        """Bytes of the ring that was asked for, or else of one in which no copy waits."""
        return self.ring_bytes or default_ring_bytes(self.streamed(split))
