"""The oracle against transformers on a GPU: every variant in fp32, and in bf16 by the kernels that bf16 takes there."""

import pytest
import torch

from tests.support.oracle.cases import PROMPT_LENGTHS, Case
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.oracle.compare import apart, choices, reference_logits, relative_difference
from tests.support.oracle.engine_runs import run_case
from tests.support.oracle.variants import VARIANTS
from tests.support.rounding import assert_apart

pytestmark = pytest.mark.gpu
NUM_TOKENS = 24


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_and_tokens(variant, dtype, tmp_path):
    """Streamed, in chunks, with poisoned slots; tokens are compared where the reference's top-2 gap is wide."""
    model = write_checkpoint(tmp_path, variant, dtype).float()
    case = Case(variant, 1, "none", dtype, device="cuda")
    result = run_case(case, tmp_path, NUM_TOKENS)
    assert result["copied_bytes"] > 0
    reference = reference_logits(model, result["tokens"])
    bound = apart(model, max(PROMPT_LENGTHS) + NUM_TOKENS, getattr(torch, dtype))
    assert_apart(relative_difference(result["logits"], reference), bound)
    assert not len(choices(result["tokens"], reference).wrong(2 * bound))
