"""The sampling defaults that a checkpoint brings, in its generation_config.json, as vLLM reads them."""

from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.planning.find_model import find_model
from penstock.engine.user_files import read_json
from penstock.scheduler.batching.request import SamplingParams

FILE = "generation_config.json"
_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_defaults(config: EngineConfig) -> dict[str, Any]:
    """SamplingParams' fields that the checkpoint sets, empty if it sets none. Raises ValueError, naming the file, for
    one that cannot be meant."""
    path = find_model(config.model)
    file = (path if path.is_dir() else path.parent) / FILE
    if not file.is_file():
        return {}
    given = read_json(file, keep_too_large=True)
    defaults = {own: given[name] for name, own in _NAMES.items() if given.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(f"{file}: {error} (--generation-config none leaves it unread)") from None
    return defaults
