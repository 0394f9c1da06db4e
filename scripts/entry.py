"""How a script ends: a user's mistake is one line, as on the command line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


def run_script(main: Callable[[], int | None]) -> int:
    """The exit status of `main`; 2 for a ValueError, which rank 0 shows."""
    try:
        return main() or 0
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
