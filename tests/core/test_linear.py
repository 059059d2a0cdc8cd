"""Linear products against float64, the bitwise promises they make, and what they refuse.

Owns: nothing.  Thread-safety: single-threaded tests; they set the core's own thread count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.attention_batches import run_on_isa
from vmalloc import _core
from vmalloc.errors import ConfigError

NAN = float("nan")
STORE, ADD, SILU_GATE, GELU_GATE = range(4)
# Of a sum of K products in float32, as a share of the sum of their magnitudes: one rounding for
# each of the products that follow each other in a lane, of which there are at least 4, and a few.
ROUNDING = 2.0**-24


@dataclass
class Product:
    """One call: tensors whose rows may lie apart, and what becomes of the product."""

    x: Tensor
    weight: Tensor
    out: Tensor
    bias: Tensor | None = None
    up: Tensor | None = None
    up_bias: Tensor | None = None
    epilogue: int = STORE
    scale: float = 1.0


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Tests leave the thread count as they found it."""
    before = _core.num_threads()
    _core.set_num_threads(2)
    yield
    _core.set_num_threads(before)


def run(products: Sequence[Product], num_rows: int | None = None) -> None:
    """All products in one call of the core."""

    def rows(tensor: Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), tensor.stride(0)

    def weight(tensor: Tensor, bias: Tensor | None) -> tuple[int, int, int, int, int]:
        address = 0 if bias is None else bias.data_ptr()
        return tensor.data_ptr(), tensor.stride(0), address, *tensor.shape

    calls = [
        (
            rows(p.x),
            weight(p.weight, p.bias),
            None if p.up is None else weight(p.up, p.up_bias),
            rows(p.out),
            p.epilogue,
            p.scale,
        )
        for p in products
    ]
    _core.linear(calls, len(products[0].x) if num_rows is None else num_rows)


def in_wider_rows(tensor: Tensor, padding: int = 3) -> Tensor:
    """The same values in rows that lie apart, NaN in between."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + padding), NAN)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def reference(p: Product) -> tuple[Tensor, Tensor]:
    """The result in float64, and a bound of the error that float32 may make."""

    def product(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        exact = F.linear(p.x.double(), weight.double())
        bound = F.linear(p.x.double().abs(), weight.double().abs())
        if bias is not None:
            exact, bound = exact + bias.double(), bound + bias.double().abs()
        return exact, (weight.shape[1] / 4 + 16) * ROUNDING * bound

    exact, bound = product(p.weight, p.bias)
    if p.epilogue in (STORE, ADD):
        before = p.out.double() if p.epilogue == ADD else torch.zeros(())
        exact = before + p.scale * exact
        return exact, abs(p.scale) * bound + 2 * ROUNDING * (exact.abs() + before.abs())
    assert p.up is not None
    up, up_bound = product(p.up, p.up_bias)
    gated = F.silu(exact) if p.epilogue == SILU_GATE else F.gelu(exact, approximate="tanh")
    # Neither gate is steeper than 1.13; exp and tanh are good to a few of their last bits.
    gate_bound = 1.2 * bound + 32 * ROUNDING * exact.abs()
    return gated * up, (gated.abs() + gate_bound) * up_bound + up.abs() * gate_bound + 1e-30


def check(products: Sequence[Product]) -> None:
    """Run them and hold every result to its bound."""
    expected = [reference(p) for p in products]
    run(products)
    for p, (exact, bound) in zip(products, expected, strict=True):
        excess = ((p.out.double() - exact).abs() - bound).max().item()
        assert excess <= 0, f"error beyond the bound by {excess}"


def random_product(
    num_rows: int, in_features: int, out_features: int, *, epilogue: int = STORE, seed: int = 0
) -> Product:
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    gated = epilogue in (SILU_GATE, GELU_GATE)
    return Product(
        in_wider_rows(values(num_rows, in_features)),
        in_wider_rows(values(out_features, in_features)),
        in_wider_rows(values(num_rows, out_features)),
        bias=values(out_features),
        up=in_wider_rows(values(out_features, in_features)) if gated else None,
        up_bias=values(out_features) if gated else None,
        epilogue=epilogue,
        scale=1.0 if gated else 0.75,
    )


# ---- against float64


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 16, 17, 73, 150])
@pytest.mark.parametrize("in_features", [1, 7, 16, 100, 769, 1600])
@pytest.mark.parametrize("out_features", [1, 2, 3, 4, 67, 130])
def test_odd_sizes_match_float64(num_rows: int, in_features: int, out_features: int) -> None:
    check([random_product(num_rows, in_features, out_features)])


@pytest.mark.parametrize("epilogue", [STORE, ADD, SILU_GATE, GELU_GATE])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 33])
def test_epilogues_match_float64(epilogue: int, has_bias: bool, num_rows: int) -> None:
    product = random_product(num_rows, 130, 91, epilogue=epilogue)
    if not has_bias:
        product = replace(product, bias=None, up_bias=None)
    check([product])


@pytest.mark.parametrize("gate", [SILU_GATE, GELU_GATE])
def test_gates_saturate_as_torchs_do(gate: int) -> None:
    values = [-1e30, -1e4, -100.0, -88.5, -20.0, -1.0, -0.0, 0.0, 1e-20, 1.0, 20.0, 100.0, 1e4]
    x = torch.tensor(values)[:, None]
    out = torch.empty(len(values), 1)
    one = torch.ones(1, 1)
    run([Product(x, one, out, up=one, epilogue=gate)])
    expected = F.silu(x) if gate == SILU_GATE else F.gelu(x, approximate="tanh")
    torch.testing.assert_close(out, expected * x, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("gate", [SILU_GATE, GELU_GATE])
def test_nan_stays_nan_in_its_row(gate: int) -> None:
    product = random_product(5, 40, 9, epilogue=gate)
    product.x[2, 17] = NAN
    run([product])
    assert product.out[2].isnan().all()
    assert product.out[[0, 1, 3, 4]].isfinite().all()


def test_products_of_different_shapes_run_together() -> None:
    products = [
        random_product(19, in_features, out_features, epilogue=epilogue, seed=seed)
        for seed, (in_features, out_features, epilogue) in enumerate(
            [(256, 256, STORE), (256, 6, ADD), (7, 300, STORE), (256, 700, SILU_GATE)]
        )
    ]
    check(products)


def test_nothing_outside_the_rows_is_read_or_written() -> None:
    product = random_product(6, 21, 13, epilogue=GELU_GATE)
    check([product])
    for tensor in (product.x, product.weight, product.out):
        base = tensor._base
        assert base is not None
        assert base[:, tensor.shape[1] :].isnan().all()


def test_rows_may_alternate_in_one_buffer() -> None:
    buffer = torch.randn(9, 30 + 20 + 10)
    x, first, second = buffer.split([30, 20, 10], dim=1)
    products = [
        Product(x, torch.randn(20, 30), first),
        Product(x, torch.randn(10, 30), second, epilogue=ADD),
    ]
    check(products)


def test_no_rows_are_fine() -> None:
    product = random_product(4, 8, 8)
    before = product.out.clone()
    run([product], num_rows=0)
    _core.linear([], 3)
    assert torch.equal(product.out, before)


# ---- the same bits, whatever else is computed


@pytest.mark.parametrize("epilogue", [STORE, SILU_GATE])
@pytest.mark.parametrize("in_features", [64, 250, 1000])
def test_bits_do_not_depend_on_the_other_rows(in_features: int, epilogue: int) -> None:
    whole = random_product(97, in_features, 75, epilogue=epilogue)
    run([whole])
    for first, end in [(0, 1), (96, 97), (3, 5), (10, 13), (20, 24), (1, 17), (0, 64), (5, 97)]:
        part = replace(whole, x=whole.x[first:end], out=torch.empty(end - first, 75))
        run([part])
        assert torch.equal(part.out, whole.out[first:end]), (first, end)
    backwards = replace(whole, x=whole.x.flip(0), out=torch.empty(97, 75))
    run([backwards])
    assert torch.equal(backwards.out.flip(0), whole.out)


@pytest.mark.parametrize("epilogue", [STORE, GELU_GATE])
def test_bits_do_not_depend_on_the_other_columns(epilogue: int) -> None:
    whole = random_product(18, 300, 203, epilogue=epilogue)
    run([whole])
    for first, end in [(0, 1), (1, 4), (2, 203), (199, 203), (60, 131)]:
        columns = slice(first, end)
        part = replace(
            whole,
            weight=whole.weight[columns],
            bias=None if whole.bias is None else whole.bias[columns],
            up=None if whole.up is None else whole.up[columns],
            up_bias=None if whole.up_bias is None else whole.up_bias[columns],
            out=torch.empty(18, end - first),
        )
        run([part])
        assert torch.equal(part.out, whole.out[:, columns]), (first, end)


@pytest.mark.parametrize("num_rows", [1, 16, 100])
def test_bits_do_not_depend_on_threads_or_other_calls(num_rows: int) -> None:
    products = [
        random_product(num_rows, 512, 512, seed=1),
        random_product(num_rows, 512, 1100, epilogue=SILU_GATE, seed=2),
    ]
    _core.set_num_threads(1)
    alone = []
    for p in products:
        run([p])
        alone.append(p.out.clone())
    for threads in (1, 2, 5):
        _core.set_num_threads(threads)
        for order in (products, products[::-1]):
            for p in products:
                p.out.fill_(NAN)
            run(order)
            for p, expected in zip(products, alone, strict=True):
                assert torch.equal(p.out, expected)


ISA_SCRIPT = """
from tests.core import test_linear as cases
from vmalloc import _core
for num_rows in (1, 3, 17, 73):
    for in_features in (7, 100, 769):
        for out_features in (3, 67):
            cases.test_odd_sizes_match_float64(num_rows, in_features, out_features)
for epilogue in range(4):
    cases.test_epilogues_match_float64(epilogue, True, 33)
for gate in (2, 3):
    cases.test_bits_do_not_depend_on_the_other_columns(gate)
    cases.test_gates_saturate_as_torchs_do(gate)
    cases.test_nan_stays_nan_in_its_row(gate)
    cases.test_bits_do_not_depend_on_the_other_rows(250, gate)
print(_core.attention_isa())
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets_agree_with_the_reference(isa: str) -> None:
    result = run_on_isa(ISA_SCRIPT, isa)
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() != isa:
        pytest.skip(f"this CPU has no {isa}")


# ---- what is refused, with nothing written

Change = Callable[[Product], Product]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: replace(p, x=p.x.as_strided((4, 8), (7, 1))),
            r"calls\[0\].x_stride is 7, must be at least the row's length, 8",
        ),
        (
            lambda p: replace(p, out=p.out.as_strided((4, 6), (5, 1))),
            r"calls\[0\].out_stride is 5, must be at least the row's length, 6",
        ),
        (
            lambda p: replace(p, weight=p.weight.as_strided((6, 8), (4, 1))),
            r"calls\[0\].weight.row_stride is 4, must be at least the row's length, 8",
        ),
        (
            lambda p: replace(p, weight=p.weight[:0]),
            r"calls\[0\].weight.(data is null|out_features is 0, must be at least 1)",
        ),
        (
            lambda p: replace(p, weight=p.weight[:, :0]),
            r"calls\[0\].weight.(data is null|in_features is 0, must be at least 1)",
        ),
        (lambda p: replace(p, epilogue=4), r"calls\[0\].epilogue is 4, must be in \[0, 3\]"),
        (lambda p: replace(p, epilogue=SILU_GATE), r"calls\[0\].up.data is null"),
        (
            lambda p: replace(p, epilogue=SILU_GATE, up=p.weight[:5]),
            r"calls\[0\].up.out_features is 5, must be the gate's, 6",
        ),
        (
            lambda p: replace(p, epilogue=GELU_GATE, up=p.weight[:, :7]),
            r"calls\[0\].up.in_features is 7, must be the gate's, 8",
        ),
        (
            lambda p: replace(p, epilogue=GELU_GATE, up=p.weight, scale=2.0),
            r"calls\[0\].scale is 2.0+, must be 1 with a gate",
        ),
        (
            lambda p: replace(p, out=p.x[:, :6]),
            r"calls\[0\].out shares memory with calls\[0\].x",
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name(change: Change, message: str) -> None:
    good = Product(torch.randn(4, 8), torch.randn(6, 8), torch.full((4, 6), 3.0))
    bad = change(good)
    with pytest.raises(ConfigError, match=message):
        run([bad])
    assert torch.equal(good.out, torch.full((4, 6), 3.0))


def test_outputs_that_share_memory_are_refused() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    buffer = torch.empty(4, 11)
    products = [Product(x, weight, buffer[:, :6]), Product(x, weight, buffer[:, 5:])]
    with pytest.raises(ConfigError, match=r"calls\[0\].out shares memory with calls\[1\].out"):
        run(products)


def test_one_row_that_shares_memory_is_refused_whatever_its_stride() -> None:
    buffer = torch.full((1, 12), 3.0)
    x, out = buffer.as_strided((1, 8), (0, 1)), buffer.as_strided((1, 6), (0, 1), 4)
    with pytest.raises(ConfigError, match=r"calls\[0\].out shares memory with calls\[0\].x"):
        run([Product(x, torch.ones(6, 8), out)])
    assert (buffer == 3.0).all()


def test_negative_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_rows is -1, must be at least 0"):
        run([random_product(2, 3, 4)], num_rows=-1)
