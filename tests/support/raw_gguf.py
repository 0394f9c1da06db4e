"""GGUF files byte by byte, so that a test can get each byte wrong."""

import struct

from penstock.engine.weights.gguf_values import _NUMBERS

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def typed(kind: int, value) -> bytes:
    """A value behind its type; that of an array is (kind of the items, items), or their bytes."""
    return struct.pack("<I", kind) + packed(kind, value)


def packed(kind: int, value) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        items, values = value
        head = struct.pack("<IQ", items, len(values))
        return head + (values if isinstance(values, bytes) else b"".join(packed(items, each) for each in values))
    return struct.pack("<" + _NUMBERS[kind], value)


def key(name: str, kind: int, value) -> bytes:
    return text(name) + typed(kind, value)


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A row of the table; `shape` is torch's."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def whole(
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data
