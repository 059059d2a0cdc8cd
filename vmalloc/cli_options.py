"""The options of ``vmalloc generate``, with the texts of ``--help``; names follow vLLM.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

_SAMPLING = "Sampling"
_MEMORY = "KV memory"
_SCHEDULING = "Scheduling"
_RANKS = "Several devices"


class Dtype(str, Enum):
    """Element types, as the option lists them."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Backend(str, Enum):
    """KV backends, as the option lists them."""

    AUTO = "auto"
    VIRTUAL = "virtual"
    PAGED = "paged"


class Driver(str, Enum):
    """Where pages come from, as the option lists them."""

    AUTO = "auto"
    HOST = "host"
    CUDA = "cuda"
    NULL = "null"


class Fused(str, Enum):
    """Who computes forward passes, as the option lists it."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class CommitPolicy(str, Enum):
    """Commit policies, as the option lists them."""

    ON_DEMAND = "on_demand"
    MAX_LENGTH = "max_length"
    POWER_OF_TWO = "power_of_two"
    ORACLE = "oracle"


class SchedulingPolicy(str, Enum):
    """Scheduling policies, as the option lists them."""

    FCFS = "fcfs"
    PRIORITY = "priority"


class PreemptionMode(str, Enum):
    """Ways to preempt, as the option lists them."""

    AUTO = "auto"
    SWAP = "swap"
    RECOMPUTE = "recompute"


Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="Text to go on from. Repeatable.")
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(help="One prompt a line; a line that is a JSON string may hold newlines."),
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="'demo' (bundled), a local folder, or a hub id.")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or hub id, if it is not the model's own.")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Weights, activations and KV; auto is float32 on CPU, and on a GPU the checkpoint's "
        "16-bit type or bfloat16."
    ),
]
Device = Annotated[
    str,
    typer.Option(help="Where to compute: cpu, cuda or cuda:N; auto is a GPU where there is one."),
]
EnforceEager = Annotated[
    bool,
    typer.Option("--enforce-eager", help="Launch decodes kernel by kernel, without CUDA graphs."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Decode through torch.compile; starting takes minutes.")
]
FusedOption = Annotated[
    Fused,
    typer.Option(
        "--fused",
        help="Compute known models on CPU in one native loop over their layers; auto: where its "
        "logits are seen to be the model's, on: or not at all.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]

NumCompletions = Annotated[
    int, typer.Option("--n", help="Completions per prompt.", rich_help_panel=_SAMPLING)
]
BestOf = Annotated[
    int | None,
    typer.Option(
        help="Candidates of which the n likeliest are shown; with --use-beam-search the beam "
        "width. Default: n.",
        rich_help_panel=_SAMPLING,
    ),
]
UseBeamSearch = Annotated[
    bool,
    typer.Option(
        "--use-beam-search",
        help="Search for the likeliest texts instead of drawing tokens.",
        rich_help_panel=_SAMPLING,
    ),
]
LengthPenalty = Annotated[
    float,
    typer.Option(help="Beams rank by log-probability / length ** this.", rich_help_panel=_SAMPLING),
]
MaxTokens = Annotated[
    int, typer.Option(help="Most tokens to generate per completion.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 always takes the likeliest token. Default: 0, and 1 for several samples.",
        rich_help_panel=_SAMPLING,
    ),
]
TopK = Annotated[
    int,
    typer.Option(help="Sample from the k likeliest; 0 or -1: all.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float,
    typer.Option(help="Sample from the likeliest that add up to p.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float,
    typer.Option(
        help="Leave out tokens below this share of the likeliest.", rich_help_panel=_SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(help="Above 1: make tokens seen before less likely.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Same seed, same text; with --batch-invariant whatever else runs in the batch.",
        rich_help_panel=_SAMPLING,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End a text at this string. Repeatable.", rich_help_panel=_SAMPLING),
]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos", help="Go on past the end token.", rich_help_panel=_SAMPLING),
]
Regex = Annotated[
    str | None,
    typer.Option(help="Write only what matches this whole.", rich_help_panel=_SAMPLING),
]

BackendOption = Annotated[
    Backend, typer.Option(help="Where K and V live.", rich_help_panel=_MEMORY)
]
KVDriver = Annotated[
    Driver,
    typer.Option(
        help="Where its pages come from; auto goes by the device.", rich_help_panel=_MEMORY
    ),
]
KVCacheMemoryBytes = Annotated[
    int | None,
    typer.Option(
        help="Hard cap on physical KV memory. Default: a quarter of what is available on CPU, what "
        "--gpu-memory-utilization leaves on a GPU; at most what the sequences can use.",
        rich_help_panel=_MEMORY,
    ),
]
GPUMemoryUtilization = Annotated[
    float,
    typer.Option(
        help="Share of a GPU's memory that weights, activations and KV may take together.",
        rich_help_panel=_MEMORY,
    ),
]
SwapSpace = Annotated[
    float | None,
    typer.Option(
        help="GiB of host memory for the KV of preempted requests; 0: none. Default: a tenth of "
        "what is available, at most the cap.",
        rich_help_panel=_MEMORY,
    ),
]
EnablePrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Share the KV of equal prompt beginnings.",
        rich_help_panel=_MEMORY,
    ),
]
CommitPolicyOption = Annotated[
    CommitPolicy,
    typer.Option(
        help="What a request reserves when it starts: on_demand its prompt; the others more, as "
        "older systems do, for comparison.",
        rich_help_panel=_MEMORY,
    ),
]
PageSize = Annotated[
    int | None,
    typer.Option(
        help="Bytes of one physical page. Default: 16 to 64 KiB on CPU, the least on a GPU.",
        rich_help_panel=_MEMORY,
    ),
]
BlockSize = Annotated[
    int,
    typer.Option(help="Tokens of one block of the paged backend.", rich_help_panel=_MEMORY),
]
LayersPerGroup = Annotated[
    int | None,
    typer.Option(
        help="Layers whose K and V share one row; 1: a buffer per layer. "
        "Default: 1 on CPU, all on a GPU.",
        rich_help_panel=_MEMORY,
    ),
]
CommitAhead = Annotated[
    int,
    typer.Option(
        help="Tokens backed ahead of each sequence by the worker thread; 0: no worker.",
        rich_help_panel=_MEMORY,
    ),
]

MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Most tokens of a sequence, prompt included.", rich_help_panel=_SCHEDULING),
]
MaxNumSeqs = Annotated[
    int, typer.Option(help="Most sequences in one step.", rich_help_panel=_SCHEDULING)
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens in one step; longer prompts are computed in chunks. Default: 512.",
        rich_help_panel=_SCHEDULING,
    ),
]
SchedulingPolicyOption = Annotated[
    SchedulingPolicy,
    typer.Option(help="fcfs goes by arrival, priority by --priority.", rich_help_panel=_SCHEDULING),
]
Priority = Annotated[
    list[int] | None,
    typer.Option(
        help="One for each prompt, in order; lower runs first.", rich_help_panel=_SCHEDULING
    ),
]
PreemptionModeOption = Annotated[
    PreemptionMode,
    typer.Option(
        help="Where memory runs out: swap copies a request's KV to host memory, recompute drops "
        "it, auto takes what costs less time.",
        rich_help_panel=_SCHEDULING,
    ),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Make logits bitwise independent of batch mates.",
        rich_help_panel=_SCHEDULING,
    ),
]

TensorParallelSize = Annotated[
    int,
    typer.Option(
        help="Processes, one a device, that share every layer's heads and their K and V. Sizes of "
        "memory are for each of them.",
        rich_help_panel=_RANKS,
    ),
]
TensorParallelPort = Annotated[
    int | None,
    typer.Option(
        help="TCP port on the loopback interface where they meet. Default: any free one.",
        rich_help_panel=_RANKS,
    ),
]
TensorParallelTimeout = Annotated[
    float,
    typer.Option(
        help="Seconds that one may be behind the others before it counts as lost.",
        rich_help_panel=_RANKS,
    ),
]
