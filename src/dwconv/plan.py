"""How a problem is computed: a kernel variant with its constants, grid and arguments. Pure Python, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .device import DeviceSpec
from .problem import ACTIVATIONS, DepthwiseProblem

Constants = tuple[tuple[str, int | str], ...]

# The kernels' names of element types; those of 16 bits are kernels/common.cuh's own.
CUDA_ELEMENTS = {"float16": "dwconv::Half", "bfloat16": "dwconv::BFloat16", "float32": "float", "float64": "double"}


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A tensor of four dimensions, the innermost one first, of which the copy engine copies boxes (sm_90 and newer).

    Attributes:
        operand: its address, by number among those of a launch.
        sizes, box: elements; a box reaches out of the tensor, too, where it is zeros.
        strides: bytes from one element of the outer three dimensions to the next one, multiples of 16.
        element_bytes: of an element.
        swizzle: bytes of a box's rows, 32, 64 or 128, whose pieces of 16 trade places in shared memory: piece k of line
            `line` of 128 bytes is where piece k ^ line % (swizzle / 16) would be. 0: none do.
    """

    operand: int
    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    box: tuple[int, int, int, int]
    element_bytes: int
    swizzle: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to compute a problem on a device.

    Attributes:
        variant: the stem of the algorithm: `variants/<stem>.py` and `kernels/<stem>.cuh`.
        constants: what is compiled in, sorted by name; with the architecture they name the kernel.
        grid, block: launch shape.
        shared_bytes: dynamic shared memory of a block.
        partial_bytes: memory that blocks leave their sums in for the last one of them (gradients of filters).
        arrivals: counters of such blocks, 32-bit, zero before the launch and after it.
        sizes: the fields of `dwconv::Sizes`, 64-bit.
        tiling: the fields of the variant's Tiling, 32-bit unsigned.
        tile: the choice in words.
        predicted_seconds: what the variant's cost model expects.
        maps: what the kernel takes as its last argument, in this order; without any it has none.
    """

    problem: DepthwiseProblem
    device: DeviceSpec
    variant: str
    constants: Constants
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    sizes: tuple[int, ...]
    tiling: tuple[int, ...]
    tile: str
    predicted_seconds: float
    partial_bytes: int = 0
    arrivals: int = 0
    maps: tuple[TensorMap, ...] = ()

    @property
    def kernel_id(self) -> tuple[str, Constants, str]:
        """What decides the machine code: plans that share it share one compiled kernel."""
        return self.variant, self.constants, self.device.arch


@dataclass(frozen=True, slots=True)
class Rejection:
    """A variant, or one of its tiles, that can't serve the problem, and why."""

    variant: str
    tile: str
    reason: str


def legal(found: Iterable[Plan | Rejection]) -> list[Plan]:
    """The plans among them, in their order."""
    return [each for each in found if isinstance(each, Plan)]


def problem_constants(problem: DepthwiseProblem) -> dict[str, int | str]:
    """The constants of `ProblemConfig` (kernels/config.cuh), which every kernel takes from the problem itself."""
    problem, epilogue = problem.lifted(3), problem.epilogue
    constants: dict[str, int | str] = {
        "ELEMENT": CUDA_ELEMENTS[problem.dtype],
        "CHANNELS_LAST": int(problem.layout == "channels_last"),
        "MULTIPLIER": problem.multiplier,
        "REVERSED": int(problem.reversed),
        "HAS_BIAS": int(problem.bias),
        "ACTIVATION": 0 if epilogue.activation is None else 1 + ACTIVATIONS.index(epilogue.activation),
        "HAS_SCALE": int(epilogue.scale),
        "HAS_SHIFT": int(epilogue.shift),
        "HAS_RESIDUAL": int(epilogue.residual),
    }
    for i, (side, before) in enumerate((("D", "FRONT"), ("H", "TOP"), ("W", "LEFT"))):
        constants |= {
            f"FILTER_{side}": problem.filter[i],
            f"STRIDE_{side}": problem.stride[i],
            f"PAD_{before}": problem.padding[i][0],
            f"DILATION_{side}": problem.dilation[i],
        }
    return constants


def problem_sizes(problem: DepthwiseProblem) -> tuple[int, ...]:
    """The fields of `dwconv::Sizes` (kernels/common.cuh), in their order. For the gradient of x, y's stands for x."""
    problem = problem.lifted(3)
    channels, size, out_size = problem.out_channels, problem.size, problem.out_size
    if problem.direction == "grad_input":
        channels, size, out_size = problem.channels, out_size, size
    return (problem.batch * channels, channels, *size, *out_size, *problem.plane_strides)


def fast_divisor(divisor: int) -> tuple[int, int, int]:
    """The fields of `dwconv::FastDivisor`: divisor, multiplier, shift.

    quotient = n * multiplier >> shift is exact for 0 <= n < 2**31, because multiplier = ceil(2**shift / divisor) with
    shift = 31 + ceil(log2 divisor) is off by less than 2**-31 * divisor (Granlund and Montgomery, 1994).

    >>> divisor, multiplier, shift = fast_divisor(7)
    >>> all(n * multiplier >> shift == n // 7 for n in (0, 6, 7, 48, 49, 2**31 - 1))
    True
    """
    shift = 31 + (divisor - 1).bit_length()
    return divisor, -(-(1 << shift) // divisor), shift
