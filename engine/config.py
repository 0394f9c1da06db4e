"""User configuration: a frozen dataclass, and a second one of debug options; the command line's flags are made from
their fields (flags.py).

Measured and derived values (rates, residency, page counts) live elsewhere: nothing changes a config.
"""

import dataclasses
import os
import re
import typing
from dataclasses import dataclass
from typing import Self

from penstock.scheduler.batching.request import INT32_MAX, SEEDS
from penstock.scheduler.batching.waiting import POLICIES
from penstock.scheduler.units import GB, GIB, KIB, MIB, TIB, show_value

MOST_PLANNED_SEQS = 256  # sequences that weights make room for, where max_num_seqs is not set; more may be let in
MOST_SEQS = 2**16  # that max_num_seqs may be
USUAL_BATCHED_TOKENS = 8192  # of a pass, where max_num_batched_tokens is not set and the link hides no more
_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
          "kb": 10**3, "mb": 10**6, "gb": GB, "tb": 10**12}  # fmt: skip


# The largest values of the fields that count something, from 1 on: more can only be a mistake, which would show only
# after hours, or when all memory is taken.
_MOST = {
    "tensor_parallel_size": 256,
    "max_model_len": INT32_MAX,
    "max_num_seqs": MOST_SEQS,
    "max_num_batched_tokens": 2**20,
    "attention_window": INT32_MAX,
    "page_size": 2**16,
    "num_pages": INT32_MAX,
}
_MOST_BYTES = 2**60
_LINK_GB_S = (1e-3, 1e6)

METAVARS = {int: "N", float: "X"}  # how --help shows a value of this type


def parse_bytes(value: int | str) -> int:
    """The bytes of `"24GiB"`, `"24 GB"`, `"1048576"` or an int. Raises ValueError for anything else."""
    if isinstance(value, int):
        num_bytes = value
    else:
        match = re.fullmatch(r"\s*([0-9]{0,18}\.?[0-9]{1,18})\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{value!r} is not a number of bytes (examples: 25769803776, 24GiB, 24GB)")
        num_bytes = int((float(match[1]) if "." in match[1] else int(match[1])) * _UNITS[match[2].lower()])
    if not 0 < num_bytes <= _MOST_BYTES:
        raise ValueError(f"{show_value(value)}: a number of bytes must be positive, and at most {_MOST_BYTES} (1 EiB)")
    return num_bytes


def parse_resident(value: str | float) -> str | float:
    """Reads `"auto"`, `"all"`, `"none"`, or a fraction of the layers' bytes in 0..1. Raises ValueError otherwise."""
    if value in ("auto", "all", "none"):
        return value
    try:
        fraction = float(value)
    except (TypeError, ValueError, OverflowError):
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"resident={show_value(value)}: expected auto, all, none or a fraction between 0 and 1")
    return fraction


def option(default, help: str, choices: tuple[str, ...] | None = None, flags: tuple[str, ...] = (), type=None):
    """A config field that the command line shows: `flags` are short aliases, `type` parses its text."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "flags": flags, "type": type})


def _check_types(config) -> None:
    """Raises ValueError for a field of another type than it is declared with; a path becomes its text."""
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), typing.get_args(field.type) or (field.type,)
        if isinstance(value, os.PathLike) and str in kinds:
            value = os.fspath(value)
            object.__setattr__(config, field.name, value)
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if not fits or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{field.name}={show_value(value)}: expected {expected}")


def _check_choices(config) -> None:
    """Raises ValueError for a value that is not one of its field's choices."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{field.name}={value!r}: expected one of {', '.join(choices)}")


def _check_seed(name: str, value: int | None) -> None:
    if value is not None and not SEEDS[0] <= value <= SEEDS[1]:
        raise ValueError(f"{name}={show_value(value)}: expected an integer of 64 bits")


@dataclass(frozen=True)
class DebugConfig:
    """Options that make the engine's own faults loud. Outputs keep the same bits with any of them (but as a GPU reads
    quantised weights, sums are added up in another order); they only cost time.

    Raises ValueError, naming the field, when a value cannot be meant.
    """

    lanes: str = option(
        "earliest", "CPU only: order in which the two lanes interleave", ("earliest", "latest", "random")
    )
    poison: bool = option(False, "fill freed slots with NaN so that a broken contract is loud")
    page_order_seed: int | None = option(None, "hand out KV pages in this shuffled order", type=int)
    as_on_gpu: bool = option(False, "CPU only: fuse steps, pad decode passes and read quantised weights as on a GPU")
    lookahead: int | None = option(
        None, "passes under way when one more is prepared, 0 or 1 (default: 1 on a GPU, 0 on a CPU)", type=int
    )
    watch: str | None = option(None, "module:Class of a Watch that sees every pass on every rank")

    def __post_init__(self):
        _check_types(self)
        _check_seed("page_order_seed", self.page_order_seed)
        if self.watch is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", self.watch):
            raise ValueError(f"watch={show_value(self.watch)}: expected module:Class")
        if self.lookahead not in (None, 0, 1):
            raise ValueError(f"lookahead={show_value(self.lookahead)}: expected 0 or 1")
        _check_choices(self)

    @classmethod
    def of(cls, values: dict) -> Self:
        """The inverse of `dataclasses.asdict`; missing fields have their defaults. Raises ValueError for other
        names."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"debug={values!r}: there is no {name!r}; expected some of {', '.join(names)}")
        return cls(**values)


@dataclass(frozen=True)
class EngineConfig:
    """All that a user may choose about an engine. Names and defaults are vLLM's where they exist. `debug` may be given
    as a dict, and is kept as a DebugConfig.

    Raises ValueError, naming the field, when a value cannot be meant.
    """

    model: str = option("demo", "checkpoint directory, GGUF file, config.json (plan, or load-format dummy), or 'demo'")
    tokenizer: str | None = option(None, "directory or GGUF file with a tokenizer, if it is not the model's")
    chat_template: str | None = option(None, "file with a chat template, instead of the model's own")
    tensor_parallel_size: int | None = option(
        None, "number of ranks (default: torchrun's number of ranks, else 1)", flags=("-tp",), type=int
    )
    dtype: str = option("auto", "compute dtype; auto is the checkpoint's", ("auto", "float32", "bfloat16", "float16"))
    device: str = option("auto", "where to compute", ("auto", "cuda", "cpu"))
    gpu_memory_utilization: float = option(0.9, "fraction of each GPU that may be used", type=float)
    gpu_memory: int | str | None = option(
        None, "GPU memory that may be used a rank, in bytes or like 24GiB; wins over the utilization"
    )
    resident: str | float = option(
        "auto",
        "what stays on the GPU: auto, all, none, or a fraction of the layers' bytes",
        type=parse_resident,
    )
    weights_compression: str = option(
        "auto",
        "lossless compresses bfloat16 weights to two thirds of their bytes; auto does so where weights would stream",
        ("auto", "none", "lossless"),
    )
    load_format: str = option("auto", "dummy fills random weights without a file", ("auto", "safetensors", "dummy"))
    max_model_len: int | None = option(
        None, "longest sequence in tokens (default: what the model and memory allow)", type=int
    )
    max_num_seqs: int | None = option(
        None, "most sequences in one pass (default: those of the job, else as many as pay and fit)", type=int
    )
    max_num_batched_tokens: int | None = option(
        None,
        "most tokens in one pass, at least max_num_seqs; longer prompts are prefilled in chunks (default: 8192, or more"
        " where the link hides more)",
        type=int,
    )
    scheduling_policy: str = option(
        "fcfs",
        "who runs first: who came first, or by priority, where the urgent take the rows of others",
        tuple(POLICIES),
    )
    enable_prefix_caching: bool = option(
        True, "let sequences share the KV pages of what they begin with; never with an attention window"
    )
    kv_host_memory: int | str | None = option(
        None,
        "host memory a rank, in bytes or like 20GiB, to which KV pages move instead of being forgotten, where moving"
        " them back is faster than computing them again (default: none)",
    )
    attention_sinks: int = option(0, "first tokens that stay in the KV cache beside the attention window", type=int)
    attention_window: int | None = option(
        None,
        "keep only so many recent tokens in the KV cache, for sequences of any length (default: all)",
        type=int,
    )
    page_size: int = option(16, "tokens in one page of the KV cache", type=int)
    num_pages: int | None = option(None, "KV pages (default: what memory allows)", type=int)
    ring: int | str | None = option(None, "bytes of the ring that holds streamed groups (default: planned)")
    enforce_eager: bool = option(False, "launch kernels one by one instead of replaying decode passes as CUDA graphs")
    capture: str = option(
        "start",
        "when passes are captured as CUDA graphs: at the start, or each when it is first needed",
        ("start", "lazy"),
    )
    seed: int = option(0, "base of every random choice that names no seed of its own", type=int)
    trace: str | None = option(None, "write a Chrome/Perfetto trace of the passes to this file")
    device_profile: str | None = option(None, "rates to plan with: h200, cpu or a JSON file (default: by device)")
    link_gb_s: float | None = option(
        None, "host-to-device rate a rank in 1e9 bytes/s, instead of the profile's", type=float
    )
    debug: DebugConfig | dict = DebugConfig()

    def __post_init__(self):
        _check_types(self)
        if isinstance(self.debug, dict):
            object.__setattr__(self, "debug", DebugConfig.of(self.debug))
        for name, parse in (("gpu_memory", parse_bytes), ("ring", parse_bytes), ("kv_host_memory", parse_bytes)):
            value = getattr(self, name)
            if value is not None:
                try:
                    object.__setattr__(self, name, parse(value))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        object.__setattr__(self, "resident", parse_resident(self.resident))
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name}={show_value(value)}: expected a positive integer, at most {most}")
        _check_seed("seed", self.seed)
        if not 0 <= self.attention_sinks <= INT32_MAX:
            sinks = show_value(self.attention_sinks)
            raise ValueError(f"attention_sinks={sinks}: expected a number of tokens, or 0, at most {INT32_MAX}")
        if (self.max_num_seqs or 1) > self.least_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}:"
                " each sequence computes at least a token in a pass; raise the one or lower the other"
            )
        if self.attention_sinks and self.attention_window is None:
            raise ValueError(f"attention_sinks={self.attention_sinks}: there are none without an attention_window")
        if self.kv_host_memory is not None and (not self.enable_prefix_caching or self.attention_window is not None):
            other = "an attention_window" if self.enable_prefix_caching else "enable_prefix_caching=False"
            raise ValueError(
                f"kv_host_memory={self.kv_host_memory} with {other}: pages there are found by the prefix cache, which"
                " is off"
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            share = show_value(self.gpu_memory_utilization)
            raise ValueError(f"gpu_memory_utilization={share}: expected a fraction above 0, at most 1")
        if self.link_gb_s is not None and not _LINK_GB_S[0] <= self.link_gb_s <= _LINK_GB_S[1]:
            least, most = _LINK_GB_S
            rate = show_value(self.link_gb_s)
            raise ValueError(f"link_gb_s={rate}: expected a positive rate, from {least:g} to {most:g}")
        _check_choices(self)

    def for_job(self, num_seqs: int) -> "EngineConfig":
        """The config for a job of so many sequences: if max_num_seqs is not set it is their number, as far as one pass
        takes them. That of many is planned, since not all of them need be there at once."""
        if self.max_num_seqs is not None or not 0 < num_seqs <= MOST_PLANNED_SEQS:
            return self
        return dataclasses.replace(self, max_num_seqs=min(num_seqs, self.most_seqs))

    @property
    def most_seqs(self) -> int:
        """The most sequences in one pass: max_num_seqs if it is set, else the most that may be planned."""
        return self.max_num_seqs or min(MOST_PLANNED_SEQS, self.least_batched_tokens)

    @property
    def least_batched_tokens(self) -> int:
        """The most tokens in one pass if they are set, else the fewest that may be planned."""
        return self.max_num_batched_tokens or max(USUAL_BATCHED_TOKENS, self.max_num_seqs or 1)

    def to_dict(self) -> dict:
        """The fields as JSON takes them; EngineConfig(**d) is the inverse."""
        return dataclasses.asdict(self)
