"""`penstock probe` measures the hardware of a group of ranks, says what the figures mean, and saves them, so that
`penstock plan` and the engine plan with them. It needs no model. Rank 0 prints.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from penstock.engine.commands.flags import Groups
from penstock.engine.config import EngineConfig
from penstock.engine.measure.probe_report import report
from penstock.engine.planning.device_profile import Probe, device_profile, profile_path, save_profile
from penstock.engine.user_files import check_output
from penstock.parallel.failure import SELF_LAUNCHED, exit_with_parent
from penstock.parallel.launch import WORKER_COMMAND, resolve_launch

CONFIG_FIELDS = ("tensor_parallel_size", "dtype", "device")
COMMAND = (*WORKER_COMMAND[:-1], "probe")  # of a self-launched rank, which reads its config from standard input
AUTO_DTYPE = "bfloat16"


def add_arguments(groups: Groups) -> None:
    """Options of `probe` beside the engine's own."""
    text = "keep the profile there (for --device-profile), not in the cache where the planner finds it"
    groups.everyday.add_argument("--output", metavar="FILE", help=text)
    groups.everyday.add_argument("--json", action="store_true", help="print the profile as one JSON object instead")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measures and saves. Raises ValueError if the profile cannot be saved: to --output before anything is measured, in
    the cache after it was printed."""
    if args.output is not None:
        check_output("--output", args.output)
    if SELF_LAUNCHED in os.environ:
        config = EngineConfig(**json.loads(exit_with_parent()))
    from penstock.engine.runtime.probe import run_probe  # imports torch: the parent is watched before that
    from penstock.parallel.group import run_in_group

    dtype = AUTO_DTYPE if config.dtype == "auto" else config.dtype

    def work(topology, collectives) -> Probe:
        print(topology.describe(), file=sys.stderr)
        return run_probe(topology, collectives, dtype)

    launch = resolve_launch(config.tensor_parallel_size)
    config = dataclasses.replace(config, tensor_parallel_size=launch.tp_size)
    probe = run_in_group(launch, config.device, work, json.dumps(config.to_dict()), COMMAND)
    if launch.rank == 0:
        _finish(probe, args)
    return 0


def _finish(probe: Probe, args: argparse.Namespace) -> None:
    profile = device_profile(probe)
    path = Path(args.output) if args.output is not None else profile_path(probe.device_type, probe.num_ranks)
    print(json.dumps(profile) if args.json else report(probe), flush=True)
    if path is None:
        raise ValueError("there is no home directory to keep the profile in; give --output FILE")
    save_profile(profile, path)
    print(f"kept in {path}", file=sys.stderr)
