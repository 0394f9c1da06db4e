"""The kernels that sum over ranks, inside the engine: hidden states, tokens and calls, on real ranks."""

import pytest

from tests.support.commands import run_ranks
from tests.support.gpu.enough import needs_ranks
from tests.support.oracle.checkpoints import write_checkpoint

pytestmark = pytest.mark.gpu


@needs_ranks(2)
@pytest.mark.parametrize("variant", ["qwen3", "neox_parallel"])
def test_real_ranks(tmp_path, variant):
    write_checkpoint(tmp_path, variant, hidden_size=256, intermediate_size=384)
    run_ranks(2, "-m", "tests.support.gpu.kernel_ranks", tmp_path, timeout=240)
