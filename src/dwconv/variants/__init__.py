"""The algorithms. A new one is a file here, a kernel of the same stem, and a line below."""

from __future__ import annotations

from .base import Variant
from .direct_nchw import DirectNchw
from .one_per_thread import OnePerThread
from .tile16 import Tile16
from .wide_nchw import WideNchw

REGISTRY: dict[str, Variant] = {
    variant.stem: variant for variant in (DirectNchw(), WideNchw(), OnePerThread(), Tile16())
}

__all__ = ["REGISTRY", "Variant"]
