"""What sequence groups ask of the KV cache: admit, fork, reorder, grow, register, give back.

Owns: what sequences note about their KV (``has_kv``, ``num_rows``). Of memory it knows only what
the backend answers.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from operator import gt
from typing import TYPE_CHECKING

from ..backend import PrefixHit, SequenceGroupSpec
from .schedule import ScheduledBatch
from .sequence import Sequence
from .sequence_group import GroupStatus, SequenceGroup, common_prefix

if TYPE_CHECKING:
    from ..backend import KVBackend


class GroupMemory:
    """The KV of sequence groups in one ``KVBackend``.

    ``try_x`` returns None or False where memory is short. What was done until then stands, is
    noted in the group, and is not done again.

    Attributes:
        share_tokens: tokens of the unit that sequences share, a page or a block.
    """

    def __init__(self, backend: KVBackend) -> None:
        self._backend = backend
        self._caches_prefixes = backend.config.prefix_caching
        self.share_tokens = _share_tokens(backend)

    def find_prefix(self, group: SequenceGroup) -> PrefixHit | None:
        """What of the group's first sequence is cached; None if it is not to be looked up."""
        if group.prompt_logprobs is not None or not self.shares_prefix(group):
            return None
        assert group.salt is not None
        return self._backend.match_prefix(_first_to_admit(group).token_ids, group.salt)

    def shares_prefix(self, group: SequenceGroup) -> bool:
        """Whether others may use the KV of the group's tokens, and it that of others."""
        return self._caches_prefixes and group.salt is not None

    def try_admit(self, group: SequenceGroup, budget: int, hit: PrefixHit | None) -> int | None:
        """Admit one sequence of a group without KV; its tokens to compute now, or None.

        Its siblings fork from it later.
        """
        seq = _first_to_admit(group)
        goal = group.prefill_goal(seq)
        num_cached = 0 if hit is None else min(hit.num_tokens, goal - 1)
        spec = SequenceGroupSpec(
            (seq.seq_id,),
            num_tokens=num_cached + min(goal - num_cached, budget),
            prompt_tokens=seq.num_prompt_tokens,
            final_tokens=seq.num_prompt_tokens + seq.max_tokens,
            cache_salt=group.salt,
        )
        reservation = self._backend.try_admit(spec, hit)
        if reservation is None:
            return None
        seq.has_kv = True
        seq.num_rows = spec.num_tokens
        seq.num_computed_tokens = reservation.num_cached_tokens
        group.num_shared_tokens = reservation.num_cached_tokens
        if group.num_cached_tokens is None:
            group.num_cached_tokens = reservation.num_cached_tokens
        if seq.num_rows - seq.num_computed_tokens > budget:  # less was cached than the hit said
            self._shrink(seq, seq.num_computed_tokens + budget)
        return seq.num_rows - seq.num_computed_tokens

    def try_prepare(self, group: SequenceGroup) -> bool:
        """Do the group's pending fork or reorder; False if there is no memory for it now.

        True also while a sequence waits for the sibling it will fork from to be computed.
        """
        if group.pending_parents is not None:
            seq_ids = [seq.seq_id for seq in group.active]
            if not self._backend.try_reorder(seq_ids, group.pending_parents):
                return False
            group.pending_parents = None
            return True
        if not self._try_fork(group):
            return False
        if all(seq.has_kv for seq in group.active):
            self.free_finished(group)
        return True

    def try_extend(self, seqs: SequenceABC[Sequence], totals: SequenceABC[int]) -> bool:
        """Back rows ``[0, totals[i])`` of every sequence, or change nothing."""
        if any(map(gt, [seq.num_rows for seq in seqs], totals)):
            for seq, total in zip(seqs, totals, strict=True):
                if total < seq.num_rows:  # a step that was not computed had more
                    self._shrink(seq, total)
        if not self._backend.try_extend([seq.seq_id for seq in seqs], totals):
            return False
        for seq, total in zip(seqs, totals, strict=True):
            seq.num_rows = total
        return True

    def note_computed(self, batch: ScheduledBatch) -> None:
        """Note that a step computed its tokens; others may share them."""
        for seq, num_new_tokens in zip(batch.seqs, batch.num_new_tokens, strict=True):
            seq.num_computed_tokens += num_new_tokens
        if not self._caches_prefixes:
            return
        for part in batch.groups:
            for seq, num_new_tokens in zip(part.seqs, part.num_new_tokens, strict=True):
                if num_new_tokens > 1 or seq.num_computed_tokens % self.share_tokens == 0:
                    self._register(part.group, seq)

    def free(self, group: SequenceGroup) -> None:
        """Give back all KV of a group, swapped out or not."""
        held = [seq for seq in group.seqs if seq.has_kv]
        if not held:
            return
        seq_ids = [seq.seq_id for seq in held]
        if group.error is not None:  # its rows may hold what is no number
            self._backend.free(seq_ids, keep_prefix=False)
        else:
            if group.status is not GroupStatus.SWAPPED:
                for seq in held:
                    self._register(group, seq)
            self._backend.free(seq_ids)
        for seq in held:
            seq.has_kv = False

    def free_finished(self, group: SequenceGroup) -> None:
        """Give back the KV of a group's ended sequences, unless a sibling must fork first."""
        if any(not seq.has_kv for seq in group.active):
            return
        ended = [seq for seq in group.seqs if seq.has_kv and seq.is_finished]
        if not ended:
            return
        for seq in ended:
            self._register(group, seq)
        self._backend.free([seq.seq_id for seq in ended])
        for seq in ended:
            seq.has_kv = False

    def try_swap_out(self, group: SequenceGroup) -> bool:
        """Move a group's KV to host memory; False if there is no space for it."""
        held = [seq for seq in group.seqs if seq.has_kv]
        for seq in held:
            if seq.num_rows > seq.num_computed_tokens:
                self._shrink(seq, seq.num_computed_tokens)
        return self._backend.try_swap_out([seq.seq_id for seq in held])

    def try_swap_in(self, group: SequenceGroup) -> bool:
        """Bring a group's KV back."""
        return self._backend.try_swap_in([seq.seq_id for seq in group.seqs if seq.has_kv])

    def _try_fork(self, group: SequenceGroup) -> bool:
        """Give sequences without KV that of the sibling they have most in common with."""
        known = [seq for seq in group.seqs if seq.has_kv]
        forks: dict[tuple[int, int], list[Sequence]] = {}
        for child in group.active:
            if child.has_kv:
                continue
            parent, num_tokens = _closest(child, known)
            known.append(child)
            if parent.has_kv and parent.num_computed_tokens >= num_tokens:
                forks.setdefault((parent.seq_id, num_tokens), []).append(child)
        for (parent_id, num_tokens), children in forks.items():
            child_ids = [child.seq_id for child in children]
            if not self._backend.try_fork(parent_id, child_ids, num_tokens):
                return False
            for child in children:
                child.has_kv = True
                child.num_computed_tokens = child.num_rows = num_tokens
        return True

    def _register(self, group: SequenceGroup, seq: Sequence) -> None:
        # A beam's rows change with every reorder; its prompt is known from the root.
        if self.shares_prefix(group) and (group.beams is None or seq.num_output_tokens == 0):
            self._backend.register_tokens(seq.seq_id, seq.token_ids, seq.num_computed_tokens)

    def _shrink(self, seq: Sequence, num_tokens: int) -> None:
        self._backend.truncate(seq.seq_id, num_tokens)
        seq.num_rows = num_tokens


def _first_to_admit(group: SequenceGroup) -> Sequence:
    """The longest unfinished sequence: with it there is a token to compute before the last."""
    return max(group.active, key=lambda seq: (seq.num_tokens, -seq.choice_idx))


def _closest(child: Sequence, known: list[Sequence]) -> tuple[Sequence, int]:
    """The sequence that has most in common with ``child``, and how many tokens that is.

    The last token of either is left out: it is what the next step computes.
    """
    best, most = known[0], -1
    for other in known:
        common = min(common_prefix(child, other), child.num_tokens - 1, _forkable_tokens(other))
        if common > most:
            best, most = other, common
    return best, most


def _forkable_tokens(seq: Sequence) -> int:
    return seq.num_computed_tokens if seq.is_finished else seq.num_tokens - 1


def _share_tokens(backend: KVBackend) -> int:
    config = backend.config
    if backend.name == "paged":
        return config.block_size
    num_layers = len(config.layers)
    num_groups = -(-num_layers // (config.layers_per_group or num_layers))
    return max(1, backend.stats().page_bytes * num_groups // config.token_bytes)
