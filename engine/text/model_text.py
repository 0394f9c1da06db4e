"""The tokenizer and the chat template of the model that a config names."""

from pathlib import Path

from penstock.engine.config import EngineConfig
from penstock.engine.planning.find_model import find_model
from penstock.engine.text.chat import ChatReader
from penstock.engine.text.chat_files import find_template
from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.text.tokenizer_files import sought
from penstock.engine.weights.gguf_file import is_gguf


def tokenizer_path(config: EngineConfig) -> Path:
    """The directory or GGUF file that --tokenizer names, else the model's."""
    path = find_model(config.tokenizer, "tokenizer") if config.tokenizer else find_model(config.model)
    return path if path.is_dir() or is_gguf(path) else path.parent


def has_tokenizer(config: EngineConfig) -> bool:
    """Tells whether there is a file with a vocabulary; it is not read."""
    return Tokenizer.is_there(tokenizer_path(config))


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The model's tokenizer, or None if there is none (token ids still work). Raises ValueError if --tokenizer named a
    directory without one."""
    tokenizer = Tokenizer.load(tokenizer_path(config))
    if tokenizer is None and config.tokenizer is not None:
        raise ValueError(f"tokenizer={config.tokenizer!r}: no tokenizer there ({sought(config.tokenizer)})")
    return tokenizer


def check_chat(config: EngineConfig) -> None:
    """Raises ValueError, before anything is loaded, if the model has no chat template or no tokenizer. A model that
    names something else than a model's files is left to who reads those."""
    path = find_model(config.model)
    if config.load_format != "dummy" and not path.is_dir() and not is_gguf(path):
        return
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
