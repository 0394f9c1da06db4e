"""Mistakes of users in Python, in a prompt or in a flag, and models that run only in part."""

import json
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from penstock.engine.commands.cli import main
from penstock.engine.planning.find_model import find_model
from safetensors.torch import load_file, save_file

from penstock import LLM, SamplingParams
from tests.support.commands import TORCHRUN, Command
from tests.support.watches import BeginPass

OPTIONS = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}
FLAGS = ("--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "64")


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", **OPTIONS) as llm:
        yield llm


@pytest.fixture
def nothing_runs(llm):
    with llm.engine.watched_by(BeginPass(lambda _: pytest.fail("a pass ran before the mistake was found"))):
        yield


LONG_IDS = [5] * 64
BAD_PROMPTS = [
    ([[]], r"prompt 0: is empty"),
    ([[1], []], r"prompt 1: is empty"),
    ([LONG_IDS], r"prompt 0: has 64 tokens, and at most 63 fit \(max_model_len is 64"),
    ("Return the " * 40, r"prompt 0: has \d+ tokens, and at most 63 fit"),
    ([[-1]], r"prompt 0: token id -1 is not in 0\.\.2047"),
    ([[1, 2048]], r"prompt 0: token id 2048 is not in 0\.\.2047"),
    ([[1, -(2**40)]], r"prompt 0: token id -1099511627776 is not in 0\.\.2047"),
    (["a", [1, True]], r"prompt 1: token id True is not an integer"),
    ([True], r"prompt 0: token id True is not an integer"),
    ([[1.0, 2.0]], r"prompt 0: token id 1\.0 is not an integer"),
    ([["a", "b"]], r"prompt 0: token id 'a' is not an integer"),
    ([1, "a"], r"prompt 0: token id 'a' is not an integer"),
    (np.array([1, 2048]), r"prompt 0: token id 2048 is not in 0\.\.2047"),
    ([[np.int64(2048)]], r"prompt 0: token id 2048 is not in 0\.\.2047"),
    ([np.array([True, False])], r"prompt 0: token id True is not an integer"),
    ([[np.True_]], r"prompt 0: token id True is not an integer"),
    ([np.array([1.0, 2.0])], r"prompt 0: token id 1\.0 is not an integer"),
    (["a", np.array([[1], [2]])], r"prompt 1: token id \[1\] is not an integer"),
    (np.float64(1), r"prompts=1\.0: expected a string"),
    (["a", torch.tensor(1)], r"prompt 1: 1 is neither a string nor a list"),
    ([torch.tensor([False])], r"prompt 0: token id False is not an integer"),
    ([None], r"prompt 0: None is neither a string nor a list of token ids"),
    ([{"prompt": "a"}], r"prompt 0: \{'prompt': 'a'\} is neither"),
    (None, r"prompts=None: expected a string, a list of token ids, or a list of such prompts"),
    (7, r"prompts=7: expected a string"),
    (b"Return", r"prompts=b'Return': expected a string"),
    ("a\udc80", r"prompt 0: 'a\\udc80' is not valid Unicode"),
]


@pytest.mark.parametrize("prompts, message", BAD_PROMPTS)
def test_bad_prompt(llm, nothing_runs, prompts, message):
    for refuse in (llm.generate, llm.check):
        with pytest.raises(ValueError, match=message):
            refuse(prompts)


@pytest.mark.parametrize(
    "params, message",
    [
        ([], r"1 prompts but 0 sampling_params"),
        ([SamplingParams()] * 2, r"1 prompts but 2 sampling_params"),
        ({"temperature": 0}, r"sampling_params=\{'temperature': 0\}: expected SamplingParams, or a list of them"),
        ([None], r"sampling_params=\[None\]: expected SamplingParams"),
        (SamplingParams(stop_token_ids=np.array([5, 2048])), r"prompt 0: stop_token_ids: 2048 is not in 0\.\.2047"),
        (SamplingParams(stop_token_ids=[2048]), r"prompt 0: stop_token_ids: 2048 is not in 0\.\.2047"),
    ],
)
def test_bad_parameters(llm, nothing_runs, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate("Return the", params)


BAD_SAMPLING = [
    *(("temperature", value) for value in (-0.1, math.nan, math.inf, "hot", None, True)),
    *(("top_p", value) for value in (0, 1.1, math.nan)),
    *(("top_k", value) for value in (-2, 1.5)),
    *(("min_p", value) for value in (-0.1, 1.1)),
    *(("n", value) for value in (0, -1, 1.0)),
    *(("max_tokens", value) for value in (0, -5, 2.5, "many")),
    *(("repetition_penalty", value) for value in (0, -1, math.inf)),
    *(("presence_penalty", value) for value in (2.1, -2.1, math.nan)),
    ("frequency_penalty", 3),
    *(("logprobs", value) for value in (-1, 21, 1.0, True)),
    *(("seed", value) for value in (2**64, 1.5, "x")),
    *(("stop", value) for value in ("", ["a", ""], [1], 5)),
    *(("stop_token_ids", value) for value in ([-1], ["a"], [1.0], 3, np.array([1.0]), np.int64(3))),
    ("ignore_eos", 1),
]


@pytest.mark.parametrize("name, value", BAD_SAMPLING)
def test_bad_sampling_value(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        *(("tensor_parallel_size", value) for value in ("2", 2.0, True)),
        *(("max_num_seqs", value) for value in ("many", 2.0, True)),
        *(("gpu_memory", value) for value in (1.5, True, b"1")),
        *(("seed", value) for value in (None, "x", 0.5)),
        *(("debug", value) for value in (1, "poison", None)),
        *(("resident", value) for value in (None, True, [])),
        *(("model", value) for value in (None, 5)),
        *(("trace", 1), ("tokenizer", 1), ("gpu_memory_utilization", "0.9"), ("dtype", None)),
    ],
)
def test_option_of_another_type(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected "):
        LLM(**{name: value})


@pytest.mark.parametrize("name, value", [("poison", 1), ("poison", "yes"), ("page_order_seed", "x"), ("lanes", None)])
def test_debug_option_of_another_type(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected "):
        LLM(debug={name: value})


def test_unknown_names():
    with pytest.raises(ValueError, match=r"^debug={'verbose': True}: there is no 'verbose'; expected some of lanes, "):
        LLM("demo", debug={"verbose": True})
    with pytest.raises(TypeError, match="tensor_parallel"):
        LLM("demo", tensor_parallel=2)
    with pytest.raises(TypeError, match="max_new_tokens"):
        SamplingParams(max_new_tokens=5)


def demo_without_tokenizer(directory: Path) -> str:
    shutil.copytree(find_model("demo"), directory, ignore=shutil.ignore_patterns("tokenizer*"))
    return str(directory)


def test_without_a_tokenizer_token_ids_work(tmp_path, llm, capfd):
    ids = llm.tokenizer.encode("Return the")
    params = SamplingParams(temperature=0, logprobs=1)
    model = demo_without_tokenizer(tmp_path / "model")
    with LLM(model, **OPTIONS) as other:
        (output,) = other.generate(ids, params)
        with pytest.raises(ValueError, match=r"model: no tokenizer \(.*\), so prompt 1 cannot have a text prompt"):
            other.generate([ids, "Return the"], params)
        with pytest.raises(
            ValueError, match=r"no tokenizer \(.*\), so prompt 0 cannot have a stop string; give token ids"
        ):
            other.generate([ids], SamplingParams(stop="x"))
    (expected,) = llm.generate(ids, params)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids and output.outputs[0].text == ""
    assert {one.decoded_token for one in output.outputs[0].logprobs[0].values()} == {None}
    with LLM(model, tokenizer="demo", **OPTIONS) as borrowed:
        assert borrowed.generate("Return the", params)[0].outputs[0].text == expected.outputs[0].text
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt_token_ids": {ids}}}')
    capfd.readouterr()
    assert main(["generate", model, "--prompts-file", str(prompts), "--temperature", "0"]) == 0
    assert capfd.readouterr().out.split() == [str(token) for token in expected.outputs[0].token_ids]


def test_ignorable_tensors_are_skipped(tmp_path, llm):
    """Old checkpoints hold rotary frequencies, and tied models the head once more."""
    directory = Path(shutil.copytree(find_model("demo"), tmp_path / "model"))
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors")
    params = SamplingParams(temperature=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with LLM(directory, **OPTIONS) as other:
            assert other.generate("Return the", params) == llm.generate("Return the", params)


def spoilt(directory: Path) -> Path:
    shutil.copytree(find_model("demo"), directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][7, 9] = math.nan
    save_file(weights, directory / "model.safetensors")
    return directory


def test_nan_weights_are_warned_of_and_nan_logits_end_each_sequence(tmp_path, capfd):
    directory = spoilt(tmp_path / "model")
    with pytest.warns(
        UserWarning, match=r"model: model\.layers\.3\.mlp\.down_proj\.weight has NaN; the output will be"
    ):
        llm = LLM(directory, **OPTIONS)
    with llm:
        for _ in range(2):
            for output in llm.generate(["Return the"] * 6, SamplingParams(logprobs=2)):
                (sequence,) = output.outputs
                assert (sequence.finish_reason, sequence.token_ids, sequence.text) == ("error", [], "")
                assert sequence.error.startswith("the logits are NaN: the weights hold NaN or inf")
        llm.loop.scheduler.check_integrity()
        assert llm.loop.scheduler.num_running == llm.loop.scheduler.num_waiting == 0
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["generate", str(directory), *FLAGS, "--prompt", "Return the", "--n", "2", "--json"]) == 1
    captured = capfd.readouterr()
    outputs = json.loads(captured.out)["outputs"]
    assert [one["finish_reason"] for one in outputs] == ["error"] * 2
    for index, one in enumerate(outputs):
        assert f"penstock: error: prompt 0, output {index}: {one['error']}\n" in captured.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bogus", "1"], r"unrecognized arguments: --bogus \(penstock generate --help "),
        (["--max_tokens", "4"], r"unrecognized arguments: --max_tokens \(did you mean --max-tokens\? penstock"),
        (["--tp", "2"], r"unrecognized arguments: --tp \(did you mean -tp\? penstock"),
        (["--max-tokens", "many"], "argument --max-tokens: invalid int value: 'many'"),
        (["--temperature", "nan"], "temperature=nan: expected a finite number of at least 0"),
        (["--logprobs", "21"], "logprobs=21: expected an integer from 0 to 20, or None"),
        (["--stop", ""], r"stop=\['a', ''\]|stop=\[''\]: expected a string that is not empty"),
        (["--prompt"], "argument --prompt: expected one argument"),
        (["demo", "--model", "other"], "model='demo' and --model 'other': which one?"),
        (["--prompts-file", "nowhere.txt"], "--prompts-file nowhere.txt: .*No such file"),
        (["--prompts-file", "empty"], r"no prompt: give --prompt TEXT, --prompts-file FILE, or standard input"),
        (["--prompts-file", "bad.jsonl"], r"bad\.jsonl, line 2: is not JSON: "),
        (
            ["--prompts-file", "no.jsonl"],
            r'no\.jsonl, line 1: expected an object with "prompt" \(text\) or "prompt_token',
        ),
        (["--prompts-file", "binary"], r"--prompts-file binary: 'utf-8' codec can't decode"),
        (["--prompts-file", "ids.jsonl"], r"prompt 0: token id 9999 is not in 0\.\.2047"),
        (["--prompt", "x " * 900], r"prompt 0: has \d+ tokens, and at most 63 fit"),
        (["--stop-token-ids", "2048", "--prompt", "a"], r"prompt 0: stop_token_ids: 2048 is not in 0\.\.2047"),
    ],
)
def test_bad_command_line(tmp_path, monkeypatch, capfd, nothing_runs, arguments, message):
    files = {"empty": b"\n \n", "bad.jsonl": b'{"prompt": "a"}\n{"prompt": \n', "no.jsonl": b'{"text": "a"}'}
    files |= {"binary": b"\xff\xfe\x00", "ids.jsonl": b'{"prompt_token_ids": [9999]}'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LLM, "measure", lambda self: pytest.fail("measured before the mistake was found"))
    prompt = [] if "--prompts-file" in arguments or "--prompt" in arguments else ["--prompt", "a"]
    assert main(["generate", *FLAGS, *prompt, *arguments]) == 2
    captured = capfd.readouterr()
    (line,) = (line.strip() for line in captured.err.splitlines() if line.strip() and "loading:" not in line)
    assert captured.out == "" and line.startswith("penstock: error: ")
    assert re.search(message, line), line


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "launcher, arguments, message",
    [
        pytest.param(
            TORCHRUN, ["--model", "nowhere"], "model='nowhere': no such file or directory", marks=pytest.mark.soak
        ),
        (TORCHRUN, ["--prompt", "x " * 900], "and at most 63 fit (max_model_len is 64"),
        ((), ["-tp", "2", "--prompt", "x " * 900], "and at most 63 fit (max_model_len is 64"),
    ],
)
def test_rank_0_alone_says_what_is_wrong(tmp_path, launcher, arguments, message):
    done = Command(tmp_path, "generate", *FLAGS, *arguments, launcher=launcher).finish(stdin="Return the")
    assert done.exit_code == (1 if launcher else 2) and done.stdout == ""
    assert done.stderr.count("penstock: error: ") == 1 and done.stderr.count(message) == 1, done.stderr
    before = done.stderr[: done.stderr.index(message)]  # torchrun ends with a report and a traceback of its own
    assert "Traceback" not in before and "another rank is gone" not in done.stderr
