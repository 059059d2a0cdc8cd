"""The native decoder: bits that depend on a row's own sequence alone, and refusals by name.

What it computes is held against transformers in tests/engine/fused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention_batches import make_view, run_on_isa
from vmalloc import _core
from vmalloc.errors import ConfigError
from vmalloc.kernels.decoder_cpu import CpuDecoder, decoder_cache
from vmalloc.kernels.decoder_spec import DecoderSpec, LayerSpec, Norm, Projection

HIDDEN, WIDTH, VOCAB = 44, 52, 37  # no multiples of any vector
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 3, 40
NUM_SLOTS, NUM_ROWS = 6, 70
POISON = 7e7


def make_spec(**changes: Any) -> DecoderSpec:
    """Two layers with every part that there is."""
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    def projection(out_features: int, in_features: int) -> Projection:
        return Projection(weights(out_features, in_features), weights(out_features))

    def norm(size: int, offset: float = 0.0) -> Norm:
        return Norm(weights(size) + 1.0, 1e-5, offset)

    query_size, kv_size = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    layers = tuple(
        LayerSpec(
            query=projection(query_size, HIDDEN),
            key=projection(kv_size, HIDDEN),
            value=projection(kv_size, HIDDEN),
            output=projection(HIDDEN, query_size),
            gate=projection(WIDTH, HIDDEN),
            up=projection(WIDTH, HIDDEN),
            down=projection(HIDDEN, WIDTH),
            before_attention=norm(HIDDEN),
            after_attention=norm(HIDDEN, 1.0),
            before_mlp=norm(HIDDEN),
            after_mlp=None,
            query_norm=norm(HEAD_DIM),
            key_norm=norm(HEAD_DIM),
            softmax_scale=0.3,
            softcap=5.0,
            window=window,
            rope_idx=0,
        )
        for window in (None, 9)
    )
    angles = torch.arange(NUM_ROWS)[:, None] * torch.logspace(0, -2, 14)  # 28 of 40 elements turn
    spec = DecoderSpec(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        embedding=weights(VOCAB, HIDDEN),
        embedding_multiplier=2.0,
        layers=layers,
        activation="silu",
        residual_multiplier=0.7,
        final_norm=norm(HIDDEN),
        head=projection(VOCAB, HIDDEN),
        logit_multiplier=0.5,
        logit_softcap=4.0,
        ropes=(torch.stack([angles.cos(), angles.sin()], dim=1).contiguous(),),
    )
    return dataclasses.replace(spec, **changes)


class Sequences:
    """A decoder over slots that start out poisoned."""

    def __init__(self, spec: DecoderSpec | None = None) -> None:
        self.decoder = CpuDecoder(spec or make_spec())
        shape = (NUM_SLOTS, NUM_ROWS, NUM_KV_HEADS, HEAD_DIM)
        self.views = [(torch.full(shape, POISON), torch.full(shape, POISON)) for _ in range(2)]
        self.cache = decoder_cache(self.views)
        self.lens = [0] * NUM_SLOTS

    def compute(self, parts: list[tuple[int, list[int]]], rows: list[int] | None = None) -> Tensor:
        """Go on with tokens in some slots; logits of some packed rows, all by default."""
        starts = [self.lens[slot] for slot, _ in parts]
        for slot, tokens in parts:
            self.lens[slot] += len(tokens)
        token_ids = torch.tensor([token for _, tokens in parts for token in tokens])
        positions = torch.cat(
            [
                torch.arange(start, start + len(tokens))
                for start, (_, tokens) in zip(starts, parts, strict=True)
            ]
        )
        wanted = torch.tensor(list(range(len(token_ids))) if rows is None else rows).long()
        logits = torch.full((len(wanted), VOCAB), POISON)
        view = make_view(
            [len(tokens) for _, tokens in parts],
            [self.lens[slot] for slot, _ in parts],
            [slot for slot, _ in parts],
        )
        self.decoder.forward(self.cache, token_ids, positions, wanted, view, logits)
        return logits


PROMPT = [(7 * idx + 3) % VOCAB for idx in range(50)]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Tests leave the thread count as they found it."""
    before = _core.num_threads()
    _core.set_num_threads(2)
    yield
    _core.set_num_threads(before)


def test_rows_do_not_depend_on_cuts_mates_slots_or_threads() -> None:
    whole = Sequences().compute([(0, PROMPT)])
    one_by_one = Sequences()
    for idx, token in enumerate(PROMPT):
        assert torch.equal(one_by_one.compute([(3, [token])])[0], whole[idx])
    mixed = Sequences()
    mixed.compute([(1, [5]), (2, PROMPT[:20]), (4, [9] * 31)])
    beside = mixed.compute([(4, [1, 2]), (2, PROMPT[20:49]), (1, [6])])
    assert torch.equal(beside[2:31], whole[20:49])
    for threads in (1, 3):
        _core.set_num_threads(threads)
        assert torch.equal(mixed.compute([(2, PROMPT[49:])])[0], whole[49])
        mixed.lens[2] = 49
    assert whole.isfinite().all()
    assert whole.abs().max() <= 4.0  # capped


@pytest.mark.parametrize(
    "rows", [[], [19], [0], [5, 19, 20], [18, 19, 30, 31], list(range(20)), [3, 19, 31], [20, 21]]
)
def test_any_rows_may_be_asked_for(rows: list[int]) -> None:
    parts = [(0, PROMPT[:20]), (1, PROMPT[7:19])]
    sequences, expected = Sequences(), Sequences()
    logits = sequences.compute(parts, rows)
    assert torch.equal(logits, expected.compute(parts)[rows])
    for ours, theirs in zip(sequences.views, expected.views, strict=True):
        assert torch.equal(ours[0], theirs[0])  # K and V of every row are there all the same
        assert torch.equal(ours[1], theirs[1])


def test_nothing_but_the_new_rows_is_written() -> None:
    sequences = Sequences()
    sequences.compute([(2, PROMPT[:5])])
    for k, v in sequences.views:
        for cache in (k, v):
            assert (cache[2, :5] != POISON).all()
            assert (cache[2, 5:] == POISON).all()
            assert (cache[[0, 1, 3, 4, 5]] == POISON).all()


@pytest.mark.parametrize(
    ("parts", "rows", "message"),
    [
        ([(0, [1, VOCAB])], None, r"token_ids\[1\] is 37, must be in \[0, 36\]"),
        ([(0, [-1])], None, r"token_ids\[0\] is -1"),
        ([(0, [1] * 71)], None, r"seqused_k\[0\] is 71"),
        ([(6, [1])], None, r"cache_batch_idx\[0\] is 6"),
        ([(0, [1, 2])], [2], r"rows\[0\] is 2, must be in \[0, 1\]"),
        ([(0, [1, 2])], [1, 0], r"rows\[1\] is 0, must be above the one before it, 1"),
        ([(0, [1, 2])], [1, 1], r"rows\[1\] is 1, must be above"),
    ],
)
def test_what_is_out_of_range_is_named_and_writes_nothing(
    parts: Any, rows: Any, message: str
) -> None:
    sequences = Sequences()
    sequences.lens.append(0)
    with pytest.raises(ConfigError, match=message):
        sequences.compute(parts, rows)
    assert all((view == POISON).all() for views in sequences.views for view in views)


def test_positions_past_the_rotary_table_are_refused() -> None:
    spec = make_spec()
    short = dataclasses.replace(spec, ropes=(spec.ropes[0][:20].contiguous(),))
    sequences = Sequences(short)
    sequences.compute([(0, PROMPT[:20])])
    with pytest.raises(ConfigError, match=r"positions\[0\] is 20, must be in \[0, 19\]"):
        sequences.compute([(0, [1])])


WITHOUT_NORMS = tuple(
    dataclasses.replace(layer, query_norm=None, key_norm=None) for layer in make_spec().layers
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads is 5, must be a multiple of num_kv_heads, 3"),
        ({"head_dim": 36}, r"a norm has shape \(40,\), must be \(216,\)"),
        ({"head_dim": 36, "layers": WITHOUT_NORMS}, "k_head_dim is 36, must be a multiple of 8"),
        ({"num_kv_heads": 2}, r"layers\[0\].key.out_features is 120, must be 80"),
        ({"layers": ()}, "layers is 0, must be at least 1"),
        ({"ropes": ()}, r"layers\[0\].rope_idx is 0, must be -1"),
        ({"final_norm": Norm(torch.ones(3), 1e-5)}, r"a norm has shape \(3,\), must be \(44,\)"),
        ({"activation": "relu"}, "activation is 'relu'; supported: silu, gelu_tanh"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(changes: Any, message: str) -> None:
    spec = make_spec(**changes)
    with pytest.raises(ConfigError, match=message):
        CpuDecoder(spec)


def test_wrong_tensors_are_refused() -> None:
    sequences = Sequences()
    view = make_view([1], [1], [0])
    one, logits = torch.zeros(1, dtype=torch.int64), torch.zeros(1, VOCAB)
    arguments = (sequences.cache, one, one, one, view, logits)
    sequences.decoder.forward(*arguments)
    for place, wrong, message in [
        (1, one.int(), "must be contiguous torch.int64"),
        (2, torch.zeros(2, dtype=torch.int64), "positions has 2 entries, must be 1"),
        (5, logits.double(), "must be contiguous torch.float32"),
        (5, torch.zeros(2, VOCAB), "must be contiguous torch.float32"),
    ]:
        changed: Any = [*arguments[:place], wrong, *arguments[place + 1 :]]
        with pytest.raises(ConfigError, match=message):
            sequences.decoder.forward(*changed)
    half = [(k.bfloat16(), v) for k, v in sequences.views]
    with pytest.raises(ConfigError, match=r"the cache is torch\.bfloat16"):
        decoder_cache(half)


def all_weights(spec: DecoderSpec) -> list[Tensor]:
    parts = [spec.head, spec.final_norm]
    for layer in spec.layers:
        parts += [layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up]
        parts += [layer.down, layer.before_attention, layer.after_attention, layer.before_mlp]
        parts += [layer.query_norm, layer.key_norm]
    weights = [part.weight for part in parts]
    biases = [part.bias for part in parts if isinstance(part, Projection) and part.bias is not None]
    return [spec.embedding, *weights, *biases]


def test_weights_whose_memory_moves_are_found_again() -> None:
    spec = make_spec()
    sequences = Sequences(spec)
    expected = Sequences().compute([(0, PROMPT[:5])])
    weights = all_weights(spec)
    before = [weight.data_ptr() for weight in weights]
    for weight in weights:
        weight.share_memory_()  # in other memory; the former is freed
    assert all(weight.data_ptr() != old for weight, old in zip(weights, before, strict=True))
    one_by_one = [sequences.compute([(1, [token])])[0] for token in PROMPT[:5]]
    assert torch.equal(torch.stack(one_by_one), expected)
    spec.embedding.zero_()  # seen only where it is now
    changed = sequences.compute([(2, PROMPT[:5])])
    assert not torch.equal(changed, expected)
    fresh = make_spec()
    fresh.embedding.zero_()
    assert torch.equal(changed, Sequences(fresh).compute([(0, PROMPT[:5])]))


@pytest.mark.parametrize("place", range(len(all_weights(make_spec()))))
def test_any_one_weight_that_moves_is_found_again_in_a_prompt(place: int) -> None:
    spec = make_spec()
    sequences = Sequences(spec)
    weight = all_weights(spec)[place]
    weight.share_memory_()
    weight.add_(1.0)
    fresh = make_spec()
    all_weights(fresh)[place].add_(1.0)
    expected = Sequences(fresh).compute([(0, PROMPT[:5])])
    assert torch.equal(sequences.compute([(0, PROMPT[:5])]), expected)


def test_a_weight_whose_storage_was_freed_is_refused() -> None:
    spec = make_spec()
    sequences = Sequences(spec)
    spec.layers[1].before_mlp.weight.untyped_storage().resize_(0)  # type: ignore[union-attr]
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"a weight of shape \(44,\) has no memory"):
            sequences.compute([(0, PROMPT[:5])])
        sequences.lens[0] = 0
    assert all((view == POISON).all() for views in sequences.views for view in views)


def test_scratch_memory_grows_with_the_largest_batch_only() -> None:
    sequences = Sequences()
    assert sequences.decoder.scratch_bytes == 0
    sequences.compute([(0, PROMPT)])
    taken = sequences.decoder.scratch_bytes
    assert taken > 0
    sequences.compute([(1, PROMPT[:30]), (2, [1])])
    assert sequences.decoder.scratch_bytes == taken


SCRIPT = """
import json
from tests.kernels.test_decoder_cpu import PROMPT, Sequences
sequences = Sequences()
logits = sequences.compute([(0, PROMPT), (1, PROMPT[:3])])
print(json.dumps([sequences.decoder.name, logits.tolist()]))
"""


def test_every_instruction_set_gives_the_same_logits() -> None:
    results = {}
    for isa in ("portable", "avx2", "avx512"):
        result = run_on_isa(SCRIPT, isa)
        assert result.returncode == 0, result.stderr
        name, logits = json.loads(result.stdout)
        results[name] = torch.tensor(logits)
    assert "fused_portable" in results
    for logits in results.values():
        torch.testing.assert_close(logits, results["fused_portable"], rtol=0, atol=1e-5)
