"""Train the demo checkpoint in engine/demo_model/ from the text that ships with CPython.

What: a 3.5 M parameter Llama with its own byte-level BPE tokenizer, in the Hugging Face layout (config.json,
generation_config.json, model.safetensors in bfloat16, tokenizer files, chat template), at most 8 MB in all.

Why: tests and benchmarks need a checkpoint that can be committed, loads at once and has trained weights;
random weights give almost uniform logits, where a wrong kernel and a right one look alike. Head and KV-head
counts divide by 4, so it splits over 1, 2 or 4 ranks.

Training text: the pydoc topics and the standard library's docstrings (tests left out) of the interpreter that
runs this script; nothing is downloaded. Chat turns are made of the same text ("What does X do?", answered by
the first paragraph of X's docstring). Modules whose name hashes into the held-out share are never trained on;
bits per byte are measured on them.

The model knows little but the tone of Python's documentation. What it states is often wrong, it knows
English only, and it has never seen more than 512 tokens at once.

Usage: python -m scripts.train_demo_model --compile     (15 to 30 minutes on two CPU cores)
       python -m scripts.train_demo_model --steps 300   (a rough version in two)
On a machine that has other work, set OMP_WAIT_POLICY=PASSIVE, since threads that spin at barriers take most
of its speed. The seed fixes data order and initial weights; another CPython, torch or CPU gives slightly other
figures.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from penstock.engine.commands.flags import Parser
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.bench.entry import run_script

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_PERCENT = 5  # share of modules
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "lib2to3", "turtledemo", "__pycache__"}
BOS, EOS, TURN_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
HEADER, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Llama 3's split. Unlike GPT-2's it keeps a run of newlines whole, so that a chat prompt, which ends in two,
# becomes the same tokens as in training, where an answer follows them.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_FOLDER_BYTES = 8_000_000
GREEDY_PROMPTS = ["Return the", "The following example shows", "This module provides", "If the file"]

Docs = dict[str, list[tuple[str, str]]]  # module name -> (object name, docstring) pairs


def source_docstrings(stdlib: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (module, object name, docstring) from the library's sources, in path order."""
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib).with_suffix("")
        if EXCLUDED.isdisjoint(relative.parts):
            module = ".".join(relative.parts).removesuffix(".__init__")
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield module, getattr(node, "name", module), ast.get_docstring(node) or ""


def clean(text: str) -> str:
    """Drop doctest blocks and join wrapped lines.

    Doctests are mostly runs of digits, which teach a model of this size little but to loop, and where a
    paragraph happened to be wrapped is not worth learning either.
    """
    text = re.sub(r"^ *>>> .*\n?(?: *\S.*\n?)*", "", text.expandtabs(), flags=re.MULTILINE)
    lines = [""]
    for line in map(str.rstrip, text.strip().splitlines()):
        body, previous = line.lstrip(), lines[-1].lstrip()
        same_indent = len(line) - len(body) == len(lines[-1]) - len(previous)
        if len(previous) > 45 and same_indent and re.match(r"[A-Za-z(\"'*]", body):
            lines[-1] += " " + body
        else:
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines[1:]))


def collect_docs() -> Docs:
    """Collects all documents by module; a docstring that occurs twice is kept only where it came first."""
    docs: Docs = {}
    seen = set()
    topic_docs = [("topics." + name, name, text) for name, text in sorted(topics.items())]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for module, name, raw in [*topic_docs, *source_docstrings(stdlib)]:
        text = clean(raw)
        if len(text) >= 20 and text not in seen:
            seen.add(text)
            docs.setdefault(module, []).append((name, text))
    return docs


def is_held_out(module: str, percent: int) -> bool:
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100 < percent


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, HEADER, HEADER_END, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, docs: Docs) -> torch.Tensor:
    """Joins the documents, each as BOS ... EOS, with chats as the chat template renders them."""
    ids: list[int] = []
    for pairs in docs.values():
        ids += tokenizer.encode("\n\n".join(text for _, text in pairs) + EOS).ids
        for name, text in pairs:
            if not name.startswith("_") and len(text) < 600:
                question = f"{HEADER}user{HEADER_END}\n\nWhat does {name} do?{TURN_END}"
                answer = f"{HEADER}assistant{HEADER_END}\n\n{text.partition(chr(10) * 2)[0]}{TURN_END}"
                ids += tokenizer.encode(question + answer).ids
    return torch.tensor(ids)


def build_model(tokenizer: Tokenizer, context: int) -> LlamaForCausalLM:
    bos, eos, turn_end = map(tokenizer.token_to_id, (BOS, EOS, TURN_END))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [eos, turn_end]
    return model


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str], context: int) -> float:
    """Bits per UTF-8 byte, each document cut into windows that begin with BOS."""
    nats = 0.0
    for text in texts:
        bos, *ids = tokenizer.encode(text).ids
        for start in range(0, len(ids), context - 1):
            window = torch.tensor([[bos, *ids[start : start + context - 1]]])
            nats += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def train(model: LlamaForCausalLM, stream: torch.Tensor, args: argparse.Namespace) -> None:
    """Trains on random crops. Each starts with BOS, so that the model knows prompts of any kind behind it."""
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.warmup, args.steps)
    forward = torch.compile(model) if args.compile else model
    began = time.monotonic()
    for step in range(args.steps):
        # Short crops are cheaper and teach as much at first; the last fifth reaches the full context.
        length = args.context if step >= 0.8 * args.steps else args.context // 2
        starts = torch.randint(len(stream) - length, (args.batch_tokens // length, 1))
        bos = torch.full_like(starts, model.config.bos_token_id)
        ids = torch.cat([bos, stream[starts + torch.arange(length - 1)]], dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - began:6.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, context: int) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def replace_folder(new: Path, target: Path) -> None:
    """Swaps the folders by renaming, so that a reader never meets a half-written checkpoint."""
    if folder_bytes(new) > MAX_FOLDER_BYTES:
        raise SystemExit(f"{new} has {folder_bytes(new)} bytes, more than {MAX_FOLDER_BYTES}")
    old = new.with_name(new.name + ".old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def greedy_sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> str:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
    return tokenizer.decode(out[0].tolist())


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Train the demo model on the text that ships with CPython.")
    parser.add_argument("--out", type=Path, default=ROOT / "engine" / "demo_model", help="checkpoint folder")
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks" / "demo_model.json")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--context", type=int, default=512, help="longest sequence")
    parser.add_argument("--vocab", type=int, default=2048, help="tokens in the vocabulary")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument(
        "--held-out-percent", type=int, default=HELD_OUT_PERCENT, help="share of modules kept for measuring"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    docs = collect_docs()
    train_docs = {module: d for module, d in docs.items() if not is_held_out(module, args.held_out_percent)}
    texts = {module: "\n\n".join(text for _, text in pairs) for module, pairs in docs.items()}
    train_texts = [texts[module] for module in train_docs]
    held_out = [texts[module] for module in docs if module not in train_docs]
    tokenizer = train_tokenizer(train_texts, args.vocab)
    stream = token_stream(tokenizer, train_docs)
    print(f"{len(train_texts)} documents, {len(held_out)} held out; {len(stream)} tokens to train on")
    model = build_model(tokenizer, args.context)
    untrained = bits_per_byte(model, tokenizer, held_out, args.context)
    began = time.monotonic()
    train(model, stream, args)
    seconds = time.monotonic() - began

    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".demo_model-", dir=args.out.parent))
    save(model, tokenizer, folder, args.context)
    # What is measured is what was written, after rounding to bfloat16.
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    report = {
        "bits_per_byte_untrained": round(untrained, 4),
        "bits_per_byte_trained": round(bits_per_byte(saved, tokenizer, held_out, args.context), 4),
        "parameters": saved.num_parameters(),
        "training_tokens": args.steps * args.batch_tokens,
        "seconds": round(seconds, 1),
        "corpus_bytes": sum(len(text.encode()) for text in train_texts),
        "held_out_bytes": sum(len(text.encode()) for text in held_out),
        "folder_bytes": folder_bytes(folder),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": args.threads,
        "compiled": args.compile,
        "seed": args.seed,
        "greedy_samples": {prompt: greedy_sample(saved, tokenizer, prompt) for prompt in GREEDY_PROMPTS},
    }
    replace_folder(folder, args.out)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(run_script(main))
