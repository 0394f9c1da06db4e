"""A test has the same examples, whatever else a worker has imported: conftest.py sees to it."""

import importlib

from hypothesis import given, settings
from hypothesis import strategies as st


def drawn() -> list[int]:
    """Numbers as a test is given them."""
    numbers = []

    @settings(max_examples=300, derandomize=True)
    @given(st.integers())
    def draw(number):
        numbers.append(number)

    draw()
    return numbers


def test_examples_are_the_same_once_another_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "with_constants.py").write_text(f"NUMBERS = {[10**6 + 7 * i for i in range(1000)]}\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = drawn()
    assert importlib.import_module("with_constants").NUMBERS
    assert drawn() == before and len(set(before)) > 100
