"""What is in the cache, how large is it, and what goes when it is too large?"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.subjects.fixtures import cache_dir
from numerics_suite.versions import locks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


LIMIT_VARIABLE = "NUMERICS_SUITE_CACHE_LIMIT"
DEFAULT_LIMIT = "20 GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def make_room(say: Callable[[str], None]) -> None:
    """Remove the environments used longest ago until the limit is kept."""
