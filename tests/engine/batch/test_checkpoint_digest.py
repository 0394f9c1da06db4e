"""The hash that says which checkpoint a job runs: whatever decides its rows changes it."""

import pytest
from penstock.engine.batch import checkpoint_digest as digests
from penstock.engine.batch.checkpoint_digest import checkpoint_digest
from penstock.engine.config import EngineConfig

from tests.support.gguf_models import SMALL, write_model

WEIGHTS = bytes(range(256)) * 64


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", b"{ }"),
        ("model.safetensors", b"x" + WEIGHTS[1:]),
        ("model.safetensors", WEIGHTS[:1000] + bytes(len(WEIGHTS) - 1000)),
        ("tokenizer.model", b"other"),
        ("chat_template.jinja", b"new"),
        ("additional_chat_templates/tool_use.jinja", b"new"),
    ],
)
def test_each_file_counts(tmp_path, monkeypatch, file, content):
    monkeypatch.setattr(digests, "HEAD_BYTES", 512)
    monkeypatch.setattr(digests, "SAMPLE_BYTES", 16)
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.model": b"t"}
    files["additional_chat_templates/tool_use.jinja"] = b"old"
    for name, old in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(old)
    config = EngineConfig(model=str(tmp_path))
    before = checkpoint_digest(config)
    (tmp_path / "notes.txt").write_bytes(b"no part of it")
    assert checkpoint_digest(config) == before
    (tmp_path / file).write_bytes(content)
    assert checkpoint_digest(config) != before


def digest(file) -> str:
    return checkpoint_digest(EngineConfig(str(file)))


def changed(file) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_weight_of_another_shard_makes_another_checkpoint(tmp_path):
    write_model(tmp_path / "m.gguf", "llama", shards=8, sizes=SMALL)
    shards = sorted(tmp_path.iterdir())
    before = digest(shards[0])
    assert len(shards) == 2 and digest(shards[1]) == before
    changed(shards[1])
    assert digest(shards[0]) != before
    shards[1].unlink()
    with pytest.raises(ValueError, match="00002-of-00002.gguf: missing"):
        digest(shards[0])


def test_the_case_of_an_ending_does_not_matter(tmp_path):
    write_model(tmp_path / "M.GGUF", "llama", sizes=SMALL)
    before = digest(tmp_path / "M.GGUF")
    changed(tmp_path / "M.GGUF")
    assert digest(tmp_path / "M.GGUF") != before
