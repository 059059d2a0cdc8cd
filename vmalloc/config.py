"""What a KV cache is made of: validated, frozen settings.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from .device import DriverName, check_device, device_index, resolve_driver
from .errors import ConfigError

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Element types a cache may hold, and their size in bytes."""

DEFAULT_PAGE_BYTES = 64 * 1024
"""Page size of the host and null drivers: mapping costs about the same for any size, and at 64 KiB
a page holds few enough tokens that partly filled ones waste little. The CUDA driver's default is
its granularity, 2 MiB on today's devices."""

CommitPolicy = Literal["on_demand", "max_length", "power_of_two", "oracle"]
"""How much is backed when a sequence is admitted. ``on_demand`` backs its rows and grows; the
others reserve at once, as the systems do that the PagedAttention paper (SOSP 2023) compares with:
``max_length`` the longest sequence (FasterTransformer, Orca Max), ``power_of_two`` the prompt and
the output rounded up to a power of two (Orca Pow2), ``oracle`` just what it will need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKVSpec:
    """What one layer stores for one token: ``num_kv_heads`` keys and as many values.

    Attributes:
        num_kv_heads: heads of K and V (fewer than query heads under grouped-query attention).
        k_head_dim, v_head_dim: elements of one key and of one value.
        dtype: element type, a key of ``DTYPE_BYTES``.
        window: tokens a sliding-window layer looks back, or None. All rows are kept all the same;
            the attention kernel applies the window.
    """

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype: str = "float32"
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "k_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"KV dtype is {self.dtype!r}; supported: {', '.join(DTYPE_BYTES)}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window is {self.window}; it must be at least 1, or None")

    @property
    def k_bytes(self) -> int:
        """Bytes of one token's keys."""
        return self.num_kv_heads * self.k_head_dim * DTYPE_BYTES[self.dtype]

    @property
    def v_bytes(self) -> int:
        """Bytes of one token's values."""
        return self.num_kv_heads * self.v_head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.k_bytes + self.v_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheConfig:
    """Everything a ``KVBackend`` needs to know.

    Attributes:
        layers: one spec per layer, in layer order.
        max_num_seqs: most sequences that are live at once.
        max_seq_len: most tokens of one sequence.
        capacity_bytes: hard cap on physical memory. Nothing is taken at start, but for the paged
            backend on CUDA, which takes all of it.
        device: where the tensors live: ``"cpu"``, ``"cuda"`` (which is ``"cuda:0"``) or
            ``"cuda:N"``.
        driver: where physical pages come from. ``"auto"``: the host's memory on ``"cpu"``, CUDA's
            on ``"cuda"``; ``"null"`` counts pages and holds no memory (for simulations).
            ``"cuda"`` on device ``"cpu"`` is for tests over a stand-in for the CUDA driver.
        page_bytes: physical unit; a multiple of the driver's granularity. None: its default
            (64 KiB on the host driver, the granularity on the CUDA driver).
        layers_per_group: layers whose K and V of one token stand together in one row; 1 gives a
            buffer per layer, ``len(layers)`` one buffer for all. None: all layers.
        kv_split: keep K and V of a group in two address ranges instead of one.
        num_slots: address ranges reserved; a spare one lets a new sequence start while the pages
            of an old one wait for the GPU. None: twice ``max_num_seqs``.
        commit_ahead_tokens: rows that the background worker keeps backed past each sequence's end.
            0 turns the worker off, and every page is mapped on the critical path.
        lookahead_tokens: rows past a sequence's end that an attention kernel may read (0 for
            kernels that are exact to the row). These rows are always backed.
        low_watermark: share of the cap below which no new sequence is admitted while others run.
        high_watermark: share of the cap; free pages above it go back to the system.
        zero_on_reuse: clear a page before it passes from one sequence to another.
        block_size: tokens of one block of the paged backend.
        prefix_caching: keep registered prefixes of ended sequences for later ones.
        swap_bytes: host memory that swapped-out sequences may take; 0 turns swapping off.
        commit_policy: how much is backed at admission.
        protect_shared: map shared pages read-only on the host driver, so that a write that should
            have copied first ends the process with SIGSEGV instead of corrupting a neighbour. For
            debugging: it splits kernel mappings.
    """

    layers: tuple[LayerKVSpec, ...]
    max_num_seqs: int
    max_seq_len: int
    capacity_bytes: int
    device: str = "cpu"
    driver: DriverName = "auto"
    page_bytes: int | None = None
    layers_per_group: int | None = None
    kv_split: bool = False
    num_slots: int | None = None
    commit_ahead_tokens: int = 4
    lookahead_tokens: int = 0
    low_watermark: float = 0.01
    high_watermark: float = 1.0
    zero_on_reuse: bool = False
    block_size: int = 16
    prefix_caching: bool = True
    swap_bytes: int = 0
    commit_policy: CommitPolicy = "on_demand"
    protect_shared: bool = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("layers is empty; a cache needs at least one layer")
        _check("max_num_seqs", self.max_num_seqs, lambda n: n >= 1, "at least 1")
        _check("max_seq_len", self.max_seq_len, lambda n: n >= 1, "at least 1")
        _check("capacity_bytes", self.capacity_bytes, lambda n: n >= 1, "at least 1")
        _check("commit_ahead_tokens", self.commit_ahead_tokens, lambda n: n >= 0, "0 or more")
        _check("lookahead_tokens", self.lookahead_tokens, lambda n: n >= 0, "0 or more")
        _check("block_size", self.block_size, lambda n: n >= 1, "at least 1")
        _check("swap_bytes", self.swap_bytes, lambda n: n >= 0, "0 or more")
        if self.commit_policy not in get_args(CommitPolicy):
            raise ConfigError(
                f"commit_policy is {self.commit_policy!r}; supported: "
                f"{', '.join(get_args(CommitPolicy))}"
            )
        check_device(self.device, self.driver)
        if self.page_bytes is not None:
            _check("page_bytes", self.page_bytes, lambda n: n >= 1, "at least 1")
        if self.layers_per_group is not None:
            _check(
                "layers_per_group",
                self.layers_per_group,
                lambda n: 1 <= n <= len(self.layers),
                f"between 1 and the number of layers, {len(self.layers)}",
            )
        if self.num_slots is not None:
            _check(
                "num_slots",
                self.num_slots,
                lambda n: n >= self.max_num_seqs,
                f"at least max_num_seqs, {self.max_num_seqs}",
            )
        for name in ("low_watermark", "high_watermark"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}; it is a share of the cap, between 0 and 1")
        if self.low_watermark > self.high_watermark:
            raise ConfigError(
                f"low_watermark is {self.low_watermark}; it must not exceed "
                f"high_watermark, {self.high_watermark}"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes that one token stores over all layers."""
        return sum(layer.token_bytes for layer in self.layers)

    @property
    def driver_name(self) -> str:
        """``driver``, with ``"auto"`` resolved: ``"host"``, ``"cuda"`` or ``"null"``."""
        return resolve_driver(self.device, self.driver)

    @property
    def device_idx(self) -> int:
        """Number of the CUDA device; 0 on ``"cpu"``."""
        return device_index(self.device)


def _check(name: str, value: int, is_valid: Callable[[int], bool], rule: str) -> None:
    if not is_valid(value):
        raise ConfigError(f"{name} is {value}; it must be {rule}")
