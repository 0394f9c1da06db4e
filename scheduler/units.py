"""Units of bytes, times and rates, and text for these, counts and values. Torch-free.

Memory is counted in powers of two (GiB); what crosses a link, and the link's rate, in powers of ten (GB, GB/s).
"""

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
GB = 10**9
MOST_SHOWN = 200  # characters of a value that a message shows


def ms(seconds: float) -> float:
    """Seconds in milliseconds."""
    return seconds * 1e3


def us(seconds: float) -> float:
    """Seconds in microseconds."""
    return seconds * 1e6


def gb_s(nbytes: float, seconds: float) -> float:
    """A rate in 1e9 bytes/s."""
    return nbytes / seconds / GB


def show_bytes(nbytes: float) -> str:
    """Text of a number of bytes with its unit: GiB, or MiB under a tenth of a GiB, or bytes under a tenth of a MiB."""
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if abs(nbytes) >= size / 10:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} bytes"


def show_size(nbytes: float) -> str:
    """Text of a round size, in MiB or KiB, with all its digits."""
    return f"{nbytes / MIB:g} MiB" if nbytes >= MIB else f"{nbytes / KIB:g} KiB"


def show_time(seconds: float) -> str:
    """Text of a time, in s or ms."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{ms(seconds):.2f} ms"


def show_count(number: int) -> str:
    """Text of a count, in billions or millions."""
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"


def show_value(value: object) -> str:
    """Text of a user's value for a message, cut after MOST_SHOWN characters. Python refuses to write an integer of over
    4300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return "(a number of over 4300 digits)"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def show_text(text: str) -> str:
    """Untrusted text for a message: quoted, in one short line, without anything that a terminal would obey."""
    return ascii(text[:MOST_SHOWN]) + (f"... ({len(text)} characters)" if len(text) > MOST_SHOWN else "")
