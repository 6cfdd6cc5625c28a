"""What a page shows is held to what a command printed, neither looser nor tighter than the module says."""

from __future__ import annotations

import pytest
from docs.outputs import difference

PRINTED = """\
numerics-suite 0.1.0, python 3.11.7, torch 2.13.0+cpu, transformers 5.24.0
2 of 15 checks, 0 not passed, 13 s
ok   load.finite              1  non-finite 0
FAIL train.finite             1  rise -8.739  glm4-chat/bf16/sdpa
   try       a remedy of sequence-
             classification [loss 0.218 → 0.126 in 5 steps]
13 passed in 26.8 s
"""


@pytest.mark.parametrize(
    "shown",
    [
        PRINTED,
        "…\nok   load.finite  1  non-finite 0\n…\n",
        "…\n13 passed in 1.2 s\n",
        "numerics-suite 0.2.0, python 3.12.1, torch 2.9.0, transformers 5.30.1\n…",
        "…\nFAIL train.finite 1 rise -8.5 glm4-chat/bf16/sdpa\n…",
        "…\ntry a remedy of sequence-classification [loss\n0.218 → 0.13 in 5 steps]\n…",
    ],
)
def test_the_same_but_for_what_varies(shown):
    assert difference(shown, PRINTED) is None


@pytest.mark.parametrize(
    "shown",
    [
        "ok   load.finite  1  non-finite 0\n",  # neither the beginning nor the end
        "…\nok   load.finite  1  non-finite 0\n",  # not the end
        "…\nok   load.finite  2  non-finite 0\n…",  # a whole number
        "…\nFAIL train.finite 1 rise -4.1 glm4-chat/bf16/sdpa\n…",
        "…\nFAIL train.finite 1 rise 8.739 glm4-chat/bf16/sdpa\n…",
        "…\nok train.finite\n…",
        "…\n13 passed in 26.8 s\n…\nok   load.finite              1  non-finite 0\n…",  # another order
        "…\n13 passed in 26.8 m\n",
    ],
)
def test_what_is_another_output(shown):
    assert difference(shown, PRINTED) is not None


def test_noise_near_zero_is_noise():
    assert difference("error 1.7e-15", "error 9.1e-16") is None
    assert difference("error 1.7e-5", "error 9.1e-6") is not None
