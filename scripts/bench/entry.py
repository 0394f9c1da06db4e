"""The end of a script, which shows a user's mistake as one line, as the command line does."""

import sys
from collections.abc import Callable
from pathlib import Path

from penstock.engine.streams import guarded_streams, say_mistake


def run_script(main: Callable[[], int | None]) -> int:
    """Runs `main` and returns its exit status, or 2 for a user's mistake. Raises SystemExit, with one line and status
    1, if standard output takes no more."""
    program = Path(sys.argv[0]).name
    with guarded_streams(program):
        try:
            return main() or 0
        except (ValueError, OSError, MemoryError) as error:
            if not say_mistake(error, program):
                raise
            return 2
