"""The baselines of benchmarks: transformers with resident weights, by `generate` or by continuous batching, and
transformers offloaded by accelerate. Each gets the engine's own weights.

Two times are taken: that of the first token, and the median gap between later ones. A first, short run of each baseline
is not timed.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from penstock.engine.config import EngineConfig
from penstock.engine.model.families import config_file, read_config, read_spec, tensor_names
from penstock.engine.model.layout import expected_tensors
from penstock.engine.model.shard import Piece
from penstock.engine.planning.find_model import find_model
from penstock.engine.weights.dummy import DummyWeights
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from scripts.bench.workload import Measured

try:
    import accelerate
except ImportError:  # check_compare has said so, if it was asked for
    accelerate = None

WARM_UP_TOKENS = 2
NEVER = -1  # no token has this id; None would stand for the id in the config
CB_BLOCK = 256  # tokens in a block of its KV cache


def load(name: str, config: EngineConfig, dtype: str, device: torch.device) -> PreTrainedModel:
    """Loads the model with the engine's weights to the device; accelerate brings them there while it runs."""
    path = find_model(config.model)
    if config.load_format == "dummy":
        values = read_config(path)
        their_config = AutoConfig.for_model(**values)
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(their_config)]
        weights = dummy_state(values, str(config_file(path)), config.seed, getattr(torch, dtype))
        model = architecture.from_pretrained(None, config=their_config, state_dict=weights, dtype=getattr(torch, dtype))
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.generation_config = GenerationConfig()  # that of the checkpoint may end sequences early, or draw
    if name == "accelerate":
        return accelerate.cpu_offload(model.eval(), execution_device=device)
    return model.eval().to(device)


def dummy_state(values: dict, source_name: str, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Makes the checkpoint for which the engine's dummy weights stand: tensors by name."""
    spec = read_spec(values, source_name)
    shapes = expected_tensors(spec, tensor_names(spec))
    source, state = DummyWeights(shapes, seed), {}
    for name, shape in shapes.items():
        num_rows, num_cols = (*shape, 1)[:2]
        tensor = torch.empty(num_rows, num_cols, dtype=dtype)
        source.read_piece(Piece(name, 0, num_rows, 0, num_cols, to_row=0), tensor)
        state[name] = tensor.view(shape)
    return state


def generate(
    name: str, model: PreTrainedModel, device: torch.device, prompts: Sequence[list[int]], num: int
) -> Measured:
    """Generates greedily `num` tokens from each prompt (all of one length)."""
    run = _continuously if name == "transformers-cb" else _together
    run(model, device, prompts, WARM_UP_TOKENS)
    return run(model, device, prompts, num)


class _Clock(StoppingCriteria):
    """Notes the time of each token; it stops nothing."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        input_ids[0, -1].item()  # waits for the token
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _together(model: PreTrainedModel, device: torch.device, prompts: Sequence[list[int]], num: int) -> Measured:
    tokens, clock = torch.tensor(prompts, device=device), _Clock()
    start = time.perf_counter()
    generated = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=GenerationConfig(max_new_tokens=num, do_sample=False),
        stopping_criteria=[clock],
    )
    gaps = [after - before for before, after in zip(clock.times, clock.times[1:])]
    outputs = generated[:, tokens.shape[1] :].tolist()
    return Measured(list(prompts), outputs, clock.times[0] - start, statistics.median(gaps))


def _continuously(model: PreTrainedModel, device: torch.device, prompts: Sequence[list[int]], num: int) -> Measured:
    outputs = run_continuously(model, prompts, num)
    gaps = [after - before for one in outputs for before, after in zip(one.timestamps, one.timestamps[1:])]
    first_token_s = max(one.timestamps[0] for one in outputs) - min(one.created_time for one in outputs)
    tokens = [one.generated_tokens for one in outputs]
    return Measured(list(prompts), tokens, first_token_s, statistics.median(gaps))


def run_continuously(model: PreTrainedModel, prompts: Sequence[list[int]], num: int) -> list:
    """Runs the continuous batching of transformers, whose cache has room for all prompts at once. Returns its outputs,
    in the order of the prompts, with the times at which each request was made and its tokens came. Raises RuntimeError
    if some did not finish."""
    num_blocks = sum(-(-(len(prompt) + num) // CB_BLOCK) + 1 for prompt in prompts)
    settings = ContinuousBatchingConfig(block_size=CB_BLOCK, num_blocks=num_blocks, max_batch_tokens=8192)
    outputs = model.generate_batch(
        [list(prompt) for prompt in prompts],
        generation_config=GenerationConfig(max_new_tokens=num, do_sample=False, eos_token_id=NEVER),
        continuous_batching_config=settings,
        record_timestamps=True,
    )
    done = [one for one in outputs.values() if one.error is None and len(one.generated_tokens) == num]
    if len(done) < len(prompts):
        raise RuntimeError(f"continuous batching finished {len(done)} of {len(prompts)} requests")
    return done


def elapsed_s(outputs: list) -> float:
    """Seconds from the first request to the last token."""
    return max(one.timestamps[-1] for one in outputs) - min(one.created_time for one in outputs)
