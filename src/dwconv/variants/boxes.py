"""Channels-last tensors as the copy engine sees them (sm_90 and newer): x and y, or x and y's gradient."""

from __future__ import annotations

import math

from ..device import DeviceSpec
from ..plan import TensorMap
from ..problem import DepthwiseProblem, dense_strides
from .march import axes
from .streams import BULK_COPIES
from .strips import planar

MOST = 256  # elements of a box, along a dimension
STACK = 120  # the architecture from which on ptxas (13.0) gives kernels that copy boxes a stack

Maps = tuple[TensorMap, ...]


def gradient_maps(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    turned: bool,
    x_box: tuple[int, int],
    g_box: tuple[int, int],
    swizzled: bool = False,
    rows: tuple[int, int] = (1, 1),
) -> Maps | None:
    """x and y's gradient as channels, positions across the march, rows along it and planes; with boxes of so many
    channels and positions.

    None where the copy engine can't copy them: classes of columns, tensors that aren't aligned to 16 bytes, boxes that
    are no multiples of 128 and stand one behind the other, as those that aren't swizzled do.

    problem: of its own dimensions.
    swizzled: see `TensorMap`; rows of boxes must have 32, 64 or 128 bytes.
    rows: of a box of x, and of g.
    """
    planes, size = planar(problem), problem.element_bytes
    _, across = axes(planes, turned)
    if not copies_boxes(device) or across.apart > 1 or problem.aligned < 16:
        return None
    if problem.dims == 3 and problem.plane_strides != dense_strides(problem.x_shape, problem.layout):
        return None  # planes can't be counted through all images
    (height, width), (out_height, out_width) = planes.size, planes.out_size
    image, _, row, column = planes.plane_strides
    if planes.batch == 1:
        image = max(image, row * height)
    depth = problem.size[0] if problem.dims == 3 else 1
    g_row = out_width * problem.out_channels

    def tensor_map(
        operand: int, sizes: tuple[int, int, int, int], strides: tuple[int, ...], box: tuple[int, int], rows: int
    ) -> TensorMap:
        channels, b, c, images = sizes
        column, row, image = (stride * size for stride in strides)
        across_first, steps = (
            ((channels, c, b, images), (row, column, image)) if turned else (sizes, (column, row, image))
        )
        return TensorMap(operand, across_first, steps, (*box, rows, 1), size, box[0] * size * swizzled)

    found = (
        tensor_map(0, (problem.channels, width, height, problem.batch * depth), (column, row, image), x_box, rows[0]),
        tensor_map(
            1,
            (problem.out_channels, out_width, out_height, planes.batch),
            (problem.out_channels, g_row, out_height * g_row),
            g_box,
            rows[1],
        ),
    )
    within = column >= problem.channels and row >= width * column and image >= height * row
    whole = swizzled or all(math.prod(each.box) * size % 128 == 0 for each in found)
    return found if all(map(_is_legal, found)) and whole and within else None


def forward_maps(
    problem: DepthwiseProblem,
    device: DeviceSpec,
    turned: bool,
    x_box: tuple[int, int, int, int],
    y_box: tuple[int, int, int, int] | None = None,
    swizzled: bool = True,
) -> Maps | None:
    """x, and y where it has boxes, too, with boxes of so many channels, columns, images and rows, in this order.

    None where the copy engine can't copy them: tensors that aren't aligned to 16 bytes, an expanded batch, boxes that
    have more than 256 elements along a dimension.

    problem: of two dimensions.
    turned: it is one with rows for columns (`sparse_rows.turned`), also those of y.
    swizzled: see `TensorMap`; pixels of boxes must have 32, 64 or 128 bytes.
    """
    if not copies_boxes(device) or problem.aligned < 16:
        return None
    size, channels = problem.element_bytes, problem.out_channels
    (height, width), (out_height, out_width) = problem.size, problem.out_size
    image, _, row, column = problem.plane_strides
    out_column, out_row = (out_height * channels, channels) if turned else (channels, out_width * channels)

    def tensor_map(
        operand: int, sizes: tuple[int, int, int, int], strides: tuple[int, int, int], box: tuple[int, int, int, int]
    ) -> TensorMap:
        # Of one element, any stride will do.
        first, second, third = (s * size if n > 1 else 16 for n, s in zip(sizes[1:], strides, strict=True))
        return TensorMap(operand, sizes, (first, second, third), box, size, box[0] * size * swizzled)

    found = [tensor_map(0, (problem.channels, width, problem.batch, height), (column, image, row), x_box)]
    if y_box is not None:
        strides = (out_column, out_height * out_width * channels, out_row)
        found.append(tensor_map(3, (channels, out_width, problem.batch, out_height), strides, y_box))
    return tuple(found) if all(map(_is_legal, found)) else None


def copies_boxes(device: DeviceSpec) -> bool:
    """Whether the device has a copy engine that ptxas makes good code for."""
    return BULK_COPIES <= device.sm < STACK


def _is_legal(found: TensorMap) -> bool:
    """Whether the driver takes a map, and kernels can count on where its boxes lie in shared memory."""
    return (
        all(stride % 16 == 0 and 0 < stride < 2**40 for stride in found.strides)
        and found.box[0] * found.element_bytes % 16 == 0
        and found.swizzle in (0, 32, 64, 128)
        and max(found.box) <= MOST
        and 0 < min(found.sizes) <= max(found.sizes) < 2**31
    )
