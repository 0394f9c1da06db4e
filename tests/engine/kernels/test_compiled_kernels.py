"""Every kernel compiles for a GPU of compute capability 9.0, in the shapes in which the engine launches it."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.commands import ROOT
from tests.support.gguf_models import K_QUANTS, SMALL, write_model
from tests.support.kernel_registry import KERNELS, OVER_RANKS
from tests.support.oracle.checkpoints import write_checkpoint

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.timeout(600)  # a minute where the machine does nothing else
def test_kernels_compile_where_there_is_no_gpu(tmp_path):
    checkpoints = [tmp_path / variant for variant in ("qwen3", "neox_parallel")]
    for checkpoint in checkpoints:
        write_checkpoint(checkpoint, checkpoint.name, **TINY, max_position_embeddings=256)
    for name, sizes in (("stored", SMALL), ("k_quants", K_QUANTS)):
        checkpoints.append(tmp_path / f"{name}.gguf")
        write_model(checkpoints[-1], "llama", sizes=sizes)
    script = ROOT / "tests/support/compile_kernels.py"
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, script, *checkpoints]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert compiled.keys() >= {kernel.module.__name__ for name, kernel in KERNELS.items() if name not in OVER_RANKS}
    assert compiled.keys() >= {"penstock.parallel.push_reduce", "penstock.parallel.two_step_reduce"}
    assert "_merge_segments" in compiled["penstock.engine.kernels.decode_attention"]
    # codes and x stay in the registers of the threads that read them: of a row only sums go from thread to thread
    assert compiled["penstock.engine.kernels.stored_linear"]["_stored_gemv"] <= 64
