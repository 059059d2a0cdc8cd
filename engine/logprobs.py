"""Log-probabilities to report: of chosen tokens and their rivals, and of a prompt's own tokens.

They are log-softmax of the raw logits, before penalties, masks and temperature.
Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .outputs import Logprob

_ROWS_AT_ONCE = 128
"""Bounds the float32 copies that scoring a long prompt makes."""


@torch.inference_mode()
def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
) -> list[dict[int, Logprob]]:
    """Per row of ``logits [num_rows, vocab_size]``: its token, then the most likely ones.

    A row's result depends on that row alone.
    """
    vocab_size = logits.shape[1]
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(list(token_ids)).unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=-1).add_(1).tolist()
    chosen_values = chosen[:, 0].tolist()
    top = logprobs.topk(min(max(num_logprobs, default=0), vocab_size), dim=-1)
    top_values, top_ids = top.values.tolist(), top.indices.tolist()
    rows = []
    for row, (token_id, count) in enumerate(zip(token_ids, num_logprobs, strict=True)):
        entries = {token_id: Logprob(chosen_values[row], ranks[row])}
        for place in range(min(count, vocab_size)):
            entries.setdefault(top_ids[row][place], Logprob(top_values[row][place], place + 1))
        rows.append(entries)
    return rows


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
