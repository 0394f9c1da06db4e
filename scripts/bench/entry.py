"""The end of a script, which shows a user's mistake as one line, as the command line does; and a model that not every
script reads."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from penstock.engine.streams import guarded_streams, say_mistake
from penstock.engine.weights.gguf_file import is_gguf


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


def no_gguf(model: str) -> str:
    """An argparse type: a model that is no GGUF file."""
    if is_gguf(model):
        raise argparse.ArgumentTypeError(f"{model!r}: expected a directory of safetensors, which alone is read here")
    return model
