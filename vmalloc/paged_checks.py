"""Recount what the paged backend's books say, from its tables alone.

Owns: nothing.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .block_pool import BlockPool, Blocks
from .block_table import BlockTables
from .errors import InvariantError
from .paged_swap import SwapSpace
from .prefix_index import PrefixIndex


def check_books(
    pool: BlockPool,
    tables: BlockTables,
    rows: Iterable[int],
    index: PrefixIndex,
    swap: SwapSpace,
    num_tokens: int,
    scratch: Blocks,
) -> None:
    """Compare every count with the tables of ``rows``, the index, swapped groups and ``scratch``.

    Raises:
        InvariantError: naming the count that differs.
    """
    seq_refs = np.zeros(pool.num_blocks, np.int32)
    others = np.zeros(pool.num_blocks, np.int32)
    holds = np.zeros(pool.num_blocks, np.int32)
    used_rows = list(rows)
    for row in used_rows:
        seq_refs[tables.blocks(row)] += 1
    for node in index.nodes():
        others[list(node.pages)] += 1
        holds[list(node.pages)] += node.num_pins > 0
    others[scratch] += 1
    holds[scratch] += 1
    groups = swap.distinct_groups()
    for group in groups:
        others[group.kept] += 1
        holds[group.kept] += 1
    _check("references of sequences per block", pool.seq_refs, seq_refs)
    _check("references per block", pool.refs, seq_refs + others)
    _check("holds per block", pool.holds, holds)
    _check("live tokens", num_tokens, int(tables.lens.sum()))
    _check("swapped blocks", swap.num_copied, sum(group.num_copied for group in groups))
    is_free = np.ones(len(tables.lens), np.bool_)
    is_free[used_rows] = False
    _check("tokens in free rows of the table", int(tables.lens[is_free].sum()), 0)
    columns = np.arange(tables.ids.shape[1])
    used = columns < -(-tables.lens[:, None] // tables.block_size)
    _check("block ids past the ends of sequences", int(tables.ids[~used].sum()), 0)
    filled = np.zeros(pool.num_blocks, np.int64)
    for row in used_rows:
        blocks = tables.blocks(row)
        _check("distinct blocks of a sequence", len(np.unique(blocks)), len(blocks))
        rows_left = tables.lens[row] - np.arange(len(blocks)) * tables.block_size
        filled[blocks] = np.maximum(filled[blocks], np.minimum(rows_left, tables.block_size))
    num_distinct = tables.num_distinct_tokens(np.array(used_rows, np.intp), pool)
    _check("live tokens, shared ones once", num_distinct, int(filled.sum()))


def _check(what: str, booked: object, counted: object) -> None:
    if not np.array_equal(np.asarray(booked), np.asarray(counted)):
        raise InvariantError(f"{what}: {booked} in the books, {counted} counted")
