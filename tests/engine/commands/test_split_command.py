"""`penstock split`: the text of `penstock generate`, and beside it what crossed."""

import json

import pytest
from penstock.engine.commands.cli import main
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.planning.find_model import find_model
from penstock.engine.split.permutation import NOTICE

ASKED = ("--prompt", "Return the", "--prompt", "Raise an error", "--max-tokens", "8", "--ignore-eos")
SAMPLED = ("--temperature", "0.8", "--top-p", "0.9", "--seed", "4", "--n", "2")


def run(capsys, command: str, *arguments: str) -> tuple[str, str]:
    assert main([command, *ASKED, *arguments]) == 0
    return capsys.readouterr()


def test_text_is_that_of_generate(capsys):
    expected, _ = run(capsys, "generate", "--device", "cpu", *SAMPLED)
    out, err = run(capsys, "split", "--attention", "fused", *SAMPLED)
    assert out == expected
    assert "counted equals predicted, byte for byte" in err
    (line,) = [line.split() for line in err.splitlines() if line.startswith("attn_qkv")]
    assert line[1:5] == ["0", "to", "3", "32"] and line[-3] == "32", "4 layers, 8 passes: one call each"


def test_json_and_all_layers(capsys):
    expected, _ = run(capsys, "generate", "--device", "cpu", "--temperature", "0", "--json")
    out, err = run(capsys, "split", "--temperature", "0", "--json", "--layers", "--wire-dtype", "bfloat16")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["Return the", "Raise an error"]
    assert len(out.splitlines()) == len(expected.splitlines())
    assert len([line for line in err.splitlines() if line.startswith("ffn_down")]) == 4
    assert "attention_scores" in err
    (transfers,) = json.loads(err.splitlines()[-1])["transfers"]
    crossed = transfers["calls"]["operations"]["attn_qkv"]
    num_tokens, element = sum(len(json.loads(line)["prompt_token_ids"]) + 7 for line in out.splitlines()), 2
    spec = read_spec(read_config(find_model("demo")), "demo")
    assert crossed["num_calls"] == 8 * spec.num_layers
    assert crossed["sent_bytes"] == num_tokens * spec.num_layers * spec.hidden_size * element


def test_permuted_text_is_the_same_and_the_command_says_what_this_is(capsys):
    arguments = ("--temperature", "0", "--dtype", "float32")
    expected, unpermuted = run(capsys, "split", *arguments)
    out, err = run(capsys, "split", *arguments, "--permute", "rows,head_dim", "--permute-key", "0f" * 16)
    assert out == expected
    (notice,) = [line for line in err.splitlines() if line not in unpermuted.splitlines()]
    assert notice.startswith("permuted: rows, head_dim.") and NOTICE in notice
    assert "0f0f" not in err


def test_help_says_what_permuting_is(capsys):
    with pytest.raises(SystemExit):
        main(["split", "--help"])
    assert NOTICE in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--wire-dtype", "float16"), "--wire-dtype"),
        (("--attention", "flash"), "--attention"),
        (("--permute", "dims"), "permute='dims'"),
        (("--permute-key", "00" * 16), "permute_key: nothing is permuted"),
        (("--permute", "rows", "--permute-key", "0012"), "permute_key: 2 bytes"),
        (("--device", "cuda"), "unrecognized arguments: --device"),
        (("--max-model-len", "2"), "max_model_len is 2"),
    ],
)
def test_a_mistake_is_one_line(capsys, wrong, message):
    assert main(["split", *ASKED, *wrong]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and message in err[0]
