"""`penstock generate` on one rank in this process: prompts in, text or JSON out, --help."""

import dataclasses
import io
import json
import re
import shlex
import sys

import pytest
from penstock.engine.commands import said
from penstock.engine.commands.cli import COMMANDS, _parsers, main
from penstock.engine.commands.flags import EVERYDAY, MEMORY
from penstock.engine.commands.generate import SAMPLING_FLAGS
from penstock.engine.commands.plan import plan_of
from penstock.engine.commands.said import say_after
from penstock.engine.config import DebugConfig, EngineConfig
from penstock.engine.planning.find_model import find_model
from penstock.engine.runtime.engine import Engine
from penstock.engine.streams import guarded_streams
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.batching.request import SamplingParams as Params
from penstock.scheduler.units import show_bytes

from penstock import LLM, SamplingParams
from tests.support.failing_rows import NAN, WARNS, poison
from tests.support.gguf_models import SMALL, write_model

GREEDY = ("--temperature", "0", "--ignore-eos", "--max-tokens", "8")


@pytest.fixture(scope="module")
def expected():
    """The greedy answers, as the library gives them."""
    prompts = ["Return the", "Raise an error", [0, 376, 268]]
    with LLM("demo") as llm:
        return llm.generate(prompts, SamplingParams(temperature=0, ignore_eos=True, max_tokens=8))


def run(*arguments: str, stdin: str = "", monkeypatch=None) -> int:
    if monkeypatch is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    return main(["generate", *GREEDY, *arguments])


BEFORE = r"demo on 1 rank \(cpu\): {}; predicted [\d.]+ tokens/s for {} \(assumed: cpu\)"
AFTER = r"{} tokens in [\d.]+ m?s: [\d.]+ tokens/s, [\d.]+ of the {} bound at the {} rates"


@pytest.fixture
def nothing_is_measured(monkeypatch):
    monkeypatch.setattr(Engine, "measure", lambda *_: pytest.fail("rates were measured, and nobody asked"))


def assert_lines(err: str, *patterns: str) -> None:
    lines = err.splitlines()
    assert len(lines) == len(patterns), err
    for line, pattern in zip(lines, patterns):
        assert re.fullmatch(pattern, line), line


def test_one_prompt_gives_its_text_alone(capsys, expected, nothing_is_measured):
    assert run("--model", "demo", "--prompt", "Return the", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert out == expected[0].outputs[0].text + "\n"
    assert_lines(err, BEFORE.format("nothing streams", "1 sequence"), AFTER.format(8, "launch", "assumed"))


def test_titles_of_several_texts_come_after_the_line_before(capsys, monkeypatch, nothing_is_measured):
    monkeypatch.setattr("sys.stderr", sys.stdout)
    assert run("demo", "--prompt", "Return the", "--prompt", "Raise an error", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (lines.index(f"--- prompt {prompt}, output 0") for prompt in (0, 1))
    assert lines[first - 1].startswith("demo on 1 rank (cpu)") and first + 1 < second < len(lines) - 2


def test_the_line_before_says_what_streams_and_the_line_after_what_binds(capsys, nothing_is_measured):
    """At a link of 1 MB/s the plan says link, whatever the machine does; the job is two sequences."""
    more = ("--weights-compression", "none", "--device", "cpu", "--resident", "none", "--link-gb-s", "0.001")
    assert run("demo", "--prompt", "Return the", "--n", "2", *more) == 0
    streamed_bytes = plan_of(EngineConfig(device="cpu", resident="none")).layout.nbytes
    before, after = capsys.readouterr().err.splitlines()
    streams = f"{show_bytes(streamed_bytes)} of weights stream to each rank in a pass"
    assert before.startswith(f"demo on 1 rank (cpu): {streams}; predicted ")
    speed = float(re.search(r"predicted ([\d.]+) tokens/s for 2 sequences at once", before)[1])
    assert speed == pytest.approx(2 / (streamed_bytes / 1e6), rel=0.01)
    assert re.fullmatch(AFTER.format(16, "link", "assumed"), after)
    elapsed, share = map(float, re.findall(r"16 tokens in ([\d.]+) .* ([\d.]+) of the", after)[0])
    seconds = elapsed if " ms:" not in after else elapsed / 1e3
    assert share >= 0.98 * 8 * (streamed_bytes / 1e6) / seconds  # eight passes, which took no longer than the call


def test_verbose_shows_the_plan_and_what_was_measured(capsys, expected):
    assert run("demo", "--prompt", "Return the", "--resident", "none", "--verbose", "--table") == 0
    out, err = capsys.readouterr()
    assert out == expected[0].outputs[0].text + "\n"
    assert "   1   as many as the job has, or as a pass takes\n" in err  # nobody asked
    for part in ("rank 0 of 1: ", "4 layers", "predicted decode pass", "rates (measured): ", "passes took"):
        assert err.count(part) == 1
    assert "attn_residual" in err and "moved 0.0" in err  # the step table; weights crossed the link
    (after,) = [line for line in err.splitlines() if line.startswith("8 tokens in")]
    assert after.endswith("bound at the measured rates")


def test_verbose_says_how_requests_came_and_waited(capsys):
    """At a link that hides more tokens than there are; of two prompts that begin alike one waits for the other's
    row."""
    prompts, few = ["Return the first", "Return the first one"], {"max_num_seqs": 1, "page_size": 2}
    with LLM("demo", device="cpu", resident="none", link_gb_s=0.001, **few) as llm:
        llm.engine.times.keep()
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        say_after(llm, outputs, 1.0, verbose=True)
        said = llm.loop.scheduler.counts.describe()
    assert set(said) <= set(capsys.readouterr().err.splitlines()) and len(said) == 3
    for line, part in zip(said, ("tokens of prompts were cached", "for: rows 2", "tokens that the link hid")):
        assert part in line


@pytest.mark.parametrize("num_threads, slow, is_said", [(1, 9e9, False), (2, 9e9, True), (2, 0.0, False)])
def test_a_slow_run_on_more_threads_than_one_is_told_of_them(capsys, monkeypatch, num_threads, slow, is_said):
    monkeypatch.setattr(said, "SLOW", slow)
    with LLM("demo", device="cpu") as llm:
        llm.engine.times.keep()
        outputs = llm.generate("Return the", SamplingParams(temperature=0, max_tokens=2))
        monkeypatch.setattr("torch.get_num_threads", lambda: num_threads)
        say_after(llm, outputs, 1.0, verbose=False)
    notes = capsys.readouterr().err.splitlines()[1:]
    assert [note.endswith("OMP_NUM_THREADS=1 may help") for note in notes] == [True] * is_said


def test_what_a_user_should_know_of_the_plan_is_a_line_of_its_own(capsys, nothing_is_measured):
    window = ("--attention-sinks", "4", "--attention-window", "200")
    assert run("demo", "--prompt", "Return the", *window) == 0
    note, before, after = capsys.readouterr().err.splitlines()
    assert note.startswith("note: of a sequence the first 4 tokens") and before.startswith("demo on 1 rank")


def test_where_all_fail_nothing_is_said_but_why(capsys, tmp_path):
    """Not how fast no token came."""
    with WARNS:
        model = poison(find_model("demo"), tmp_path / "demo", 376)
        (tmp_path / "ids.jsonl").write_text('{"prompt_token_ids": [0, 376, 268]}\n')
        assert run("--model", model, "--device", "cpu", "--prompts-file", str(tmp_path / "ids.jsonl")) == 1
    out, err = capsys.readouterr()
    assert out == "\n"
    assert_lines(err, r".*demo on 1 rank .*", f"penstock: error: prompt 0, output 0: {NAN}")


def test_json_is_one_object_a_prompt(capsys, expected):
    assert run("--prompt", "Return the", "--prompt", "Raise an error", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [output.to_dict() for output in expected[:2]]
    assert lines[0]["prompt_token_ids"] and lines[0]["outputs"][0]["token_ids"]


def test_json_of_what_was_moved_is_no_line_of_stdout(capsys, expected):
    """The last line on stderr."""
    assert run("--prompt", "Return the", "--resident", "0.5", "--json", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["outputs"] for line in out.splitlines()] == [expected[0].to_dict()["outputs"]]
    predicted = TransferLedger()
    with LLM("demo", resident=0.5, device="cpu") as llm:
        residency = llm.engine.plan.residency
        for index, (group, nbytes) in enumerate(residency.streamed):
            for _ in range(8 + (index < residency.ring.num_wrapped)):  # passes: one for each token; and the prologue
                predicted.add(Site(group.name, group.layer_idx), nbytes)
    assert predicted.total.num_calls >= 5 * 8
    *said, moved = err.splitlines()
    assert len(said) == 2
    (transfers,) = json.loads(moved)["transfers"]
    told = [transfers["weights"][part] for part in ("total", "operations")]
    assert told == [predicted.to_dict()[part] for part in ("total", "operations")]
    assert sorted(map(str, transfers["weights"]["sites"])) == sorted(map(str, predicted.to_dict()["sites"]))
    assert transfers["rank"] == 0 and transfers["all_reduces"] == TransferLedger().to_dict()
    assert run("--prompt", "Return the") == 0
    assert "transfers" not in "".join(capsys.readouterr())


def test_several_prompts_print_in_order(capsys, expected):
    assert run("--prompt", "Return the", "--prompt", "Raise an error", "--n", "2") == 0
    blocks = [
        f"--- prompt {prompt}, output {index}\n{output.outputs[0].text}\n"
        for prompt, output in enumerate(expected[:2])
        for index in range(2)
    ]
    assert capsys.readouterr().out == "".join(blocks)


LINES = "Return the\n\n  \nRaise an error\n"
JSONL = """{"prompt": "Return the", "id": 7}
{"prompt": null, "prompt_token_ids": [0, 376, 268]}

{"prompt": "Raise an error"}
"""


@pytest.mark.parametrize("way", ["file", "-", "stdin alone"])
@pytest.mark.parametrize(
    "text, indices",
    [
        *((LINES, [0, 1]), (JSONL, [0, 2, 1]), ("\ufeff" + LINES, [0, 1]), ("\ufeff" + JSONL, [0, 2, 1])),
        *((text.replace("\n", "\r\n"), indices) for text, indices in ((LINES, [0, 1]), (JSONL, [0, 2, 1]))),
    ],
)
def test_prompts_from_a_file_or_standard_input(capsys, monkeypatch, tmp_path, expected, way, text, indices):
    file = tmp_path / "prompts"
    file.write_bytes(text.encode())
    options = {"file": ["--prompts-file", str(file)], "-": ["--prompts-file", "-"], "stdin alone": []}[way]
    assert run(*options, "--json", stdin=text, monkeypatch=monkeypatch) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["outputs"] for line in lines] == [expected[index].to_dict()["outputs"] for index in indices]


def test_standard_input_is_not_read_beside_other_prompts(capsys, monkeypatch, expected):
    assert run("--prompt", "Return the", stdin="Raise an error", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == expected[0].outputs[0].text + "\n"


def test_every_sampling_flag_arrives(monkeypatch):
    """Each field of SamplingParams gets another value than its default, but for seed, which is the engine's."""
    values = {"n": 2, "max_tokens": 3, "temperature": 0.5, "top_p": 0.25, "top_k": 4, "min_p": 0.125}
    values |= {"repetition_penalty": 1.5, "presence_penalty": 0.75, "frequency_penalty": -0.5, "logprobs": 6}
    assert set(values) == set(SAMPLING_FLAGS)
    flags = [text for name, value in values.items() for text in ("--" + name.replace("_", "-"), str(value))]
    seen = []

    def generate(self, prompts, params, on_text):
        seen.append(params)
        raise ValueError("seen")

    monkeypatch.setattr(LLM, "generate", generate)
    more = ["--stop", "x", "--stop", "yz", "--stop-token-ids", "5", "6", "--ignore-eos"]
    assert main(["generate", "--prompt", "a", *flags, *more, "--seed", "9"]) == 2
    assert seen == [Params(**values, stop=["x", "yz"], stop_token_ids=[5, 6], ignore_eos=True)]


def test_stop_strings(capsys, expected):
    text = expected[0].outputs[0].text
    assert run("--prompt", "Return the", "--stop", text[5:8]) == 0
    assert capsys.readouterr().out == text[: text.index(text[5:8])] + "\n"


def test_a_seed_repeats_the_text(capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", "--prompt", "Return the", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def shown(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main([*arguments])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    return text


FIELDS = [f for f in (*dataclasses.fields(EngineConfig), *dataclasses.fields(DebugConfig)) if f.name != "debug"]


def test_help_explains_every_field(capsys, monkeypatch):
    """The options stand in groups, of which --help leaves out the one for debugging; plan samples nothing."""
    monkeypatch.setenv("COLUMNS", "120")
    assert {*EVERYDAY, *MEMORY} <= {field.name for field in FIELDS}
    for command in ("generate", "plan"):
        some, text = shown(capsys, command, "--help"), shown(capsys, command, "--help-all")
        groups = ("everyday", *(["sampling"] if command == "generate" else []), "memory and streaming", "debugging")
        titles = [text.index(f"\n{title}:\n") for title in groups]
        assert titles == sorted(titles) and "debugging:" not in some
        assert text.startswith(some.rstrip("\n"))
        for field in FIELDS:
            option = f"--{field.name.replace('_', '-')} "
            assert (option in some.replace(",", " ")) == (field.name in (*EVERYDAY, *MEMORY)), option
            assert option in text.replace(",", " ")
            assert " ".join(field.metadata["help"].split()[:3]) in " ".join(text.split())
        assert "-tp" in text and "(default: 16)" in text and "(default: None)" not in text


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.does])
def test_help_begins_with_a_sentence_and_an_example_that_is_one(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "120")
    sentence, _, title, example, *_ = shown(capsys, name, "--help").splitlines()
    assert sentence == COMMANDS[name].does and title in ("example:", "examples:")
    for example in COMMANDS[name].examples:
        program, *words = shlex.split(example)
        parser, *_ = _parsers(name)
        assert program == "penstock" and parser.parse_args(words).command == name


def test_help_of_the_whole_hides_the_worker(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "generate" in text and "plan" in text and "examples:" in text
    assert "worker" not in text and "SUPPRESS" not in text


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0 and capsys.readouterr().out.startswith("penstock 0.")


def test_a_reader_that_leaves_early_ends_the_run(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as leaving, guarded_streams():
        run("--prompt", "Return the")
    assert leaving.value.code == "penstock: error: standard output: Broken pipe"


def test_unknown_variables_of_ours_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("PENSTOCK_RESIDENT", "none")
    assert main(["plan", "demo"]) == 2
    assert "environment variable PENSTOCK_RESIDENT" in capsys.readouterr().err


def test_rates_that_are_given_are_not_measured(capsys):
    arguments = ["generate", "--max-tokens", "1", "--prompt", "a", "--device", "cpu", "--verbose"]
    assert main([*arguments, "--link-gb-s", "3"]) == 0
    assert "rates (measured, link as given): link 3 GB/s" in capsys.readouterr().err
    assert main([*arguments, "--device-profile", "cpu"]) == 0
    assert "rates (assumed: cpu)" in capsys.readouterr().err


def test_a_text_for_a_gguf_file_without_vocabulary_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "m.gguf", "llama", sizes=SMALL)
    monkeypatch.setattr("penstock.engine.llm.LLM", lambda **config: pytest.fail("loaded"))
    assert run("--model", str(tmp_path / "m.gguf"), "--prompt", "a") == 2
    told = "m.gguf: no tokenizer (keys tokenizer.ggml.*), so prompt 0 cannot have a text prompt; give token ids"
    assert told in capsys.readouterr().err


def test_a_text_for_a_directory_of_gguf_files_says_which_file_to_give(tmp_path, capsys):
    write_model(tmp_path / "m.gguf", "llama", sizes=SMALL)
    assert run("--model", str(tmp_path), "--prompt", "a") == 2
    assert "has no config.json, but m.gguf: give the GGUF file itself" in capsys.readouterr().err
