"""The hash by which a job knows its checkpoint again: of every file that makes up a model."""

import pytest
from penstock.engine.batch.checkpoint_digest import checkpoint_digest
from penstock.engine.config import EngineConfig

from tests.support.gguf_models import SMALL, write_model


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
