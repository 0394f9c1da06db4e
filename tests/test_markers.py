"""Markers stand in the files whose tests have them: by that conftest.py leaves out the files that have none."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_no_helper_gives_a_marker_to_the_tests_of_another_file():
    helpers = [*(TESTS / "support").rglob("*.py"), *TESTS.glob("*/**/conftest.py")]
    given = re.compile(r"pytest\.mark\.(?!skipif)")  # by which nobody chooses tests
    assert len(helpers) > 40 and [str(path) for path in helpers if given.search(path.read_text())] == []
