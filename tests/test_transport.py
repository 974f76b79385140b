"""Scores on their way: what rounding may change, how many bytes a token takes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.distill.objectives import DenseStudent, TeacherScores, Tokens, build
from tutelage.distill.teachers.transport import LEAST, CompactScores, rounding_bound

N, VOCABULARY = 64, 500


@pytest.fixture
def logits_NV() -> torch.Tensor:
    """From near certainty (log-probabilities down to 1e-6) to tails of -100."""
    generator = torch.Generator().manual_seed(5)
    scales_N = torch.logspace(-1, 1.4, N)
    return scales_N[:, None] * torch.randn(N, VOCABULARY, generator=generator)


@pytest.fixture
def sampled_N() -> torch.Tensor:
    return torch.randint(VOCABULARY, (N,), generator=torch.Generator().manual_seed(6))


def _there_and_back(scores: TeacherScores) -> TeacherScores:
    packed: CompactScores = pickle.loads(pickle.dumps(CompactScores.pack(scores, teacher="one")))
    query_ids_NJ = scores.query_ids_NJ
    return packed.unpack(None if query_ids_NJ is None else query_ids_NJ.numpy().astype(np.int32))


def _scores(logits_NV: torch.Tensor, sampled_N: torch.Tensor, **options: Any) -> TeacherScores:
    return TeacherScores.from_logits(logits_NV, sampled_N, **({"k": 32} | options))


class TestRounding:
    def test_every_log_probability_stays_within_the_stated_bound(
        self, logits_NV: torch.Tensor, sampled_N: torch.Tensor
    ) -> None:
        query_ids_NJ = torch.arange(7).expand(N, 7)
        scores = _scores(logits_NV, sampled_N, query_ids_NJ=query_ids_NJ)
        back = _there_and_back(scores)
        assert scores.full_NV is not None and scores.full_NV.min() < -60
        assert (scores.logprobs_NK > -1e-4).any()  # float16 is subnormal there
        for name in ("logprobs_NK", "query_logprobs_NJ", "full_NV", "entropy_N"):
            there, here = getattr(scores, name), getattr(back, name)
            assert ((there - here).abs() <= rounding_bound(there)).all(), name
            assert (there != here).any(), name
        for name in ("ids_NK", "query_ids_NJ", "sampled_N"):
            assert torch.equal(getattr(scores, name), getattr(back, name)), name

    def test_the_bound_is_reached(self) -> None:
        """A bound that nothing comes near would prove nothing."""
        ramp = -torch.linspace(1, 2, 100_001, dtype=torch.float64)
        halves = ramp.to(torch.float16).double()
        assert ((ramp - halves).abs() / rounding_bound(ramp)).max() > 0.97

    def test_what_is_rounded_is_not_rounded_again(
        self, logits_NV: torch.Tensor, sampled_N: torch.Tensor
    ) -> None:
        once = _there_and_back(_scores(logits_NV, sampled_N))
        twice = _there_and_back(once)
        for name in ("ids_NK", "logprobs_NK", "sampled_N", "entropy_N", "full_NV"):
            assert torch.equal(getattr(once, name), getattr(twice, name)), name

    def test_the_impossible_and_the_nearly_impossible(self) -> None:
        """-inf is a fact and stays; a finite number must not become one."""
        said = torch.tensor([[-1e-7, -1e4, -7e4, -3e38, -torch.inf]])
        scores = TeacherScores(
            ids_NK=torch.arange(5)[None],
            logprobs_NK=said,
            sampled_N=torch.tensor([-torch.inf]),
            vocabulary=9,
        )
        back = _there_and_back(scores)
        assert back.logprobs_NK[0, 1:].tolist() == [-1e4, LEAST, LEAST, -torch.inf]
        assert back.logprobs_NK[0, 0] == pytest.approx(-1e-7, abs=2.0**-25)
        assert back.sampled_N.item() == -torch.inf
        assert back.entropy_N is None and back.full_NV is None


class TestBytes:
    def test_192_a_token_at_32_ids_and_6_for_the_sampled_one(
        self, logits_NV: torch.Tensor, sampled_N: torch.Tensor
    ) -> None:
        packed = CompactScores.pack(_scores(logits_NV, sampled_N, keep_full=False), teacher="one")
        assert packed.ids_NK.nbytes + packed.logprobs_NK.nbytes == 192 * N
        assert packed.nbytes == 198 * N
        assert len(pickle.dumps(packed)) < 198 * N + 1000  # nothing else rides along

    def test_asked_ids_do_not_come_back(
        self, logits_NV: torch.Tensor, sampled_N: torch.Tensor
    ) -> None:
        query_ids_NJ = torch.arange(16).expand(N, 16)
        plain = CompactScores.pack(_scores(logits_NV, sampled_N, keep_full=False), teacher="one")
        scores = _scores(logits_NV, sampled_N, keep_full=False, query_ids_NJ=query_ids_NJ)
        packed = CompactScores.pack(scores, teacher="one")
        assert packed.nbytes == plain.nbytes + 2 * 16 * N
        with pytest.raises(ValueError, match="must come together"):
            packed.unpack()
        back = packed.unpack(query_ids_NJ.numpy().astype(np.int32))
        assert back.query_ids_NJ is not None and torch.equal(back.query_ids_NJ, query_ids_NJ)

    def test_the_whole_distribution_takes_two_bytes_an_id(
        self, logits_NV: torch.Tensor, sampled_N: torch.Tensor
    ) -> None:
        packed = CompactScores.pack(_scores(logits_NV, sampled_N, k=1), teacher="one")
        assert packed.nbytes == N * (2 * VOCABULARY + 12)


def test_unpacked_scores_may_be_written_to(
    logits_NV: torch.Tensor, sampled_N: torch.Tensor
) -> None:
    """Ray hands out arrays that must not change, and a loss may work in place."""
    packed = copy.deepcopy(CompactScores.pack(_scores(logits_NV, sampled_N), teacher="one"))
    for array in (packed.ids_NK, packed.sampled_N):
        array.flags.writeable = False
    before = packed.sampled_N.copy()
    packed.unpack().sampled_N.zero_()
    assert (packed.sampled_N == before).all()


def test_rounding_moves_a_gradient_by_a_fifth_of_a_percent_at_most(
    variant: tuple[str, dict[str, Any]],
    logits_NV: torch.Tensor,
    sampled_N: torch.Tensor,
    gradient: Callable[..., torch.Tensor],
) -> None:
    """Every objective with every option, a student about one nat away."""
    name, options = variant
    objective = build(name, **options)
    noise_NV = torch.randn(N, VOCABULARY, generator=torch.Generator().manual_seed(7))
    student_NV = (logits_NV * 0.9 + noise_NV).double()
    behavior_logprobs_N = student_NV.log_softmax(-1).gather(1, sampled_N[:, None])[:, 0]
    scores = _scores(logits_NV, sampled_N, k=8) if objective.needs.teacher else None

    def slope(given: TeacherScores | None) -> torch.Tensor:
        def loss(at_NV: torch.Tensor) -> torch.Tensor:
            draws = torch.Generator().manual_seed(8)
            tokens = Tokens(sampling_logprobs_N=0.8 * behavior_logprobs_N)
            student = DenseStudent(at_NV)
            return objective(
                student, given, sampled_N, behavior_logprobs_N, generator=draws, tokens=tokens
            )[0]

        return gradient(loss, student_NV)

    exact = slope(scores)
    moved = slope(None if scores is None else _there_and_back(scores)) - exact
    assert moved.norm() < 2e-3 * exact.norm()
