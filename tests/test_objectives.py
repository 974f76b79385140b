"""Every objective with every option: finite differences, edges, refusals. What is one objective's
own stands in a file of its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tutelage.distill.objectives import DenseStudent, TeacherScores, Tokens, build

N, V = 7, 11
Draw = Callable[..., torch.Tensor]
Scores = Callable[..., TeacherScores]
Gradient = Callable[..., torch.Tensor]

# One reply of three tokens, one of four of which the first takes no loss; every rule of every draw.
TOKENS = Tokens(
    segments_N=torch.tensor([0, 0, 0, 1, 1, 1, 1]),
    mask_N=torch.tensor([True, True, True, False, True, True, True]),
    uniforms_N=torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.6]),
    sampling_logprobs_N=torch.tensor([-0.3, -1.5, -2.5, -0.1, -3.0, -0.8, -1.2]),
)
Variant = tuple[str, dict[str, Any]]


def _differences(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Central differences; a row's loss depends on its own logits alone, so rows move together."""
    step = 1e-5
    columns = []
    for v in range(at.shape[1]):
        up, down = at.clone(), at.clone()
        up[:, v] += step
        down[:, v] -= step
        columns.append((loss(up) - loss(down)) / (2 * step))
    return torch.stack(columns, dim=1)


@pytest.fixture
def example(
    draw: Draw, sampled_ids_N: torch.Tensor, make_scores: Scores
) -> tuple[torch.Tensor, TeacherScores, torch.Tensor]:
    """(student logits, scores with everything, log pi_old): near, but off policy."""
    student_NV, teacher_NV = draw(N, V), draw(N, V)
    old_NV = (student_NV + 0.5 * draw(N, V)).log_softmax(-1)
    scores = make_scores(teacher_NV, sampled_ids_N, k=V)
    return student_NV, scores, old_NV.gather(1, sampled_ids_N[:, None])[:, 0]


def test_gradients_equal_float64_finite_differences(
    variant: Variant,
    example: tuple[torch.Tensor, TeacherScores, torch.Tensor],
    sampled_ids_N: torch.Tensor,
    gradient: Gradient,
) -> None:
    """Where tokens may be given, two are."""
    name, options = variant
    if "importance_clip" in options or options.get("outlier") == "forward_kl_pg":
        pytest.skip("its weight moves with the value and not with the gradient: see by hand")
    objective, (student_NV, scores, old_N) = build(name, **options), example
    if objective.needs.given:
        old_N = old_N.clone()
        old_N[[1, 4]] = torch.nan

    def loss(logits_NV: torch.Tensor) -> torch.Tensor:
        student = DenseStudent(logits_NV)
        return objective(student, scores, sampled_ids_N, old_N, tokens=TOKENS)[0]

    found_NV = gradient(loss, student_NV)
    assert found_NV.any()
    torch.testing.assert_close(found_NV, _differences(loss, student_NV), rtol=1e-6, atol=1e-8)


def test_the_lesson_reaches_every_branch(
    example: tuple[torch.Tensor, TeacherScores, torch.Tensor], sampled_ids_N: torch.Tensor
) -> None:
    """The guard of the test above: each switch stands both ways on some token."""
    student_NV, scores, old_N = example
    for name, options, switch in (
        ("local_support", {"k": 4}, "support/sampled_outside"),
        ("sampled_token", {"clip": 0.05, "dual_clip": 1.5}, "ppo/clip_share"),
        ("trust_region", {"k": 4}, "trust/share"),
        ("trust_region", {"k": 4, "trust": "static", "tau": -0.5}, "trust/share"),
        ("entropy_aware", {"k": 4, "tau": 1.2}, "teacher/undecided"),
        ("advantage_gated", {"k": 4}, "gate/share"),
        ("advantage_gated", {"k": 4, "tau": 0.05}, "gate/share"),
        ("reward_clipped", {"floor": -0.5, "switch": 1.0}, "reward/kept"),
        ("reward_clipped", {"floor": -0.5, "switch": 0.0, "share": 0.5}, "reward/kept"),
    ):
        _, metrics = build(name, **options)(
            DenseStudent(student_NV), scores, sampled_ids_N, old_N, tokens=TOKENS
        )
        assert 0 < metrics[switch].sum() < N, (name, options)


def test_diagnostics_hold_no_graph_and_one_value_a_token(
    variant: Variant,
    example: tuple[torch.Tensor, TeacherScores, torch.Tensor],
    sampled_ids_N: torch.Tensor,
) -> None:
    """A graph kept in the metrics is the step's memory kept."""
    name, options = variant
    student_NV, scores, old_N = example
    student = DenseStudent(student_NV.clone().requires_grad_())
    loss_N, metrics = build(name, **options)(student, scores, sampled_ids_N, old_N, tokens=TOKENS)
    assert loss_N.shape == (N,) and loss_N.requires_grad
    for value_N in metrics.values():
        assert value_N.shape == (N,) and not value_N.requires_grad


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_what_the_teacher_rules_out_stays_finite(
    variant: Variant, kind: torch.dtype, draw: Draw
) -> None:
    """Two tokens have probability, nine none: among the nine are the sampled token, half of the
    teacher's top K and most of the student's. One token more underflows to 0 without being -inf."""
    name, options = variant
    objective = build(name, **options)
    teacher_NV = torch.full((N, V), -torch.inf, dtype=kind)
    teacher_NV[:, [2, 5]] = torch.tensor([0.3, 1.0], dtype=kind)
    teacher_NV[:, 7] = -5000.0
    ids_N = torch.tensor([0, 2, 10, 5, 7, 1, 7])
    student_NV = draw(N, V).to(kind).requires_grad_()
    old_N = student_NV.detach().log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    scores = TeacherScores.from_logits(teacher_NV, ids_N, k=max(1, objective.needs.k))
    loss_N, metrics = objective(DenseStudent(student_NV), scores, ids_N, old_N, tokens=TOKENS)
    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    assert loss_N.isfinite().all() and gradient_NV.isfinite().all()
    assert all(value_N.isfinite().all() for value_N in metrics.values())


def test_no_tokens_are_no_loss(variant: Variant) -> None:
    """A micro-batch can hold rows in which nothing was said."""
    name, options = variant
    objective, none = build(name, **options), torch.zeros(0, dtype=torch.long)
    scores = TeacherScores.from_logits(torch.zeros(0, V), none, k=max(1, objective.needs.k))
    nobody = Tokens(sampling_logprobs_N=torch.zeros(0))
    student = DenseStudent(torch.zeros(0, V))
    loss_N, _ = objective(student, scores, none, torch.zeros(0), tokens=nobody)
    assert loss_N.shape == (0,)


class TestImitation:
    def test_value_and_gradient_are_the_scaled_negative_log_likelihood(
        self, draw: Draw, sampled_ids_N: torch.Tensor, gradient: Gradient
    ) -> None:
        student_NV, behavior_logprobs_N = draw(N, V), torch.full((N,), torch.nan)

        def loss(logits_NV: torch.Tensor) -> torch.Tensor:
            objective = build("imitation", beta=0.25)
            return objective(DenseStudent(logits_NV), None, sampled_ids_N, behavior_logprobs_N)[0]

        for n, y in enumerate(sampled_ids_N.tolist()):
            pi = student_NV[n].softmax(-1)
            assert loss(student_NV)[n].item() == pytest.approx(-0.25 * math.log(pi[y].item()))
            torch.testing.assert_close(
                gradient(loss, student_NV)[n],
                0.25 * (pi - torch.eye(V, dtype=torch.float64)[y]),
            )


class TestTeacherScores:
    def test_top_ids_come_most_probable_first_with_full_vocabulary_logs(
        self, draw: Draw, sampled_ids_N: torch.Tensor
    ) -> None:
        logits_NV = draw(N, V)
        scores = TeacherScores.from_logits(logits_NV, sampled_ids_N, k=4)
        for n in range(N):
            q = logits_NV[n].softmax(-1)
            order = sorted(range(V), key=lambda v: -q[v].item())[:4]
            assert scores.ids_NK[n].tolist() == order
            assert scores.logprobs_NK[n].tolist() == pytest.approx(
                [math.log(q[v].item()) for v in order], rel=1e-5
            )
            assert scores.sampled_N[n].item() == pytest.approx(
                math.log(q[sampled_ids_N[n]].item()), rel=1e-5
            )

    def test_joined_parts_and_taken_parts_keep_their_order(
        self, draw: Draw, sampled_ids_N: torch.Tensor
    ) -> None:
        logits_NV = draw(N, V)
        whole = TeacherScores.from_logits(logits_NV, sampled_ids_N, k=2)
        parts = [
            TeacherScores.from_logits(logits_NV[at], sampled_ids_N[at], k=2)
            for at in (slice(0, 3), slice(3, N))
        ]
        joined = TeacherScores.join(parts)
        index = torch.tensor([5, 0])
        for one, other in ((joined, whole), (joined.take(index), whole.take(index))):
            assert torch.equal(one.ids_NK, other.ids_NK)
            assert torch.equal(one.sampled_N, other.sampled_N)
            assert one.full_NV is not None and other.full_NV is not None
            assert torch.equal(one.full_NV, other.full_NV)
        assert whole.take(index).sampled_N[0] == whole.sampled_N[5]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_broken_teacher_numbers_are_refused_with_their_place(self, bad: float) -> None:
        with pytest.raises(ValueError, match=r"sampled_N at \[1\]"):
            TeacherScores(
                ids_NK=torch.zeros(2, 1, dtype=torch.long),
                logprobs_NK=torch.zeros(2, 1),
                sampled_N=torch.tensor([-1.0, bad]),
                vocabulary=3,
            )

    def test_an_id_beyond_the_vocabulary_is_refused(self) -> None:
        with pytest.raises(ValueError, match="outside the vocabulary of 3"):
            TeacherScores(
                ids_NK=torch.tensor([[3]]),
                logprobs_NK=torch.zeros(1, 1),
                sampled_N=torch.zeros(1),
                vocabulary=3,
            )

    def test_entropy_is_in_nats_and_finite_where_probabilities_vanish(self) -> None:
        """(1/2, 1/4, 1/4, 0): 1.5 bits."""
        teacher_1V = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
        scores = TeacherScores.from_logits(teacher_1V, torch.tensor([3]), k=4)
        assert scores.entropy_N is not None
        assert scores.entropy_N.item() == pytest.approx(1.5 * math.log(2))
        assert scores.sampled_N.item() == -math.inf

    def test_answers_stand_at_the_asked_ids(self, draw: Draw, sampled_ids_N: torch.Tensor) -> None:
        """In the order that they were asked in, joined and taken like the rest."""
        logits_NV, query_ids_NJ = draw(N, V), torch.stack([torch.randperm(V)[:3] for _ in range(N)])
        parts = [
            TeacherScores.from_logits(
                logits_NV[at],
                sampled_ids_N[at],
                k=1,
                keep_full=False,
                query_ids_NJ=query_ids_NJ[at],
            )
            for at in (slice(0, 2), slice(2, N))
        ]
        scores = TeacherScores.join(parts).take(torch.tensor([6, 0]))
        assert scores.full_NV is None and scores.query_logprobs_NJ is not None
        for found, n in zip(scores.query_logprobs_NJ, (6, 0), strict=True):
            q = logits_NV[n].softmax(-1)
            assert found.exp().tolist() == pytest.approx(q[query_ids_NJ[n]].tolist(), rel=1e-5)

    def test_what_one_part_lacks_the_whole_lacks(
        self, draw: Draw, sampled_ids_N: torch.Tensor
    ) -> None:
        """A half-filled distribution would be read as if it were whole."""
        parts = [
            TeacherScores.from_logits(draw(N, V), sampled_ids_N, k=2, keep_full=full)
            for full in (True, False)
        ]
        joined = TeacherScores.join(parts)
        assert joined.full_NV is None and joined.entropy_N is not None

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("logprobs_NK", torch.zeros(2, 3), "differ in shape"),
            ("entropy_N", torch.zeros(3), "entropy_N is of 3 tokens, not 2"),
            ("query_ids_NJ", torch.zeros(2, 1, dtype=torch.long), "must come together"),
            ("full_NV", torch.zeros(2, 5), "full_NV has 5 columns for a vocabulary of 3"),
            ("full_NV", torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]]), r"at \[1, 1\]"),
            ("ids_NK", torch.tensor([[0], [-1]]), "outside the vocabulary of 3"),
        ],
    )
    def test_fields_that_do_not_fit_each_other_are_refused(
        self, field: str, value: torch.Tensor, message: str
    ) -> None:
        fields: dict[str, Any] = {
            "ids_NK": torch.zeros(2, 1, dtype=torch.long),
            "logprobs_NK": torch.zeros(2, 1),
            "sampled_N": torch.zeros(2),
            "vocabulary": 3,
        }
        with pytest.raises(ValueError, match=message):
            TeacherScores(**(fields | {field: value}))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_broken_logits_are_refused(self, bad: float) -> None:
        logits_NV = torch.zeros(3, V)
        logits_NV[2, 4] = bad
        with pytest.raises(ValueError, match=r"at \[2.*check the teacher's weights"):
            TeacherScores.from_logits(logits_NV, torch.zeros(3, dtype=torch.long), k=2)

    @pytest.mark.parametrize("k", [0, V + 1])
    def test_k_beyond_the_vocabulary_is_refused(self, k: int) -> None:
        with pytest.raises(ValueError, match=f"k={k}"):
            TeacherScores.from_logits(torch.zeros(1, V), torch.tensor([0]), k=k)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local_suport", {}, "local_support"),
        ("local_support", {"renormalise": True}, "'renormalize'"),
        ("local_support", {"direction": "foward"}, "'forward'"),
        ("local_support", {"k": 0}, "k=0"),
        ("local_support", {"k": 2.5}, "k=2.5"),
        ("local_support", {"k": "many"}, "k='many'"),
        ("local_support", {"k": True}, "k=True"),
        ("sampled_token", {"clip": 0}, "clip=0"),
        ("sampled_token", {"clip": None}, "clip=None: it must be of type float"),
        ("sampled_token", {"dual_clip": 1.0}, "dual_clip=1.0"),
        ("sampled_token", {"reward_clip": -1.0}, "reward_clip=-1.0"),
        ("sampled_token", {"gamma": 1.5}, "gamma=1.5"),
        ("sampled_token", {"clip": math.nan}, "clip=nan: it must be a number"),
        ("local_support", {"support": "techer"}, "'teacher'"),
        ("local_support", {"tail": "all"}, "tail='all'"),
        ("local_support", {"tail": True}, "tail=True"),
        ("local_support", {"tail": "sampled"}, "renormalize=False (got True)"),
        (
            "local_support",
            {"tail": "sampled", "renormalize": False, "direction": "forward"},
            "got 'forward'",
        ),
        (
            "local_support",
            {"tail": "sampled", "renormalize": False, "support": "teacher+sampled"},
            "without '+sampled'",
        ),
        ("local_support", {"mass": 0.0}, "mass=0.0"),
        ("local_support", {"mass": 0.9, "support": "student"}, "support='student'"),
        ("local_support", {"importance_clip": 0.0}, "importance_clip=0.0"),
        ("full_vocabulary", {"direction": "reversed"}, "'reverse'"),
        ("full_vocabulary", {"beta": 1.5}, "beta=1.5"),
        ("trust_region", {"outlier": "forward-kl"}, "'forward_kl'"),
        ("trust_region", {"trust": "ration"}, "'ratio'"),
        ("trust_region", {"outlier": "clip"}, "needs tau"),
        ("trust_region", {"trust": "static"}, "needs tau"),
        ("trust_region", {"beta": -1.0}, "beta=-1.0"),
        ("trust_region", {"k": 0}, "k=0"),
        ("entropy_aware", {"tau": -0.1}, "tau=-0.1"),
        ("entropy_aware", {"k": 0}, "k=0"),
        ("advantage_gated", {"tau": 2.0}, "tau=2.0"),
        ("advantage_gated", {"k": 0}, "k=0"),
        ("reward_clipped", {"lam": 1.0}, "lam=1.0"),
        ("reward_clipped", {"share": 0.0}, "share=0.0"),
        ("reward_clipped", {"switch": 1.1}, "switch=1.1"),
        ("imitation", {"beta": 0.0}, "beta=0.0"),
        ("imitation", {"beta": "x"}, "beta='x'"),
    ],
)
def test_unknown_names_options_and_values_are_refused_in_one_line(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        build(name, **options)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_local_support_refuses_an_unknown_direction_by_its_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'forward'"):
        build("local_support", direction="foward")


class TestRefusedCalls:
    """Each names the objective, the value and what to do."""

    @staticmethod
    def _call(name: str = "sampled_token", **changes: Any) -> None:
        options = changes.pop("options", {})
        scores = TeacherScores.from_logits(torch.zeros(3, V), torch.tensor([0, 1, 2]), k=3)
        call: dict[str, Any] = {
            "student": DenseStudent(torch.zeros(3, V)),
            "scores": scores,
            "sampled_ids_N": torch.tensor([0, 1, 2]),
            "behaviour_logprobs_N": torch.zeros(3),
        } | changes
        build(name, **options)(**call)

    def test_the_call_that_the_others_break_is_well(self) -> None:
        self._call()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sampled_ids_N": torch.tensor([0, 1])}, "sampled ids of 2 tokens for 3 positions"),
            ({"behaviour_logprobs_N": torch.zeros(4)}, "behavior log-prob.* of 4 tokens for 3"),
            ({"student": DenseStudent(torch.zeros(5, V))}, "3 tokens for 5 positions"),
            ({"tokens": Tokens(segments_N=torch.zeros(2))}, "segments of 2 tokens"),
            ({"tokens": Tokens(mask_N=torch.ones(2).bool())}, "a mask of 2 tokens"),
            ({"tokens": Tokens(uniforms_N=torch.zeros(2))}, "uniform draws of 2 tokens"),
            ({"sampled_ids_N": torch.tensor([0, V, 2])}, f"sampled id {V} of token 1 .*of {V}"),
            ({"sampled_ids_N": torch.tensor([0, 5, -1])}, "sampled id -1 of token 2"),
            ({"scores": None}, "needs a teacher's scores, and got none"),
            (
                {
                    "scores": TeacherScores.from_logits(
                        torch.zeros(3, V + 2), torch.tensor([0, 1, 2]), k=3
                    )
                },
                f"vocabulary has {V + 2} ids, the student's {V}: cut both",
            ),
            (
                {"behaviour_logprobs_N": torch.tensor([-1.0, math.nan, -1.0])},
                "token 1 was not sampled by the student.*only imitation and trust_region",
            ),
        ],
    )
    def test_bad_input(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=rf"^sampled_token: .*{message}"):
            self._call(**changes)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"k": V + 1}, rf"k={V + 1} is larger than the student's vocabulary of {V}: lower"),
            ({"k": V + 1, "support": "student"}, rf"k={V + 1} is larger than .* {V}: lower"),
            ({"k": 4}, "k=4, but the teacher's scores hold 3 ids"),
        ],
    )
    def test_a_support_larger_than_there_is(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=rf"^local_support: {message}"):
            self._call("local_support", options=options)
