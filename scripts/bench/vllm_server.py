"""vLLM's OpenAI-compatible server, in a process of its own, to which a client sends what it sent to ours."""

import asyncio
import contextlib
import http.client
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from penstock.engine.config import EngineConfig

from scripts.bench.vllm_side import Vllm, asynchronous, flags_of, last_words, model_folder, options_of

MODULE, HOST = "vllm.entrypoints.openai.api_server", "127.0.0.1"
START_S, STOP_S = 300.0, 30.0
POLL_S = 0.1
Address = tuple[str, int]


def run_vllm_server(
    vllm: Vllm, config: EngineConfig, record: dict[str, Any], send: Callable[[Address], Awaitable[Any]], most_s: float
) -> dict[str, Any]:
    """Serves until `send`, given the address, is done: `version`, `options`, `load_s` (to the first 200 from /health)
    and what it `sent`; or `error`, after its output went to standard error, if it is not ready in START_S, or if `send`
    failed or took longer than `most_s`."""
    result = {"version": vllm.version, "options": vllm.options}
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder, model_folder(config, folder) as model:
        log = Path(folder) / "log"
        try:
            with serving(vllm, options_of(vllm, config, record, model), log) as (address, load_s):
                return result | {"load_s": load_s, "sent": asyncio.run(within(most_s, send, address))}
        except (OSError, RuntimeError, EOFError) as error:  # a TimeoutError is an OSError
            return result | {"error": f"{error or type(error).__name__}: {last_words(log)}"}


@contextlib.contextmanager
def serving(vllm: Vllm, options: dict[str, Any], log: Path) -> Iterator[tuple[Address, float]]:
    """A server that is ready, and the seconds that it took. Raises RuntimeError if it is not in START_S."""
    address = HOST, free_port()
    command = [vllm.python, "-m", MODULE, "--host", HOST, "--port", str(address[1]), "--disable-uvicorn-access-log"]
    began_s = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen([*command, *flags_of(options)], env=asynchronous(vllm), stdout=output, stderr=output)
    try:
        while not is_healthy(address):
            if process.poll() is not None:
                raise RuntimeError(f"ended with status {process.returncode}")
            if time.monotonic() > began_s + START_S:
                raise RuntimeError(f"not ready after {START_S:.0f} s")
            time.sleep(POLL_S)
        yield address, time.monotonic() - began_s
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server((HOST, 0)) as one:
        return one.getsockname()[1]


def is_healthy(address: Address) -> bool:
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


async def within(most_s: float, send: Callable[[Address], Awaitable[Any]], address: Address) -> Any:
    """Waits for `send`, and returns what it does. Raises TimeoutError after so many seconds."""
    try:
        return await asyncio.wait_for(send(address), most_s)
    except TimeoutError:
        raise TimeoutError(f"not all answered after {most_s:.0f} s") from None
