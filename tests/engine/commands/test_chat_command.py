"""`penstock chat` in this process: turns, commands, mistakes, Ctrl-C; and `generate --chat`."""

import io
import json
import re
import shutil
import signal
import sys

import pytest
from penstock.engine.commands import chat as command
from penstock.engine.commands.cli import main
from penstock.engine.planning.find_model import find_model

from penstock import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
FLAGS = ("--model", "demo", "--temperature", "0", "--max-tokens", "5", "--ignore-eos", "--max-model-len", "200")
FIRST, SECOND = "What does sorted() return?", "And reversed()?"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def answers():
    """The answers to FIRST, to SECOND after it, and to SECOND alone."""
    with LLM("demo", max_model_len=200) as llm:
        (first,) = llm.chat([user(FIRST)], GREEDY)
        after = [user(FIRST), said(first.outputs[0].text), user(SECOND)]
        second, alone = llm.chat([after, [user(SECOND)]], GREEDY)
    return [output.outputs[0].text for output in (first, second, alone)]


def chat(monkeypatch, capsys, *lines: str, flags: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", *FLAGS, *flags]) == 0
    out, err = capsys.readouterr()
    return out, err.splitlines()


def test_the_conversation_so_far_goes_with_each_message(monkeypatch, capsys, answers):
    out, err = chat(monkeypatch, capsys, FIRST, "", f"  {SECOND} ", "/reset", SECOND, "/exit", FIRST)
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert err[0].startswith("demo on 1 rank") and err[1].startswith("commands: /stats, /reset")
    assert err[2:] == ["a new conversation"]


def test_stats_say_how_fast_and_how_long(monkeypatch, capsys):
    _, err = chat(monkeypatch, capsys, "/stats", FIRST, SECOND, "/stats", "/help", "/nope")
    assert err[2] == "no answer yet"
    assert re.fullmatch(r"the last answer: 5 tokens in .* m?s; held \d+ \+ 5 of 200 tokens", err[3])
    assert re.fullmatch(r"all answers: 10 tokens in .* tokens/s, .* of the \w+ bound at the assumed rates", err[4])
    assert err[5:9] == [f"{name}: {does}" for name, does in command.COMMANDS.items()]
    assert err[9] == "/nope: there is no such command" and err[10:] == err[5:9]


def test_a_system_message_begins_every_conversation(monkeypatch, capsys):
    with LLM("demo", max_model_len=200) as llm:
        (output,) = llm.chat([{"role": "system", "content": "Be brief."}, user(FIRST)], GREEDY)
    out, _ = chat(monkeypatch, capsys, FIRST, "/reset", FIRST, flags=("--system", "Be brief."))
    assert out == f"{output.outputs[0].text}\n" * 2


def test_a_message_that_cannot_be_answered_is_forgotten(monkeypatch, capsys, answers):
    out, err = chat(monkeypatch, capsys, FIRST, "word " * 300, SECOND)
    assert out == f"{answers[0]}\n\n{answers[1]}\n"
    refused = r"penstock: error: prompt 0: has \d+ tokens, and at most 199 fit.*; /reset begins a new conversation"
    assert re.fullmatch(refused, err[2])


def test_an_interrupt_ends_the_answer_and_not_the_chat(monkeypatch, capsys):
    """All that came by then is part of the conversation."""
    with LLM("demo", max_model_len=200) as llm:
        talk = command.Chat(llm, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        pieces = []

        def interrupt(piece: str) -> None:
            pieces.append(piece)
            if len(pieces) == 2:
                raise command.Stopped

        assert talk.answer(FIRST, interrupt) is None
        assert talk.messages == [user(FIRST), said("".join(pieces))]
        assert talk.answer(SECOND, lambda piece: None) is None and len(talk.messages) == 4
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest may have another one
    try:
        with command.interrupts() as heard:
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_mistakes_are_found_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(LLM, "__init__", lambda *_, **__: pytest.fail("loaded"))
    shutil.copy(find_model("demo") / "tokenizer.json", tmp_path)
    for arguments in (["chat"], ["generate", "--chat", "Hello"]):
        assert main([*arguments, "--tokenizer", str(tmp_path)]) == 2
        assert f"{tmp_path}: has no chat template" in capsys.readouterr().err
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["chat"]) == 2
    assert "give -tp N instead of torchrun" in capsys.readouterr().err


def test_generate_answers_messages_beside_prompts(monkeypatch, capsys, answers):
    monkeypatch.setattr(sys, "stdin", io.StringIO("not read"))
    assert main(["generate", *FLAGS, "--chat", FIRST, "--chat", SECOND]) == 0
    titles = [f"--- prompt {index}, output 0\n" for index in range(2)]
    assert capsys.readouterr().out == f"{titles[0]}{answers[0]}\n{titles[1]}{answers[2]}\n"
    assert main(["generate", *FLAGS, "--prompt", "Return the", "--chat", FIRST, "--json"]) == 0
    prompt, message = map(json.loads, capsys.readouterr().out.splitlines())
    assert prompt["prompt"] == "Return the" and message["outputs"][0]["text"] == answers[0]
    assert FIRST in message["prompt"] and message["prompt"] != FIRST
