"""`python -m dwconv`: the same as the command `dwconv`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
