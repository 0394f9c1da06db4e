"""Checks the files of a model before anything is started for it."""

from penstock.engine.config import EngineConfig
from penstock.engine.planning.device_profile import plan_rates
from penstock.engine.planning.find_model import find_model
from penstock.engine.weights.read_model import read_model_to_plan


def check_model(config: EngineConfig) -> None:
    """Raises ValueError for files that no engine could start with."""
    read_model_to_plan(find_model(config.model), dummy=config.load_format == "dummy")
    if config.device_profile is not None:
        plan_rates(config, config.tensor_parallel_size or 1, config.device)
