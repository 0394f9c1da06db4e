"""The sampling defaults that a checkpoint brings, in its generation_config.json; how long answers are is the API's."""

from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.planning.find_model import find_model
from penstock.engine.user_files import read_json
from penstock.scheduler.batching.request import SamplingParams

FILE = "generation_config.json"
_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_defaults(config: EngineConfig) -> dict[str, Any]:
    """SamplingParams' fields that the checkpoint sets, empty if it sets none. Raises ValueError, naming the file, for
    one that cannot be meant."""
    path = find_model(config.model)
    file = (path if path.is_dir() else path.parent) / FILE
    if not file.is_file():
        return {}
    given = read_json(file, keep_too_large=True)
    defaults = {name: given[name] for name in _NAMES if given.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(f"{file}: {error} (--generation-config none leaves it unread)") from None
    return defaults
