"""The mutations of the source that the tests must notice, and the test that notices each.

Owns: the list.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass

AGREE = "tests/engine/test_backends_agree.py"
PREEMPTION = "tests/engine/test_backends_agree_preemption.py"
CONFORMANCE = "tests/kv/test_conformance.py"
ARENA = "tests/core/test_kv_arena.py"
SHARING = "tests/core/test_kv_arena_sharing.py"

ELASTIC_TESTS = "tests/kv/test_elastic_tensor.py"
VATTENTION_TESTS = "tests/integrations/test_vattention.py"

PARALLEL = f"{AGREE}::TestMethods::test_one_method[n=4-5x3x40-0]"
BEAMS = f"{AGREE}::TestMethods::test_one_method[beam-5x3x40-0]"
CUDA = "tests/core/test_cuda_driver.py"
ALL_METHODS = f"{AGREE}::TestMethods::test_all_methods_in_one_batch[5x3x40-0]"
PREFIXES = f"{AGREE}::test_prefixes_of_requests_that_ended_or_still_run[ended-0-5x3x40]"
SLEEP = "tests/kv/test_sleep.py"
SWAP = f"{PREEMPTION}::test_preemption_at_random_steps[0-swap-5x3x40]"
RECOMPUTE = f"{PREEMPTION}::test_preemption_at_random_steps[0-recompute-5x3x40]"


@dataclass(frozen=True)
class Edit:
    """Replaces the one place of a file that reads ``old``."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """A mistake, and the test that must go red with it."""

    name: str
    test: str
    edits: tuple[Edit, ...]

    @property
    def is_native(self) -> bool:
        """Whether the C++ core must be built again."""
        return any(edit.path.startswith("csrc/") for edit in self.edits)


def _mutation(name: str, test: str, path: str, old: str, new: str) -> Mutation:
    return Mutation(name, test, (Edit(path, old, new),))


COPY_ON_WRITE = [
    _mutation(
        "virtual: try_extend does not prepare a write",
        f"{CONFORMANCE}::test_what_is_truncated_and_written_again_stays_private[odd-virtual]",
        "vmalloc/kv_cache.py",
        "if self._cut and not self._prepare_write(seq_ids, num_tokens):",
        "if False and not self._prepare_write(seq_ids, num_tokens):",
    ),
    Mutation(
        "virtual: prepare_write returns the slot as it is, and nobody checks",
        f"{CONFORMANCE}::test_what_is_truncated_and_written_again_stays_private[odd-virtual]",
        (
            Edit(
                "csrc/kv_arena_share.cpp",
                "if (entry.num_rows >= entry.shared_rows) return slot;\n  wait(lock",
                "if (entry.num_rows <= config_.max_rows) return slot;\n  wait(lock",
            ),
            Edit(
                "csrc/kv_arena_grow.cpp",
                "if (slot.num_rows < slot.shared_rows && rows > slot.num_rows) {",
                "if (slot.num_rows > config_.max_rows) {",
            ),
        ),
    ),
    _mutation(
        "paged: no copy on write",
        PARALLEL,
        "vmalloc/paged_sequences.py",
        "if not is_shared.any():",
        "if True:",
    ),
    _mutation(
        "paged: the last of those that write copies too late",
        PARALLEL,
        "vmalloc/paged_sequences.py",
        "if left > 1:",
        "if left > 2:",
    ),
    _mutation(
        "virtual: a fork does not copy the partial tail",
        PARALLEL,
        "csrc/kv_arena_grow.cpp",
        "growth.copy_from = prefix->tails[r];",
        "growth.copy_from = kNoPage;",
    ),
    _mutation(
        "virtual: half of the partial tail is copied",
        PARALLEL,
        "csrc/kv_arena_grow.cpp",
        "pool_.handle(growth.copy_from), growth.copy_bytes);",
        "pool_.handle(growth.copy_from), growth.copy_bytes / 2);",
    ),
    _mutation(
        "paged: one row of a copied block is missing",
        PARALLEL,
        "vmalloc/paged_sequences.py",
        "targets.tolist(), num_rows.tolist(), strict=True))",
        "targets.tolist(), (num_rows - 1).tolist(), strict=True))",
    ),
]

FENCE = [
    _mutation(
        "retired pages are settled whatever their epoch",
        f"{ARENA}::TestEpochs::test_pages_freed_in_an_open_step_wait_for_its_fence",
        "csrc/kv_arena_shrink.cpp",
        "mapped.retired_epochs[mapped.retired_epochs.size() - 1 - num_pages] <= completed_)",
        "mapped.retired_epochs[mapped.retired_epochs.size() - 1 - num_pages] <= epoch_ + 1)",
    ),
    _mutation(
        "a fence counts as passed when it is recorded",
        f"{ARENA}::TestEpochs::test_pages_wait_as_long_as_the_fence_does",
        "csrc/kv_arena.cpp",
        "driver_->fence_passed(fences_.front().second)",
        "(driver_->fence_passed(fences_.front().second), true)",
    ),
    _mutation(
        "pages of an idle slot are taken as if no kernel had read them",
        f"{ARENA}::TestEpochs::"
        "test_parked_pages_are_unmapped_for_another_slot_only_after_the_fence",
        "csrc/kv_arena_shrink.cpp",
        "const Epoch last_use = entry.state == SlotState::kLive ? epoch_ : entry.last_use;",
        "const Epoch last_use = entry.state == SlotState::kLive ? epoch_ : 0;",
    ),
    _mutation(
        "a draining slot is idle at once",
        f"{SHARING}::TestSlots::test_an_emptied_slot_is_not_given_away_under_a_running_kernel",
        "csrc/kv_arena.cpp",
        "if (!mapped.pages.empty()) return;",
        "if (mapped.pages.size() > config_.max_pages) return;",
    ),
]

PENDING = [
    _mutation(
        "cuda: what was enqueued between two steps has no epoch",
        f"{CUDA}::TestPendingWork::test_what_the_driver_enqueued_between_steps_is_waited_for",
        "csrc/kv_arena_grow.cpp",
        "if (growth.is_enqueued) mapped.enqueued_in = note_enqueued();",
        "static_cast<void>(&KVArena::note_enqueued);",
    ),
    _mutation(
        "cuda: a failed growth unmaps what is being cleared",
        f"{CUDA}::TestPendingWork::"
        "test_a_growth_that_fails_waits_before_it_unmaps_what_is_being_cleared",
        "csrc/kv_arena_grow.cpp",
        "if (growth.is_enqueued) driver_->wait_enqueued();",
        "",
    ),
    _mutation(
        "cuda: a page is destroyed under the copy that reads it",
        f"{CUDA}::TestPendingWork::test_a_page_is_not_destroyed_under_the_copy_that_reads_it",
        "csrc/cuda_driver.cpp",
        "if (!stream_.is_done(page.last_access)) stream_.wait();",
        "",
    ),
    _mutation(
        "cuda: new pages are not cleared",
        f"{CUDA}::TestContents::test_new_pages_are_zeros_whatever_the_driver_hands_out",
        "csrc/cuda_driver.cpp",
        "return page != pages_.end() && page->second.is_fresh;",
        "return page == pages_.end();",
    ),
    _mutation(
        "cuda: lack of memory in the middle of a mapping leaves it there",
        f"{CUDA}::TestErrors::test_lack_of_memory_is_a_value_and_another_error_is_named",
        "csrc/cuda_driver.cpp",
        "if (num_mapped > 0) unmap(address, num_mapped);",
        "",
    ),
]

REFCOUNT = [
    _mutation(
        "virtual: a page that is mapped again is not counted",
        PARALLEL,
        "csrc/page_pool.cpp",
        "change(page, [](Page& entry) { ++entry.live; });",
        "change(page, [](Page&) {});",
    ),
    _mutation(
        "virtual: a page is free once one of its users lets go",
        PARALLEL,
        "csrc/page_pool.cpp",
        "if (entry.num_in_use() > 0 || entry.retired > 0) return;",
        "if (entry.num_in_use() > 1 || entry.retired > 0) return;",
    ),
    _mutation(
        "virtual: the prefix index takes no reference",
        PREFIXES,
        "csrc/page_pool.cpp",
        "change(page, [](Page& entry) { ++entry.cached; });",
        "change(page, [](Page&) {});",
    ),
    _mutation(
        "virtual: a swapped-out group does not hold the pages that stay",
        f"{CONFORMANCE}::test_pages_shared_outside_the_group_stay_where_they_are[odd-virtual]",
        "csrc/page_pool.cpp",
        "change(page, [](Page& entry) { ++entry.held; });",
        "change(page, [](Page&) {});",
    ),
    _mutation(
        "paged: a block that one more sequence has is not counted",
        PARALLEL,
        "vmalloc/block_pool.py",
        "self.refs[blocks] += count",
        "self.refs[blocks] += 0",
    ),
    _mutation(
        "paged: a block is free once one of its users lets go",
        PARALLEL,
        "vmalloc/block_pool.py",
        "freed = blocks[self.refs[blocks] == 0].tolist()",
        "freed = blocks.tolist()",
    ),
    _mutation(
        "paged: the prefix index takes no reference",
        PREFIXES,
        "vmalloc/paged_prefix.py",
        "retain=lambda pages: pool.add_refs(_block_ids(pages)),",
        "retain=lambda pages: None,",
    ),
    _mutation(
        "paged: a reorder takes no reference to the parents' blocks",
        BEAMS,
        "vmalloc/paged_sequences.py",
        "self._pool.add_seq_refs(blocks)\n",
        "self._pool.add_seq_refs(blocks[:0])\n",
    ),
]

SWAPPING = [
    _mutation(
        "virtual: a swapped-out group forgets what it shared",
        f"{CONFORMANCE}::test_a_group_comes_back_as_it_was_with_what_it_shared[odd-virtual]",
        "csrc/kv_arena_swap.cpp",
        "if (found != packed.end()) return found->second;",
        "if (found != packed.end() && page == kNoPage) return found->second;",
    ),
    _mutation(
        "paged: blocks that others share are moved out too",
        f"{CONFORMANCE}::test_pages_shared_outside_the_group_stay_where_they_are[odd-paged]",
        "vmalloc/paged_swap.py",
        "self._pool.holds[blocks]) > 0",
        "self._pool.holds[blocks]) < 0",
    ),
    _mutation(
        "paged: swapped-in contents land in each other's blocks",
        SWAP,
        "vmalloc/paged_swap.py",
        "self._storage.write(blocks, group.data)",
        "self._storage.write(blocks[::-1], group.data)",
    ),
    _mutation(
        "virtual: who wakes leaves pages to others",
        f"{SLEEP}::TestFullCache::test_it_wakes_with_the_place_that_batches_are_padded_with"
        "[virtual-0]",
        "vmalloc/virtual_sleep.py",
        "with self._supply.down_to_the_last_page():",
        "if self._supply is not None:",
    ),
    _mutation(
        "virtual: a cache sleeps above its cap",
        f"{SLEEP}::TestRefused::test_above_a_lowered_cap[virtual]",
        "vmalloc/virtual_sleep.py",
        'if raw["committed_pages"] > raw["max_pages"]:',
        'if raw["committed_pages"] < 0:',
    ),
    _mutation(
        "engine: a swap forgets a reorder that is pending",
        SWAP,
        "engine/preemption.py",
        "group.status = GroupStatus.SWAPPED",
        "group.status, group.pending_parents = GroupStatus.SWAPPED, None",
    ),
    _mutation(
        "engine: a sequence that comes back forks one token too far",
        RECOMPUTE,
        "engine/group_memory.py",
        "common = min(common_prefix(child, other), child",
        "common = min(common_prefix(child, other) + 1, child",
    ),
]

PREFIX_INDEX = [
    _mutation(
        "the salt is ignored",
        "tests/engine/test_groups.py::"
        "test_requests_of_equal_prompts_share_unless_salt_or_settings_forbid",
        "vmalloc/prefix_index.py",
        "        node = self._roots.get(salt)\n",
        '        salt = ""\n        node = self._roots.get(salt)\n',
    ),
    _mutation(
        "a token that differs counts as cached",
        PREFIXES,
        "vmalloc/prefix_node.py",
        "            return i\n",
        "            return min(i + 1, len(b))\n",
    ),
    _mutation(
        "paged: one row of a cached tail is not copied",
        PREFIXES,
        "vmalloc/paged_sequences.py",
        "self._copy((source, int(own[0]), num_rows) for own in own_blocks)",
        "self._copy((source, int(own[0]), num_rows - 1) for own in own_blocks)",
    ),
    _mutation(
        "virtual: a hit starts with one row less than it says",
        PREFIXES,
        "vmalloc/slot_prefixes.py",
        "start=self._start(num_tokens, pages)",
        "start=self._start(max(1, num_tokens - 1), pages)",
    ),
]

DECODING = [
    _mutation(
        "beams are not reordered",
        BEAMS,
        "engine/group_memory.py",
        "if not self._backend.try_reorder(seq_ids, group.pending_parents):",
        "if not seq_ids:",
    ),
    _mutation(
        "virtual: a beam that is to go on in its parent's memory stays in its own",
        BEAMS,
        "vmalloc/kv_cache.py",
        "moved.update({child: slots[parent] for",
        "moved.update({child: slots[child] for",
    ),
    _mutation(
        "the choice index is not part of the random numbers' key",
        "tests/engine/test_groups.py::"
        "test_completions_share_the_prompt_and_are_those_of_requests_alone",
        "engine/sampler.py",
        "[seq.choice_idx for seq in seqs],",
        "[0 for seq in seqs],",
    ),
    _mutation(
        "a random number depends on the place in the batch",
        ALL_METHODS,
        "engine/sampler.py",
        "[seq.seed for seq in seqs],",
        "[seq.seed + row for row, seq in enumerate(seqs)],",
    ),
    _mutation(
        "the position is not part of the random numbers' key",
        "tests/engine/test_sampler.py::test_draws_at_other_positions_differ",
        "engine/sampler.py",
        "[len(seq.token_ids) for seq in seqs],",
        "[0 for seq in seqs],",
    ),
    _mutation(
        "an ended sequence is freed before its siblings forked from it",
        "tests/engine/test_groups.py::"
        "test_a_sequence_that_ends_at_once_leaves_its_kv_to_its_siblings",
        "engine/group_memory.py",
        "        if any(not seq.has_kv for seq in group.active):\n            return\n",
        "",
    ),
]

ELASTIC = [
    _mutation(
        "elastic: a page goes though another row needs it",
        f"{ELASTIC_TESTS}::TestDecommit::test_a_page_stays_while_a_neighbour_needs_it[host]",
        "csrc/elastic_memory_shrink.cpp",
        "if (it->second.retired_in != 0 || committed_.meets(bytes_of(it->first))) continue;",
        "if (it->second.retired_in != 0) continue;",
    ),
    _mutation(
        "elastic: a page is unmapped under the kernel that reads it",
        f"{ELASTIC_TESTS}::TestDevice::test_a_launch_that_reads_decommitted_rows_is_safe",
        "csrc/elastic_memory_shrink.cpp",
        "if (places_.at(idx).retired_in <= completed_) due.push_back(idx);",
        "due.push_back(idx);",
    ),
    _mutation(
        "elastic: work on another stream is not waited for",
        f"{ELASTIC_TESTS}::TestDevice::test_work_on_another_stream_is_waited_for_there",
        "csrc/elastic_memory_shrink.cpp",
        "  driver_->use_stream(stream);\n"
        "  for (const ByteSpan span : spans) committed_.erase(span);",
        "  static_cast<void>(stream);\n"
        "  driver_->use_stream(0);\n"
        "  for (const ByteSpan span : spans) committed_.erase(span);",
    ),
    _mutation(
        "elastic: an alias that was given up is taken back",
        f"{ELASTIC_TESTS}::TestAlias::test_an_alias_that_was_given_up_is_not_taken_back[host]",
        "csrc/elastic_memory_grow.cpp",
        "return page == kNoPage || pool_.is_shared(page, true);",
        "return page == kNoPage;",
    ),
    _mutation(
        "elastic: what is left in a page that stayed is not cleared",
        f"{ELASTIC_TESTS}::TestDecommit::test_what_rows_find_when_they_come_back[host-True]",
        "csrc/elastic_memory_grow.cpp",
        "if (!try_clear_old(gap)) return false;",
        "static_cast<void>(gap);",
    ),
    _mutation(
        "elastic: a commit that failed keeps what it mapped",
        f"{ELASTIC_TESTS}::TestFaults::"
        "test_a_call_that_takes_something_fails[host-Fault.OUT_OF_MEMORY]",
        "csrc/elastic_memory_grow.cpp",
        "  if (!is_done) {\n    undo(runs);\n    return false;\n  }\n  publish(runs, plan);",
        "  if (!is_done) return false;\n  publish(runs, plan);",
    ),
    _mutation(
        "vattention: slots start where the one before ends, on a page or not",
        f"{VATTENTION_TESTS}::TestDefects::"
        "test_5_any_length_puts_each_slot_on_pages_of_its_own[host]",
        "vmalloc/integrations/vattention_layout.py",
        "return self.round_up(self.max_rows)",
        "return self.max_rows",
    ),
    _mutation(
        "vattention: pages of active slots may be reclaimed",
        f"{VATTENTION_TESTS}::TestSemantics::"
        "test_freed_slots_keep_their_pages_until_a_step_is_short[host]",
        "vmalloc/integrations/vattention_cache.py",
        "own = self._layout.rows_for(self._lens[slot])",
        "own = 0",
    ),
    _mutation(
        "vattention: a call does not wait for the thread",
        f"{VATTENTION_TESTS}::TestDefects::"
        "test_1_no_call_overtakes_the_thread_of_the_step_before[host]",
        "vmalloc/integrations/vattention_cache.py",
        "                ahead.result()\n",
        "                pass\n",
    ),
    _mutation(
        "vattention: common pages stay though not all slots got them",
        f"{VATTENTION_TESTS}::TestDefects::"
        "test_7_common_pages_that_cannot_all_be_mapped_are_given_back[host-Fault.ERROR]",
        "vmalloc/integrations/vattention_cache.py",
        "self._elastic.decommit(*parts)",
        "pass",
    ),
]

RANKS = [
    _mutation(
        "ranks: evictions are not repeated",
        "tests/kv/test_plans.py::test_random_calls_are_repeated_page_for_page[virtual-0]",
        "vmalloc/page_supply.py",
        "while (what := script.next()) >= 0:\n            self._index.evict(what)",
        "while (what := script.next()) >= 0:\n            pass",
    ),
    _mutation(
        "ranks: reordered beams keep the tokens that they had",
        "tests/kv/test_plans.py::test_random_calls_are_repeated_page_for_page[paged-0]",
        "vmalloc/plans/plan_executor.py",
        "self._token_ids[seq_id] = list(before[idx])",
        "pass",
    ),
    _mutation(
        "ranks: pages are created on demand beside the granted ones",
        "tests/core/test_page_pool.py::"
        "test_granted_pages_are_there_and_no_more_are_created_on_demand",
        "csrc/page_pool.cpp",
        "const std::size_t limit = std::min(max_pages_, granted_);",
        "const std::size_t limit = max_pages_;",
    ),
    _mutation(
        "ranks: what was created for a refused grant stays",
        "tests/core/test_page_pool.py::test_a_grant_that_others_did_not_get_leaves_nothing",
        "csrc/page_pool.cpp",
        "if (!keeps_pages && free_.contains(page))",
        "if (false && free_.contains(page))",
    ),
]

MUTATIONS = [
    *(*COPY_ON_WRITE, *FENCE, *PENDING, *REFCOUNT, *SWAPPING, *PREFIX_INDEX, *DECODING),
    *ELASTIC,
    *RANKS,
]
