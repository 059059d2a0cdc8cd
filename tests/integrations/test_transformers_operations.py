"""Every operation of a transformers cache, at random, against DynamicCache; and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers.cache_utils import DynamicCache

from tests.integrations.hf_models import VERSION, generate, model, one, padded
from vmalloc import ClosedError, ConfigError, VmallocError
from vmalloc.integrations.transformers import CacheFullError, InferenceOnlyError, VirtualCache

PAGE = 4096
NUM_LAYERS = 3
MAX_BATCH = 8
MANY_ROWS = 90  # more than are reserved where nobody says how many
KEEPS_POSITIVE = VERSION < (5, 18)


def make_config(max_len: int = 4096) -> Any:
    return hf.LlamaConfig(num_hidden_layers=NUM_LAYERS, max_position_embeddings=max_len)


def states(batch: int, num_tokens: int, seed: int, layer: int = 0, **shape: Any) -> Any:
    """Keys and values that no other call has; heads and sizes leave rows astride of pages."""
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    dims = {"num_heads": 3, "k_dim": 40, "v_dim": 24} | shape
    return tuple(
        torch.randn(batch, dims["num_heads"], num_tokens, dims[name], generator=generator)
        for name in ("k_dim", "v_dim")
    )


def update(cache: Any, batch: int, num_tokens: int, seed: int) -> list[Any]:
    return [
        cache.update(*states(batch, num_tokens, seed, layer), layer) for layer in range(NUM_LAYERS)
    ]


class CacheMachine(RuleBasedStateMachine):
    """Two caches get the same calls and hold the same rows after each of them."""

    @initialize(
        layers_per_group=st.sampled_from([1, 2, 3]), worker=st.sampled_from([0, 0, 20]),
        batch=st.integers(1, 3), is_limited=st.booleans(),
    )  # fmt: skip
    def start(self, layers_per_group: int, worker: int, batch: int, is_limited: bool) -> None:
        self.theirs = DynamicCache(config=make_config())
        self.ours = VirtualCache(
            make_config(4096 if is_limited else 25),
            max_batch=MAX_BATCH if is_limited else None,
            page_bytes=PAGE,
            layers_per_group=layers_per_group,
            commit_ahead_tokens=worker,
            capacity_bytes=(64 if is_limited else 1024) << 20,
        )
        self.max_batch = MAX_BATCH if is_limited else MANY_ROWS
        self.is_limited = is_limited
        self.batch = batch
        self.seed = 0
        self.add(20)

    @rule(num_tokens=st.sampled_from([1, 1, 2, 5, 30]))
    def add(self, num_tokens: int) -> None:
        self.seed += 1
        given = update(self.ours, self.batch, num_tokens, self.seed)
        expected = update(self.theirs, self.batch, num_tokens, self.seed)
        for mine, other in zip(given, expected, strict=True):
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])

    @precondition(lambda self: self.theirs.get_seq_length() > 0)
    @rule(count=st.sampled_from([0, 1, 3, 11, 40]))
    def crop(self, count: int) -> None:
        self.ours.crop(-count)
        self.theirs.crop(-count)
        if self.theirs.get_seq_length() == 0:
            self.start_over()

    @precondition(lambda self: self.theirs.get_seq_length() > 0)
    @rule(data=st.data())
    def reorder(self, data: Any) -> None:
        row = st.integers(0, self.batch - 1)
        rows = data.draw(st.lists(row, min_size=self.batch, max_size=self.batch))
        self.ours.reorder_cache(torch.tensor(rows))
        self.theirs.reorder_cache(torch.tensor(rows))

    @precondition(lambda self: self.theirs.get_seq_length() > 0)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats: int) -> None:
        if self.batch * repeats > self.max_batch:
            if self.is_limited:
                with pytest.raises(ConfigError, match="max_batch is 8"):
                    self.ours.batch_repeat_interleave(repeats)
            return
        self.ours.batch_repeat_interleave(repeats)
        self.theirs.batch_repeat_interleave(repeats)
        self.batch *= repeats

    @precondition(lambda self: self.theirs.get_seq_length() > 0)
    @rule(data=st.data(), as_mask=st.booleans())
    def select(self, data: Any, as_mask: bool) -> None:
        if as_mask:
            kept = data.draw(st.lists(st.booleans(), min_size=self.batch, max_size=self.batch))
            indices = torch.tensor(kept if any(kept) else [True] * self.batch)
            self.batch = int(indices.sum())
        else:
            row = st.integers(-self.batch, self.batch - 1)
            rows = data.draw(st.lists(row, min_size=1, max_size=MAX_BATCH))
            if not self.is_limited and data.draw(st.integers(0, 5)) == 0:
                rows = (rows * MANY_ROWS)[:MANY_ROWS]
            indices = torch.tensor(rows)
            self.batch = len(rows)
        self.ours.batch_select_indices(indices)
        self.theirs.batch_select_indices(indices)

    @rule(batch=st.integers(1, 3))
    def reset(self, batch: int) -> None:
        self.ours.reset()
        self.batch = batch
        self.start_over()

    @rule()
    def trim(self) -> None:
        self.ours.trim()

    @precondition(lambda self: self.theirs.get_seq_length() > 0)
    @rule()
    def go_on_with_a_copy(self) -> None:
        twin = copy.deepcopy(self.ours)
        self.ours.close()
        self.ours = twin

    def start_over(self) -> None:
        self.ours.reset()
        self.theirs = DynamicCache(config=make_config())

    @invariant()
    def they_are_equal(self) -> None:
        if not hasattr(self, "ours"):
            return
        self.ours.check_invariants()
        num_tokens = self.theirs.get_seq_length()
        assert self.ours.get_seq_length() == num_tokens
        assert self.ours.get_mask_sizes(5, 0) == self.theirs.get_mask_sizes(5, 0)
        if num_tokens == 0:
            return
        stats = self.ours.stats()
        assert (stats.batch_size, stats.num_tokens) == (self.batch, num_tokens)
        total = 0
        for mine, other in zip(self.ours.layers, self.theirs.layers, strict=True):
            assert torch.equal(mine.keys, other.keys)
            assert torch.equal(mine.values, other.values)
            total += other.keys.nbytes + other.values.nbytes
        assert stats.logical_bytes == total
        assert len(list(self.ours)) == NUM_LAYERS

    def teardown(self) -> None:
        if hasattr(self, "ours"):
            self.ours.close()


TestOperations = CacheMachine.TestCase
TestOperations.__test__ = True


@pytest.fixture
def cache() -> Any:
    with VirtualCache(make_config(), page_bytes=PAGE, capacity_bytes=100 * PAGE) as made:
        yield made


def contents(cache: Any) -> list[Any]:
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def assert_unchanged(cache: Any, before: list[Any]) -> None:
    cache.check_invariants()
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


class TestRunningOut:
    def test_of_pages_names_the_cap_and_changes_nothing(self, cache: Any) -> None:
        update(cache, 2, 60, 1)
        before = contents(cache)
        with pytest.raises(CacheFullError, match=r"capacity_bytes=409600, of which \d+ hold 60"):
            update(cache, 2, 60, 2)
        assert_unchanged(cache, before)
        cache.crop(-50)
        update(cache, 2, 30, 3)  # and goes on
        assert cache.get_seq_length() == 40

    def test_it_is_a_memory_error(self) -> None:
        assert issubclass(CacheFullError, MemoryError)
        assert issubclass(CacheFullError, VmallocError)

    def test_at_the_first_call_leaves_it_empty(self, cache: Any) -> None:
        with pytest.raises(CacheFullError, match="no room for 5000 tokens of 1 rows"):
            update(cache, 1, 5000, 1)
        assert cache.get_seq_length() == 0
        update(cache, 3, 5, 1)
        assert cache.get_seq_length() == 5

    def test_of_tokens_names_max_len(self) -> None:
        with VirtualCache(make_config(), max_len=32) as cache:
            update(cache, 1, 32, 1)
            before = contents(cache)
            with pytest.raises(CacheFullError, match="no room for 33 tokens: max_len is 32"):
                update(cache, 1, 1, 2)
            assert_unchanged(cache, before)

    def test_while_beams_are_reordered(self) -> None:
        with VirtualCache(make_config(), page_bytes=PAGE, capacity_bytes=12 * PAGE) as cache:
            update(cache, 4, 5, 1)  # a page a row and layer: all of them
            before = contents(cache)
            with pytest.raises(CacheFullError, match="no room for 4 rows of 5 tokens"):
                cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
            assert_unchanged(cache, before)

    def test_in_the_middle_of_generate(self) -> None:
        made = model("gemma2")  # a sliding layer comes before the full one
        cache = VirtualCache(made, page_bytes=PAGE, capacity_bytes=8 * PAGE)
        with pytest.raises(CacheFullError, match="the cap is capacity_bytes=32768"):
            generate(made, padded(), past_key_values=cache, max_new_tokens=100)
        lengths = {layer.get_seq_length() for layer in cache.layers}
        assert len(lengths) == 1  # no layer is a token ahead
        cache.check_invariants()
        cache.close()

    def test_in_the_first_pass_of_a_mixed_model(self) -> None:
        made = model("gemma2")
        cache = VirtualCache(made, page_bytes=PAGE, capacity_bytes=2 * PAGE)
        with pytest.raises(CacheFullError):
            generate(made, padded(), past_key_values=cache)
        assert {layer.get_seq_length() for layer in cache.layers} == {0}
        cache.close()


class TestRefusals:
    def test_another_batch(self, cache: Any) -> None:
        update(cache, 2, 5, 1)
        before = contents(cache)
        with pytest.raises(ConfigError, match="the batch has 3 rows; the cache holds 5 tokens of"):
            update(cache, 3, 1, 2)
        assert_unchanged(cache, before)

    def test_more_rows_than_max_batch(self) -> None:
        with (
            VirtualCache(make_config(), max_batch=2) as cache,
            pytest.raises(ConfigError, match="the batch has 3 rows; max_batch is 2"),
        ):
            update(cache, 3, 1, 1)

    def test_rows_that_are_not_there(self, cache: Any) -> None:
        update(cache, 2, 5, 1)
        for indices in ([2], [-3], [0, 7]):
            with pytest.raises(ConfigError, match="the cache has 2 rows"):
                cache.batch_select_indices(torch.tensor(indices))

    def test_an_element_type_that_there_is_not(self, cache: Any) -> None:
        keys, values = states(1, 4, 1)
        with pytest.raises(ConfigError, match=r"torch.float64.*holds one of float32, bfloat16"):
            cache.update(keys.double(), values.double(), 0)
        with pytest.raises(ConfigError, match=r"\[batch, num_kv_heads, num_tokens, head_dim\]"):
            cache.update(keys, values[:, :2], 0)

    def test_another_shape_than_before(self, cache: Any) -> None:
        update(cache, 1, 4, 1)
        with pytest.raises(VmallocError, match="layer 0 brings LayerShape"):
            cache.update(*states(1, 4, 1, num_heads=2), 0)

    def test_a_positive_crop(self, cache: Any) -> None:
        update(cache, 1, 9, 1)
        if KEEPS_POSITIVE:
            cache.crop(4)
            assert cache.get_seq_length() == 4
        else:
            with pytest.raises(ValueError, match="negative"):
                cache.crop(4)

    def test_operations_on_one_layer(self, cache: Any) -> None:
        update(cache, 2, 5, 1)
        layer = cache.layers[0]
        for name, argument in {
            "crop": -1,
            "reorder_cache": torch.tensor([1, 0]),
            "batch_repeat_interleave": 2,
            "batch_select_indices": torch.tensor([0]),
        }.items():
            with pytest.raises(VmallocError, match=f"{name} goes to the VirtualCache"):
                getattr(layer, name)(argument)
        with pytest.raises(VmallocError, match="cannot be replaced"):
            layer.keys = torch.zeros(1)

    def test_a_layer_that_lags_behind_shared_rows(self, cache: Any) -> None:
        """After a pass that stopped half-way, shared rows must not be written over."""
        update(cache, 2, 40, 1)
        cache.update(*states(2, 40, 2, 0), 0)
        cache.reorder_cache(torch.tensor([0, 0]))
        with pytest.raises(VmallocError, match="token 40 would be written anew"):
            cache.update(*states(2, 40, 2, 1), 1)

    def test_gradients(self, cache: Any) -> None:
        keys, values = (state.requires_grad_() for state in states(1, 4, 1))
        out, _ = cache.update(keys, values, 0)
        assert torch.equal(out, keys)
        with pytest.raises(InferenceOnlyError, match="for inference"):
            out.sum().backward()

    def test_pickling(self, cache: Any) -> None:
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(cache)

    def test_use_after_close(self, cache: Any) -> None:
        update(cache, 1, 4, 1)
        cache.close()
        for call in (
            lambda: update(cache, 1, 1, 2),
            lambda: cache.layers[0].keys,
            cache.reset,
            cache.trim,
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([0])),
        ):
            with pytest.raises(ClosedError, match="closed"):
                call()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_batch": 0}, "max_batch is 0; it must be at least 1"),
            ({"max_len": -1}, "max_len is -1"),
            ({"capacity_bytes": 0}, "capacity_bytes is 0"),
            ({"commit_ahead_tokens": -1}, "commit_ahead_tokens is -1"),
        ],
    )
    def test_settings(self, settings: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            VirtualCache(make_config(), **settings)

    def test_what_is_no_config(self) -> None:
        with pytest.raises(ConfigError, match=r"config is int; .* give it model\.config"):
            VirtualCache(7)

    def test_reserving_late_or_for_nothing(self, cache: Any) -> None:
        with pytest.raises(ConfigError, match="max_len is 0"):
            cache.reserve(1, 0)
        update(cache, 1, 4, 1)
        with pytest.raises(ConfigError, match="holds 4 tokens; reserve"):
            cache.reserve(4, 100)
        cache.reset()
        cache.reserve(2, 10)
        update(cache, 2, 10, 1)
        with pytest.raises(CacheFullError, match="max_len is 10"):
            update(cache, 2, 1, 2)


class TestUnequalLayers:
    def test_each_new_shape_lays_the_rows_out_anew(self) -> None:
        """Nobody says beforehand what layers store; the first forward pass shows it."""
        shapes = [{"num_heads": 3}, {"num_heads": 1, "k_dim": 64}, {"num_heads": 3}]
        theirs = DynamicCache(config=make_config())
        with VirtualCache(make_config(), page_bytes=PAGE) as ours:
            for seed, num_tokens in enumerate((30, 1, 1, 9)):
                for layer, shape in enumerate(shapes):
                    given = states(2, num_tokens, seed, layer, **shape)
                    mine, other = ours.update(*given, layer), theirs.update(*given, layer)
                    assert torch.equal(mine[0], other[0])
                    assert torch.equal(mine[1], other[1])
                ours.check_invariants()
            ours.reorder_cache(torch.tensor([1, 1]))
            theirs.reorder_cache(torch.tensor([1, 1]))
            for mine, other in zip(ours.layers, theirs.layers, strict=True):
                assert torch.equal(mine.keys, other.keys)

    def test_max_batch_grows_while_nobody_is_there(self) -> None:
        with VirtualCache(make_config()) as cache:
            update(cache, 1, 4, 1)
            cache.reset()
            update(cache, 300, 4, 2)
            assert cache.stats().batch_size == 300


def test_stats_before_anything_happened() -> None:
    with VirtualCache(make_config()) as cache:
        stats = cache.stats()
        assert stats.num_virtual_layers == NUM_LAYERS
        assert stats.reserved_bytes == stats.committed_bytes == stats.num_tokens == 0
        assert cache.get_max_length() == -1  # nobody named a limit
        cache.crop(-1)
        cache.reset()
        cache.batch_repeat_interleave(2)  # like DynamicCache: nothing to repeat
        assert cache.layers[0].keys is None


def test_the_first_call_reserves_the_models_maximum() -> None:
    made = model("llama")
    with VirtualCache(made) as cache:
        generate(made, one(), past_key_values=cache)
        row_bytes = 2 * 3 * 8 * 4
        assert cache.stats().reserved_bytes >= 64 * 160 * 3 * row_bytes
