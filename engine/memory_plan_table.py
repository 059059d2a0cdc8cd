"""The memory plan as a table for people.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from itertools import groupby

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..config import LayerKVSpec
from ..memory_table import format_bytes
from .memory_plan import MemoryPlan


def memory_plan_report(plan: MemoryPlan) -> Group:
    """The plan's figures, what each is for, and what is not known."""
    table = Table(
        title=f"Memory plan of {plan.model}", title_justify="left", show_header=False, box=None
    )
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for row in (*_model_rows(plan), *_memory_rows(plan), *_capacity_rows(plan)):
        table.add_row(*row)
    notes = [Text(f"- {note}", style="dim") for note in plan.notes]
    return Group(table, Text(""), *notes)


def _model_rows(plan: MemoryPlan) -> list[tuple[str, str, str]]:
    rows = [
        ("Device", plan.device, f"computes in {plan.dtype}"),
        *_rank_rows(plan),
        ("KV cache", plan.kv_backend, f"on {plan.kv_driver}: {plan.kv_reason}"),
    ]
    first = 0
    for spec, group in groupby(plan.layers):
        last = first + len(list(group)) - 1
        name, each = f"Layer {first}", ""
        if first != last:
            name, each = f"Layers {first} to {last}", " and layer"
        rows.append(
            (f"  {name}", format_bytes(spec.token_bytes), f"a token{each}: {_describe(spec)}")
        )
        first = last + 1
    return rows


def _rank_rows(plan: MemoryPlan) -> list[tuple[str, str, str]]:
    if plan.num_ranks == 1:
        return []
    return [("Ranks", str(plan.num_ranks), "a process each; sizes are those of one")]


def _of_all(plan: MemoryPlan, num_bytes: int) -> str:
    """What all ranks take together, as the end of a remark."""
    if plan.num_ranks == 1:
        return ""
    return f"; {format_bytes(plan.num_ranks * num_bytes)} on all ranks"


def _describe(spec: LayerKVSpec) -> str:
    dims = f"{spec.k_head_dim}"
    if spec.v_head_dim != spec.k_head_dim:
        dims += f" (keys) and {spec.v_head_dim} (values)"
    window = "" if spec.window is None else f", window {spec.window}"
    return f"{spec.num_kv_heads} KV heads of {dims} in {spec.dtype}{window}"


def _memory_rows(plan: MemoryPlan) -> list[tuple[str, str, str]]:
    about = "" if plan.is_cap_exact else "about "
    return [
        ("Memory available", format_bytes(plan.available_bytes), f"on {plan.device}, now"),
        (
            "Weights",
            ("" if plan.num_ranks == 1 else "about ") + format_bytes(plan.weight_bytes),
            "the model's parameters" + _of_all(plan, plan.weight_bytes),
        ),
        (
            "Workspace",
            f"about {format_bytes(plan.workspace_bytes)}",
            f"largest step: {plan.max_num_batched_tokens} tokens, {plan.max_num_seqs} sequences",
        ),
        (
            "KV cap",
            about + format_bytes(plan.cap_bytes),
            plan.cap_reason + _of_all(plan, plan.cap_bytes),
        ),
        (
            "Swap space",
            about + format_bytes(plan.swap_space_bytes),
            "on the host, when needed" + _of_all(plan, plan.swap_space_bytes),
        ),
        (
            "Address space",
            format_bytes(plan.reserved_bytes),
            "costs no memory"
            if plan.num_slots is None
            else f"{plan.num_slots} slots; costs no memory",
        ),
    ]


def _capacity_rows(plan: MemoryPlan) -> list[tuple[str, str, str]]:
    grouping = "" if plan.num_slots is None else f", {plan.layers_per_group} layers a row"
    return [
        ("One token", format_bytes(plan.token_bytes), "K and V of all layers"),
        (
            "One page" if plan.num_slots is not None else "One block",
            format_bytes(plan.page_bytes),
            f"{plan.num_pages} of them{grouping}",
        ),
        (
            "One full sequence",
            format_bytes(plan.seq_bytes),
            f"{plan.max_model_len} tokens; alone it could have {plan.max_seq_tokens}",
        ),
        (
            "Full sequences at once",
            str(plan.max_full_length_seqs),
            f"of at most {plan.max_num_seqs}; shorter ones take less",
        ),
        ("Tokens in all", f"{plan.num_tokens:,}", "if no page were partly used"),
    ]
