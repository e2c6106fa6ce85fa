"""The card a plan is made for: its rates and limits. Presets serve machines that have no GPU."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import DepthwiseError

_MIB = 1 << 20
_KIB = 1 << 10
SHARED_SIZES = (8, 16, 32, 64, 100, 132, 164, 196, 228)  # KiB of shared memory that may be split off 256 KiB


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What a plan depends on. Presets describe one card of each architecture; on a GPU, see `launch.device_spec`.

    Attributes:
        name: the card.
        arch: what the compiler is told, "sm_90".
        multiprocessors: their number.
        dram_gbs: bytes a large device-to-device copy moves, read and written, in GB/s.
        fp32_tflops: the float32 rate, a multiply-add counted as two.
        l2_bytes: size of the second-level cache.
        shared_bytes: shared memory of one multiprocessor; a block may take 1 KiB less.
        registers: 32-bit registers of one multiprocessor.
        threads: resident threads of one multiprocessor.
        latency_ns: from a load to its use, when DRAM is busy.
    """

    name: str
    arch: str
    multiprocessors: int
    dram_gbs: float
    fp32_tflops: float
    l2_bytes: int
    shared_bytes: int
    registers: int = 65536
    threads: int = 2048
    latency_ns: float = 900.0

    @property
    def sm(self) -> int:
        return int(self.arch.removeprefix("sm_"))

    @property
    def clock(self) -> float:
        """The clock, in Hz, at which the float32 rate is reached: 128 multiply-adds of a multiprocessor in each."""
        return self.fp32_tflops * 1e12 / (self.multiprocessors * 256)

    def l1_beside(self, shared_bytes: int) -> int:
        """What L1 has where resident blocks take so much shared memory, of which it is split off in a few sizes.

        >>> H200.l1_beside(120 * 1024) // 1024
        124
        """
        largest = self.shared_bytes + 28 * _KIB
        sizes = (size * _KIB for size in SHARED_SIZES if shared_bytes <= size * _KIB <= self.shared_bytes)
        return largest - min(sizes, default=shared_bytes)


# Rates are the vendors' datasheets' (bandwidth times 0.9, what copies reach), except the H200's, which were measured.
PRESETS: dict[str, DeviceSpec] = {
    "sm_75": DeviceSpec("Tesla T4", "sm_75", 40, 288, 8.1, 4 * _MIB, 64 * _KIB, threads=1024),
    "sm_80": DeviceSpec("A100 80GB", "sm_80", 108, 1800, 19.5, 40 * _MIB, 164 * _KIB),
    "sm_86": DeviceSpec("RTX 3090", "sm_86", 82, 840, 35.6, 6 * _MIB, 100 * _KIB, threads=1536),
    "sm_89": DeviceSpec("RTX 4090", "sm_89", 128, 907, 82.6, 72 * _MIB, 100 * _KIB, threads=1536),
    "sm_90": DeviceSpec("NVIDIA H200", "sm_90", 132, 4260, 67.0, 60 * _MIB, 228 * _KIB),
    "sm_100": DeviceSpec("NVIDIA B200", "sm_100", 148, 7200, 80.0, 126 * _MIB, 228 * _KIB),
    "sm_120": DeviceSpec("RTX 5090", "sm_120", 170, 1600, 104.8, 96 * _MIB, 100 * _KIB, threads=1536),
}
H200 = PRESETS["sm_90"]


def preset(arch: str) -> DeviceSpec:
    """The preset of an architecture.

    Raises:
        DepthwiseError: there is none.

    >>> preset("sm_80").name
    'A100 80GB'
    """
    if arch not in PRESETS:
        raise DepthwiseError(f"arch={arch!r} is unknown to dwconv: use one of {', '.join(PRESETS)}")
    return PRESETS[arch]
