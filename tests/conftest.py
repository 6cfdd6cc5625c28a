"""What every test needs: no network, one thread per process, quiet tokenizers."""

from __future__ import annotations

import os

# Before anything imports torch: the models are tiny, and xdist's workers would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
