"""The cost of keeping KV in host memory: to move tokens over the link, beside computing them again.

Torch-free. Both are a rank's seconds, in the same rates. Where the link binds a pass, tokens are computed for nothing
in it, and each byte more on the link makes it longer: then nothing shall move.
"""

from dataclasses import dataclass
from functools import cached_property

from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import Rates, free_tokens, link_s, predict_pass


@dataclass(frozen=True)
class Moving:
    """Compares the two for passes of this work, of up to `most_tokens`."""

    work: PassWork
    rates: Rates
    most_tokens: int

    @cached_property
    def free_tokens(self) -> int:
        return free_tokens(self.work, self.rates)

    def move_s(self, num_tokens: int) -> float:
        """Seconds that so many tokens' keys and values take over the link, one way."""
        return link_s(num_tokens * self.work.kv_token_bytes, self.rates)

    def compute_s(self, num_tokens: int, beside: int) -> float:
        """Seconds that so many tokens of a prompt add to a pass with `beside` others."""
        shapes = (PassShape(beside + num_tokens, 1, 0), PassShape(beside, 1, 0))
        longer, shorter = (predict_pass(self.work, shape, self.rates).total_s for shape in shapes)
        return longer - shorter

    def link_binds(self, num_tokens: int) -> bool:
        """Tells whether a pass of so many tokens has more that cost nothing."""
        return self.free_tokens > num_tokens

    def pays(self, num_tokens: int, beside: int) -> bool:
        """Tells whether so many tokens shall move to the device rather than be computed in a pass with `beside`
        others."""
        return not self.link_binds(beside) and self._pays(num_tokens, beside, ways=1)

    def pays_both_ways(self, num_rows: int) -> bool:
        """Tells whether tokens that leave the device shall move to the host, to come back later, in an engine of so
        many rows."""
        return not self.link_binds(num_rows) and self._pays(self.most_tokens, num_rows, ways=2)

    def _pays(self, num_tokens: int, beside: int, ways: int) -> bool:
        num_tokens = min(num_tokens, self.most_tokens)  # more are computed in several passes, each no cheaper
        return ways * self.move_s(num_tokens) < self.compute_s(num_tokens, beside)
