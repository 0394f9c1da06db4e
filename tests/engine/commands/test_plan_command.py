"""`penstock plan` on a config alone: no torch, in under two seconds, with figures that can be checked by hand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from penstock.engine.commands import cli
from penstock.engine.commands import plan as plan_module
from penstock.engine.commands.flags import config_from_args
from penstock.engine.config import DebugConfig, EngineConfig
from penstock.engine.model.families import read_config, read_spec, tensor_names
from penstock.engine.model.layout import model_layout
from penstock.engine.planning.device_profile import load_profile
from penstock.engine.planning.engine_plan import make_engine_plan
from penstock.engine.planning.predictions import pass_work, step_seconds
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.time_model import predict_pass
from penstock.scheduler.cost.timeline import predict_timeline, timeline_s
from penstock.scheduler.passes.check import validate

import penstock

ROOT = Path(__file__).parents[3]
SHAPES = ROOT / "benchmarks" / "shapes"
SMALL, LARGE = str(SHAPES / "Llama-3-8B.json"), str(SHAPES / "Llama-3-70B.json")
HUGE = str(SHAPES / "Llama-3.1-405B.json")


def plan(capsys, *arguments) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def plan_json(capsys, *arguments) -> dict:
    return json.loads(plan(capsys, *arguments, "--json"))


def spec_of(path):
    return read_spec(read_config(path), path)


def processor_seconds(code: str) -> tuple[float, subprocess.CompletedProcess]:
    """Processor seconds of a Python program, whatever runs beside it."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, done


@pytest.fixture(scope="module")
def two_seconds() -> float:
    """Two processor seconds of a machine on which Python adds ten million squares in 0.85, as seconds of this one."""
    return 2 / 0.85 * processor_seconds("sum(i * i for i in range(10**7))")[0]


@pytest.mark.alone
@pytest.mark.parametrize(
    "options",
    [[LARGE, "-tp", "2", "--gpu-memory", "24GiB"], [HUGE, "-tp", "8", "--gpu-memory", "100GiB"], [HUGE]],
    ids=str,
)
def test_it_needs_neither_torch_nor_transformers_and_two_seconds(options, two_seconds):
    code = (
        "import sys\nfrom penstock.engine.commands.cli import main\n"
        f"status = main(['plan', *{options!r}, '--table'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'tokenizers'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    seconds, done = processor_seconds(code)
    assert done.returncode == 0, done.stderr
    assert seconds < two_seconds
    assert re.search(r"prefetch \d+\.attn", done.stdout) and "tokens/s" in done.stdout


def test_a_model_that_fits_stays(capsys):
    shown = plan_json(capsys, "--model", SMALL, "--gpu-memory", "24GiB", "--max-num-seqs", "8")
    assert shown["streamed"] == [] and shown["embed_resident"] and shown["host_bytes"] == 0
    note = "all weights fit and stay: streaming some of them would gain less than 5% of the tokens/s"
    assert note in shown["notes"]
    assert note not in plan_json(capsys, "--model", SMALL, "--gpu-memory", "8GiB")["notes"]
    assert note not in plan_json(capsys, "--model", SMALL, "--gpu-memory", "24GiB", "--resident", "all")["notes"]
    assert len(shown["resident"]) == 65
    assert [p["bound"] for p in shown["predictions"]] == ["memory", "memory"]
    assert shown["memory_bytes"] == 24 * 2**30 >= sum(shown["claims_bytes"].values())


def test_streamed_bytes_are_the_facts(capsys):
    """8B: 15.01e9 bytes of layers and head, 70B: 139.0e9, split over two ranks."""
    plain = ("--resident", "none", "--gpu-memory", "24GiB", "--weights-compression", "none")
    small = plan_json(capsys, "--model", SMALL, *plain)
    assert small["streamed_bytes"] == pytest.approx(15.01e9, rel=1e-3)
    assert small["predictions"][0]["total_s"] == pytest.approx(15.01 / 55.1, rel=0.01)
    large = plan_json(capsys, "--model", LARGE, *plain, "-tp", "2")
    assert large["streamed_bytes"] == pytest.approx(139.0e9 / 2, rel=1e-3)
    assert large["rates"]["link_gb_s"] == 53.1
    assert 8000 < small["free_tokens"] < 16000


def test_timeline_and_bounds_agree(capsys):
    shown = plan_json(capsys, "--model", SMALL, "--resident", "none", "--gpu-memory", "24GiB")
    assert shown["timeline_s"] == pytest.approx(shown["predictions"][0]["total_s"], rel=0.01)


@pytest.mark.parametrize("fraction, num_tokens", [(0.0, 1), (0.0, 2048), (0.5, 64), (1.0, 2048)])
@pytest.mark.parametrize("tp_size", [1, 4])
def test_the_replayed_plan_is_near_the_bounds(fraction, num_tokens, tp_size):
    config = EngineConfig(model=SMALL, resident=fraction)
    made = make_engine_plan(config, spec_of(SMALL), tp_size, 141 * 10**9, load_profile("h200", tp_size))
    assert pass_work(made).num_reduces == (65 + 1 if tp_size > 1 else 0)  # the logits are gathered
    shape = PassShape(num_tokens, 1, num_tokens)
    replayed = timeline_s(predict_timeline(made.pass_plan, *step_seconds(made, shape)))
    assert replayed == pytest.approx(predict_pass(pass_work(made), shape, made.rates).total_s, rel=0.15)


def test_a_link_as_given_slows_the_pass_in_proportion(capsys):
    arguments = ("--model", SMALL, "--resident", "none", "--gpu-memory", "24GiB")
    half = plan_json(capsys, *arguments, "--link-gb-s", "27.55")["predictions"][0]
    whole = plan_json(capsys, *arguments)["predictions"][0]
    assert half["link_s"] == pytest.approx(2 * whole["link_s"])


def test_context_bounds_the_best_batch(capsys):
    arguments = ("--model", SMALL, "--gpu-memory", "24GiB", "--max-num-seqs", "256")
    short, long = (plan_json(capsys, *arguments, "--context", n)["predictions"][-1] for n in ("1024", "4096"))
    assert short["num_seqs"] > 3 * long["num_seqs"] and short["tokens_s"] > long["tokens_s"]


def test_the_best_batch_is_the_most_that_fits(capsys):
    shown = plan_json(capsys, "--model", LARGE, "-tp", "2", "--gpu-memory", "24GiB")
    best = shown["predictions"][-1]
    assert best["num_seqs"] == (shown["num_pages"] - 1) // (2048 // 16)
    assert best["tokens_s"] > 10 * shown["predictions"][0]["tokens_s"]


def test_text_has_what_a_user_asks_for(capsys):
    text = plan(capsys, LARGE, "-tp", "2", "--gpu-memory", "24GiB")
    for words in (
        "2 ranks", "24.00 GiB", "ring", "KV cache", "resident weights", "host memory a rank", "tokens/s", "link (",
        "assumed: h200", "batch 1", "one more GiB", "device memory as asked", "most sequences a pass",
        "planned:", "gives up", "longest",
    ):  # fmt: skip
        assert words in text, words


def test_an_assumed_memory_is_said(capsys):
    assert "90% of 131.32 GiB (assumed: h200)" in plan(capsys, SMALL)
    assert "unlimited (assumed: cpu)" in plan(capsys, SMALL, "--device-profile", "cpu")


def test_the_demo_and_a_directory(capsys):
    demo = plan_json(capsys, "--model", "demo", "--device", "cpu")
    assert demo == plan_json(capsys, str(ROOT / "engine" / "demo_model"), "--device", "cpu")
    assert demo["context_tokens"] == demo["max_model_len"] <= 2048


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("resident", ["auto", "all", "none", 0.5])
def test_the_engine_gets_what_was_planned(tp_size, resident):
    config = EngineConfig(model="demo", resident=resident, device="cpu", max_num_seqs=4, max_num_batched_tokens=64)
    spec = spec_of(ROOT / "engine" / "demo_model")
    made = make_engine_plan(config, spec, tp_size, None, load_profile("cpu", tp_size))
    validate(made.pass_plan)
    assert made.layout == model_layout(spec, tensor_names(spec), spec.dtype, tp_size, 0)
    assert made.pass_plan.streamed_bytes == made.residency.streamed_bytes
    assert made.residency.resident_bytes + made.residency.host_bytes == made.layout.nbytes
    claims = dict(made.residency.claims)
    assert claims["activations"] == made.activations_bytes and "context" not in claims


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "model='nowhere': no such file or directory"),
        (["--model", SMALL, "-tp", "3"], "tensor_parallel_size=3 does not divide the 32 query heads"),
        (["--model", LARGE, "--gpu-memory", "1GiB"], "What would fit: gpu_memory of at least"),
        (["--model", SMALL, "--gpu-memory", "1TiB"], "gpu_memory=1024.00 GiB: the device has 131.32 GiB"),
        (["--model", SMALL, "--gpu-memory", "lots"], "gpu_memory: 'lots' is not a number of bytes"),
        (["--model", SMALL, "--context", "0"], "context=0"),
        (["--model", SMALL, "--max-model-len", "9999"], "trained for 8192 tokens"),
        (["--model", SMALL, "--device-profile", "abacus"], "device_profile='abacus'"),
        ([SMALL, "--model", LARGE], "which one?"),
        (["--resident", "2"], "expected auto, all, none or a fraction"),
    ],
)
def test_mistakes_are_one_line_and_status_two(capsys, arguments, message):
    assert cli.main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("penstock: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        [LARGE, "-tp", "2", "--gpu-memory", "24GiB"],
        [LARGE, "--gpu-memory", "24GiB", "--resident", "none"],
        [SMALL],
        ["demo", "--device", "cpu", "--max-num-seqs", "1"],
    ],
    ids=str,
)
def test_its_short_form_is_ten_lines_of_the_long_one(capsys, options):
    """All but the last stand in the long form too; the last has the figures of its rows."""
    long, (*lines, speeds) = plan(capsys, *options), plan(capsys, *options, "--short").splitlines()
    assert 8 <= len(lines) + 1 <= 10 and set(lines) <= set(long.splitlines())
    assert lines[0].startswith(options[0]) and any(line.startswith("streamed a pass") for line in lines)
    rows = [line.split() for line in long.split("bound\n")[1].splitlines() if line.startswith("  batch ")]
    for tokens_s in (row[-4] for row in rows):
        assert f" {tokens_s} " in speeds.replace(";", " ")
    assert speeds.endswith(f"bound: {' '.join(rows[0][-3:])}")


def test_flags_are_the_config_s_fields(capsys):
    parser, *_ = cli._parsers("plan")
    args = parser.parse_args(["plan", SMALL, "-tp", "2", "--max-num-seqs", "8", "--no-poison", "--resident", "0.5"])
    config = config_from_args(args)
    expected = EngineConfig(model=SMALL, tensor_parallel_size=2, max_num_seqs=8, resident=0.5)
    assert config == expected
    assert config_from_args(parser.parse_args(["plan"])) == EngineConfig()
    with pytest.raises(SystemExit):
        parser.parse_args(["plan", "--help-all"])
    shown = capsys.readouterr().out
    fields = {**EngineConfig.__dataclass_fields__, **DebugConfig.__dataclass_fields__}
    for name in fields.keys() - {"debug"}:
        assert f"--{name.replace('_', '-')} " in shown or f"--{name.replace('_', '-')}," in shown, name


def test_the_public_face_is_lazy():
    code = "import penstock, sys; assert 'torch' not in sys.modules; print(penstock.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == penstock.__version__
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        penstock.LMM  # noqa: B018


@pytest.mark.parametrize(
    "words",
    [
        *(("generate", "--help"), ("chat", "--help"), ("batch", "--help")),
        *(("generate", "--model", "nowhere", "--chat", "a"), ("chat", "--model", "nowhere")),
        ("batch", "--model", "nowhere", "-i", "a.txt", "-o", "b.jsonl"),
    ],
    ids=str,
)
def test_a_command_brings_no_torch_in_before_it_starts_an_engine(words):
    code = f"import sys, penstock.engine.commands.cli as cli; status = cli.main({words}); sys.exit(status)"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in words else 2) and done.stdout.endswith("False\n"), done.stderr


def test_the_version_is_said_once(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and penstock.__version__ in capsys.readouterr().out


def test_with_a_window_it_says_what_stays(capsys):
    arguments = ("--model", "demo", "--device", "cpu", "--attention-sinks", "4", "--attention-window", "200")
    shown = plan_json(capsys, *arguments)
    assert (shown["max_context"], shown["max_model_len"]) == (204, 2**31 - 1)
    text = plan(capsys, *arguments)
    kept = "of a sequence the first 4 tokens and 200 recent ones stay cached"
    note = f"{kept}, of which the oldest 48 are evicted at a time"
    assert f"note: {note}" in text and shown["notes"][-1] == note
    assert re.search("longest context +204 tokens", text)
    short = plan_json(capsys, *arguments, "--max-model-len", "100", "--num-pages", "8")
    assert (short["max_context"], short["max_model_len"]) == (100, 100)
    assert "evicted" not in plan(capsys, "--model", "demo", "--device", "cpu")


@pytest.mark.parametrize(
    "flags, has_gpu, is_said",
    [([], False, True), ([], True, False), (["--device", "cpu"], False, False), (["--device", "cuda"], False, False),
     (["--device-profile", "h200"], False, False), (["--gpu-memory", "24GiB"], False, False)],
)  # fmt: skip
def test_a_machine_without_a_gpu_is_told_how_to_plan_for_itself(capsys, monkeypatch, flags, has_gpu, is_said):
    monkeypatch.setattr(plan_module, "GPU_DRIVERS", [__file__, "/nowhere"] if has_gpu else ["/nowhere"])
    assert cli.main(["plan", SMALL, *flags]) == 0
    told = ["note: no GPU here: --device cpu plans for this machine"]
    assert capsys.readouterr().err.splitlines() == told * is_said
