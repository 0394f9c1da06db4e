"""Checks the files of a model before anything is started for it."""

from penstock.engine.config import EngineConfig
from penstock.engine.planning.device_profile import plan_rates
from penstock.engine.planning.find_model import find_model
from penstock.engine.weights.read_model import check_files, read_model_to_plan


def check_model(config: EngineConfig, to_plan: bool = False) -> None:
    """Raises ValueError for files that no engine could start with; with `to_plan` for those that say too little to
    plan."""
    path, is_dummy = find_model(config.model), config.load_format == "dummy"
    (read_model_to_plan if to_plan else check_files)(path, is_dummy)
    if config.device_profile is not None:
        plan_rates(config, config.tensor_parallel_size or 1, config.device)
