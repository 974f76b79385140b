"""Sizes and tolerances that depend on the dtype of weights alone."""

from __future__ import annotations

BYTES = {"float32": 4, "bfloat16": 2}

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Nats, in the mean over a few tokens, by which log-probabilities of the same weights may differ: a
teacher's later or on another machine, an engine's from the learner's. Other kernels and devices
move float32 by about 1e-5, and bfloat16, where the order of summation shows in the second digit, by
some 1e-2; other weights move them by whole nats."""

ROWS_TOLERANCE = TOLERANCE | {"float32": 2e-3}
"""The same over the doctor's rows, whose padding and batches differ each time."""
