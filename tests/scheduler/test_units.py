"""Units, and how sizes, times, counts and values are shown."""

import pytest
from penstock.scheduler.units import (
    GIB,
    KIB,
    MIB,
    gb_s,
    ms,
    show_bytes,
    show_count,
    show_size,
    show_text,
    show_time,
    show_value,
    us,
)


@pytest.mark.parametrize(
    "shown, text",
    [
        (show_bytes(0), "0 bytes"),
        (show_bytes(MIB / 10 - 1), "104857 bytes"),
        (show_bytes(MIB), "1.00 MiB"),
        (show_bytes(-GIB / 10), "-0.10 GiB"),
        (show_bytes(3 * GIB), "3.00 GiB"),
        (show_size(16 * KIB), "16 KiB"),
        (show_size(1.5 * MIB), "1.5 MiB"),
        (show_time(1), "1.000 s"),
        (show_time(0.99), "990.00 ms"),
        (show_count(99_999_999), "100.00 million"),
        (show_count(8_030_261_248), "8.03 billion"),
    ],
)
def test_everything_has_its_unit(shown, text):
    assert shown == text


def test_units():
    assert (ms(0.25), us(0.25), gb_s(3e9, 2)) == (250, 250_000, 1.5)


def test_values_are_shown_on_one_short_line():
    assert show_value("a\nb") == r"'a\nb'"
    assert show_value(10**5000) == "(a number of over 4300 digits)"
    assert show_value(list(range(99))) == f"{list(range(99))}"[:200] + "..."


def test_what_a_stranger_says_is_quoted_and_short():
    assert show_text("\x1b[2Jé") == r"'\x1b[2J\xe9'"
    assert show_text("x" * 1000) == "'" + "x" * 200 + "'... (1000 characters)"
