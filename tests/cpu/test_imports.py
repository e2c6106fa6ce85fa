"""Imports run one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dwconv

ROOT = Path(dwconv.__file__).parent

# From the bottom up. A module imports from layers below its own, and from its own package; modules that share a line
# don't know each other. "__init__" is the public face: `from dwconv import conv2d`.
LAYERS = (
    ("errors", "version"),
    ("env",),
    ("problem",),
    ("device",),
    ("roofline",),
    ("plan",),
    ("tensor_maps",),
    ("variants",),
    ("choose",),
    ("sources",),
    ("cache",),
    ("nvrtc",),
    ("compile",),
    ("launch", "emulator"),
    ("reference", "tensors"),
    ("ops",),
    ("gradient_ops", "transforms"),
    ("autograd",),
    ("flops",),
    ("functional",),
    ("modules", "preparation"),
    ("conversion",),
    ("__init__",),
    ("versions",),
    ("bench",),
    ("explain",),
    ("optimize",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def room_of(path: Path) -> str:
    """The module, or the package, right below dwconv that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import from dwconv, those inside functions and under TYPE_CHECKING included."""
    package = ("dwconv", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "dwconv":
                known = len(target) > 1 and target[1] in LEVEL
                yield node.lineno, target[1] if known else "__init__"


SOURCES = sorted(path for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in LEVEL, f"{room} has no layer: add it to LAYERS in {__file__}, above everything that it imports"
    for line, target in imported_rooms(path):
        assert target == room or LEVEL[target] < LEVEL[room], (
            f"{path}:{line}: {room} imports {target}, which lies above or beside it in the layers of {__file__}"
        )


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


_WATCHED_IMPORT = """
import os, sys

def watch(event, details):
    if event == "open":
        path, _, flags = details
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), f"import writes {path}"
    assert event not in ("os.mkdir", "os.rename", "os.remove", "os.utime", "subprocess.Popen", "ctypes.dlopen"), details

sys.addaudithook(watch)
import dwconv
"""


def test_import_touches_neither_disk_nor_cuda_nor_torch():
    loaded = run(_WATCHED_IMPORT + "print(*sys.modules)").split()
    for name in ("torch", "cuda", "cuda.bindings", "ctypes", "rich", "dwconv.compile"):
        assert name not in loaded


def test_the_public_functions_leave_cuda_alone_until_called():
    output = run(
        "import sys, dwconv\n"
        "for name in dwconv.__all__: getattr(dwconv, name)\n"
        "import torch\n"
        "print(torch.cuda.is_initialized(), 'cuda.bindings.nvrtc' in sys.modules)"
    )
    assert output.split() == ["False", "False"]


def test_at_most_twelve_public_names():
    assert len(dwconv.__all__) <= 12
    assert all(hasattr(dwconv, name) for name in dwconv.__all__)
