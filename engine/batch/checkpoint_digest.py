"""Says by a hash which checkpoint a job runs: its small files whole, and of weights the header and samples."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from penstock.engine.config import EngineConfig
from penstock.engine.planning.find_model import find_model
from penstock.engine.user_files import open_file
from penstock.engine.weights.gguf_file import gguf_files, is_gguf
from penstock.scheduler.units import KIB, MIB

WEIGHTS = (".safetensors", ".gguf")
OTHERS = (".json", ".jinja", ".model")
HEAD_BYTES = 16 * MIB  # of a file of weights; its header is at most that long, but for vocabularies larger than any
SAMPLES, SAMPLE_BYTES = 64, 4 * KIB  # further in: weights of the same shapes differ there


def checkpoint_digest(config: EngineConfig) -> str:
    """The hash, in hexadecimal, of the files that `config` names: model, tokenizer and chat template. Raises ValueError
    for one that cannot be read."""
    digest = hashlib.sha256()
    for file in _files(config):
        digest.update(f"{file.name} ".encode())
        for part in _parts(file):
            digest.update(part)
    return digest.hexdigest()


def _files(config: EngineConfig) -> Iterator[Path]:
    for named in (config.model, config.tokenizer):
        if named is not None:
            there = _there(find_model(named))
            yield from (file for file in there if file.suffix.lower() in (*WEIGHTS, *OTHERS) and file.is_file())
    if config.chat_template is not None:
        yield Path(config.chat_template)


def _there(path: Path) -> list[Path]:
    """The files in a directory, and a level deeper its templates; the shards of a GGUF file; or the file itself."""
    if path.is_dir():
        return sorted([*path.iterdir(), *path.glob("*/*.jinja")])
    return gguf_files(path) if is_gguf(path) else [path]


def _parts(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield f"{size} ".encode()
    with open_file(file) as stream:
        if file.suffix.lower() not in WEIGHTS:
            while part := stream.read(MIB):
                yield part
            return
        yield stream.read(HEAD_BYTES)
        for number in range(SAMPLES if size > HEAD_BYTES else 0):
            stream.seek(HEAD_BYTES + (size - HEAD_BYTES) * number // SAMPLES)
            yield stream.read(SAMPLE_BYTES)
