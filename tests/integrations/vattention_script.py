"""A small serving loop over vAttention's module: prefill, decode, write, read back, free."""

import argparse

import torch
import vattention

NUM_LAYERS = 4
NUM_KV_HEADS = 2
HEAD_SIZE = 64
MAX_BATCH_SIZE = 6
MAX_CONTEXT_LENGTH = 512
DTYPE = torch.float16


class CacheEngine:
    """The engine's side: which sequence has which slot, and how long each is."""

    def __init__(self, device, page_size, megacache, is_async, free_memory):
        self.is_async = is_async
        self.seq_to_batch_idx = {}
        self.curr_seq_lens = [0] * MAX_BATCH_SIZE
        kv_cache = vattention.init_kvcache(
            NUM_LAYERS,
            NUM_KV_HEADS,
            HEAD_SIZE,
            MAX_BATCH_SIZE,
            MAX_CONTEXT_LENGTH,
            device,
            DTYPE,
            page_size,
            megacache,
        )
        if megacache:
            assert len(kv_cache) == 2
            k_cache, v_cache = kv_cache
            self.k = [k_cache[:, :, layer] for layer in range(NUM_LAYERS)]
            self.v = [v_cache[:, :, layer] for layer in range(NUM_LAYERS)]
        else:
            assert len(kv_cache) == 2 * NUM_LAYERS
            self.k = kv_cache[:NUM_LAYERS]
            self.v = kv_cache[NUM_LAYERS:]
        for cache in [*self.k, *self.v]:
            assert cache.shape == (MAX_BATCH_SIZE, MAX_CONTEXT_LENGTH, NUM_KV_HEADS, HEAD_SIZE)
            assert cache.dtype == DTYPE
        self.num_pages = vattention.reserve_physical_pages(free_memory)

    def add(self, seq_id, prompt_len):
        batch_idx = vattention.alloc_new_batch_idx(prompt_len)
        assert batch_idx != -1, "no free slot"
        self.seq_to_batch_idx[seq_id] = batch_idx
        self.curr_seq_lens[batch_idx] = prompt_len

    def step(self):
        if self.is_async:
            vattention.step_async(self.curr_seq_lens)
        else:
            vattention.step(self.curr_seq_lens, True)

    def free(self, seq_id):
        batch_idx = self.seq_to_batch_idx.pop(seq_id)
        vattention.free_batch_idx(batch_idx)
        self.curr_seq_lens[batch_idx] = 0

    def write(self, seq_id, first, end):
        batch_idx = self.seq_to_batch_idx[seq_id]
        for layer in range(NUM_LAYERS):
            k, v = rows(seq_id, layer, first, end)
            self.k[layer][batch_idx, first:end] = k
            self.v[layer][batch_idx, first:end] = v

    def check(self, seq_id):
        batch_idx = self.seq_to_batch_idx[seq_id]
        end = self.curr_seq_lens[batch_idx]
        for layer in range(NUM_LAYERS):
            k, v = rows(seq_id, layer, 0, end)
            assert torch.equal(self.k[layer][batch_idx, :end].cpu(), k)
            assert torch.equal(self.v[layer][batch_idx, :end].cpu(), v)


def rows(seq_id, layer, first, end):
    """What a sequence has in its rows: no two rows of the run are alike."""
    tokens = torch.arange(first, end, dtype=torch.float32)[:, None, None]
    heads = torch.arange(NUM_KV_HEADS * HEAD_SIZE).view(NUM_KV_HEADS, HEAD_SIZE)
    values = (seq_id * 37 + layer * 11 + tokens * 3 + heads) % 1000
    return values.to(DTYPE), (-values - 1).to(DTYPE)


def serve(engine, num_requests):
    """Requests come as slots come free; every row is read back when its request ends."""
    left = {}  # seq_id -> tokens to decode
    next_id = 0
    while next_id < num_requests or left:
        while next_id < num_requests and len(left) < MAX_BATCH_SIZE:
            prompt_len = 1 + (next_id * 53) % 200
            engine.add(next_id, prompt_len)
            left[next_id] = 5 + (next_id * 29) % 60
            next_id += 1
        engine.step()
        for seq_id in left:
            batch_idx = engine.seq_to_batch_idx[seq_id]
            engine.write(seq_id, 0, engine.curr_seq_lens[batch_idx])
        for seq_id in list(left):
            batch_idx = engine.seq_to_batch_idx[seq_id]
            left[seq_id] -= 1
            if left[seq_id] == 0:
                engine.check(seq_id)
                engine.free(seq_id)
                del left[seq_id]
            else:
                engine.curr_seq_lens[batch_idx] += 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="0")
    parser.add_argument("--page-size", type=int, default=2 << 20)
    parser.add_argument("--megacache", action="store_true")
    parser.add_argument("--async", dest="is_async", action="store_true")
    parser.add_argument("--no-deferred", dest="is_deferred", action="store_false")
    parser.add_argument("--free-memory", type=int, default=256 << 20)
    args = parser.parse_args()

    device = int(args.device) if args.device.isdigit() else args.device
    vattention.set_verbose(True)
    engine = CacheEngine(device, args.page_size, args.megacache, args.is_async, args.free_memory)
    vattention.set_deferred_reclamation(args.is_deferred)
    vattention.show_kvcache_config()
    before = vattention.num_free_kvblocks()
    serve(engine, num_requests=20)
    vattention.show_allocator_state()
    assert vattention.num_free_kvblocks() == before, "blocks are missing"
    vattention.cleanup()
    print(f"OK: {engine.num_pages} pages, {before} blocks")


if __name__ == "__main__":
    main()
