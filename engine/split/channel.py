"""The channel between the two sides: every call crosses it, in the wire dtype, and is counted.

What it does not know: what an operation computes, what the host side does between two calls.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.model.families import read_config, read_spec
from engine.planning import find_model, make_engine_plan, plan_rates
from engine.split.device_side import DeviceSide
from engine.split.frames import Header, receive_header, receive_tensors, send
from parallel.launch import WORKER_COMMAND, python_path
from parallel.ledger import Site, TransferLedger

DEVICE_COMMAND = (*WORKER_COMMAND[:-1], "split-device")
FAILED = "failed"  # the operation of an answer that is an error's text
MOST_TEXT_BYTES = 2**16
CLOSE_S = 5.0


class Channel(Protocol):
    """`ledger` counts what crossed."""

    ledger: TransferLedger

    def call(self, site: Site, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Has the device side compute `site` of `tensors`; its answer, of the shape of `out`, is written there. Floats
        cross in the wire dtype. Raises RuntimeError if the device side fails, is gone or answers something else."""

    def close(self) -> None:
        """Idempotent."""


class InProcess:
    """The device side is in this process, and closed with the channel."""

    def __init__(self, device_side: DeviceSide, wire_dtype: torch.dtype):
        self.ledger = TransferLedger()
        self.device_side, self._wire_dtype = device_side, wire_dtype

    def call(self, site: Site, tensors: Sequence[Tensor], out: Tensor) -> None:
        sent = [to_wire(tensor, self._wire_dtype) for tensor in tensors]
        answer = to_wire(self.device_side.run(site, sent), self._wire_dtype)
        _check_answer(Header.of(site, [answer]), site, self._wire_dtype, out)
        self.ledger.add(site, sum(tensor.nbytes for tensor in sent), answer.nbytes)
        out.copy_(answer)

    def close(self) -> None:
        self.device_side.close()


class Subprocess:
    """The device side is a process of its own at the other end of a local socket. It ends with this one."""

    def __init__(self, config: EngineConfig, wire_dtype: torch.dtype):
        self.ledger = TransferLedger()
        self._wire_dtype = wire_dtype
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                DEVICE_COMMAND,
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": python_path()},
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
            wire_name = str(wire_dtype).removeprefix("torch.")
            told = {"config": config.to_dict(), "wire_dtype": wire_name, "socket": theirs.fileno()}
        with contextlib.suppress(BrokenPipeError):  # it died at once: the first call says so
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()

    def call(self, site: Site, tensors: Sequence[Tensor], out: Tensor) -> None:
        sent = [to_wire(tensor, self._wire_dtype) for tensor in tensors]
        try:
            send(self._connection, site, sent)
            answer = self._answer(site, out)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the device side is gone ({self._exit()})") from error
        except BaseException:
            self._connection.close()  # what is still in it belongs to no later call
            raise
        self.ledger.add(site, sum(tensor.nbytes for tensor in sent), answer.nbytes)
        out.copy_(answer)

    def _answer(self, site: Site, out: Tensor) -> Tensor:
        """Nothing is allocated for an answer that was not asked for: this side does not trust the other."""
        try:
            header = receive_header(self._connection)
        except ValueError as error:
            raise RuntimeError(f"the device side answered {error}") from error
        if header.site.operation == FAILED and len(header.shapes) == 1 and 0 < _text_bytes(header) <= MOST_TEXT_BYTES:
            (text,) = receive_tensors(self._connection, header)
            raise RuntimeError(f"the device side failed at {site}: {bytes(text.tolist()).decode(errors='replace')}")
        _check_answer(header, site, self._wire_dtype, out)
        return receive_tensors(self._connection, header)[0]

    def _exit(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"exit code {self._process.wait(CLOSE_S)}"
        return "it closed the connection"

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()


def run_device_side(config: EngineConfig, wire_dtype: str, connection: socket.socket) -> None:
    """What a device side that is a process of its own does, from loading to its end."""
    path = find_model(config.model)
    spec = read_spec(read_config(path), str(path))
    plan = make_engine_plan(config, spec, tp_size=1, device_memory=None, rates=plan_rates(config, 1, "cpu"))
    serve(connection, DeviceSide(config, plan), getattr(torch, wire_dtype))


def serve(connection: socket.socket, device_side: DeviceSide, wire_dtype: torch.dtype) -> None:
    """The device side's whole life: answers calls until the host side closes the connection. An error is told to the
    host side, and raised."""
    with connection:
        while True:
            try:
                header = receive_header(connection)
            except EOFError:
                return
            tensors = receive_tensors(connection, header)
            try:
                answer = to_wire(device_side.run(header.site, tensors), wire_dtype)
            except Exception as error:
                text = repr(error).encode()[:MOST_TEXT_BYTES]
                send(connection, Site(FAILED, header.site.layer_idx), [torch.frombuffer(text, dtype=torch.uint8)])
                raise
            send(connection, header.site, [answer])


def to_wire(tensor: Tensor, wire_dtype: torch.dtype) -> Tensor:
    """As it crosses: floats in the wire dtype, token ids as they are."""
    return tensor.to(wire_dtype) if tensor.is_floating_point() else tensor


def _check_answer(header: Header, site: Site, wire_dtype: torch.dtype, out: Tensor) -> None:
    expected = Header(site, ((wire_dtype, tuple(out.shape)),))
    if header != expected:
        raise RuntimeError(f"the device side answered {header} where {expected} was asked for")


def _text_bytes(header: Header) -> int:
    ((dtype, dims),) = header.shapes
    return math.prod(dims) if dtype == torch.uint8 else MOST_TEXT_BYTES + 1
