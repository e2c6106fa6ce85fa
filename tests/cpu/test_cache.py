"""The disk cache: whatever happens to its files, a kernel is found whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings

import pytest

from dwconv.cache import KernelCache

PAYLOAD = bytes(range(256)) * 64


@pytest.fixture
def store(tmp_path):
    return KernelCache(tmp_path, 1 << 20)


def entry_of(store, key):
    return store.folder / key


def test_what_is_put_is_got(store):
    assert store.get("key") is None
    store.put("key", PAYLOAD)
    assert store.get("key") == PAYLOAD
    assert KernelCache(store.root, 1 << 20).get("key") == PAYLOAD
    store.put("key", b"")
    assert store.get("key") == b""


def test_nothing_else_is_left_in_the_folder(store):
    for _ in range(3):
        store.put("key", PAYLOAD)
    assert [path.name for path in store.folder.iterdir()] == ["key"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda entry: entry[:-1], id="truncated"),
        pytest.param(lambda entry: entry[:10], id="truncated-header"),
        pytest.param(lambda entry: b"", id="empty"),
        pytest.param(lambda entry: entry + b"x", id="too-long"),
        pytest.param(lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]), id="flipped-bit"),
        pytest.param(lambda entry: bytes([entry[0] ^ 1]) + entry[1:], id="other-magic"),
        pytest.param(lambda entry: bytes(len(entry)), id="zeros"),
    ],
)
def test_a_damaged_entry_is_a_miss_and_is_rebuilt(store, damage):
    store.put("key", PAYLOAD)
    path = entry_of(store, "key")
    path.write_bytes(damage(path.read_bytes()))
    assert store.get("key") is None
    assert not path.exists()
    store.put("key", PAYLOAD)
    assert store.get("key") == PAYLOAD


def test_a_folder_in_place_of_an_entry_is_a_miss(store):
    entry_of(store, "key").mkdir(parents=True)
    assert store.get("key") is None
    with pytest.warns(RuntimeWarning, match="can't keep compiled kernels"):
        store.put("key", PAYLOAD)
    assert [path.name for path in store.folder.iterdir()] == ["key"]


def test_an_impossible_folder_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")  # unlike permissions, this binds root too
    store = KernelCache(tmp_path / "file" / "cache", 1 << 20)
    with pytest.warns(RuntimeWarning, match="set DWCONV_CACHE_DIR to a folder that can be written to"):
        store.put("one", PAYLOAD)
    store.put("two", PAYLOAD)  # a second warning would be an error
    assert store.get("one") is None
    assert store.size() == 0
    store.clear()


def test_a_full_disk_leaves_nothing_behind(store, monkeypatch):
    store.put("old", PAYLOAD)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        store.put("new", PAYLOAD)
    assert [path.name for path in store.folder.iterdir()] == ["old"]
    assert store.get("old") == PAYLOAD


def test_a_read_only_folder_is_still_read(store, monkeypatch):
    store.put("key", PAYLOAD)

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refused)
    monkeypatch.setattr(os, "utime", refused)
    reader = KernelCache(store.root, 1 << 20)
    assert reader.get("key") == PAYLOAD
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        reader.put("other", PAYLOAD)


def test_limit_zero_leaves_the_disk_alone(tmp_path):
    store = KernelCache(tmp_path / "cache", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put("key", PAYLOAD)
    assert store.get("key") is None
    assert not store.root.exists()


def test_those_used_longest_ago_make_room(tmp_path):
    store = KernelCache(tmp_path, 10 * len(PAYLOAD))
    for i in range(9):
        store.put(f"{i}", PAYLOAD)
        os.utime(entry_of(store, f"{i}"), (1000 + i, 1000 + i))
    assert store.get("0") == PAYLOAD  # and with that it is the youngest
    store.put("9", PAYLOAD)
    left = {path.name for path in store.folder.iterdir()}
    assert {"0", "9"} <= left
    assert "1" not in left
    assert store.size() <= store.limit_bytes


def test_a_long_stream_stays_within_the_limit(tmp_path):
    store = KernelCache(tmp_path, 1 << 20)
    for i in range(200):
        store.put(f"{i}", PAYLOAD)
        assert store.size() <= store.limit_bytes * 1.05
    assert store.get("199") == PAYLOAD
    assert store.size() >= store.limit_bytes * 0.8


def test_half_written_files_of_killed_processes_go_in_time(store):
    store.folder.mkdir(parents=True)
    old, young = store.folder / "a.123.tmp", store.folder / "b.456.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    long_ago = time.time() - 2 * 3600
    os.utime(old, (long_ago, long_ago))
    store.put("key", PAYLOAD)
    assert not old.exists()
    assert young.exists()


def test_clear_empties(store):
    store.put("key", PAYLOAD)
    store.clear()
    assert store.size() == 0
    assert store.get("key") is None


_WORKER = """
import sys
from dwconv.cache import KernelCache
store = KernelCache(sys.argv[1], 40 * 5000)
for turn in range(40):
    for key in range(60):  # more than fit: entries come and go all the time
        found = store.get(f"{key}")
        assert found is None or found == bytes([key]) * 5000, (key, len(found))
        if found is None or turn % 8 == int(sys.argv[2]):
            store.put(f"{key}", bytes([key]) * 5000)
"""


def test_eight_processes_at_once(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", _WORKER, str(tmp_path)]
    workers = [subprocess.Popen([*command, f"{i}"], env=environment, stderr=subprocess.PIPE) for i in range(8)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    store = KernelCache(tmp_path, 40 * 5000)
    assert all(not path.name.endswith(".tmp") for path in store.folder.iterdir())
    assert store.size() <= 1.5 * store.limit_bytes
