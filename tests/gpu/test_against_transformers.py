"""The oracle against transformers on a GPU: every variant in fp32, and in bf16 by the kernels that bf16 takes there."""

import pytest

from tests.support.oracle.cases import Case
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.oracle.compare import choices, reference_logits, relative_difference
from tests.support.oracle.engine_runs import run_case
from tests.support.oracle.variants import VARIANTS

pytestmark = pytest.mark.gpu
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}
NUM_TOKENS = 24


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_and_tokens(variant, dtype, tmp_path):
    """Streamed, in chunks, with poisoned slots; tokens are compared where the reference's top-2 gap is wide."""
    model = write_checkpoint(tmp_path, variant, dtype).float()
    case = Case(variant, 1, "none", dtype, device="cuda")
    result = run_case(case, tmp_path, NUM_TOKENS)
    assert result["copied_bytes"] > 0
    reference = reference_logits(model, result["tokens"])
    assert relative_difference(result["logits"], reference).max() <= TOLERANCE[dtype]
    assert not len(choices(result["tokens"], reference).wrong(2 * TOLERANCE[dtype]))
