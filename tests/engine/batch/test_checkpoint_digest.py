"""The hash that says which checkpoint a job runs: whatever decides its rows changes it."""

import pytest
from penstock.engine.batch import checkpoint_digest as digests
from penstock.engine.batch.checkpoint_digest import checkpoint_digest
from penstock.engine.config import EngineConfig

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
