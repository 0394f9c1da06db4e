"""Finds the files of a model that a user names. Torch-free."""

import os
from pathlib import Path

from penstock.engine.user_files import named_errors, refuse_cache_root


def find_model(model: str, field: str = "model") -> Path:
    """The directory, config.json or GGUF file that `model` names, which that `field` of the config has; "demo" is the
    model inside the package.

    Raises ValueError if there is none, and for the root of a Hugging Face cache.
    """
    with named_errors(model):
        path = Path(__file__).parents[1] / "demo_model" if model == "demo" else Path(os.path.expanduser(model))
        if not path.exists():
            raise ValueError(
                f"{field}={model!r}: no such file or directory (nothing is downloaded, `hf download` does that;"
                " 'demo' is built in)"
            )
        refuse_cache_root(path)
    return path
