"""Published figures of GPUs and of the driver calls that map their memory.

Owns: nothing.  Thread-safety: immutable.

Sources:

- H100 and H200: NVIDIA's datasheets of the SXM modules. 1,979 teraflops in bfloat16 are with
  sparsity, so half of them here; PCIe 5 with 128 GB/s and NVLink with 900 GB/s are both directions
  together, so half of them here too.
- B200: NVIDIA's DGX B200 datasheet: eight GPUs have 1,440 GB, 64 TB/s and 36 petaflops in
  bfloat16 with sparsity; NVLink 1.8 TB/s and PCIe 5 both ways.
- Driver calls: the mean of each call on pages of 2 MiB that kvcached publishes for an A100
  (its benchmark ``bench_vmm``). Nobody published them for the GPUs above that we know of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU.

    Attributes:
        memory_bytes: of device memory.
        memory_bandwidth: bytes per second, from it and to it.
        flops: multiplications and additions per second in bfloat16, dense.
        host_bandwidth: bytes per second to host memory, and back.
        link_bandwidth: bytes per second to other GPUs, one way.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    flops: float
    host_bandwidth: float
    link_bandwidth: float


DEVICES = {
    device.name: device
    for device in (
        Device("H100", 80 * 10**9, 3.35e12, 989.5e12, 64e9, 450e9),
        Device("H200", 141 * 10**9, 4.8e12, 989.5e12, 64e9, 450e9),
        Device("B200", 180 * 10**9, 8.0e12, 2250e12, 64e9, 900e9),
    )
}


@dataclass(frozen=True, slots=True)
class DriverLatency:
    """Microseconds that a driver call takes on the thread that makes it.

    Attributes:
        create_us: creating a page.
        map_us: mapping a page.
        set_access_us: making a run of mapped pages accessible.
        unmap_us: unmapping a run.
    """

    create_us: float = 193.0
    map_us: float = 1.5
    set_access_us: float = 36.0
    unmap_us: float = 26.0

    def times(self, factor: float) -> DriverLatency:
        """All of them so many times as long."""
        return replace(
            self,
            create_us=self.create_us * factor,
            map_us=self.map_us * factor,
            set_access_us=self.set_access_us * factor,
            unmap_us=self.unmap_us * factor,
        )

    def seconds(self, calls: DriverCalls) -> float:
        """What so many calls take, one after another."""
        return 1e-6 * (
            calls.creates * self.create_us
            + calls.mapped_pages * self.map_us
            + calls.maps * self.set_access_us
            + calls.unmaps * self.unmap_us
        )


@dataclass(frozen=True, slots=True)
class DriverCalls:
    """Driver calls so far: pages created, runs mapped, pages in them, runs unmapped."""

    creates: int = 0
    maps: int = 0
    mapped_pages: int = 0
    unmaps: int = 0

    def plus(self, other: DriverCalls) -> DriverCalls:
        """Both together."""
        return DriverCalls(
            self.creates + other.creates,
            self.maps + other.maps,
            self.mapped_pages + other.mapped_pages,
            self.unmaps + other.unmaps,
        )

    def since(self, earlier: DriverCalls) -> DriverCalls:
        """Those made after ``earlier``."""
        return DriverCalls(
            self.creates - earlier.creates,
            self.maps - earlier.maps,
            self.mapped_pages - earlier.mapped_pages,
            self.unmaps - earlier.unmaps,
        )
