"""The same requests for one rank, for self-launched ranks and, as a module, for ranks as under torchrun, each with

    -m tests.support.llm_runs FOLDER

Each rank writes FOLDER/rankN.json; the lists in it are equal to what `run_requests` gives on one rank.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from penstock.engine.output import RequestOutput
from penstock.engine.split.llm import SplitLLM
from penstock.parallel import launch
from penstock.parallel.failure import RankFailed

from penstock import LLM, SamplingParams

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,  # less than the long prompt: it comes in chunks
    "resident": 0.5,
    "page_size": 4,
}
MESSAGE = {"role": "user", "content": "Hello"}
WAYS = {  # how passes follow each other
    "in_turn": {"resident": 0.5, "debug": {"lookahead": 0}},
    "ahead": {"resident": "all", "debug": {"lookahead": 1}},
    "prepared": {"resident": 0.5, "debug": {"lookahead": 1}},
}
LONG = "Return a new list of all the values that are in the table, and the number of times that each was found."
REQUESTS: list[tuple[str | list[int], dict[str, Any]]] = [
    ("Return the", {"temperature": 0, "logprobs": 2}),
    ([0, 376, 268], {"seed": 11, "max_tokens": 5}),
    (LONG, {"seed": 12, "temperature": 0.8, "top_p": 0.9, "max_tokens": 12, "prompt_logprobs": 2}),
    ("def", {"seed": 13, "top_k": 20, "n": 2, "logprobs": 0}),
    ("The", {"seed": 14, "min_p": 0.05, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}),
    ("Raise", {"temperature": 0, "max_tokens": 1}),
    ("Test", {}),  # no seed of its own: the engine's
]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    """The tokens of every sequence, one prompt after another."""
    return [list(sequence.token_ids) for output in outputs for sequence in output.outputs]


def run_requests(llm: LLM) -> list[dict[str, Any]]:
    """More prompts than rows, so that some wait for those that end early."""
    prompts = [prompt for prompt, _ in REQUESTS]
    return [
        output.to_dict()
        for output in llm.generate(prompts, [SamplingParams(**own, ignore_eos=True) for _, own in REQUESTS])
    ]


def refusal(run) -> str:
    """The message of the ValueError that `run` has to raise."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def aborted_by_on_text(llm: LLM) -> dict[str, Any]:
    """Outputs of a call whose on_text raises for the first prompt, and whether that was raised here."""
    params, raised = SamplingParams(temperature=0, ignore_eos=True), False
    try:
        outputs = llm.generate([LONG, "Return the"], params, on_text=lambda prompt, *_: 1 // prompt)
    except ZeroDivisionError as error:
        outputs, raised = error.outputs, True
    return {"aborted": [output.to_dict() for output in outputs], "raised": raised}


def mistakes_of_one(llm: LLM, rank: int) -> dict[str, Any]:
    """Ranks that are given different things; each of these calls is refused, and the next one is answered."""
    greedy = SamplingParams(temperature=0, ignore_eos=True)
    facts = {
        "refused_by_one": refusal(lambda: llm.generate([[0, 99999]] if rank == 1 else "Return the")),
        "refused_by_rank_0": refusal(lambda: llm.generate(["Return the"] if rank == 1 else 5)),
        "other_prompts": refusal(lambda: llm.generate(f"Rank {rank}")),
        "other_call": refusal(lambda: llm.generate("def") if rank == 0 else llm.measure()),
        "no_value": refusal(lambda: llm.generate([torch.empty(3, device="meta")] if rank == 1 else "Return the")),
        "no_message": refusal(lambda: llm.chat([MESSAGE] if rank == 0 else ["Hello"])),
        "chat_or_not": refusal(lambda: llm.chat([MESSAGE]) if rank == 0 else llm.generate("def")),
    }
    facts["measured"] = refusal(llm.measure)
    if rank == 0:
        llm.measure()  # the others answer within generate
    facts["follows"] = tokens_of(llm.generate("Return the" if rank == 0 else [], greedy))
    facts["own"] = tokens_of(llm.generate("Return the", greedy))
    facts["chats"] = [tokens_of(llm.chat([MESSAGE] if asks else [], greedy)) for asks in (True, rank == 0)]
    return facts


def refused_options(mistakes: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The kind and the message of what LLM raises for each of these options."""
    launch.wait_for_launcher = lambda: None  # torchrun ends nobody here
    found = {}
    for name, options in mistakes.items():
        try:
            (SplitLLM if "split" in options else LLM)("demo", **OPTIONS | options)
        except (TypeError, ValueError, RankFailed) as error:
            found[name] = [type(error).__name__, str(error)]
    return found


def options_of_one(rank: int) -> dict[str, list[str]]:
    """Options that are refused on rank 1, which lives on, and then on rank 0."""
    mistakes = {
        "other_size": {"tensor_parallel_size": 4},
        "no_number": {"max_model_len": "many"},
        "no_option": {"no_such": 1},
        "no_tokenizer": {"tokenizer": "nowhere"},
        "no_split": {"split": "fused"},
    }
    found = refused_options({name: options if rank == 1 else {} for name, options in mistakes.items()})
    found |= refused_options({"rank_0": {"resident": 7} if rank == 0 else {}})
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "nope0" if rank == 1 else "lo"
    found |= refused_options({"interface": {}})
    os.environ["GLOO_SOCKET_IFNAME"] = interface or "lo"
    return found


def run_rank(folder: Path) -> None:
    """Two engines one after another, with mistakes in between: on all ranks alike, then on one alone."""
    rank = int(os.environ["RANK"])
    facts = {
        "unlike_world": refusal(lambda: LLM("demo", tensor_parallel_size=4, **OPTIONS)),
        "bad_option": [refusal(lambda: LLM("demo", **OPTIONS | {"resident": 7})) for _ in range(5)],
        "options_of_one": options_of_one(rank),
    }
    with LLM("demo", **OPTIONS) as llm:
        facts["held"] = refused_options({"second": {}})
        facts["first"] = run_requests(llm)
        facts["bad_prompt"] = refusal(lambda: llm.generate([[0, 99999]]))
        facts |= aborted_by_on_text(llm)
        facts["again"] = [
            output.to_dict() for output in llm.generate(LONG, SamplingParams(temperature=0, ignore_eos=True))
        ]
        facts |= mistakes_of_one(llm, rank)
    for name, unlike in (("other_config", {"load_format": "dummy"}), ("other_trace", {"trace": "trace.json"})):
        facts[name] = refusal(functools.partial(LLM, "demo", **OPTIONS | (unlike if rank == 1 else {})))
    with LLM("demo", tensor_parallel_size=2, **OPTIONS) as llm:
        facts["second"] = run_requests(llm)
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
