"""The version, kept here so that a source tree runs without being installed."""

from __future__ import annotations

__version__ = "0.1.0"
