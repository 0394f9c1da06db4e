"""The report of what a split execution moves: predicted from a config alone, and counted in a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from penstock.engine.split.channel import InProcess

from scripts.bench.entry import run_script
from scripts.research import transfer_report
from tests.support.oracle.variants import VARIANTS

ROOT = Path(__file__).parents[3]
LLAMA = str(ROOT / "benchmarks" / "shapes" / "Llama-3.2-1B.json")
BASE = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 100, "num_hidden_layers": 2}
BASE |= {"num_attention_heads": 8, "max_position_embeddings": 64}


@pytest.fixture
def report(monkeypatch, capsys):
    def run(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["transfer_report.py", *arguments])
        assert run_script(transfer_report.main) == status
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


def test_the_original_figures_without_torch():
    code = (
        "import sys; from scripts.research import transfer_report\n"
        f"sys.argv = ['x', '--model', {LLAMA!r}, '--tokens', '1024', '--attention', 'repeated']\n"
        "transfer_report.main()\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["original", "98", "3328.02", "3656.49", "6984.50", "0.00", "66.0%", "58.6%"] in lines
    assert ["all", "98", "3328.02", "3656.49", "6984.50", "100.0%"] in lines
    assert lines[-1][-7:] == ["82", "544.01", "804.24", "1348.26", "5636.25", "11.9%", "0.0%"]


@pytest.mark.parametrize("attention", ["scores", "fused", "repeated"])
@pytest.mark.parametrize("variant", ["llama_gqa", "mistral_window_head_dim", "qwen3", "neox_parallel", "neox_serial"])
def test_what_is_counted_is_what_was_predicted(variant, attention, report, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({**BASE, **VARIANTS[variant].config, "model_type": VARIANTS[variant].model_type})
    )
    shown = report("--model", str(tmp_path / "config.json"), "--tokens", "37", "--attention", attention, "--measure")
    assert "counted equals predicted, byte for byte" in shown


def test_a_checkpoint_runs_with_its_weights_in_bfloat16(report):
    shown = report("--model", "demo", "--tokens", "16", "--wire-dtype", "bfloat16", "--measure", "--layers")
    assert "counted equals predicted" in shown and "bfloat16 on the wire" in shown


def test_a_prompt_in_chunks(report):
    shown = report("--model", "demo", "--tokens", "40", "--chunk", "16", "--measure")
    assert "counted equals predicted" in shown and "in chunks of 16" in shown
    (line,) = [line.split() for line in shown.splitlines() if line.startswith("attn_qkv")]
    assert line[1:5] == ["0", "to", "3", "12"], "three passes over four layers"


def test_a_difference_is_the_exit_status(report, monkeypatch):
    call = InProcess.call

    def call_twice(channel, site, tensors, out):
        for _ in range(1 + (site.operation == "ffn_down" and site.layer_idx == 2)):
            call(channel, site, tensors, out)

    monkeypatch.setattr(InProcess, "call", call_twice)
    shown = report("--model", "demo", "--tokens", "16", "--measure", status=1)
    assert "counted differs from predicted, first at" in shown and "layer_idx=2" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "demo", "--tokens", "0"), "--tokens 0"),
        (("--model", "demo", "--tokens", "8", "--chunk", "0"), "--chunk 0"),
        (("--model", "nowhere", "--tokens", "8"), "nowhere"),
        (("--model", "demo", "--tokens", "100000"), "--tokens 100000: demo is trained to 512 positions"),
        (("--model", "demo", "--tokens", "512", "--measure"), "max_model_len"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, report):
    shown = report(*arguments, status=2)
    assert message in shown and len(shown.splitlines()) == 1
