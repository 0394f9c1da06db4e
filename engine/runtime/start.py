"""Describes what an engine needs before it can run: the model's files, the memory there is, and a plan that all ranks
share.

Mistakes in config, model and checkpoint are found here, before anything is allocated.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from penstock.engine.config import EngineConfig
from penstock.engine.model.families import read_eos_token_ids, tensor_names
from penstock.engine.model.layout import expected_tensors
from penstock.engine.model.weight_formats import stored_shapes
from penstock.engine.planning.decision import Decision
from penstock.engine.planning.device_profile import plan_rates
from penstock.engine.planning.engine_plan import EnginePlan, make_engine_plan, plain_plan
from penstock.engine.planning.find_model import find_model
from penstock.engine.planning.memory_claims import DeviceMemory
from penstock.engine.runtime.calls import config_objection, pack_config
from penstock.engine.weights.blocks import WeightSource
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.dummy import DummyWeights
from penstock.engine.weights.gguf_checkpoint import GGUFCheckpoint
from penstock.engine.weights.gguf_file import is_gguf
from penstock.engine.weights.read_model import Model, read_model
from penstock.parallel.collectives import Collectives
from penstock.parallel.launch import Launch
from penstock.parallel.rendezvous import meet
from penstock.parallel.topology import device_name, resolve_topology
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.units import MIB

LEAST_CONTEXT_BYTES = 400 * MIB  # of a CUDA context, before any kernel is loaded


@dataclass(frozen=True)
class ModelFiles:
    """Holds what a model's files say, without its weights."""

    path: Path
    model: Model
    eos_token_ids: tuple[int, ...]

    def digest(self) -> str:
        """The digest of all that these files say of a model, wherever they lie."""
        said = repr((self.model.spec, self.eos_token_ids)).encode()
        return hashlib.blake2b(said, digest_size=16).hexdigest()


def read_files(config: EngineConfig) -> ModelFiles:
    """Raises ValueError naming the file that is wrong."""
    path = find_model(config.model)
    if path.is_file() and not is_gguf(path) and config.load_format != "dummy":
        where = "give the checkpoint's directory or a .gguf file (a config.json is enough with load_format='dummy')"
        raise ValueError(f"model={config.model!r} is a file: {where}")
    if is_gguf(path) and config.load_format == "safetensors":
        raise ValueError(
            f"model={config.model!r} is a GGUF file, and load_format='safetensors' asks for another format"
        )
    model = read_model(path, dummy=config.load_format == "dummy")
    return ModelFiles(path, model, read_eos_token_ids(path, model.spec))


class Start:
    """One rank's way to a plan and a checked source of its weights. Under torchrun ranks meet first, so that each hears
    why another one does not go on.

        rank 0   prepare: reads, plans, checks ------ agree: says what it decided
        others                                        agree: read, make the same plan, check
    """

    def __init__(self, config: EngineConfig, launch: Launch):
        if launch.kind == "torchrun":
            meet(launch)
        self.config, self.launch = config, launch
        self.topology = resolve_topology(
            launch.rank, launch.tp_size, launch.local_rank, config.device, launch.num_local_ranks
        )
        self.memory = device_memory(self.topology.device)  # before the ranks' own buffers
        self.files: ModelFiles | None = None
        self.plan: EnginePlan | None = None
        self.source: WeightSource | None = None

    def prepare(self) -> None:
        """Finds the mistakes of a user before anything is launched; on rank 0. Raises ValueError for them."""
        device, launch = self.topology.device, self.launch
        self.files = read_files(self.config)
        name, sharing = device_name(device), launch.most_ranks_on_a_host
        self.plan = self._plan(plan_rates(self.config, launch.tp_size, device.type, name, sharing))
        self.source = open_source(self.config, self.files.path, self.plan)

    def agree(self, collectives: Collectives) -> str:
        """Comes to one plan, for the least memory of any rank; on all ranks together. Returns why they cannot run
        together, the same on all; empty if they can."""
        memory = least_memory(self.memory, collectives)
        if self.files is None:
            self.files = read_files(self.config)
        if self.launch.kind == "torchrun":
            frames = collectives.share_frames(pack_config(self.config, self.files.digest()))
            if refused := config_objection(frames):
                return refused
        is_less, self.memory = memory != self.memory, memory
        if self.plan is not None and is_less:
            self.plan = self._plan(self.plan.rates)
        self._share(collectives)
        if self.source is None:
            self.source = open_source(self.config, self.files.path, self.plan)
        return ""

    def plan_plain(self, collectives: Collectives) -> None:
        """Plans plain weights instead of compressed ones; on all ranks together."""
        self.plan = plain_plan(self.plan) if self.launch.rank == 0 else None
        self._share(collectives)

    def _share(self, collectives: Collectives) -> None:
        """Gives rank 0's plan to the others, which have none: they are told what it decided."""
        told = collectives.broadcast_bytes(None if self.plan is None else self.plan.decision.pack())
        if self.plan is None:
            decision = Decision.unpack(told)
            self.config = decision.as_told(self.config)
            self.plan = self._plan(decision.rates, decision)

    def _plan(self, rates: Rates, decided: Decision | None = None) -> EnginePlan:
        model, tp_size = self.files.model, self.launch.tp_size
        return make_engine_plan(self.config, model.spec, tp_size, self.memory, rates, model.notes, decided)

    def close(self) -> None:
        """Closes the source. Idempotent."""
        if isinstance(self.source, Checkpoint):
            self.source.close()


def open_source(config: EngineConfig, path: Path, plan: EnginePlan) -> WeightSource:
    """The checked checkpoint, or random weights. Raises ValueError naming the file and tensor that is wrong."""
    names = tensor_names(plan.spec)
    expected = expected_tensors(plan.spec, names)
    if config.load_format == "dummy":
        return DummyWeights(expected | stored_shapes(expected, plan.spec.formats), config.seed)
    checkpoint = GGUFCheckpoint.open_model(path, plan.spec) if is_gguf(path) else Checkpoint.open(path)
    checkpoint.check(expected, names.ignorable)
    return checkpoint


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
