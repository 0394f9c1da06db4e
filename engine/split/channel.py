"""The channel between the two sides: every call crosses it, in the wire dtype, and is counted.

It does not know what an operation computes, nor what the host side does between two calls.
"""

import contextlib
import dataclasses
import itertools
import math
import socket
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from penstock.engine.config import EngineConfig
from penstock.engine.planning.device_profile import plan_rates
from penstock.engine.planning.engine_plan import make_engine_plan
from penstock.engine.planning.find_model import find_model
from penstock.engine.split.deadline import LEAST_LOAD_BYTES_S, Until, call_s, load_s
from penstock.engine.split.device_process import DeviceProcess
from penstock.engine.split.device_side import DeviceSide
from penstock.engine.split.frames import Connection, Header, receive_header, receive_tensors, send
from penstock.engine.weights.read_model import read_model
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.units import show_bytes, show_text
from torch import Tensor

READY = Site("ready", -1)  # the site of the frame that says that the weights are loaded
FAILED = "failed"  # the operation of an answer that is an error's text
MOST_TEXT_BYTES = 2**16
MOST_HEADER_SHOWN = 400  # characters


class DeviceSideFailed(RuntimeError):
    """The device side failed, is gone, took too long or answered what it was not asked."""


class Channel(Protocol):
    """The way to the device side; `ledger` counts what crosses."""

    ledger: TransferLedger

    def call(self, site: Site, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Lets the device side compute `site` from `tensors` and writes its answer to `out`, whose shape it has. Floats
        cross in the wire dtype. Raises DeviceSideFailed; no call after that is answered."""

    def close(self) -> None:
        """Ends the device side. Idempotent."""


class InProcess:
    """The device side is in this process, and closed with the channel. It is trusted: what is not finite in its answers
    is so in the plain engine too, and ends the sequence that it reaches."""

    def __init__(self, device_side: DeviceSide, wire_dtype: torch.dtype):
        self.ledger = TransferLedger()
        self.device_side, self._wire_dtype = device_side, wire_dtype

    def call(self, site: Site, tensors: Sequence[Tensor], out: Tensor) -> None:
        sent = [to_wire(tensor, self._wire_dtype) for tensor in tensors]
        answer = to_wire(self.device_side.run(site, sent), self._wire_dtype)
        _check_header(Header.of(site, [answer]), _expected(site, self._wire_dtype, out))
        self.ledger.add(site, sum(tensor.nbytes for tensor in sent), answer.nbytes)
        out.copy_(answer)

    def close(self) -> None:
        self.device_side.close()


class Subprocess:
    """A Channel to a device side that is a process of its own at the other end of a local socket, and not trusted. It
    has `timeout_s` seconds to get ready and for each call, beside those that loading `weights_bytes` and the call's own
    work take at most (deadline.py). Any failure ends it."""

    def __init__(self, config: EngineConfig, wire_dtype: torch.dtype, timeout_s: float, weights_bytes: int):
        self.ledger = TransferLedger()
        self._wire_dtype, self._timeout_s, self._weights_bytes = wire_dtype, timeout_s, weights_bytes
        self._is_ready, self._failure, self._numbers = False, None, itertools.count(1)
        # paths as this process finds them; it needs no rates, and must not see prompts
        own = {"model": str(find_model(config.model).absolute()), "tokenizer": None, "device_profile": "cpu"}
        told = dataclasses.replace(config, **own).to_dict()
        self._process = DeviceProcess({"config": told, "wire_dtype": str(wire_dtype).removeprefix("torch.")})
        self._connection = self._process.connection

    def call(self, site: Site, tensors: Sequence[Tensor], out: Tensor) -> None:
        if self._failure is not None:
            raise DeviceSideFailed(f"the device side is gone: {self._failure}")
        sent = [to_wire(tensor, self._wire_dtype) for tensor in tensors]
        try:
            self._await_ready()
            answer = self._exchange(site, sent, out)
        except BaseException as error:
            self._failure = str(error) if isinstance(error, DeviceSideFailed) else f"a call ended by {error!r}"
            self._process.kill()  # what is still in the connection belongs to no later call
            raise
        self.ledger.add(site, sum(tensor.nbytes for tensor in sent), answer.nbytes)
        out.copy_(answer)

    def _await_ready(self) -> None:
        if not self._is_ready:
            why = f"for {show_bytes(self._weights_bytes)} of weights at {LEAST_LOAD_BYTES_S / 1e6:.0f} MB/s"
            with self._within(load_s(self._weights_bytes), "is not ready", why) as connection:
                _check_header(self._header(connection), Header(READY, ()))
            self._is_ready = True

    def _exchange(self, site: Site, sent: list[Tensor], out: Tensor) -> Tensor:
        """Sends a call and receives its answer. An answer that was not asked for is refused before memory is allocated
        for it: this side does not trust the other."""
        expected = _expected(site, self._wire_dtype, out, next(self._numbers) % 2**32)
        with self._within(call_s(sent, out), f"has not answered {site}", "for the work of this call") as connection:
            send(connection, site, sent, expected.number)
            header = self._header(connection)
            if is_text(header):
                (text,) = receive_tensors(connection, header)
                said = bytes(text.tolist()).decode(errors="replace")
                raise DeviceSideFailed(f"the device side failed at {site}: {show_text(said)}")
            _check_header(header, expected)
            (answer,) = receive_tensors(connection, header)
        _check_values(site, sent, answer)
        return answer

    @contextlib.contextmanager
    def _within(self, work_s: float, late: str, why: str) -> Iterator[Connection]:
        """The connection for as long as the work may take. Raises DeviceSideFailed after that, or if it breaks."""
        limit_s = self._timeout_s + work_s
        try:
            yield Until(self._connection, limit_s)
        except TimeoutError:
            parts = f"timeout_s={self._timeout_s:g}, and {work_s:.3g} s {why}"
            raise DeviceSideFailed(f"the device side {late} after {limit_s:.4g} s ({parts})") from None
        except (EOFError, OSError) as error:
            raise DeviceSideFailed(f"the device side is gone ({self._process.how_it_ended()})") from error

    @staticmethod
    def _header(connection: Connection) -> Header:
        try:
            return receive_header(connection)
        except ValueError as error:
            raise DeviceSideFailed(f"the device side answered {error}") from error

    def close(self) -> None:
        self._process.close()


def run_device_side(config: EngineConfig, wire_dtype: str, connection: socket.socket) -> None:
    """Runs a device side that is a process of its own, from loading to its end."""
    spec = read_model(find_model(config.model), dummy=config.load_format == "dummy").spec
    plan = make_engine_plan(config, spec, tp_size=1, device_memory=None, rates=plan_rates(config, 1, "cpu"))
    serve(connection, DeviceSide(config, plan), getattr(torch, wire_dtype))


def serve(connection: socket.socket, device_side: DeviceSide, wire_dtype: torch.dtype) -> None:
    """Says that the device side is ready, and answers calls until the host side closes the connection. An error is sent
    to the host side, and raised."""
    with connection:
        send(connection, READY, [])
        while True:
            try:
                header = receive_header(connection)
            except EOFError:
                return
            tensors = receive_tensors(connection, header)
            try:
                answer = to_wire(device_side.run(header.site, tensors), wire_dtype)
            except Exception as error:
                text = torch.frombuffer(repr(error).encode()[:MOST_TEXT_BYTES], dtype=torch.uint8)
                send(connection, Site(FAILED, header.site.layer_idx), [text], header.number)
                raise
            send(connection, header.site, [answer], header.number)


def to_wire(tensor: Tensor, wire_dtype: torch.dtype) -> Tensor:
    """The tensor as it crosses: floats in the wire dtype, token ids as they are."""
    return tensor.to(wire_dtype) if tensor.is_floating_point() else tensor


def is_text(header: Header) -> bool:
    """Tells whether the text of an error follows, of a size that such a text can have."""
    if header.site.operation != FAILED or len(header.shapes) != 1:
        return False
    ((dtype, dims),) = header.shapes
    return dtype == torch.uint8 and 0 < math.prod(dims) <= MOST_TEXT_BYTES


def _expected(site: Site, wire_dtype: torch.dtype, out: Tensor, number: int = 0) -> Header:
    return Header(site, ((wire_dtype, tuple(out.shape)),), number)


def _check_header(header: Header, expected: Header) -> None:
    if header != expected:
        told = repr(header)
        told = told if len(told) <= MOST_HEADER_SHOWN else f"{told[:MOST_HEADER_SHOWN]}..."
        raise DeviceSideFailed(f"the device side answered {told} where {expected} was asked for")


def _check_values(site: Site, sent: Sequence[Tensor], answer: Tensor) -> None:
    """Raises DeviceSideFailed for an answer that is not finite where what was sent is: by row, and in attention, which
    is one sequence's, in all. A sequence whose values were not finite before the call ends alone."""
    if answer.isfinite().all():
        return
    given = _finite_rows(sent[0]) if len(sent) == 1 else torch.stack([tensor.isfinite().all() for tensor in sent]).all()
    if (given & ~_finite_rows(answer)).any():
        raise DeviceSideFailed(f"the device side answered {site} with NaN or infinity")


def _finite_rows(tensor: Tensor) -> Tensor:
    return tensor.isfinite().reshape(len(tensor), -1).all(1)
