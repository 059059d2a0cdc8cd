"""Decides whether a sequence ends with the token it just got, and what of its text may be shown.

Owns: nothing.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from .sampling_params import RequestOutputKind
from .sequence import Sequence


def check_stop(seq: Sequence) -> None:
    """Finish ``seq`` if its last token ends it; its text is then complete and cut.

    A stop token wins over a stop string, that over the end of a grammar, and that over the length
    limit. A whole text that its grammar lets nothing follow ends before ``min_tokens`` too.
    """
    params = seq.params
    token_id = seq.token_ids[-1]
    num_output_tokens = seq.num_output_tokens
    is_early = num_output_tokens < params.min_tokens
    if not is_early and token_id in seq.stop_token_ids:
        # The token stays in token_ids; its text does not belong to the answer.
        complete_text(seq, num_left_out=0 if params.include_stop_str_in_output else 1)
        seq.finish("stop", token_id if token_id in (params.stop_token_ids or ()) else None)
        return
    is_whole = seq.filters is not None and seq.filters.is_complete(seq)
    is_last = is_whole or num_output_tokens >= seq.max_tokens
    if is_last:
        complete_text(seq)
    elif (
        seq.detokenizer is not None
        and _is_watched(seq)
        and seq.detokenizer.num_tokens < num_output_tokens  # else a check of it was interrupted
    ):
        seq.detokenizer.append(token_id)
    if params.stop_strings and seq.detokenizer is not None:
        if is_early:
            seq.num_unstoppable_chars = seq.num_searched_chars = len(seq.detokenizer.text)
        elif _cut_at_stop_string(seq):
            return
    if is_last:
        seq.finish("stop" if is_whole else "length")


def complete_text(seq: Sequence, num_left_out: int = 0) -> None:
    """Bring the text of an ending sequence up to date, without its last ``num_left_out`` tokens."""
    if seq.detokenizer is not None:
        token_ids = seq.output_token_ids
        end = len(token_ids) - num_left_out
        seq.detokenizer.finish(token_ids[seq.detokenizer.num_tokens : end])


def visible_chars(seq: Sequence, text: str) -> int:
    """Leading characters of a running sequence's text that no later stop string can take back."""
    params = seq.params
    if not params.stop_strings or params.include_stop_str_in_output:
        return len(text)
    num_stoppable = len(text) - seq.num_unstoppable_chars
    held = max(
        length
        for stop in params.stop_strings
        for length in range(min(len(stop), num_stoppable + 1))
        if length == 0 or text.endswith(stop[:length])
    )
    return len(text) - held


def _is_watched(seq: Sequence) -> bool:
    """Whether anybody looks at the text before the end."""
    is_silent = seq.params.output_kind is RequestOutputKind.FINAL_ONLY
    return not is_silent or bool(seq.params.stop_strings)


def _cut_at_stop_string(seq: Sequence) -> bool:
    """End ``seq`` at the first stop string of its text, if there is one."""
    assert seq.detokenizer is not None
    params, text = seq.params, seq.detokenizer.text
    found = []
    for stop in params.stop_strings:
        start = max(seq.num_searched_chars - len(stop) + 1, seq.num_unstoppable_chars)
        at = text.find(stop, start)
        if at >= 0:
            found.append((at, stop))
    seq.num_searched_chars = len(text)
    if not found:
        return False
    at, stop = min(found)
    seq.detokenizer.text = text[: at + len(stop) if params.include_stop_str_in_output else at]
    seq.finish("stop", stop)
    return True
