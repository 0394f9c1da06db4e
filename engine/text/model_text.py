"""The tokenizer and the chat template of the model that a config names."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from penstock.engine.config import EngineConfig
from penstock.engine.planning.find_model import find_model
from penstock.engine.text.chat import ChatReader
from penstock.engine.text.chat_files import find_template
from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.text.tokenizer_files import sought
from penstock.engine.weights.gguf_file import is_gguf
from penstock.engine.weights.read_model import check_files


@contextlib.contextmanager
def model_first(config: EngineConfig) -> Iterator[None]:
    """A context for what can be wrong with a model's texts: what is wrong with the model itself is said before."""
    try:
        yield
    except ValueError:
        check_files(find_model(config.model), config.load_format == "dummy")
        raise


def tokenizer_path(config: EngineConfig) -> Path:
    """The directory or GGUF file that --tokenizer names, else the model's."""
    path = find_model(config.tokenizer, "tokenizer") if config.tokenizer else find_model(config.model)
    return path if path.is_dir() or is_gguf(path) else path.parent


def is_config_alone(config: EngineConfig) -> bool:
    """Tells whether a config.json itself was given, and not its directory; the engine says how it may be."""
    path = find_model(config.model)
    return config.load_format != "dummy" and path.is_file() and not is_gguf(path)


def has_tokenizer(config: EngineConfig) -> bool:
    """Tells whether there is a file with a vocabulary; it is not read."""
    return Tokenizer.is_there(tokenizer_path(config))


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The model's tokenizer, or None if there is none (token ids still work). Raises ValueError if --tokenizer named a
    directory without one."""
    with model_first(config):
        tokenizer = Tokenizer.load(tokenizer_path(config))
        if tokenizer is None and config.tokenizer is not None:
            raise ValueError(f"tokenizer={config.tokenizer!r}: no tokenizer there ({sought(config.tokenizer)})")
    return tokenizer


def check_chat(config: EngineConfig) -> None:
    """Raises ValueError, before anything is loaded, if the model has no chat template or no tokenizer. A config.json
    alone is left to the engine."""
    if is_config_alone(config):
        return
    with model_first(config):
        find_template(tokenizer_path(config), {}, config.chat_template)
        if not has_tokenizer(config):
            raise ValueError(f"{config.model}: no tokenizer ({sought(config.model)}), so there is no chat with it")


def make_chat_reader(config: EngineConfig, tokenizer: Tokenizer | None, with_tools: bool) -> ChatReader:
    """The reader of conversations. Raises ValueError as check_chat does."""
    if tokenizer is None:
        check_chat(config)
    return ChatReader(
        tokenizer, find_template(tokenizer_path(config), tokenizer.named, config.chat_template, with_tools)
    )
