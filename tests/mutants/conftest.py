"""Makes this folder importable as `mutants`, for the tests and for `table.py` alike."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
