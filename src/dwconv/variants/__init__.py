"""The algorithms. A new one is a file here, a kernel of the same stem, and a line below."""

from __future__ import annotations

from .base import Variant
from .direct_nchw import DirectNchw
from .direct_nhwc import DirectNhwc
from .matrix_nchw import MatrixNchw
from .one_input_per_thread import OneInputPerThread
from .one_per_thread import OnePerThread
from .one_tap_per_block import OneTapPerBlock
from .phases_nchw import PhasesNchw
from .phases_nhwc import PhasesNhwc
from .sparse_nhwc import SparseNhwc
from .staged_nchw import StagedNchw
from .taps_matrix_nchw import TapsMatrixNchw
from .taps_nchw import TapsNchw
from .taps_nhwc import TapsNhwc
from .taps_planes_nchw import TapsPlanesNchw
from .taps_sparse_nhwc import TapsSparseNhwc
from .tile16 import Tile16
from .volume_ncdhw import VolumeNcdhw
from .volume_ndhwc import VolumeNdhwc
from .wide_nchw import WideNchw
from .wide_nhwc import WideNhwc

REGISTRY: dict[str, Variant] = {
    variant.stem: variant
    for variant in (
        DirectNchw(),
        WideNchw(),
        StagedNchw(),
        MatrixNchw(),
        DirectNhwc(),
        WideNhwc(),
        SparseNhwc(),
        VolumeNcdhw(),
        VolumeNdhwc(),
        PhasesNchw(),
        PhasesNhwc(),
        TapsMatrixNchw(),
        TapsPlanesNchw(),
        TapsSparseNhwc(),
        TapsNchw(),
        TapsNhwc(),
        OneInputPerThread(),
        OneTapPerBlock(),
        OnePerThread(),
        Tile16(),
    )
}

__all__ = ["REGISTRY", "Variant"]
