"""What an engine needs before it can run: the model's files, the memory there is, and a plan that all ranks share.

Mistakes in config, model and checkpoint are found here, before anything is allocated.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from penstock.engine.config import EngineConfig
from penstock.engine.model.families import read_eos_token_ids, tensor_names
from penstock.engine.model.layout import expected_tensors
from penstock.engine.planning.decision import Decision
from penstock.engine.planning.engine_plan import EnginePlan, make_engine_plan
from penstock.engine.planning.find_model import find_model
from penstock.engine.planning.memory_claims import DeviceMemory
from penstock.engine.runtime.calls import config_objection, pack_config
from penstock.engine.weights.blocks import WeightSource
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.dummy import DummyWeights
from penstock.engine.weights.read_model import Model, read_model
from penstock.parallel.collectives import Collectives
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.units import MIB

LEAST_CONTEXT_BYTES = 400 * MIB  # of a CUDA context, before any kernel is loaded


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files say, without its weights."""

    path: Path
    model: Model
    eos_token_ids: tuple[int, ...]


def read_files(config: EngineConfig) -> ModelFiles:
    """Raises ValueError naming the file that is wrong."""
    path = find_model(config.model)
    if path.is_file() and config.load_format != "dummy":
        where = "give the checkpoint's directory (a config.json is enough with load_format='dummy')"
        raise ValueError(f"model={config.model!r} is a file: {where}")
    model = read_model(path, dummy=config.load_format == "dummy")
    return ModelFiles(path, model, read_eos_token_ids(path, model.spec))


def plan_model(
    config: EngineConfig,
    files: ModelFiles,
    tp_size: int,
    memory: DeviceMemory | None,
    rates: Rates,
    decided: Decision | None = None,
) -> EnginePlan:
    model = files.model
    return make_engine_plan(config, model.spec, tp_size, memory, rates, model.notes, decided)


def open_source(config: EngineConfig, path: Path, plan: EnginePlan) -> WeightSource:
    """The checked checkpoint, or random weights. Raises ValueError naming the file and tensor that is wrong."""
    names = tensor_names(plan.spec)
    expected = expected_tensors(plan.spec, names)
    if config.load_format == "dummy":
        return DummyWeights(expected, config.seed)
    checkpoint = Checkpoint.open(path)
    checkpoint.check(expected, names.ignorable)
    return checkpoint


def compare_configs(config: EngineConfig, collectives: Collectives) -> str:
    """Why ranks that were configured each by itself cannot run together, the same on all; empty if they can."""
    return config_objection(collectives.share_frames(pack_config(config)))


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a GPU, None for a CPU. Memory that this process holds unused, and its context, count as free."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return DeviceMemory(total, min(total, free + cached + LEAST_CONTEXT_BYTES))


def least_memory(own: DeviceMemory | None, collectives: Collectives) -> DeviceMemory | None:
    """The smallest memory of all ranks, which must call this together."""
    if own is None:
        return None
    total, free = collectives.largest([-own.total_bytes, -own.free_bytes])
    return DeviceMemory(-total, -free)
