"""How little memory is committed beyond what tokens fill, in bytes."""

import numpy as np

from vmalloc import KVCacheConfig, LayerKVSpec, SequenceGroupSpec, VirtualKVCache

ROW_BYTES = 4096  # 16 tokens a 64 KiB page
NUM_SEQS = 32
PROMPT_MEAN, OUTPUT_MEAN = 161, 338  # ShareGPT, as the PagedAttention paper reports it (fig. 11)
LOG_SIGMA = 1.0
MAX_LEN = 2048


def lognormal_lengths(rng, mean, count):
    lengths = rng.lognormal(np.log(mean) - LOG_SIGMA**2 / 2, LOG_SIGMA, count)
    return np.clip(lengths.astype(int), 4, MAX_LEN // 2 - 1)


def run(cache, num_requests, rng):
    """Continuous batching without a model: admit, grow by a token a step, free when done."""
    prompts = lognormal_lengths(rng, PROMPT_MEAN, num_requests).tolist()
    outputs = lognormal_lengths(rng, OUTPUT_MEAN, num_requests).tolist()
    lens, ends, waiting = {}, {}, list(range(num_requests))
    while waiting or lens:
        while waiting and len(lens) < NUM_SEQS:
            seq_id = waiting.pop(0)
            assert cache.try_admit(SequenceGroupSpec((seq_id,), prompts[seq_id])) is not None
            lens[seq_id] = prompts[seq_id]
            ends[seq_id] = prompts[seq_id] + outputs[seq_id]
        step = cache.begin_step()
        for seq_id in lens:
            lens[seq_id] += 1
        assert cache.try_extend(list(lens), list(lens.values()))
        cache.end_step(step)
        finished = [seq_id for seq_id in lens if lens[seq_id] >= ends[seq_id]]
        cache.free(finished)
        for seq_id in finished:
            del lens[seq_id]


def test_sharegpt_like_lengths_leave_at_most_four_percent_unused():
    layer = LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64)
    config = KVCacheConfig(
        layers=(layer,) * 4,
        max_num_seqs=NUM_SEQS,
        max_seq_len=MAX_LEN,
        capacity_bytes=NUM_SEQS * MAX_LEN * ROW_BYTES,
    )
    assert config.token_bytes == ROW_BYTES
    with VirtualKVCache(config) as cache:
        for requests, seed in ((NUM_SEQS, 0), (NUM_SEQS, 1), (128, 2)):
            before = cache.stats()
            run(cache, requests, np.random.default_rng(seed))
            after = cache.stats()
            live = after.live_byte_steps - before.live_byte_steps
            committed = after.committed_byte_steps - before.committed_byte_steps
            assert live / committed >= 0.96
        cache.check_invariants()
        assert cache.stats().adopted_pages > 0
        # The cap was never near, so these are parked pages that growth took before creating any.
        assert cache.stats().created_pages * cache.stats().page_bytes < config.capacity_bytes
        assert cache.stats().reclaimed_pages > 0
