"""The measure by which the search's plans are checked: tokens/s, and more for a plan in which all weights stay."""

from penstock.scheduler.residency.search import STREAMING_GAIN


def worth(tokens_s: float, all_stay_plain: bool) -> float:
    """The tokens/s that a plan in which weights stream, or are compressed, must have to be chosen instead of it."""
    return tokens_s * (1 + STREAMING_GAIN) if all_stay_plain else tokens_s
