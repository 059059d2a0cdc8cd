"""Draws against the plain definition in float64, and what a draw must not depend on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention_batches import run_on_isa
from vmalloc import _core
from vmalloc.errors import ConfigError
from vmalloc.kernels.draw_cpu import RandomKeys, draw

# kat_vectors of Random123, "philox 4x32 10".
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def keys_of(count: int, seed: int = 11) -> RandomKeys:
    return RandomKeys([seed] * count, [0] * count, list(range(count)))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    assert _core.philox4x32(words(counter), words(key)) == words(expected)


def test_uniforms_depend_on_their_own_key_alone_and_fill_the_unit_interval() -> None:
    seeds, positions = [2**64 - 1, 5, 5, 5] * 2000, list(range(8000))
    numbers = RandomKeys(seeds, [0] * 8000, positions).uniforms()
    assert numbers[4321] == RandomKeys([seeds[4321]], [0], [4321]).uniforms()[0]
    assert 0.0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 0.02
    assert RandomKeys([5], [0], [1]).uniforms() != RandomKeys([5], [1], [1]).uniforms()
    assert RandomKeys([5], [0], [1]).uniforms() != RandomKeys([5 + 2**32], [0], [1]).uniforms()


@pytest.mark.parametrize("vocab_size", [1, 3, 16, 17, 500, 50_257])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_a_draw_inverts_the_cumulative_distribution(vocab_size: int, temperature: float) -> None:
    num_rows = 4000 if vocab_size < 1000 else 20
    torch.manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size) * 4
    logits[1::3, ::2] = -math.inf  # masked
    logits[:, -1] = 1.0  # so that something is left in each row
    keys = keys_of(num_rows)
    drawn = draw(logits, range(num_rows), [temperature] * num_rows, keys)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1).numpy()
    at = np.arange(num_rows)
    above = cumulative[at, drawn]
    below = np.where(np.array(drawn) > 0, cumulative[at, np.array(drawn) - 1], 0.0)
    numbers = keys.uniforms()
    assert (below <= numbers + 1e-6).all()
    assert (numbers <= above + 1e-6).all()
    assert torch.isfinite(logits[at, drawn]).all()


def test_the_number_that_is_almost_one_draws_the_last_token_that_has_a_chance() -> None:
    logits = torch.full((1, 40), -math.inf)
    logits[0, :21] = torch.rand(21)
    seeds = list(range(300_000))
    numbers = np.array(_core.uniforms(seeds, [0] * len(seeds), [0] * len(seeds)))
    seed = int(numbers.argmax())
    assert numbers[seed] > 0.99999
    assert draw(logits, [0], [1.0], RandomKeys([seed], [0], [0])) == [20]
    assert draw(logits, [0], [1.0], RandomKeys([int(numbers.argmin())], [0], [0])) == [0]


def test_temperatures_of_every_size_have_their_limits() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1000, 30) * 50
    cold = draw(logits, range(1000), [1e-30] * 1000, keys_of(1000))
    assert cold == logits.argmax(-1).tolist()
    hot = draw(logits, range(1000), [1e30] * 1000, keys_of(1000))
    assert hot == [int(number * 30) for number in keys_of(1000).uniforms()]


def test_a_draw_depends_on_no_other_row_and_on_no_thread() -> None:
    torch.manual_seed(2)
    logits = torch.randn(200, 1003)
    temperatures = torch.rand(200).add(0.5).tolist()
    before = _core.num_threads()
    try:
        _core.set_num_threads(1)
        alone = [
            draw(logits[row : row + 1], [0], [temperatures[row]], RandomKeys([11], [0], [row]))[0]
            for row in range(200)
        ]
        for num_threads in (1, 2, 3):
            _core.set_num_threads(num_threads)
            assert draw(logits, range(200), temperatures, keys_of(200)) == alone
    finally:
        _core.set_num_threads(before)
    odd = range(1, 200, 2)
    keys = RandomKeys([11] * 100, [0] * 100, list(odd))
    assert draw(logits, odd, temperatures[1::2], keys) == alone[1::2]


def test_rows_without_a_finite_maximum_give_some_token() -> None:
    logits = torch.zeros(3, 20)
    logits[0] = -math.inf
    logits[1, 3] = math.nan
    logits[2, 3] = math.inf
    drawn = draw(logits, range(3), [1.0] * 3, keys_of(3))
    assert all(0 <= token_id < 20 for token_id in drawn)


def test_nothing_to_draw_is_fine() -> None:
    assert draw(torch.zeros(2, 5), [], [], RandomKeys()) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rows": [2]}, r"row is 2, must be in \[0, 2\)"),
        ({"rows": [-1]}, "row is -1"),
        ({"rows": [0, 1]}, "temperatures has 1 entries, must be 2"),
        ({"temperatures": [0.0]}, "temperature is 0"),
        ({"temperatures": [math.nan]}, "temperature is nan"),
        ({"keys": RandomKeys([1], [0], [])}, "positions has 0 entries, must be 1"),
        ({"logits": torch.zeros(2, 0)}, "vocab_size is 0"),
        ({"logits": torch.zeros(2, 5).double()}, "logits are torch.float64"),
        ({"logits": torch.zeros(5, 2).T}, "strides"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changed: dict[str, Any], reason: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(2, 5),
        "rows": [0],
        "temperatures": [1.0],
        "keys": RandomKeys([1], [0], [0]),
    }
    with pytest.raises(ConfigError, match=reason):
        draw(**(arguments | changed))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets_draw_the_same_but_at_borders(isa: str) -> None:
    result = run_on_isa(DRAWS, isa)
    assert result.returncode == 0, result.stderr
    name, *drawn = result.stdout.split()
    if name != isa:
        pytest.skip(f"this CPU has no {isa}")
    torch.manual_seed(3)
    logits = torch.randn(500, 77)
    own = draw(logits, range(500), [1.0] * 500, keys_of(500))
    cumulative = logits.double().softmax(-1).cumsum(-1)
    for row, (token_id, other) in enumerate(zip(own, map(int, drawn), strict=True)):
        if token_id != other:
            border = float(cumulative[row, min(token_id, other)])
            assert abs(border - keys_of(500).uniforms()[row]) < 1e-6


DRAWS = """
import torch
from vmalloc import _core
from vmalloc.kernels.draw_cpu import RandomKeys, draw
torch.manual_seed(3)
keys = RandomKeys([11] * 500, [0] * 500, list(range(500)))
print(_core.attention_isa(), *draw(torch.randn(500, 77), range(500), [1.0] * 500, keys))
"""
