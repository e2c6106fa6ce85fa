"""What every test relies on: a cache of its own, a seed that is printed, and GPU tests that are skipped without one."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_GPU_TESTS = Path(__file__).parent / "tests" / "gpu"
_CACHE = pytest.StashKey[str]()
# Files that begin first, so that no core waits for them in the end.
_LONG = ("test_sanitizers.py", "test_compile.py", "test_training.py", "test_edges.py", "test_gradient_edges.py")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Subprocesses, and the workers of pytest-xdist, inherit it: no test writes to the user's own cache.
    if not hasattr(config, "workerinput"):
        config.stash[_CACHE] = os.environ["DWCONV_CACHE_DIR"] = tempfile.mkdtemp(prefix="dwconv-tests-")
        # Small problems, thousands of kernels: g++ would optimize for three times as long as they run without it.
        os.environ.setdefault("DWCONV_EMULATOR_OPTIMIZE", "0")
    try:
        import hypothesis
    except ImportError:  # GPU machines may lack it; the tests that need it say so
        return
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(random.randrange(2**32))
    hypothesis.settings.register_profile("dwconv", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("dwconv")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


def pytest_report_header(config: pytest.Config) -> str:
    return f"dwconv: random examples of this run: --hypothesis-seed={config.getoption('hypothesis_seed', None)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first. Marks everything in tests/gpu, and skips it where there is no GPU."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
    gpu_tests = [item for item in items if _GPU_TESTS in item.path.parents]
    for item in gpu_tests:
        item.add_marker(pytest.mark.gpu)
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def set_variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str | None], None]]:
    """Sets (or, with None, unsets) an environment variable that dwconv has perhaps read already."""
    from dwconv import cache, compile, env, nvrtc
    from dwconv.emulator import build

    def forget() -> None:
        env.forget()
        compile.forget()
        cache.default_cache.cache_clear()
        nvrtc.forget()
        build.forget()

    def set_(name: str, value: str | None) -> None:
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
        forget()

    yield set_
    monkeypatch.undo()
    forget()
