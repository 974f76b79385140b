"""Draws from few candidates against the law's own words, a row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tutelage.distill.engines import sampling
from tutelage.distill.engines.sampling import Drawn, Laws, draw
from tutelage.scheduler.episodes import GREEDY, SamplingParams

LAWS = [
    GREEDY,
    SamplingParams(),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.3),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7, top_p=0.95),
]
CPU = torch.device("cpu")


def _logits(rows: int, vocabulary: int, *, sharp: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sharp * torch.randn(rows, vocabulary, generator=generator)


def _uniform(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed))


def _drawn(
    logits_BV: torch.Tensor, params: list[SamplingParams], uniform_B1: torch.Tensor
) -> Drawn:
    return draw(logits_BV, Laws.of(params, CPU), uniform_B1)


def _by_hand(logits_V: torch.Tensor, law: SamplingParams, uniform: float) -> int:
    """Walk down the probabilities, equal ones by id, to the share `uniform` of the nucleus."""
    if law.temperature == 0:
        return int(logits_V.argmax())
    probs = (logits_V.double() / law.temperature).softmax(-1).tolist()
    order = sorted(range(len(probs)), key=lambda v: (-probs[v], v))
    nucleus, mass = [], 0.0
    for v in order:
        if nucleus and mass >= law.top_p:
            break
        nucleus.append(v)
        mass += probs[v]
    left = uniform * mass
    for v in nucleus:
        left -= probs[v]
        if left < 0:
            return v
    return nucleus[-1]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("sharp", [0.3, 2.0, 8.0])
def test_a_draw_is_the_one_that_walking_down_the_probabilities_finds(
    law: SamplingParams, sharp: float
) -> None:
    """From flat laws, whose nucleus is wider than the candidates, to sharp ones."""
    logits_BV, uniform_B1 = _logits(60, 700, sharp=sharp), _uniform(60)
    found = _drawn(logits_BV, [law] * 60, uniform_B1)
    wanted = [
        _by_hand(row_V, law, u)
        for row_V, u in zip(logits_BV, uniform_B1[:, 0].tolist(), strict=True)
    ]
    assert found.ids == wanted == found.ids_B1[:, 0].tolist()
    plain_BV = logits_BV.log_softmax(-1)
    assert found.logprobs == [plain_BV[b, v].item() for b, v in enumerate(wanted)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_candidates_and_the_whole_vocabulary_give_the_same_to_the_bit(
    law: SamplingParams,
) -> None:
    """A row may be drawn either way, in one run and in its repetition."""
    logits_BV, uniform_B1 = _logits(80, 900, sharp=14.0), _uniform(80)
    few = _drawn(logits_BV, [law] * 80, uniform_B1)
    exact = sampling._draw(logits_BV, Laws.of([law] * 80, CPU), uniform_B1, whole=False)[3]
    assert exact.sum() > 0  # some rows end among the candidates
    whole = sampling._draw(logits_BV, Laws.of([law] * 80, CPU), uniform_B1, whole=True).tolist()
    assert [few.ids, few.logprobs, few.sampling_logprobs] == whole[:3]


def test_equal_probabilities_keep_the_order_of_ids() -> None:
    """Logits of bfloat16 are often equal. At the nucleus' edge the lowest ids are in it."""
    logits_BV = torch.zeros(100, 640)
    logits_BV[:, ::2] = -9.0
    logits_BV[:, 7] = 2.0
    uniform_B1 = torch.linspace(0, 0.999, 100)[:, None]
    law = SamplingParams(top_p=0.1)
    found = _drawn(logits_BV, [law] * 100, uniform_B1)
    assert found.ids == sorted(found.ids, key=lambda v: (v != 7, v))
    assert set(found.ids) == {7, *range(1, max(found.ids) + 1, 2)}
    assert _drawn(torch.zeros(1, 640), [GREEDY], torch.rand(1, 1)).ids == [0]


def test_no_row_depends_on_another() -> None:
    """Rows of other laws, and some that need the whole vocabulary."""
    logits_BV = torch.cat([_logits(30, 800, sharp=s, seed=i) for i, s in enumerate((0.2, 3, 9))])
    uniform_B1, params = _uniform(90), [LAWS[i % len(LAWS)] for i in range(90)]
    found = _drawn(logits_BV, params, uniform_B1)
    for b in range(90):
        alone = _drawn(logits_BV[b : b + 1], params[b : b + 1], uniform_B1[b : b + 1])
        assert (alone.ids, alone.logprobs) == ([found.ids[b]], [found.logprobs[b]])
        assert alone.sampling_logprobs == [found.sampling_logprobs[b]]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_one_broken_logit_is_loud(broken: float) -> None:
    logits_BV = _logits(5, 300, sharp=9.0)
    logits_BV[3, 17] = broken
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        _drawn(logits_BV, [SamplingParams(top_p=0.9)] * 5, _uniform(5))
