"""Train the bundled demo model: a 1.3M-parameter Llama on the Python standard library, on a CPU.

The script needs nothing but the interpreter it runs under. It collects the standard library's own
source text, trains a byte-level BPE tokenizer on it, trains a ``LlamaForCausalLM`` from scratch,
measures it on held-out files against a unigram and a bigram baseline, and writes an ordinary
checkpoint folder with a model card. Every random choice hangs off ``--seed`` and the step number,
and the run ends by step count, so an interrupted run continues exactly where it stopped.

    python scripts/train_demo_model.py --out engine/demo_model --work build/demo_train

On a machine that does other work too, set ``GOMP_SPINCOUNT=0`` in the environment: threads that
spin while they wait make every step several times slower there.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import math
import platform
import random
import re
import shutil
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

Ids = npt.NDArray[np.int64]

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, SYSTEM, USER, ASSISTANT]

# A newline is a token of its own, so that a prompt ending in a newline meets the same tokens the
# model was trained on; a run of two or more spaces never lends its last space to the next word.
PRETOKEN_PATTERN = r"\r\n|\n|\t+| {2,}| ?[\p{L}\p{M}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}_]+|\s"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Tests, demos, generated tables and build-time files teach nothing about ordinary Python code, and
# the build-time ones also hold paths of the machine that built the interpreter.
SKIPPED_FOLDERS = {
    "__phello__",
    "__pycache__",
    "_bundled",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "msilib",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "turtledemo",
}
SKIPPED_FILES = {"html/entities.py", "stringprep.py", "this.py", "sitecustomize.py"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

CONTEXT = 2048
HELD_OUT_EVERY = 20
NEW_TOKENS = 96
SAMPLE_PROMPTS = ("def ", "import ", "class Foo:\n    def __init__(self", "def read_file(path):\n")
SAMPLE_CHATS = ("Complete: def is_empty(self):", "What does `close` do?")

console = Console(highlight=False)


@dataclass(frozen=True)
class Source:
    """One standard-library file: its path below the library folder and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Phase:
    """A stretch of training steps that share one sequence length and batch size."""

    steps: int
    length: int
    batch: int


@dataclass
class Stream:
    """Documents of one kind laid end to end, with the places where each one begins."""

    ids: Ids
    starts: Ids
    weight: float
    aligned: float  # the share of rows that begin exactly where a document begins


@dataclass
class Metrics:
    """Everything the model card reports, kept as JSON beside the training checkpoint."""

    python: str = ""
    torch: str = ""
    transformers: str = ""
    command: str = ""
    seed: int = 0
    optimizer: str = ""
    lr: float = 0.0
    warmup: int = 0
    horizon: int = 0
    cooldown: int = 0
    precision: str = ""
    compiled: bool = False
    files: int = 0
    files_held_out: int = 0
    corpus_bytes: int = 0
    corpus_sha256: str = ""
    stream_tokens: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    steps: int = 0
    tokens_seen: int = 0
    phases: list[dict[str, int]] = field(default_factory=list)
    train_minutes: float = 0.0
    bytes_per_token: float = 0.0
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    by_position: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)


# ---------------------------------------------------------------------------------- the text


def collect_sources() -> tuple[list[Source], int, str]:
    """Return the library's files in sorted order, their size in bytes and their digest.

    The digest is SHA-256 over ``name NUL content NUL`` for every file in order, so it names both
    the list and the contents.
    """
    root = Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256()
    size = 0
    sources: list[Source] = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        parts = name.split("/")
        if SKIPPED_FOLDERS.intersection(parts[:-1]) or name in SKIPPED_FILES:
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        digest.update(name.encode() + b"\0" + raw + b"\0")
        size += len(raw)
        sources.append(Source(name, text))
    return sources, size, digest.hexdigest()


def split_held_out(sources: Sequence[Source]) -> tuple[list[Source], list[Source]]:
    """Set every ``HELD_OUT_EVERY``-th file aside; neither tokenizer nor model ever sees those."""
    middle = HELD_OUT_EVERY // 2
    train = [s for i, s in enumerate(sources) if i % HELD_OUT_EVERY != middle]
    held_out = [s for i, s in enumerate(sources) if i % HELD_OUT_EVERY == middle]
    return train, held_out


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Unit:
    """One function, method or class, dedented to the left margin, with its first paragraph."""

    kind: str
    name: str
    header: str
    source: str
    summary: str


def _definitions(tree: ast.Module) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Definition):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (child for child in node.body if isinstance(child, Definition))


def units_of(text: str) -> list[Unit]:
    """Cut a file into its functions, methods and classes."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    lines = text.splitlines(keepends=True)
    units: list[Unit] = []
    for node in _definitions(tree):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        source = textwrap.dedent("".join(lines[first : node.end_lineno])).rstrip() + "\n"
        header = textwrap.dedent("".join(lines[node.lineno - 1 : node.body[0].lineno - 1])).strip()
        doc = ast.get_docstring(node) or ""
        summary = " ".join(doc.split("\n\n")[0].split())
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        units.append(Unit(kind, node.name, header.split("\n")[0], source, summary))
    return units


def import_tail(text: str) -> str | None:
    """Return the file from its first import on, so that ``import`` is a usual way to begin."""
    match = re.search(r"^(?:import|from) ", text, re.MULTILINE)
    return text[match.start() :][:6000] if match else None


def chat_turns(unit: Unit) -> list[tuple[str, str]]:
    """Make question and answer pairs out of one definition; the answers are library text."""
    turns: list[tuple[str, str]] = []
    code = unit.source.rstrip("\n")
    if len(code) <= 700 and unit.header.endswith(":"):
        turns.append((f"Complete: {unit.header}", code))
        turns.append((f"Write a {unit.kind} named `{unit.name}`.", code))
    if 12 <= len(unit.summary) <= 400:
        turns.append((f"What does `{unit.name}` do?", unit.summary))
        if len(code) <= 700:
            turns.append((unit.summary, code))
    return turns


def render_chat(turns: Sequence[tuple[str, str]], system: str | None) -> str:
    """Lay out turns the way the chat template does, without the leading ``bos``."""
    head = f"{SYSTEM}{system}" if system else ""
    return head + EOS.join(f"{USER}{user}{ASSISTANT}{reply}" for user, reply in turns)


def chat_documents(units: Sequence[Unit], rng: random.Random) -> list[str]:
    """Render every pair once, some with a second turn and some with a system message."""
    pairs = [turn for unit in units for turn in chat_turns(unit)]
    rng.shuffle(pairs)
    documents: list[str] = []
    while pairs:
        turns = [pairs.pop()]
        if pairs and rng.random() < 0.2:
            turns.append(pairs.pop())
        system = "You are a helpful assistant." if rng.random() < 0.2 else None
        documents.append(render_chat(turns, system))
    return documents


# ------------------------------------------------------------------------------ the tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that gives back any text exactly as it came."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer=trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Ids]:
    """Encode each text as ``bos ... eos``."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array([bos, *item.ids, eos], dtype=np.int64) for item in encoded]


def cut_points(text: str, rng: random.Random) -> list[int]:
    """Choose where a text is cut before it is encoded, often right after its first word."""
    cuts = {rng.randrange(1, len(text)) for _ in range(1 + len(text) // 300)}
    first_space = text.find(" ", 1)
    if first_space > 0 and rng.random() < 0.4:
        cuts.add(first_space + 1)
    return sorted(cuts)


def encode_with_cuts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], rng: random.Random
) -> list[Ids]:
    """Encode each text in separately encoded pieces, the way a typed prompt breaks a text.

    A prompt such as ``"def "`` ends in a token that unbroken text never has there (the space
    belongs to the name after it). Text with such seams teaches the model to go on from them.
    """
    pieces: list[str] = []
    counts: list[int] = []
    for text in texts:
        edges = [0, *cut_points(text, rng), len(text)]
        pieces += [text[a:b] for a, b in itertools.pairwise(edges)]
        counts.append(len(edges) - 1)
    encoded = iter(tokenizer.backend_tokenizer.encode_batch(pieces, add_special_tokens=False))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [
        np.array([bos, *(i for _ in range(n) for i in next(encoded).ids), eos], dtype=np.int64)
        for n in counts
    ]


def make_stream(documents: list[Ids], weight: float, aligned: float, seed: int) -> Stream:
    """Shuffle documents once and lay them end to end."""
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    starts = np.cumsum([0, *(len(d) for d in shuffled[:-1])]).astype(np.int64)
    return Stream(np.concatenate(shuffled), starts, weight, aligned)


def build_streams(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, seed: int
) -> dict[str, Stream]:
    """Make the three kinds of training text: whole files, single definitions, and chats."""
    units = [unit for source in sources for unit in units_of(source.text)]
    pieces = [unit.source for unit in units if len(unit.source) <= 6000]
    pieces += [tail for source in sources if (tail := import_tail(source.text))]
    chats = chat_documents(units, random.Random(seed))
    files = encode_documents(tokenizer, [source.text for source in sources])
    definitions = encode_with_cuts(tokenizer, pieces, random.Random(seed + 1))
    return {
        "files": make_stream(files, weight=0.66, aligned=0.1, seed=seed),
        "definitions": make_stream(definitions, weight=0.28, aligned=0.7, seed=seed + 1),
        "chats": make_stream(
            encode_documents(tokenizer, chats), weight=0.06, aligned=0.9, seed=seed + 2
        ),
    }


def draw_batch(streams: Sequence[Stream], phase: Phase, seed: int, step: int) -> torch.Tensor:
    """Draw the rows of one step; they depend on the seed and the step number alone."""
    rng = np.random.default_rng([seed, step])
    weights = np.array([stream.weight for stream in streams])
    rows = []
    for choice in rng.choice(len(streams), size=phase.batch, p=weights / weights.sum()):
        stream = streams[choice]
        last = len(stream.ids) - phase.length - 1
        if rng.random() < stream.aligned:
            start = min(int(rng.choice(stream.starts)), last)
        else:
            start = int(rng.integers(0, last + 1))
        rows.append(stream.ids[start : start + phase.length + 1])
    return torch.from_numpy(np.stack(rows))


# -------------------------------------------------------------------------------- the training


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int, mlp: int) -> LlamaForCausalLM:
    """Build the untrained model; one token's keys and values take 4 KiB in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, name: str, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layers' matrices and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" in n]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    decayed = {"params": embeddings, "weight_decay": 0.01}
    plain = {"params": vectors, "weight_decay": 0.0}
    if name == "muon":
        adamw = torch.optim.AdamW([decayed, plain], lr=lr, betas=(0.9, 0.95), fused=True)
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        return [adamw, muon]
    groups = [decayed, plain, {"params": matrices, "weight_decay": 0.1}]
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]


def lr_scale(step: int, total: int, warmup: int, horizon: int, cooldown: int) -> float:
    """Linear warm-up, a cosine towards ``horizon``, and a straight line to zero at the end."""
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, horizon - warmup)))
    return cosine * min(1.0, (total - step) / max(1, cooldown))


@dataclass
class Run:
    """The settings of one training run."""

    phases: list[Phase]
    lr: float
    optimizer: str
    warmup: int
    horizon: int
    cooldown: int
    seed: int
    precision: str
    compiled: bool
    work: Path
    save_every: int
    log_every: int

    @property
    def total(self) -> int:
        """The number of optimizer steps."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase a step belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(step)


def train(model: LlamaForCausalLM, streams: Sequence[Stream], run: Run) -> float:
    """Train to the last step, resuming from the work folder if it can, and return the minutes."""
    optimizers = make_optimizers(model, run.optimizer, run.lr)
    checkpoint = run.work / "state.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
        console.print(f"resuming after step {first} of {run.total}")

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.precision == "bf16"):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if run.compiled else loss_of
    model.train()
    average, last_print = float("nan"), time.perf_counter()
    columns = (
        TextColumn("[bold]train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("train", total=run.total, completed=first, loss=average)
        for step in range(first, run.total):
            began = time.perf_counter()
            phase = run.phase_at(step)
            scale = lr_scale(step, run.total, run.warmup, run.horizon, run.cooldown)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = run.lr * scale
            loss = step_loss(draw_batch(streams, phase, run.seed, step))
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            value = float(loss.detach())
            average = value if math.isnan(average) else 0.98 * average + 0.02 * value
            seconds += time.perf_counter() - began
            progress.update(bar, advance=1, loss=average)
            done = step + 1
            if done % run.log_every == 0:
                now = time.perf_counter()
                rate = run.log_every * phase.length * phase.batch / (now - last_print)
                last_print = now
                console.print(
                    f"step {done}/{run.total}  length {phase.length}  loss {average:.4f}  "
                    f"lr {run.lr * scale:.2e}  {rate:,.0f} tokens/s  {seconds / 60:.1f} min"
                )
            if done % run.save_every == 0 or done == run.total:
                state = {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": done,
                    "seconds": seconds,
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
    model.eval()
    return seconds / 60


# ------------------------------------------------------------------------------ the evaluation


@torch.inference_mode()
def model_nats(
    model: LlamaForCausalLM, documents: Sequence[Ids]
) -> tuple[npt.NDArray[np.float64], Ids]:
    """Sum the loss, and count the tokens, at every position of windows of the full context.

    Each document is cut into windows of 2048 tokens, so every token but ``bos`` counts once.
    """
    sums, counts = np.zeros(CONTEXT), np.zeros(CONTEXT, dtype=np.int64)
    for ids in documents:
        for start in range(0, len(ids) - 1, CONTEXT):
            window = torch.from_numpy(ids[start : start + CONTEXT + 1])
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
            losses = F.cross_entropy(logits.double(), window[1:], reduction="none").numpy()
            sums[: len(losses)] += losses
            counts[: len(losses)] += 1
    return sums, counts


def baseline_nats(train: Ids, documents: Sequence[Ids], vocab: int) -> tuple[float, float, float]:
    """Score add-one unigrams, and bigrams backed by them at the best of several weights.

    The weight of the back-off is chosen on the held-out text itself, which favours the baseline.
    """
    counts = np.bincount(train, minlength=vocab) + 1.0
    unigram = counts / counts.sum()
    pairs = np.bincount(train[:-1] * vocab + train[1:], minlength=vocab * vocab)
    pairs = pairs.reshape(vocab, vocab)
    before = np.concatenate([ids[:-1] for ids in documents])
    after = np.concatenate([ids[1:] for ids in documents])
    seen, contexts = pairs[before, after], pairs.sum(axis=1)[before]
    scores = {
        k: float(-np.log((seen + k * unigram[after]) / (contexts + k)).sum())
        for k in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    }
    best = min(scores, key=lambda k: scores[k])
    return float(-np.log(unigram[after]).sum()), scores[best], best


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: Ids,
    held_out: Sequence[Source],
) -> tuple[dict[str, dict[str, float]], dict[str, float], float]:
    """Measure the held-out losses, the model's by position, and the bytes in one token."""
    documents = encode_documents(tokenizer, [source.text for source in held_out])
    size = sum(len(source.text.encode()) for source in held_out)
    tokens = sum(len(ids) - 1 for ids in documents)
    unigram, bigram, _ = baseline_nats(training, documents, len(tokenizer))
    losses, counts = model_nats(model, documents)
    sums = {"unigram": unigram, "bigram": bigram, "model": float(losses.sum())}
    table = {
        name: {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / size}
        for name, nats in sums.items()
    }
    edges = itertools.pairwise([0, 256, 512, 1024, CONTEXT])
    by_position = {
        f"{a} to {b - 1}": float(losses[a:b].sum() / max(1, counts[a:b].sum())) for a, b in edges
    }
    return table, by_position, size / tokens


def sample(
    model: Any, tokenizer: Any, seed: int, new_tokens: int = NEW_TOKENS
) -> list[dict[str, str]]:
    """Continue the fixed prompts, greedily and at temperature 0.7, and answer the fixed chats."""
    samples: list[dict[str, str]] = []

    def add(kind: str, prompt: str, ids: torch.Tensor, **how: Any) -> None:
        torch.manual_seed(seed)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **how
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append({"kind": kind, "prompt": prompt, "text": text})

    for prompt in SAMPLE_PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        add("greedy", prompt, ids, do_sample=False)
        add("temperature 0.7", prompt, ids, do_sample=True, temperature=0.7, top_k=0)
    for question in SAMPLE_CHATS:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False).input_ids
        add("chat, greedy", question, ids, do_sample=False)
    return samples


# ---------------------------------------------------------------------------------- the output


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint folder, everything but the card."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.float32).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def print_report(metrics: Metrics) -> None:
    """Show the losses and the samples on the terminal."""
    table = Table("held-out text", "nats per token", "bits per byte")
    for name, row in metrics.losses.items():
        table.add_row(name, f"{row['nats_per_token']:.3f}", f"{row['bits_per_byte']:.3f}")
    console.print(table)
    for item in metrics.samples:
        console.rule(f"{item['kind']}: {item['prompt']!r}")
        console.print(item["prompt"] + item["text"], markup=False)


def write_card(metrics: Metrics, config: LlamaConfig, out: Path) -> None:
    """Write the model card from the measured numbers."""
    (out / "README.md").write_text(render_card(metrics, config), encoding="utf-8")


CARD = """\
---
language: code
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [toy, python, llama]
---

# vmalloc demo model

A Llama-architecture language model of {parameters:,} parameters, trained from scratch on the Python
standard library. It exists so that the engine, its tests and its demos have a real checkpoint to
run without a download: {megabytes:.1f} MB of float32 weights that load with plain
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`. Its output has the shape
of Python; it is a toy for demonstration, not a coding assistant.

## Architecture

| | |
|---|---|
| parameters, embeddings included | {parameters:,} |
| layers | {layers} |
| hidden size | {hidden} |
| feed-forward size | {mlp} (SwiGLU) |
| query heads / key-value heads | {heads} / {kv_heads} (grouped-query attention) |
| head size | {head_dim} |
| keys and values of one token | {kv_bytes:,} bytes in float32, all layers together |
| vocabulary | {vocab:,} (byte-level BPE) |
| embeddings | tied |
| positions | rotary, base {theta:,.0f}, context {context:,} |

The tokenizer gives back any text byte for byte. A newline is always its own token and a run of two
or more spaces is never split between the indentation and the word after it. Special tokens are
`<|bos|>`, `<|eos|>`, `<|pad|>`, `<|system|>`, `<|user|>` and `<|assistant|>`. `bos` is added when
text is encoded; the chat template writes it itself, so encode a rendered chat with
`add_special_tokens=False`. An assistant turn ends with `<|eos|>`.

## Training data and licence

The only training text is the source of the Python {python} standard library, as shipped with the
interpreter the script ran under: {files} files, {corpus_bytes:,} bytes. Left out are tests, demos,
generated tables, build-time files and anything that is not UTF-8. SHA-256 over `name NUL content
NUL` of the sorted files:

    {sha}

Every {every}th file ({held_out} files) was set aside before the tokenizer was trained; it is the
held-out text below. Rows of training tokens come from three layouts of the remaining files:

| layout | tokens | share of rows |
|---|---:|---:|
| whole files | {files_tokens:,} | 66% |
| single functions and classes, and files from their first import on | {def_tokens:,} | 28% |
| chats made of definitions: "Complete: def ...", "What does `name` do?" | {chat_tokens:,} | 6% |

The second layout is encoded in separately tokenized pieces, so the model can go on from a prompt
that ends in the middle of a word or in a space. In the chats, the answers and docstrings are
library text and the fixed phrases around them are the script's own.

The Python standard library is distributed under the Python Software Foundation License Version 2
(`PSF-2.0`), Copyright (c) 2001-{year} Python Software Foundation; All Rights Reserved. It also
carries the notices of Python's history (BeOpen.com, CNRI, Stichting Mathematisch Centrum) and of
some single modules; the full text is in `LICENSE.txt` beside the library and at
<https://docs.python.org/{python_minor}/license.html>. No library file is redistributed here. The
model can repeat passages of the library; that licence applies to such passages. The weights
themselves come with this project, under Apache-2.0.

## How it was made

    {command}

The defaults are the run that made this checkpoint: seed {seed}, torch {torch}, transformers
{transformers}, {steps:,} steps, {tokens_seen:,} tokens; {optimizer};
learning rate {lr:g} with {warmup} steps of warm-up, then a cosine towards step {horizon:,} that a
straight line takes to zero over the last {cooldown} steps;
{precision}{compiled}.

Training took {minutes:.1f} minutes on two CPU cores at the lowest priority, beside other work; its
undisturbed stretches at length 256 ran at about 20,000 tokens a second. The run was planned for
6,300 steps. It was stopped at step 4,200, when the machine had become busy, and resumed from its
checkpoint with the shorter ending that is now the default. A step depends only on its number and
the state before it, so the command above walks through the same steps without the stop.

| steps | sequence length | rows |
|---:|---:|---:|
{phases}

The data, the split, the tokenizer and the order of the rows depend on the seed and the library
alone, and the run ends by step count. Floating-point sums differ between processors, torch
builds and even runs (a repeat on the same machine printed a loss of 6.8996 for 6.8995 at step 50),
so a repeat gets a model of the same quality, not the same bits.

## Held-out loss

Over the {held_out} files set aside, in windows of {context:,} tokens; one token stands for
{bytes_per_token:.2f} bytes on average. The unigram and bigram baselines are counted on the training
files. The bigram is interpolated with the unigram, at the weight that suits the held-out text best.

| | nats per token | bits per byte |
|---|---:|---:|
{losses}

By position in the window, the model's nats per token:

| position | nats per token |
|---|---:|
{positions}

## Samples

Printed by the script at the end of the run, with the run's seed; the prompt is part of the text.
Each stops after {new_tokens} tokens or at `<|eos|>`.

{samples}
## Limits

- It knows no facts and follows no instructions beyond the few question shapes it was trained on.
- Identifiers, arguments and logic drift after a few lines; greedy decoding can fall into a loop.
  Temperature 0.7 looks best.
- Contexts up to {context:,} tokens run and keep their loss, but the model recalls little of them:
  it predicts a 390-token passage barely better when the same passage has come before it (1.55
  nats per token instead of 1.62).
- Python and English docstrings only. Other languages encode losslessly and predict badly.
"""

CARD_SAMPLES = (
    ("temperature 0.7", SAMPLE_PROMPTS[0]),
    ("greedy", SAMPLE_PROMPTS[1]),
    ("temperature 0.7", SAMPLE_PROMPTS[2]),
    ("chat, greedy", SAMPLE_CHATS[0]),
)


def render_samples(samples: Sequence[dict[str, str]]) -> str:
    """Lay out the card's choice of samples, each under a line that names its prompt."""
    chosen: list[str] = []
    for kind, prompt in CARD_SAMPLES:
        item = next(s for s in samples if (s["kind"], s["prompt"]) == (kind, prompt))
        text = item["text"] if kind.startswith("chat") else prompt + item["text"]
        lines = "\n".join(line.rstrip() for line in text.split("\n")).rstrip()
        shown = prompt.replace("\n", "\\n")
        chosen.append(f"`{shown}`, {kind}:\n\n```python\n{lines}\n```\n")
    return "\n".join(chosen)


def render_card(m: Metrics, config: LlamaConfig) -> str:
    """Fill the model card with the measured numbers."""
    kv_bytes = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4
    year = re.search(r"2001-(\d{4}) Python Software Foundation", sys.copyright)
    return CARD.format(
        parameters=m.parameters,
        megabytes=m.parameters * 4 / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        kv_bytes=kv_bytes,
        vocab=config.vocab_size,
        theta=config.rope_parameters["rope_theta"],
        context=config.max_position_embeddings,
        python=m.python,
        python_minor=".".join(m.python.split(".")[:2]),
        year=year.group(1) if year else "now",
        files=m.files,
        corpus_bytes=m.corpus_bytes,
        sha=m.corpus_sha256,
        every=HELD_OUT_EVERY,
        held_out=m.files_held_out,
        files_tokens=m.stream_tokens["files"],
        def_tokens=m.stream_tokens["definitions"],
        chat_tokens=m.stream_tokens["chats"],
        command=m.command,
        seed=m.seed,
        torch=m.torch,
        transformers=m.transformers,
        steps=m.steps,
        tokens_seen=m.tokens_seen,
        optimizer="Muon for the layers' matrices and AdamW for the rest"
        if m.optimizer == "muon"
        else "AdamW",
        lr=m.lr,
        warmup=m.warmup,
        horizon=m.horizon,
        cooldown=m.cooldown,
        precision="matrix products in bfloat16 over float32 weights"
        if m.precision == "bf16"
        else "float32 throughout",
        compiled=", `torch.compile`" if m.compiled else "",
        minutes=m.train_minutes,
        phases="\n".join(f"| {p['steps']:,} | {p['length']:,} | {p['batch']} |" for p in m.phases),
        bytes_per_token=m.bytes_per_token,
        losses="\n".join(
            f"| {name} | {row['nats_per_token']:.3f} | {row['bits_per_byte']:.3f} |"
            for name, row in m.losses.items()
        ),
        positions="\n".join(f"| {name} | {loss:.3f} |" for name, loss in m.by_position.items()),
        new_tokens=NEW_TOKENS,
        samples=render_samples(m.samples),
    )


def main(
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")] = Path(
        "engine/demo_model"
    ),
    work: Annotated[
        Path, typer.Option(help="Where the resumable training state and the metrics are kept.")
    ] = Path("build/demo_train"),
    seed: Annotated[int, typer.Option(help="Seeds every random choice.")] = 20240229,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 2048,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 128,
    mlp: Annotated[int, typer.Option(help="Width of the feed-forward layers.")] = 448,
    steps: Annotated[
        tuple[int, int, int],
        typer.Option(help="Steps at sequence lengths 256, 512 and 2048, of 4096 tokens each."),
    ] = (4000, 400, 400),
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 6e-3,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 100,
    horizon: Annotated[
        int, typer.Option(help="The step at which the cosine alone would reach zero.")
    ] = 6300,
    cooldown: Annotated[
        int, typer.Option(help="Last steps, over which the rate also falls linearly to zero.")
    ] = 600,
    optimizer: Annotated[str, typer.Option(help="'muon' or 'adamw'.")] = "muon",
    precision: Annotated[
        str, typer.Option(help="'bf16' multiplies matrices in bfloat16, 'fp32' does not.")
    ] = "bf16",
    compile_: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Use torch.compile (needs a C++ compiler)."),
    ] = True,
    threads: Annotated[int, typer.Option(help="Threads for torch.")] = 2,
    save_every: Annotated[int, typer.Option(help="Steps between resumable checkpoints.")] = 200,
    log_every: Annotated[int, typer.Option(help="Steps between log lines.")] = 50,
    fresh: Annotated[bool, typer.Option(help="Forget a half-finished run and start over.")] = False,
) -> None:
    """Train the demo model and write its checkpoint folder and model card."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if fresh and work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    run = Run(
        phases=[Phase(steps[0], 256, 16), Phase(steps[1], 512, 8), Phase(steps[2], 2048, 2)],
        lr=lr,
        optimizer=optimizer,
        warmup=warmup,
        horizon=horizon,
        cooldown=cooldown,
        seed=seed,
        precision=precision,
        compiled=compile_,
        work=work,
        save_every=save_every,
        log_every=log_every,
    )

    sources, size, digest = collect_sources()
    training, held_out = split_held_out(sources)
    tokenizer = train_tokenizer([source.text for source in training], vocab_size)
    streams = build_streams(training, tokenizer, seed)
    model = make_model(tokenizer, hidden, mlp)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{len(sources)} files, {size:,} bytes, sha256 {digest[:16]}; "
        f"{len(held_out)} held out; tokens "
        + ", ".join(f"{name} {len(s.ids):,}" for name, s in streams.items())
        + f"; {parameters:,} parameters"
    )
    minutes = train(model, list(streams.values()), run)

    export(model, tokenizer, out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    loaded_tokenizer = AutoTokenizer.from_pretrained(out)
    losses, by_position, bytes_per_token = evaluate(
        loaded, loaded_tokenizer, streams["files"].ids, held_out
    )
    metrics = Metrics(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        command="python scripts/train_demo_model.py",
        seed=seed,
        optimizer=optimizer,
        lr=lr,
        warmup=warmup,
        horizon=horizon,
        cooldown=cooldown,
        precision=precision,
        compiled=compile_,
        files=len(sources),
        files_held_out=len(held_out),
        corpus_bytes=size,
        corpus_sha256=digest,
        stream_tokens={name: len(stream.ids) for name, stream in streams.items()},
        parameters=parameters,
        steps=run.total,
        tokens_seen=sum(p.steps * p.length * p.batch for p in run.phases),
        phases=[asdict(phase) for phase in run.phases],
        train_minutes=minutes,
        bytes_per_token=bytes_per_token,
        losses=losses,
        by_position=by_position,
        samples=sample(loaded, loaded_tokenizer, seed),
    )
    (work / "metrics.json").write_text(json.dumps(asdict(metrics), indent=1), encoding="utf-8")
    print_report(metrics)
    write_card(metrics, loaded.config, out)


if __name__ == "__main__":
    typer.run(main)
