"""The estimator study: its exact sums against autograd and draws, its toy against the closed forms.

Letters: Y sequences, T tokens, N = Y T, C prefixes, V vocabulary, R runs, B trajectories, G gammas.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.distill.cli.main import main
from tutelage.distill.objectives import build
from tutelage.distill.studies import estimators, toy_control
from tutelage.distill.studies.enumeration import (
    World,
    _token_gradients,
    behavior_logprobs,
    estimate,
    run_enumeration,
    sampling_shift,
    sequence_gradient,
    token_gradient,
)
from tutelage.distill.studies.toy_control import (
    MICRO_BATCHES,
    TARGETS,
    Policies,
    log_density,
    micro_batch_variance,
    noise,
    play,
    return_to_go,
    run_toy,
    score,
    train_teachers,
)
from tutelage.scheduler.episodes import SamplingParams

pytestmark = pytest.mark.runs

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)  # all in float64


@pytest.fixture(scope="module")
def world() -> World:
    return World.random(0, vocabulary=4, length=3)


def test_the_world_holds_every_sequence_once(world: World) -> None:
    assert len({tuple(ids) for ids in world.ids_YT.tolist()}) == 4**3
    assert world.probabilities().sum().item() == pytest.approx(1)
    assert len(world.student_CV) == 1 + 4 + 4**2
    prefixes = {
        (tuple(ids[:t]), row)
        for ids, rows in zip(world.ids_YT.tolist(), world.prefixes_YT.tolist(), strict=True)
        for t, row in enumerate(rows)
    }
    assert len(prefixes) == len({row for _, row in prefixes}) == len(world.student_CV)


def test_gamma_one_is_unbiased_for_the_sequence(world: World) -> None:
    close(estimate(build("sampled_token", gamma=1.0), world).mean_CV, sequence_gradient(world))


def test_gamma_zero_is_unbiased_for_the_token_and_its_bias_is_the_formula(world: World) -> None:
    """ALGORITHMS.md, section 1: bias of g_tok = E[ sum_t sum_{t'>t} r_t' g_t ], here as what it
    lacks."""
    found_CV = estimate(build("sampled_token", gamma=0.0), world).mean_CV
    close(found_CV, token_gradient(world))
    cost_YT = world.logprobs(world.student_CV) - world.logprobs(world.teacher_CV)
    later_YT = cost_YT.flip(1).cumsum(1).flip(1) - cost_YT
    probs_CV = world.student_CV.softmax(-1)
    lacking_CV = torch.zeros_like(probs_CV)
    for weight, ids, rows, later in zip(
        world.probabilities(), world.ids_YT, world.prefixes_YT, later_YT, strict=True
    ):
        for token, row, cost in zip(ids, rows, later, strict=True):
            lacking_CV[row] -= weight * cost * probs_CV[row]
            lacking_CV[row, token] += weight * cost
    close(sequence_gradient(world) - found_CV, lacking_CV)
    assert lacking_CV.norm() > 0.05 * found_CV.norm()


def test_a_support_of_the_whole_vocabulary_is_the_token_gradient(world: World) -> None:
    for objective in (
        build("local_support", k=4),
        build("local_support", k=4, renormalize=False),
        build("local_support", k=2, renormalize=False, tail="sampled"),
        build("full_vocabulary"),
    ):
        close(estimate(objective, world).mean_CV, token_gradient(world))


def test_leaving_tokens_out_is_biased(world: World) -> None:
    truth_CV = token_gradient(world)
    for options in ({"k": 2}, {"k": 2, "renormalize": False}, {"k": 2, "support": "student"}):
        found_CV = estimate(build("local_support", **options), world).mean_CV
        assert (found_CV - truth_CV).norm() > 0.1 * truth_CV.norm()


def test_variance_rises_with_gamma_and_falls_when_the_token_is_summed_out(world: World) -> None:
    variances = [
        estimate(build("sampled_token", gamma=gamma), world).variance
        for gamma in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert variances == sorted(variances)
    assert estimate(build("full_vocabulary"), world).variance < variances[0] / 2


@pytest.mark.parametrize("outlier", ["forward_kl", "mask"])
def test_moments_with_a_trust_draw_are_those_of_draws(world: World, outlier: str) -> None:
    objective = build("trust_region", k=2, outlier=outlier)
    exact = estimate(objective, world)
    generator = torch.Generator().manual_seed(0)
    rounds, total_CV, second = 400, torch.zeros_like(exact.mean_CV), 0.0
    weight_N = world.probabilities().repeat_interleave(3)
    for _ in range(rounds):
        uniforms_N = torch.rand(len(weight_N), generator=generator, dtype=torch.float64)
        gradient_NV = _token_gradients(objective, world, uniforms_N)
        weighted_NV = weight_N[:, None] * gradient_NV / rounds
        total_CV.index_add_(0, world.prefixes_YT.flatten(), weighted_NV)
        second += (weighted_NV * gradient_NV).sum().item()
    assert (total_CV - exact.mean_CV).norm() < 0.05 * exact.mean_CV.norm()  # draws: 0.02
    assert second - exact.mean_CV.square().sum().item() == pytest.approx(exact.variance, rel=0.02)


def test_the_study_measures_the_truth_as_zero_bias() -> None:
    qualities = run_enumeration([0.0, 1.0], worlds=1, vocabulary=4, length=3)
    found = {(quality.name, quality.label): quality for quality in qualities}
    token, causal = found["sampled_token", "γ=0"], found["sampled_token", "γ=1"]
    assert token.token_bias < 1e-12 < token.sequence_bias
    assert causal.sequence_bias < 1e-12 < causal.token_bias
    assert causal.cosine == pytest.approx(1)
    assert causal.token_bias == pytest.approx(token.sequence_bias, rel=1e-4)
    assert token.error(10**9) == pytest.approx(token.sequence_bias, rel=1e-4)


def test_the_toys_score_is_the_gradient_of_its_density() -> None:
    head = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    moves = torch.randn(50, dtype=torch.float64)
    (expected,) = torch.autograd.grad(log_density(head, moves).sum(), head)
    close(score(head, moves), expected)


def test_return_to_go_by_hand() -> None:
    found = return_to_go(torch.tensor([[[1.0, 2.0, 4.0]]]), 0.5)
    assert found.tolist() == [[[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0]]]


def test_variance_is_that_of_gradients_taken_batch_by_batch() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    policies = Policies(generators)
    seen = play(policies, 0, noise(generators, 16))
    features_RNF, moves_RN = seen.features_RBTF.flatten(1, 2), seen.moves_RBT.flatten(1)
    hidden_RNH = policies.hidden(features_RNF).detach()
    cost_RBT = torch.randn(seen.moves_RBT.shape)
    found_RG = micro_batch_variance(
        hidden_RNH, score(policies.head(hidden_RNH), moves_RN).detach(), cost_RBT[:, None]
    )
    surrogate_RB = cost_RBT * log_density(policies.head(hidden_RNH), moves_RN).view_as(cost_RBT)
    weight_and_bias = policies.layers[-1]
    gradients_RMP = []
    for run in range(2):
        taken = [
            torch.autograd.grad(
                surrogate_RB[run, 2 * m : 2 * m + 2].sum() / 2, weight_and_bias, retain_graph=True
            )
            for m in range(MICRO_BATCHES)
        ]
        gradients_RMP.append(
            torch.stack([torch.cat([g[run].flatten() for g in each]) for each in taken])
        )
    for run, gradients_MP in enumerate(gradients_RMP):
        expected = (gradients_MP - gradients_MP.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(found_RG[run, 0], expected, rtol=1e-4, atol=0.0)


def test_reinforce_brings_a_teacher_to_its_target() -> None:
    teachers = train_teachers([42], 1, 150)
    end = play(teachers, 1, noise([torch.Generator().manual_seed(0)])).positions_RBT[..., -1]
    assert abs(end.mean().item() - TARGETS[1]) < 0.3


def test_a_run_does_not_hang_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_control, "TEACHER_ITERATIONS", 5)
    alone, together = run_toy([0.5], [7], 6), run_toy([0.0, 0.5], [42, 7], 6)
    (same,) = [run for run in together if run.gamma == 0.5 and run.seed == 7]
    assert same.distances == pytest.approx(alone[0].distances, rel=1e-3)
    assert same.variance == pytest.approx(alone[0].variance, rel=1e-3)
    first = {run.gamma: run.first_variance for run in together if run.seed == 7}
    assert first[0.0] != first[0.5]


def test_the_command_writes_table_numbers_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toy_control, "TEACHER_ITERATIONS", 20)
    small = partial(run_enumeration, worlds=1, vocabulary=4, length=3)
    monkeypatch.setattr(estimators, "run_enumeration", small)
    out = tmp_path / "deep" / "study"
    with pytest.raises(SystemExit) as stopped:
        main(["study", "estimators", f"--out={out}", "--iterations=30", "--seeds", "1", "2", "3"])
    assert stopped.value.code == 0, capsys.readouterr().err
    found = json.loads((out / "estimators.json").read_text(encoding="utf-8"))
    assert found["settings"]["seeds"] == [1, 2, 3]
    assert len(found["toy"]) == 3 * len(found["settings"]["gammas"])
    first = {run["gamma"]: run["first_variance"] for run in found["toy"] if run["seed"] == 1}
    assert list(first.values()) == sorted(first.values())
    table = (out / "table.md").read_text(encoding="utf-8")
    assert all(f"| {quality['label']} |" in table for quality in found["enumeration"])
    for plot in ("variance_against_gamma.png", "bias_against_variance.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--iterations 0"):
        estimators.run_study(tmp_path, iterations=0)
    with pytest.raises(ValueError, match="each may stand once"):
        estimators.run_study(tmp_path, seeds=[1, 1])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install 'tutelage\\[plots\\]'"):
        estimators.run_study(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_lost_run_counts_as_diverged_and_leaves_valid_json() -> None:
    nan = float("nan")
    run = toy_control.ToyRun(
        gamma=1.0,
        seed=0,
        distances=(0.1, nan),
        variance=float("inf"),
        first_variance=1.0,
        reference_variance=1.0,
    )
    assert run.diverged and not run.reached
    assert estimators._finite({"a": [nan, 1.0]}) == {"a": [None, 1.0]}
    assert "1 of 1" in estimators.toy_sheet([run], 1).markdown()


ALL_PARAMS = [
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.6),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=0.0),
]
DRAWING: list[tuple[str, dict[str, Any]]] = [
    ("sampled_token", {}),
    ("sampled_token", {"gamma": 0.5}),
    ("sampled_token", {"gamma": 1.0}),
    ("sampled_token", {"reward_clip": 0.5}),
    ("trust_region", {"k": 2}),
    ("trust_region", {"k": 2, "outlier": "mask"}),
    ("trust_region", {"k": 2, "outlier": "clip", "tau": -0.5}),
    ("trust_region", {"k": 2, "outlier": "forward_kl_pg"}),
    ("entropy_aware", {"k": 2}),
    ("reward_clipped", {}),
    ("reward_clipped", {"switch": 0.0}),
    ("advantage_gated", {"k": 2}),
    ("local_support", {"k": 2, "renormalize": False, "tail": "sampled"}),
    ("local_support", {"k": 2, "support": "teacher+sampled"}),
    ("local_support", {"k": 2, "support": "student+sampled"}),
    ("local_support", {"k": 2, "support": "teacher+sampled", "direction": "forward"}),
    ("local_support", {"k": 2, "support": "teacher+sampled", "renormalize": False}),
]


def test_top_p_leaves_a_distribution_over_the_fewest_tokens_with_its_mass(world: World) -> None:
    pi_CV = world.student_CV.softmax(-1)
    for params in ALL_PARAMS:
        mu_CV = behavior_logprobs(world.student_CV, params).exp()
        close(mu_CV.sum(-1), torch.ones(len(mu_CV), dtype=torch.float64))
        kept = int((mu_CV > 0).sum())
        assert (kept == mu_CV.numel()) == (params.temperature > 0 and params.top_p == 1)
        if params.temperature == 0:
            assert torch.equal(mu_CV.argmax(-1), pi_CV.argmax(-1)) and kept == len(mu_CV)
    by_hand = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    wanted = {0.9: [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], 0.6: [0.5 / 0.8, 0.3 / 0.8, 0, 0]}
    for top_p, mu in wanted.items():
        close(
            behavior_logprobs(by_hand, SamplingParams(top_p=top_p)).exp(),
            torch.tensor([mu], dtype=torch.float64),
        )


@pytest.mark.parametrize(("name", "options"), DRAWING)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_under_temperature_alone_sampling_is_exactly_unbiased(
    world: World, name: str, options: dict[str, Any], temperature: float
) -> None:
    """And full is not."""
    params = SamplingParams(temperature=temperature)
    assert sampling_shift(build(name, behavior="sampling", **options), world, params) < 1e-12
    assert sampling_shift(build(name, **options), world, params) > 1e-3


@pytest.mark.parametrize(("name", "options"), DRAWING)
def test_drawn_from_the_whole_policy_the_two_behaviors_are_one(
    world: World, name: str, options: dict[str, Any]
) -> None:
    full, sampling = (
        estimate(build(name, behavior=behavior, **options), world)
        for behavior in ("full", "sampling")
    )
    close(full.mean_CV, sampling.mean_CV)
    assert full.variance == pytest.approx(sampling.variance)


@pytest.mark.parametrize(
    "params", [params for params in ALL_PARAMS if params.top_p < 1 or not params.temperature]
)
def test_what_a_cut_leaves_of_the_gradient_is_the_sum_over_what_is_drawn(
    world: World, params: SamplingParams
) -> None:
    """sum over the nucleus of pi(v) (onehot(v) - pi) log(pi(v) / q(v)): what is missing is the same
    sum over the tail, whatever the temperature; full weighs the nucleus by mu in pi's place."""
    pi_CV, q_CV = world.student_CV.softmax(-1), world.teacher_CV.softmax(-1)
    mu_CV, reach_C = behavior_logprobs(world.student_CV, params).exp(), world.reach(params)

    def by_hand(weight_CV: torch.Tensor) -> torch.Tensor:
        cost_CV = weight_CV * (pi_CV / q_CV).log()
        return reach_C[:, None] * (cost_CV - pi_CV * cost_CV.sum(-1, keepdim=True))

    inside_CV = torch.where(mu_CV > 0, pi_CV, 0.0)
    close(estimate(build("sampled_token"), world, params).mean_CV, by_hand(mu_CV))
    found_CV = estimate(build("sampled_token", behavior="sampling"), world, params).mean_CV
    close(found_CV, by_hand(inside_CV))
    close(found_CV + by_hand(pi_CV - inside_CV), by_hand(pi_CV))
    tail = build("local_support", k=2, renormalize=False, tail="sampled", behavior="sampling")
    support_CV = torch.zeros_like(pi_CV).scatter(1, q_CV.topk(2).indices, 1.0) > 0
    covered_CV = torch.where(support_CV | (mu_CV > 0), pi_CV, 0.0)
    # the direct part and the tail: the gradient of sum pi log(pi / q) over what either covers
    flow_CV = covered_CV - pi_CV * covered_CV.sum(-1, keepdim=True)
    wanted_CV = by_hand(covered_CV) + reach_C[:, None] * flow_CV
    close(estimate(tail, world, params).mean_CV, wanted_CV)


def test_a_prefix_is_reached_as_often_as_it_is_sampled(world: World) -> None:
    for params in (SamplingParams(), *ALL_PARAMS):
        reach_C = world.reach(params)
        mu_CV = behavior_logprobs(world.student_CV, params).exp()
        assert reach_C[0].item() == pytest.approx(1)
        close(reach_C[1:5], mu_CV[0])
        assert reach_C[5:].sum().item() == pytest.approx(1)


def test_the_studys_table_of_sampling_parameters_has_its_errors() -> None:
    errors = estimators.run_sampling_shifts(worlds=2, vocabulary=12)
    names = {error.name for error in errors}
    assert names == {name for name, _ in DRAWING}
    for error in errors:
        assert (error.sampling < 1e-9) == (error.top_p == 1)
    first = errors[0]
    cell = f"| {first.full:.1%} → {first.sampling:.1%} |"
    assert cell in estimators.sampling_sheet(errors).markdown()
