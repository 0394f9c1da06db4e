"""Device profiles: the built-in ones, files that a user names, and those that `penstock probe` measured and saved in
the user's cache, where the planner finds them.

Torch-free. A saved file is chosen by the type of device and the number of ranks (`cuda-2.json`), since a planner
without torch cannot ask for the device's name; the name stands in the file, and the engine compares it with the device
it runs on.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.streams import visible
from penstock.engine.user_files import read_json
from penstock.scheduler.cost.time_model import PROFILES, Rates, profile_rates, with_link
from penstock.scheduler.units import gb_s

KERNELS_A_STEP = 10  # launches of kernels that an eager step costs the host, in the mean
NODES_A_STEP = 1.4  # nodes that a captured step costs beside its bytes; an H200 takes 1.5 us, and 1.1 for a node
ASSUMED = {"cuda": "h200", "cpu": "cpu"}  # the built-in profile of a type of device


@dataclass(frozen=True)
class Probe:
    """Holds what was measured on a group of ranks; lists are by rank. Rates are in 1e9 bytes/s and 1e12 FLOP/s,
    times in seconds.

    `link_gb_s` is the rate of the slowest of the first 1, 2, ... ranks while these copy at once. `node_s` is what one
    more kernel costs in a CUDA graph, None without CUDA. `reduces` has a row for each size, as
    engine.measure.reduce_times gives them, and is empty for one rank.
    """

    device: str
    device_type: str
    num_ranks: int
    date: str
    dtype: str
    memory_bytes: int | None
    link_gb_s: list[float]
    link_alone_gb_s: list[float]
    link_together_gb_s: list[float]
    memory_gb_s: list[float]
    gemm_tflops: list[float]
    decompress_gb_s: list[float]
    launch_s: float
    node_s: float | None
    reduces: list[dict[str, float]]


def device_profile(probe: Probe) -> dict[str, Any]:
    """A profile with the fields of Rates, and the probe itself under `probe`. Its reduces are those of decode passes:
    measured in graphs where there are graphs. pass_latency_s needs a model to be measured, so it is the built-in
    profile's."""
    reduce_latency_s, reduce_gb_s = 0.0, min(probe.memory_gb_s)  # one rank: nothing is sent
    if probe.reduces:
        way = "eager_s" if probe.node_s is None else "graph_s"
        reduce_latency_s, largest = probe.reduces[0][way], probe.reduces[-1]
        reduce_gb_s = gb_s(largest["bytes"], sending_s(largest[way], reduce_latency_s))
    return {
        "source": f"measured: {probe.device}, {ranks(probe.num_ranks)}, {probe.date}",
        "link_gb_s": probe.link_gb_s,
        "memory_gb_s": min(probe.memory_gb_s),
        "gemm_tflops": min(probe.gemm_tflops),
        "reduce_latency_s": reduce_latency_s,
        "reduce_gb_s": reduce_gb_s,
        "step_latency_s": KERNELS_A_STEP * probe.launch_s,
        "node_latency_s": probe.node_s and NODES_A_STEP * probe.node_s,
        "pass_latency_s": PROFILES[ASSUMED[probe.device_type]]["pass_latency_s"],
        "decompress_gb_s": min(probe.decompress_gb_s),
        "memory_bytes": probe.memory_bytes,
        "probe": asdict(probe),
    }


def sending_s(large_s: float, small_s: float) -> float:
    """Seconds of a large all-reduce without its latency, which is that of a small one; but at least a tenth of the
    large one's, since on a busy machine the small one may have taken longer."""
    return max(large_s - small_s, 0.1 * large_s)


def ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def cache_directory() -> Path | None:
    """$XDG_CACHE_HOME/penstock, else ~/.cache/penstock; None where there is no home (XDG ignores a relative path)."""
    given, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if os.path.isabs(given):
        return Path(given, "penstock")
    return Path(home, ".cache", "penstock") if os.path.isabs(home) else None


def profile_path(device_type: str, num_ranks: int) -> Path | None:
    """Says where the probe of so many ranks is kept; None where there is no cache directory."""
    directory = cache_directory()
    return directory and directory / f"{device_type}-{num_ranks}.json"


def find_profile(device_type: str, tp_size: int) -> Path | None:
    """The saved probe of `tp_size` ranks, else of the next larger number, which knows the link of fewer ranks too; None
    if there is neither."""
    directory, found = cache_directory(), {}
    if directory is not None:
        with contextlib.suppress(PermissionError):  # a cache out of reach holds nothing
            for path in directory.glob(f"{device_type}-*.json"):
                number = path.stem.removeprefix(f"{device_type}-")
                if number.isdecimal() and int(number) >= tp_size:
                    found[int(number)] = path
    return found[min(found)] if found else None


def plan_rates(
    config: EngineConfig, tp_size: int, device: str, device_name: str | None = None, ranks_on_host: int | None = None
) -> Rates:
    """The profile that the config names, else what `penstock probe` saved for this type of device, else a built-in one;
    with the link rate that the config gives, and without graphs if it wants none.

    `device_name`, where it is known, must be that of the saved probe; if it is not, `source` says so. `ranks_on_host`
    (None: all) of the `tp_size` share a host, and so what its links get. Raises ValueError as load_profile does.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    rates = _load_rates(config, tp_size, kind, device_name, ranks_on_host or tp_size)
    return replace(rates, node_latency_s=None) if config.enforce_eager else rates


def _load_rates(config: EngineConfig, tp_size: int, kind: str, device_name: str | None, ranks_on_host: int) -> Rates:
    if config.device_profile is not None:
        return load_profile(config.device_profile, ranks_on_host, config.link_gb_s)
    saved = find_profile(kind, tp_size)
    if saved is None:
        return load_profile(ASSUMED[kind], ranks_on_host, config.link_gb_s)
    measured = read_device(saved)
    if device_name in (None, measured):
        return load_profile(str(saved), ranks_on_host, config.link_gb_s)
    rates = load_profile(ASSUMED[kind], ranks_on_host, config.link_gb_s)
    return replace(rates, source=f"{rates.source}; the saved probe is of {measured}, not {device_name}")


def load_profile(name_or_file: str, num_ranks: int = 1, link_gb_s: float | None = None) -> Rates:
    """The rates of a rank among `num_ranks` of a host, from PROFILES or a JSON file with the fields of Rates;
    `link_gb_s` wins.

    Raises ValueError, naming the file and the field, if the file cannot be read or as profile_rates does.
    """
    if name_or_file in PROFILES:
        values = {"source": f"assumed: {name_or_file}", **PROFILES[name_or_file]}
        return with_link(profile_rates(values, name_or_file, num_ranks), link_gb_s)
    path = Path(name_or_file)
    if not path.exists():
        raise ValueError(f"device_profile={name_or_file!r}: neither one of {', '.join(PROFILES)} nor a file")
    values = {"source": f"assumed: {path.name}", **read_json(path)}
    if not isinstance(values["source"], str):
        raise ValueError(f"{path}: source={values['source']!r}: expected text")
    return with_link(profile_rates(values | {"source": visible(values["source"])}, str(path), num_ranks), link_gb_s)


def read_device(path: Path) -> str:
    """The name of the device that a saved probe measured. Raises ValueError naming the file if it has none."""
    try:
        return str(read_json(path)["probe"]["device"])
    except (TypeError, KeyError):
        raise ValueError(f"{path}: is not a saved probe: run `penstock probe` again, or delete it") from None
    except ValueError as error:
        raise ValueError(f"{error}; run `penstock probe` again, or delete it") from None


def save_profile(profile: dict[str, Any], path: Path) -> None:
    """Writes a profile in one step: a reader sees the old file or the new one. Raises ValueError naming a file that
    cannot be written."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ValueError(f"{path}: cannot be written ({error.strerror}); --output FILE chooses another file") from None
