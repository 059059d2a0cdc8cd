"""Tensors whose rows get memory when they are committed: for engines with a layout of their own.

Owns: which bytes the rows are.  Thread-safety: all methods, as the core's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import prod
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import _core
from .core_setup import open_driver
from .device import DriverName, check_device, current_stream, resolve_driver, tensor_device
from .errors import ClosedError, ConfigError, DriverError
from .host_memory import available_bytes
from .sizes import MOST_BYTES, checked_dtype, checked_shape, checked_size

DriverChoice: TypeAlias = DriverName | _core.Driver
"""Where physical pages come from: as in ``KVCacheConfig``, or a driver that is made already."""


class ElasticTensor:
    """One or several tensors of one shape over reserved addresses, whose rows can be backed.

    A *row* is one index of dim 0. All tensors have the same rows committed: a commit backs its
    rows in each of them, or in none. Reading a row that is not committed gives zeros on the host
    driver and a device error on CUDA; writing it ends the process on the host.

    The memory is this object's: keep it for as long as the tensors are used. A tensor that outlives
    it keeps its addresses and loses its memory.

    Example:
        >>> cache = elastic_tensor((1_000_000, 8, 64), torch.float16)
        >>> cache.commit(range(0, 100), range(5_000, 5_100))
        True
        >>> cache.tensor[:100] = 1.0
        >>> cache.decommit(range(0, 100))
        >>> cache.close()
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype | str,
        device: str | torch.device = "cpu",
        *,
        num_tensors: int = 1,
        capacity_bytes: int | None = None,
        page_bytes: int | None = None,
        spare_bytes: int = 0,
        zero_on_reuse: bool = False,
        driver: DriverChoice = "auto",
    ) -> None:
        """See ``elastic_tensor``."""
        self._shape = checked_shape(shape)
        self._dtype = checked_dtype(dtype)
        num_tensors = checked_size("num_tensors", num_tensors, 1)
        spare_bytes = checked_size("spare_bytes", spare_bytes, 0)
        if page_bytes is not None:
            page_bytes = checked_size("page_bytes", page_bytes, 1)
        self._driver = _open_driver(str(device), driver, page_bytes)
        self._tensor_device = tensor_device(str(device))
        self._page_bytes = self._driver.page_bytes
        self._row_bytes = prod(self._shape[1:]) * self._dtype.itemsize
        num_bytes = self._shape[0] * self._row_bytes
        most = num_tensors * -(-num_bytes // self._page_bytes) * self._page_bytes
        if most > MOST_BYTES:
            raise ConfigError(f"the tensors would have {most} bytes; at most {MOST_BYTES} can be")
        if capacity_bytes is None:
            capacity_bytes = most
        self._capacity_bytes = checked_size("capacity_bytes", capacity_bytes, 0)
        self._memory = _core.ElasticMemory(
            self._driver,
            num_regions=num_tensors,
            region_bytes=num_bytes,
            max_pages=self._capacity_bytes // self._page_bytes,
            spare_pages=spare_bytes // self._page_bytes,
            zero_on_reuse=zero_on_reuse,
        )
        self._tensors = tuple(self._make_tensor(idx, num_bytes) for idx in range(num_tensors))

    @property
    def tensor(self) -> Tensor:
        """The tensor, or the first of several; contiguous, and always at the same addresses."""
        return self.tensors[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them.

        Raises:
            ClosedError: after ``close``, or in a forked child.
        """
        self._memory.check_open()
        return self._tensors

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one tensor."""
        return self._row_bytes

    @property
    def page_bytes(self) -> int:
        """The physical unit: what is committed rounds up to it."""
        return self._page_bytes

    @property
    def capacity_bytes(self) -> int:
        """Cap on physical memory, over all tensors."""
        return self._capacity_bytes

    @property
    def reserved_bytes(self) -> int:
        """Address space, over all tensors."""
        return self._memory.stats()["reserved_bytes"]

    @property
    def committed_bytes(self) -> int:
        """Memory of the pages that committed rows lie in; one that is mapped twice counts once."""
        stats = self._memory.stats()
        return stats["in_use_pages"] * self._page_bytes

    @property
    def created_bytes(self) -> int:
        """Memory taken from the system: committed, spare, or waiting for the device."""
        return self._memory.stats()["created_pages"] * self._page_bytes

    @property
    def available_bytes(self) -> int:
        """What can still be committed under the cap, if the machine has it.

        What is given up and waits for the device counts: a commit waits with it.
        """
        stats = self._memory.stats()
        return max(stats["max_pages"] - stats["in_use_pages"], 0) * self._page_bytes

    def commit(self, *rows: range, stream: int | None = None) -> bool:
        """Back all of these rows, or change nothing and return False for lack of memory.

        Rows that are committed stay as they are. New ones hold zeros, or what decommitted rows left
        in the memory that they get; with ``zero_on_reuse`` always zeros.

        Args:
            rows: half-open ranges of dim 0, in any order.
            stream: of the work that will use the rows; None is torch's current one. Other streams
                must wait for it first.

        Raises:
            ConfigError: a range has a step, or leaves the tensor.
            DriverError: the driver failed; nothing was changed.
            ClosedError: after ``close``, or in a forked child.
        """
        return self._memory.try_commit(self._spans(rows), self._stream(stream))

    def decommit(self, *rows: range, stream: int | None = None) -> None:
        """Give rows up; their memory goes back once the work enqueued on ``stream`` so far is done.

        Nothing waits here: pages come free at one of the next calls, or at once if nothing runs.
        A page that another committed row lies in stays. Rows that are not committed do not matter.
        If other streams read the rows, make ``stream`` wait for them first.

        Raises:
            ConfigError, ClosedError: as ``commit``.
        """
        self._memory.decommit(self._spans(rows), self._stream(stream))

    def alias(self, rows: range, first: int, *, stream: int | None = None) -> bool:
        """Let rows from ``first`` on be the same memory as ``rows``, and commit them.

        What is written through one is read through the other. Memory is free when neither is
        committed any more; rows that share a page are given up together. False for lack of kernel
        mappings.

        Raises:
            ConfigError: ``rows`` or the rows from ``first`` on are not whole pages; the ones are
                not committed, or the others are.
        """
        source = self._spans((rows,))
        target = self._spans((range(first, first + len(rows)),))
        if not source:
            return True
        return self._memory.try_alias(source[0], target[0][0], self._stream(stream))

    def create_spare(self, num_bytes: int) -> bool:
        """Take memory from the system until ``num_bytes`` are free, and keep so many from now on.

        Creating pages is the slow part of a commit on CUDA. False, having taken nothing, if the cap
        or the machine has not so many.

        Raises:
            DriverError: the driver failed; nothing was taken.
            ClosedError: after ``close``, or in a forked child.
        """
        num_bytes = checked_size("num_bytes", num_bytes, 0)
        stats = self._memory.stats()
        missing = num_bytes - stats["free_pages"] * self._page_bytes
        if missing > 0 and self._driver.name == "host" and missing > available_bytes():
            return False  # the kernel would promise it, and end the process later
        return self._memory.try_create_spare(num_bytes // self._page_bytes)

    def trim(self) -> int:
        """Wait for the device, and give all free memory back to the system; the bytes given."""
        return self._memory.trim(0) * self._page_bytes

    def resize(self, capacity_bytes: int) -> None:
        """Move the cap. Committed memory beyond it leaves as it is decommitted.

        Raises:
            DriverError: free memory beyond the cap could not be given back; the cap has moved.
            ClosedError: after ``close``, or in a forked child.
        """
        capacity_bytes = checked_size("capacity_bytes", capacity_bytes, 0)
        try:
            self._memory.resize(capacity_bytes // self._page_bytes)
        except DriverError:
            self._capacity_bytes = capacity_bytes
            raise
        self._capacity_bytes = capacity_bytes

    def check_invariants(self) -> None:
        """Recount every page.

        Raises:
            InvariantError: the books do not balance, which is a bug here.
        """
        self._memory.check_invariants()

    def close(self) -> None:
        """Give everything back but the addresses of tensors still held.

        Waits for the work on torch's current stream, and on those that commits and decommits named.
        """
        with suppress(ClosedError, DriverError):  # the next line reports what there is to report
            self._memory.decommit([], self._stream(None))
        self._memory.close()
        self._tensors = ()

    def __enter__(self) -> ElasticTensor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __dlpack__(self, **keywords: Any) -> object:
        """The (first) tensor for another framework: ``numpy.from_dlpack(elastic)`` and the like."""
        return self.tensor.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.tensor.__dlpack_device__()
        return int(kind), index

    def _make_tensor(self, idx: int, num_bytes: int) -> Tensor:
        # As bytes, because DLPack has no name for some of torch's types.
        capsule = self._memory.tensor_capsule(idx, 0, "uint8", [num_bytes], [1])
        flat: Tensor = from_dlpack(capsule)
        return flat.view(self._dtype).view(self._shape)

    def _spans(self, rows: Sequence[range]) -> list[tuple[int, int]]:
        """Byte spans of the ranges, empty ones left out."""
        for part in rows:
            if not isinstance(part, range) or part.step != 1:
                raise ConfigError(f"rows are {part!r}; they must be a range of step 1")
            if not 0 <= part.start <= part.stop <= self._shape[0]:
                raise ConfigError(
                    f"rows are {part!r}; they must lie within the {self._shape[0]} of the tensor"
                )
        size = self._row_bytes
        return [(part.start * size, part.stop * size) for part in rows if part]

    def _stream(self, stream: int | None) -> int:
        return current_stream(self._tensor_device) if stream is None else stream


def elastic_tensor(
    shape: Sequence[int],
    dtype: torch.dtype | str,
    device: str | torch.device = "cpu",
    *,
    num_tensors: int = 1,
    capacity_bytes: int | None = None,
    page_bytes: int | None = None,
    spare_bytes: int = 0,
    zero_on_reuse: bool = False,
    driver: DriverChoice = "auto",
) -> ElasticTensor:
    """Reserve addresses for a tensor; no memory is taken before rows are committed.

    Args:
        shape: all of it, committed or not. Dim 0 counts rows.
        dtype: any of torch's whose size is whole bytes, or its name.
        device: ``"cpu"``, ``"cuda"`` (which is ``"cuda:0"``) or ``"cuda:N"``.
        num_tensors: tensors of this shape that commit their rows together, e.g. K and V of every
            layer.
        capacity_bytes: cap on physical memory over all tensors. None: enough for every row.
        page_bytes: physical unit; a multiple of the driver's granularity. None: its default (64 KiB
            on the host driver, the granularity on the CUDA driver).
        spare_bytes: memory of decommitted rows that is kept for the next commit instead of going
            back to the system.
        zero_on_reuse: rows that are committed anew read as zeros.
        driver: as in ``KVCacheConfig``, or a driver of the core.

    Raises:
        ConfigError: a value can never work; the text names it and the limit.
    """
    return ElasticTensor(
        shape,
        dtype,
        device,
        num_tensors=num_tensors,
        capacity_bytes=capacity_bytes,
        page_bytes=page_bytes,
        spare_bytes=spare_bytes,
        zero_on_reuse=zero_on_reuse,
        driver=driver,
    )


def _open_driver(device: str, driver: DriverChoice, page_bytes: int | None) -> _core.Driver:
    if isinstance(driver, _core.Driver):
        check_device(device)
        if page_bytes not in (None, driver.page_bytes):
            raise ConfigError(
                f"page_bytes is {page_bytes}; the driver that was given has {driver.page_bytes}"
            )
        return driver
    check_device(device, driver)
    name = resolve_driver(device, driver)
    if name == "null":
        raise ConfigError("the null driver only counts pages; it has no tensors")
    return open_driver(name, device, page_bytes)
