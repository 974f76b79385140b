"""What follows from the dtype of weights alone."""

from __future__ import annotations

BYTES = {"float32": 4, "bfloat16": 2}

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Nats, in the mean over the same few tokens, by which the same weights may differ from themselves:
a teacher later or elsewhere, an engine from the learner. Other kernels and devices move float32 by
1e-5 or so, and bfloat16, where another order of summation shows in the second digit, by some 1e-2;
other weights by whole nats."""

ROWS_TOLERANCE = TOLERANCE | {"float32": 2e-3}
"""Over whatever rows the doctor has, which are padded and batched otherwise each time."""
