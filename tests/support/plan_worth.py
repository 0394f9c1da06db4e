"""The measures by which the planner's plans are checked: tokens/s, and more for a plan that is simpler than others."""

from penstock.scheduler.residency.compression_choice import STAYING_GAIN
from penstock.scheduler.residency.decide import Residency
from penstock.scheduler.residency.search import STREAMING_GAIN


def worth(tokens_s: float, all_stay_plain: bool) -> float:
    """The tokens/s that a plan in which weights stream, or are compressed, must have to be chosen instead of it."""
    return tokens_s * (1 + STREAMING_GAIN) if all_stay_plain else tokens_s


def most_instead(tokens_s: float, residency: Residency) -> float:
    """The most tokens/s of a plan instead of which this one may have been chosen, since all that stays is plain."""
    if not residency.streamed and not residency.compressed:
        return worth(tokens_s, all_stay_plain=True)
    only_streamed = residency.resident and residency.compressed and not residency.compressed & residency.resident
    return tokens_s * (1 + STAYING_GAIN) if only_streamed else tokens_s
