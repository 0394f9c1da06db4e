"""`python -m penstock`, and what the installed command `penstock` calls."""

import importlib
import sys

from penstock.engine.streams import guarded_streams
from penstock.parallel.failure import run_rank


def main() -> int:
    """The command line. Returns the exit status; an exception is shown once and ends the process. Raises SystemExit,
    with one line and status 1, if standard output takes no more."""
    with guarded_streams():
        return run_rank(importlib.import_module("penstock.engine.commands.cli").main)


if __name__ == "__main__":
    sys.exit(main())
