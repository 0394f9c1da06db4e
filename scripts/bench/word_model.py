"""A folder for random weights with a tokenizer of words: w5 is token 5, so that a text has as many tokens as it is to.

Penstock and vLLM both load it, and render a chat as the text of its messages.
"""

import json
from pathlib import Path

from penstock.engine.model.families import read_config
from penstock.engine.planning.find_model import find_model
from penstock.engine.weights.gguf_file import is_gguf
from penstock.engine.weights.read_model import read_model
from tokenizers import Tokenizer, models, pre_tokenizers

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def word(token: int) -> str:
    """The text of a token."""
    return f"w{token}"


def write_word_model(model: str, folder: Path) -> list[str]:
    """Writes config.json and tokenizer of a model into a new folder, of a GGUF file the tokenizer alone. Returns its
    words by token. Raises ValueError as read_model does for the model's shape."""
    path = find_model(model)
    spec = read_model(path, dummy=True).spec
    folder.mkdir()
    if not is_gguf(path):
        (folder / "config.json").write_text(json.dumps(read_config(path)))
    vocab = {word(token): token for token in range(spec.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": word(0), "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return list(vocab)
