"""Messages of ranks that make the same calls under torchrun. Before they load, each says how it was configured; before
a call runs, what it was given, or why it refuses. So no rank gets the outputs of another call than its own. Torch-free.
"""

import hashlib
import json
import struct
from array import array
from dataclasses import dataclass
from typing import Self

from penstock.engine.config import EngineConfig
from penstock.scheduler.batching.request import SamplingParams

_DIGEST_BYTES = 16
_FRAME = struct.Struct(f"<qq16s{_DIGEST_BYTES}s976s")  # number, argument, name, digest, refusal
_CONFIG_BYTES = 4096
# Fields that may differ between ranks: paths on their own hosts, and values that rank 0 sets for all.
_OWN_FIELDS = {
    "model",
    "tokenizer",
    "chat_template",
    "device_profile",
    "link_gb_s",
    "max_num_seqs",
    "tensor_parallel_size",
}

MODEL = "what the files of the model say"
MEASURE = "measure"  # the call that rank 0 makes for all: the others answer it whatever they wait for

Asked = list[tuple[str | None, list[int], SamplingParams]]


@dataclass(frozen=True)
class Call:
    """One rank's part in a call. `digest` is that of its prompts, empty for a rank that takes those of rank 0;
    `refusal` is the message of the ValueError with which it refuses; `number` counts the rank's calls; `argument` is
    the number that a call takes."""

    name: str
    digest: bytes = b""
    refusal: str = ""
    number: int = 0
    argument: int = 0

    def pack(self) -> bytes:
        """The call as bytes, as many on every rank; a refusal that is too long is cut."""
        texts = self.name.encode(), self.digest, self.refusal.encode(errors="replace")
        return _FRAME.pack(self.number, self.argument, *texts)

    @classmethod
    def unpack(cls, frame: bytes) -> Self:
        number, argument, *parts = _FRAME.unpack(frame)
        name, digest, refusal = (part.rstrip(b"\0") for part in parts)
        return cls(name.decode(), digest, refusal.decode(errors="ignore"), number, argument)


def digest(asked: Asked) -> bytes:
    """The digest of checked prompts; empty for a rank that gives none and takes rank 0's."""
    if not asked:
        return b""
    found = hashlib.blake2b(digest_size=_DIGEST_BYTES - 1)
    for text, token_ids, params in asked:
        found.update(array("q", token_ids).tobytes())
        found.update(repr((text, len(token_ids), params)).encode(errors="replace"))
    return found.digest() + b"\1"  # no zero byte at its end: a frame is padded with those


def objection(calls: list[Call]) -> str:
    """Says why the ranks cannot run a call, given what each says, by rank; empty if they can. The same on all ranks."""
    first = calls[0]
    if first.refusal and all(call.refusal == first.refusal for call in calls):
        return first.refusal
    which, alike = f"call {first.number} ({first.name})", "under torchrun all ranks make the same calls"
    for rank, call in enumerate(calls):
        if call.name != first.name:
            return f"{which}: rank {rank} calls {call.name} instead; {alike}"
        if call.refusal:
            return f"{which}: refused by rank {rank}: {call.refusal}"
    for rank, call in enumerate(calls):
        if call.number != first.number:
            return f"{which}: for rank {rank} it is call {call.number}; {alike}"
        if call.digest not in (b"", first.digest):
            return f"{which}: rank {rank} was given other prompts or parameters than rank 0; {alike}"
    return ""


def pack_config(config: EngineConfig, model_digest: str) -> bytes:
    """Says what ranks must have alike, fields of the config and what the model's files say, as many bytes on every
    rank."""
    fields = config.to_dict()
    fields |= fields.pop("debug") | {MODEL: model_digest}
    fields["trace"] = "a file" if config.trace else None  # a path too, but all ranks join the trace, or none
    told = json.dumps({name: value for name, value in fields.items() if name not in _OWN_FIELDS}).encode()
    assert len(told) <= _CONFIG_BYTES
    return told.ljust(_CONFIG_BYTES)


def config_objection(frames: list[bytes]) -> str:
    """Says why ranks cannot run together, given how each was configured, by rank; empty if they can."""
    first, *others = map(json.loads, frames)
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                alike = "under torchrun all ranks are configured alike"
                if name == MODEL:
                    return f"{MODEL} is not the same on ranks 0 and {rank}: {alike}"
                return f"{name}={value!r} on rank 0, but {other[name]!r} on rank {rank}: {alike}"
    return ""
