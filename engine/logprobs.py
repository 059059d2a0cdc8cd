"""Log-probabilities to report: of chosen tokens and their rivals, and of a prompt's own tokens.

They are log-softmax of the raw logits, before penalties, masks and temperature.
Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .outputs import Logprob
from .transfer import to_device, to_host

_ROWS_AT_ONCE = 128
"""Bounds the float32 copies that scoring a long prompt makes."""


class TokenScores(NamedTuple):
    """Scores of one token per row and of the row's likeliest ones, where the logits are.

    Attributes:
        chosen: ``[num_rows]`` log-probability of the token.
        ranks: ``[num_rows]`` its place among all tokens, from 1.
        top_values, top_ids: ``[num_rows, num_top]``, the likeliest first.
    """

    chosen: Tensor
    ranks: Tensor
    top_values: Tensor
    top_ids: Tensor


@torch.inference_mode()
def score_tokens(logits: Tensor, token_ids: Tensor, num_top: int) -> TokenScores:
    """Score ``token_ids [num_rows]`` at ``logits [num_rows, vocab_size]``; nothing waits."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=-1).add_(1)
    top = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    return TokenScores(chosen.squeeze(1), ranks, top.values, top.indices)


def logprob_entries(
    token_ids: Sequence[int], num_logprobs: Sequence[int], scores: Sequence[NDArray[Any]]
) -> list[dict[int, Logprob]]:
    """Per row its token, then its ``num_logprobs`` likeliest ones, from a ``TokenScores`` on the
    host."""
    chosen, ranks, top_values, top_ids = (part.tolist() for part in scores)
    rows = []
    for row, (token_id, count) in enumerate(zip(token_ids, num_logprobs, strict=True)):
        entries = {token_id: Logprob(chosen[row], int(ranks[row]))}
        for place in range(min(count, len(top_ids[row]))):
            other = Logprob(top_values[row][place], place + 1)
            entries.setdefault(int(top_ids[row][place]), other)
        rows.append(entries)
    return rows


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
) -> list[dict[int, Logprob]]:
    """Per row of ``logits [num_rows, vocab_size]``: its token, then the most likely ones.

    A row's result depends on that row alone.
    """
    ids = to_device(np.array(token_ids, dtype=np.int64), logits.device)
    scores = score_tokens(logits, ids, max(num_logprobs, default=0))
    return logprob_entries(token_ids, num_logprobs, to_host(*scores))


def prompt_logprobs(
    logits: Tensor, next_token_ids: Sequence[int], num_logprobs: int
) -> list[dict[int, Logprob]]:
    """Score the tokens that follow a chunk of prompt positions.

    Args:
        logits: float32 ``[num_positions, vocab_size]`` at the chunk's positions.
        next_token_ids: the prompt token behind each position.
        num_logprobs: most likely tokens to report beside it.

    The first token of a prompt has no score: a request's list starts with None, then come the
    entries of its chunks, the last position of the prompt left out.
    """
    entries: list[dict[int, Logprob]] = []
    for start in range(0, len(next_token_ids), _ROWS_AT_ONCE):
        token_ids = next_token_ids[start : start + _ROWS_AT_ONCE]
        rows = logits[start : start + len(token_ids)]
        entries.extend(token_logprobs(rows, token_ids, [num_logprobs] * len(token_ids)))
    return entries
