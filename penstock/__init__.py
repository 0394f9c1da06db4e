"""Penstock: language models larger than their GPUs, streamed from host memory, over one or more ranks.

    from penstock import LLM, SamplingParams

Names are resolved when they are used: `penstock plan` must not import torch. In a checkout, known by our setup.cfg
beside this folder, `penstock.engine`, `penstock.parallel` and `penstock.scheduler` are the folders at its top.
"""

import importlib
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
_SETUP = _CHECKOUT / "setup.cfg"
# By our name in it: a folder that packages are installed into may have a setup.cfg too, which says where they go.
if _SETUP.is_file() and b"name = penstock" in _SETUP.read_bytes().splitlines():
    __path__.append(str(_CHECKOUT))

PUBLIC = {
    "LLM": "penstock.engine.llm",
    "SamplingParams": "penstock.scheduler.batching.request",
    "VERSION": "penstock.engine.version",
}
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str):
    wanted = "VERSION" if name == "__version__" else name
    if wanted not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[wanted]), wanted)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
