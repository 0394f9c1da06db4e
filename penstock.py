"""Penstock: language models larger than their GPUs, streamed from host memory, over one or more ranks.

    from penstock import LLM, SamplingParams

`python -m penstock` is the command line. Names are resolved when they are asked for: `plan` must not import torch.
"""

import importlib
import sys

from engine.streams import guarded_streams
from engine.version import VERSION as __version__
from parallel.failure import run_rank

__all__ = ["LLM", "SamplingParams", "__version__", "main"]  # noqa: F822  (the first two are resolved lazily)
_PUBLIC = {"LLM": "engine.llm", "SamplingParams": "scheduler.request"}


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def main() -> int:
    """The command line. Returns the exit status; an exception is shown once and ends the process. Raises SystemExit,
    with one line and status 1, if standard output takes no more."""
    with guarded_streams():
        return run_rank(importlib.import_module("engine.cli").main)


if __name__ == "__main__":
    sys.exit(main())
