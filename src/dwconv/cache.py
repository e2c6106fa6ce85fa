"""Compiled kernels on disk: found by the content that made them, safe with many processes at once.

An entry is one file, named by its key: 8 bytes of magic, the SHA-256 of the payload, the payload. It is written beside
its place and renamed into it, so that readers see a whole entry or none, without locks. An entry that doesn't match
its checksum is a miss. A folder that can't be written to costs the disk's help and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from . import env

FORMAT = 1  # of entries and keys; each format has its own folder, so that old and new versions don't meet
_MAGIC = b"dwconv\x00" + bytes([FORMAT])
_HEADER_BYTES = len(_MAGIC) + hashlib.sha256().digest_size
_ABANDONED_SECONDS = 3600.0  # a file still half-written after that is what a killed process left
_TRIM_TO = 0.9  # of the limit: trimming to the limit itself would scan the folder at every later entry


class KernelCache:
    """Payloads by key, at most `limit_bytes` of them; those read longest ago make room.

    Never raises because of the disk: what can't be read is a miss, what can't be written is skipped, with one warning.

    Attributes:
        root: the folder; entries lie in its subfolder of this format.
        limit_bytes: the most that entries may take, up to a few percent more between two scans; 0 turns the disk off.
    """

    def __init__(self, root: str | Path, limit_bytes: int) -> None:
        self.root = Path(root)
        self.limit_bytes = limit_bytes
        self.folder = self.root / f"v{FORMAT}"
        self._writable = limit_bytes > 0
        self._unscanned_bytes = limit_bytes  # written since the last scan; the first entry scans

    def get(self, key: str) -> bytes | None:
        """The payload stored under a key, or None."""
        if not self.limit_bytes:
            return None
        path = self.folder / key
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        payload = entry[_HEADER_BYTES:]
        if entry[:_HEADER_BYTES] != _header(payload):
            _remove(path)
            return None
        try:
            os.utime(path)  # the time of last use: reading alone doesn't move it on most systems
        except OSError:
            pass
        return payload

    def put(self, key: str, payload: bytes) -> None:
        """Stores a payload, replacing what was there; all at once, as far as other processes can see."""
        if not self._writable:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._publish(key, _header(payload) + payload)
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"dwconv can't keep compiled kernels in {self.folder} ({error.strerror or error}), so each process "
                "compiles its own: set DWCONV_CACHE_DIR to a folder that can be written to",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._unscanned_bytes += _HEADER_BYTES + len(payload)
        if self._unscanned_bytes > self.limit_bytes // 32:
            self._trim()
            self._unscanned_bytes = 0

    def size(self) -> int:
        """Bytes that the entries take."""
        return sum(status.st_size for _, status in self._entries())

    def clear(self) -> None:
        """Removes every entry of this format."""
        for path, _ in list(self._entries()):
            _remove(path)

    def _publish(self, key: str, entry: bytes) -> None:
        descriptor, beside = tempfile.mkstemp(prefix=f"{key}.", suffix=".tmp", dir=self.folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(entry)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.folder / key)
        except BaseException:
            _remove(Path(beside))
            raise

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Every file of the folder, half-written ones included."""
        try:
            found = os.scandir(self.folder)
        except OSError:
            return
        with found:
            for entry in found:
                try:
                    if entry.is_file(follow_symlinks=False):
                        yield Path(entry.path), entry.stat()
                except OSError:  # another process removed it
                    continue

    def _trim(self) -> None:
        """Removes the entries used longest ago until the rest fits, and what killed processes left half-written."""
        found: list[tuple[int, int, Path]] = []
        for path, status in self._entries():
            if path.suffix != ".tmp":
                found.append((status.st_mtime_ns, status.st_size, path))
            elif time.time() - status.st_mtime > _ABANDONED_SECONDS:
                _remove(path)
        total = sum(size for _, size, _ in found)
        if total <= self.limit_bytes:
            return
        for _, size, path in sorted(found):
            if total <= self.limit_bytes * _TRIM_TO:
                break
            _remove(path)
            total -= size


def _header(payload: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(payload).digest()


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:  # gone already, or not ours to remove: either way no reason to stop
        pass


@cache
def default_cache() -> KernelCache:
    """The cache that DWCONV_CACHE_DIR and DWCONV_CACHE_LIMIT describe."""
    root = Path(env.read("DWCONV_CACHE_DIR")).expanduser()
    return KernelCache(root, env.read_integer("DWCONV_CACHE_LIMIT") << 20)
