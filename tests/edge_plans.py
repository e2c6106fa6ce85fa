"""Which plans the edge tests run: every variant on what it takes, on the CPU and on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import torch
from torch import Tensor

from box_tiles import forward_box_plans
from dwconv.choose import candidates
from dwconv.device import DeviceSpec
from dwconv.plan import Plan
from dwconv.problem import DepthwiseProblem, Direction
from dwconv.variants import REGISTRY
from problems import as_gradient, every_kind, problem_id

PLAIN = (
    "one_per_thread",
    "tile16",
    "one_input_per_thread",
    "one_tap_per_block",
)  # the same few lines for all problems: a third of them is enough
MOST_TILES = 6  # of one variant for one of TILED

# Problems whose legal tiles run, not only the chosen one.
TILED = [
    DepthwiseProblem(1, 2, (9, 68), (3, 3), padding=((1, 1), (1, 1))),
    DepthwiseProblem(1, 8, (10, 70), (3, 3), dtype="float16"),
    DepthwiseProblem(1, 2, (7, 40), (5, 5), padding=((2, 2), (2, 2)), multiplier=2, bias=True),
    DepthwiseProblem(1, 8, (13, 64), (3, 3), stride=(2, 2), padding=((1, 1), (1, 1))),
    DepthwiseProblem(1, 2, (5, 18), (3, 3), padding=((2, 0), (5, 1))),
    DepthwiseProblem(1, 8, (11, 24), (7, 7), padding=((3, 3), (3, 3)), dtype="bfloat16", layout="channels_last"),
    DepthwiseProblem(1, 24, (9, 17), (3, 3), stride=(2, 2), dtype="float16", layout="channels_last"),
    DepthwiseProblem(1, 8, (70,), (4,), padding=((3, 0),), dtype="float16"),
    DepthwiseProblem(1, 16, (33,), (9,), padding=((4, 4),), layout="channels_last"),
    DepthwiseProblem(1, 4, (5, 8, 20), (3, 3, 3), padding=((1, 1),) * 3, dtype="float16"),
    DepthwiseProblem(1, 8, (5, 6, 9), (3, 3, 3), padding=((1, 1),) * 3, layout="channels_last"),
    # strips of a warp that lanes trade; lines whose halves mirror each other
    DepthwiseProblem(2, 2, (9, 510), (3, 3), padding=((1, 1), (1, 1)), dtype="float16"),
    DepthwiseProblem(1, 2, (16, 250), (3, 7), padding=((2, 2), (6, 6)), dtype="bfloat16", bias=True),
    DepthwiseProblem(3, 2, (56, 6), (51, 3), padding=((25, 25), (1, 1)), dtype="float16"),
]


def chosen_plans(device: DeviceSpec, most: int | None = None, direction: Direction = "forward") -> list[Plan]:
    """The best plan of every variant that takes a problem, for problems of every kind.

    `most` limits how many there are of one variant, dtype, layout and number of dimensions.
    """
    found: list[Plan] = []
    for number, problem in enumerate(every_kind()):
        best: dict[str, Plan] = {}
        for plan in candidates(as_gradient(problem, direction), device):
            if isinstance(plan, Plan) and (plan.variant not in PLAIN or number % 3 == 0):
                best.setdefault(plan.variant, plan)
        found += best.values()
    return found if most is None else _spread(found, most)


def _spread(plans: list[Plan], most: int) -> list[Plan]:
    """At most so many plans of each kind, spread over all of it."""

    def kind(plan: Plan) -> Hashable:
        return plan.variant, plan.problem.dims, plan.problem.dtype, plan.problem.layout

    counts, seen = Counter(map(kind, plans)), Counter[Hashable]()
    found = []
    for plan in plans:
        if seen[kind(plan)] % -(-counts[kind(plan)] // most) == 0:
            found.append(plan)
        seen[kind(plan)] += 1
    return found


def tile_plans(device: DeviceSpec) -> list[Plan]:
    """Legal tiles of every variant for TILED, spread over all that it has; and those of boxes that few would choose."""
    found: list[Plan] = []
    for problem in TILED:
        lifted = problem.lifted(2)
        for stem, variant in REGISTRY.items():
            plans = [] if stem in PLAIN or variant.unsupported(lifted) else variant.every_plan(lifted, device)
            found += plans[:: max(1, -(-len(plans) // MOST_TILES))]
    return found + forward_box_plans(device)


def plan_id(plan: Plan) -> str:
    return f"{plan.variant}-{problem_id(plan.problem)}"


def tile_id(plan: Plan) -> str:
    return f"{plan_id(plan)}-{plan.tile}"


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that every NaN equals itself."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
