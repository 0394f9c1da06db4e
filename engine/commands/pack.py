"""`penstock pack`: writes a compressed checkpoint once, which loads like the original with less to read; or checks one.

--out DIR            packs --model into DIR
--out DIR --verify   and decompresses all of it again, bit for bit, before DIR has its name
--verify             decompresses the packed checkpoint --model: all its checksums, of what is there and what it was
"""

import argparse
import filecmp
from pathlib import Path

import torch
from penstock.engine.config import EngineConfig
from penstock.engine.planning.engine_plan import find_model
from penstock.engine.weights.headers import find_entries
from penstock.engine.weights.new_directory import copy_files, new_directory, other_files
from penstock.engine.weights.packed_format import PackedTensor, find_packed
from penstock.engine.weights.packing import Packed, least_bytes, pack_file
from penstock.engine.weights.unpacking import verify_file
from penstock.parallel.topology import resolve_topology
from penstock.scheduler.units import show_bytes
from tqdm import tqdm

CONFIG_FIELDS = ("model", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `pack` beside the engine's own."""
    parser.add_argument("--out", metavar="DIR", help="write the packed checkpoint there; what it holds must be nothing")
    text = "decompress all that was written and compare it with the model; without --out, check a model that is packed"
    parser.add_argument("--verify", action="store_true", help=text)


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Raises ValueError for what cannot be packed or written, and naming file and tensor of what is corrupt."""
    if args.out is None and not args.verify:
        raise ValueError("pack: --out DIR says where to write (or --verify checks a model that is packed)")
    model = find_model(config.model)
    device = resolve_topology(0, 1, 0, config.device).device
    packed = find_packed(model)
    if args.out is None:
        if packed is None:
            raise ValueError(f"--model {model}: is not packed (--out DIR packs it)")
        num_bytes = verify(model, None, packed, device)
        print(f"{model}: {len(packed)} tensors, {show_bytes(num_bytes)} once decompressed, all with their checksums")
        return 0
    if packed is not None:
        raise ValueError(f"--model {model}: is packed already (--verify alone checks it, penstock unpack undoes it)")
    print(describe(pack(model, Path(args.out), device, args.verify)))
    return 0


def pack(model: Path, out: Path, device: torch.device, verified: bool) -> Packed:
    """Packs the checkpoint of a directory into `out`, and says what came of it. Raises as `run`."""
    entries = find_entries(model)
    files = {entry.file for entry in entries.values()}
    others = other_files(model, files)
    needed_bytes = least_bytes(entries) + sum((model / name).stat().st_size for name in others)
    with new_directory(out, model, needed_bytes) as partial:
        with bar("packing", sum(entry.nbytes for entry in entries.values())) as shown:
            each = [pack_file(file, partial / file.name, device, shown.update) for file in sorted(files)]
        copy_files(others, model, partial)
        if verified:
            verify(partial, model, find_packed(partial), device)
            _, *wrong = filecmp.cmpfiles(model, partial, others, shallow=False)
            if any(wrong):
                raise ValueError(f"{partial / sum(wrong, [])[0]}: not a copy of the model's")
    return sum(each, Packed())


def verify(directory: Path, original: Path | None, tensors: dict[str, PackedTensor], device: torch.device) -> int:
    """Decompresses every tensor of the packed checkpoint in `directory`, and compares it with its checksums and with
    the checkpoint in `original`, if one is given. Returns the bytes decompressed. Raises ValueError naming file and
    tensor."""
    total = sum(tensor.original.nbytes for tensor in tensors.values())
    with bar("verifying", total) as shown:
        for file in sorted({tensor.stored.file for tensor in tensors.values()}):
            verify_file(file, original and original / file.name, device, shown.update)
    return total


def describe(packed: Packed) -> str:
    sizes = f"{show_bytes(packed.original_bytes)} -> {show_bytes(packed.packed_bytes)}"
    raw = f"{packed.num_raw} of {packed.num_tensors} tensors raw"
    if not packed.num_weights:
        return f"{sizes}, no bf16 weights, {raw}"
    return f"{sizes}, {8 * packed.weights_bytes / packed.num_weights:.2f} bits a bf16 weight, {raw}"


def bar(what: str, num_bytes: int) -> tqdm:
    """Shown on a terminal only."""
    return tqdm(total=num_bytes, unit="B", unit_scale=True, desc=what, disable=None, leave=False)
