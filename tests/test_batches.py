"""Rows as batches: branches, padding and packing leave hidden states what they are alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch

from tests.rounding import FORWARD_SUMS, rounding
from tutelage.distill.models.batches import FORWARD, Batch, pack
from tutelage.distill.models.decoders import TransformersDecoder
from tutelage.distill.objectives import Needs
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.scheduler.episodes import NO_ACTION, Row

CPU = torch.device("cpu")
PROMPT, FIRST, EXPERT, BETWEEN, SECOND = [5, 6, 7, 8], [20, 21, 22], [30, 31], [9, 10], [40, 41]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture
def branched(make_row: Callable[..., Row]) -> Row:
    """Two turns; in each the expert (`branch`) would have said something else."""
    return make_row(
        [
            ("prompt", PROMPT),
            ("branch", EXPERT),
            ("said", FIRST),
            ("prompt", BETWEEN),
            ("branch", [*EXPERT, 32]),
            ("said", SECOND),
        ]
    )


@torch.no_grad()
def _hidden(model: Any, rows: Sequence[Row], **how: Any) -> dict[int, torch.Tensor]:
    """By row: the hidden states that predict its action tokens."""
    found = {}
    for batch in pack(rows, **({"max_tokens": 1000} | how), device=CPU):
        hidden_ND = batch.hidden(TransformersDecoder(model))
        for b, member in enumerate(batch.members):
            found[member] = hidden_ND[batch.rows_N == b]
    return found


@torch.no_grad()
def _states(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The last hidden states [T, D] of a plain sequence: no mask, no positions, no batch."""
    hidden: torch.Tensor = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return hidden


def _close(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.shape == right.shape and left.numel()
    size = right.abs().max().item()
    torch.testing.assert_close(left, right, rtol=0, atol=rounding(sums=FORWARD_SUMS, size=size))


def test_a_branch_sees_what_a_plain_row_with_the_same_prefix_sees(
    model: Any, branched: Row
) -> None:
    """Both branches, each predicted from the trunk alone: the student's words of the same turn and
    the earlier branch are invisible to it, and positions count on from the trunk."""
    hidden_ND = _hidden(model, [branched])[0]
    first = _states(model, [*PROMPT, *EXPERT])[len(PROMPT) - 1 : -1]
    trunk = [*PROMPT, *FIRST, *BETWEEN]
    second = _states(model, [*trunk, *EXPERT, 32])[len(trunk) - 1 : -1]
    _close(hidden_ND[: len(EXPERT)], first)
    at = len(EXPERT) + len(FIRST)
    _close(hidden_ND[at : at + 3], second)


def test_trunk_tokens_after_a_branch_are_those_of_the_row_without_it(
    model: Any, branched: Row
) -> None:
    hidden_ND = _hidden(model, [branched])[0]
    plain = _states(model, [*PROMPT, *FIRST, *BETWEEN, *SECOND])
    said_first = plain[len(PROMPT) - 1 : len(PROMPT) - 1 + len(FIRST)]
    _close(hidden_ND[len(EXPERT) : len(EXPERT) + len(FIRST)], said_first)
    _close(hidden_ND[-len(SECOND) :], plain[-len(SECOND) - 1 : -1])


def test_a_branch_does_matter_to_its_own_prediction(model: Any, make_row: Any) -> None:
    """The guard of the tests above: another branch gives other hidden states inside the branch."""
    one, other = (
        make_row([("prompt", PROMPT), ("branch", ids), ("said", FIRST)])
        for ids in ([30, 31], [33, 31])
    )
    difference = _hidden(model, [one])[0] - _hidden(model, [other])[0]
    assert difference[1].abs().max() > 0.05  # predicts the second branch token, after the first
    assert difference[[0, 2, 3, 4]].abs().max() < 2e-6


def test_dagger_rows_as_a_context_makes_them(model: Any) -> None:
    """The student's own words on the trunk take no loss (turn -1) but are seen by what follows."""
    ids = [*PROMPT, *EXPERT, *FIRST, *BETWEEN, *EXPERT]
    lengths = [len(PROMPT), len(EXPERT), len(FIRST), len(BETWEEN), len(EXPERT)]
    row = Row(
        ids_T=np.asarray(ids, dtype=np.int32),
        turns_T=np.repeat([NO_ACTION, 0, NO_ACTION, NO_ACTION, 1], lengths).astype(np.int32),
        behavior_logprobs_T=np.full(len(ids), np.nan, dtype=np.float32),
        branches_T=np.repeat([0, 1, 0, 0, 2], lengths).astype(np.int32),
    )
    hidden_ND = _hidden(model, [row])[0]
    trunk = [*PROMPT, *FIRST, *BETWEEN]
    _close(hidden_ND[:2], _states(model, [*PROMPT, *EXPERT])[len(PROMPT) - 1 : -1])
    _close(hidden_ND[2:], _states(model, [*trunk, *EXPERT])[len(trunk) - 1 : -1])


def test_adjacent_branches_stay_apart(model: Any) -> None:
    """Two branches with no trunk between them start from the same place."""
    row = Row(
        ids_T=np.asarray([*PROMPT, 30, 31, 50, 51], dtype=np.int32),
        turns_T=np.asarray([-1] * 4 + [0, 0, 1, 1], dtype=np.int32),
        behavior_logprobs_T=np.full(8, np.nan, dtype=np.float32),
        branches_T=np.asarray([0] * 4 + [1, 1, 2, 2], dtype=np.int32),
    )
    hidden_ND = _hidden(model, [row])[0]
    _close(hidden_ND[:2], _states(model, [*PROMPT, 30, 31])[3:-1])
    _close(hidden_ND[2:], _states(model, [*PROMPT, 50, 51])[3:-1])


def test_padding_and_neighbours_change_nothing(
    model: Any, make_row: Callable[..., Row], branched: Row
) -> None:
    """Ragged rows with and without branches, all in one padded batch and each alone."""
    rng = np.random.default_rng(1)
    rows = [branched]
    for length in (1, 3, 9, 30):
        prompt, said = (rng.integers(1, 101, size=n).tolist() for n in (length, 4))
        rows.append(make_row([("prompt", prompt), ("said", said)]))
    together = _hidden(model, rows)
    for i, row in enumerate(rows):
        _close(together[i], _hidden(model, [row])[0])
    plain_only = _hidden(model, rows[1:])  # without a branch in the batch: the causal path
    for i in range(4):
        _close(plain_only[i], together[i + 1])


def test_losses_of_plain_rows_come_from_the_token_before(
    model: Any, make_row: Callable[..., Row]
) -> None:
    """Sources, targets and behaviour stand side by side: a shift by one would pair token t's
    log-probability with another token's state."""
    row = make_row([("prompt", PROMPT), ("said", FIRST), ("prompt", BETWEEN), ("said", SECOND)])
    (batch,) = pack([row], max_tokens=100, device=CPU)
    assert batch.sources_N.tolist() == [3, 4, 5, 8, 9]
    assert batch.targets_N.tolist() == [*FIRST, *SECOND]
    assert batch.behavior_logprobs_N.tolist() == row.behavior_logprobs_T[row.action_mask_T].tolist()
    assert batch.behavior_logprobs_N.isfinite().all()
    states = _states(model, row.ids_T.tolist())
    _close(_hidden(model, [row])[0], states[[3, 4, 5, 8, 9]])


def test_packing_takes_every_row_once_and_keeps_to_its_limit(
    make_row: Callable[..., Row],
) -> None:
    rng = np.random.default_rng(0)
    rows = [make_row([("prompt", [1] * int(n)), ("said", [2, 3])]) for n in rng.integers(1, 60, 40)]
    batches = pack(rows, max_tokens=100, device=CPU)
    members = [member for batch in batches for member in batch.members]
    assert sorted(members) == list(range(40))
    assert len(batches) < 40  # it packs
    for batch in batches:
        width = max(len(rows[i].ids_T) for i in batch.members) - 1  # nothing follows the last
        assert batch.ids_BT.shape == (len(batch.members), width)
        assert len(batch.members) * width <= 100 or len(batch.members) == 1
        assert len(batch.targets_N) == 2 * len(batch.members)
    (alone,) = pack([make_row([("prompt", [1] * 300), ("said", [2])])], max_tokens=100, device=CPU)
    assert alone.ids_BT.shape == (1, 300)


def test_packing_costs_the_least_of_all_ways_to_cut(make_row: Callable[..., Row]) -> None:
    """In tokens with their padding, and what one more forward costs."""
    rng = np.random.default_rng(1)
    for max_tokens in (1, 200, 700, 10_000):
        lengths = sorted(int(n) for n in np.exp(rng.uniform(0, 5, 9)))
        rows = [make_row([("prompt", [1] * n), ("said", [2])]) for n in lengths]
        batches = pack(rows, max_tokens=max_tokens, device=CPU)
        found = sum(FORWARD["cpu"] + batch.ids_BT.numel() for batch in batches)
        costs = []
        for inner in product([False, True], repeat=len(lengths) - 1):
            cuts = [0, *(i for i, cut in enumerate(inner, start=1) if cut), len(lengths)]
            sizes = [(end - start, lengths[end - 1]) for start, end in pairwise(cuts)]
            if all(many * width <= max_tokens or many == 1 for many, width in sizes):
                costs.append(sum(FORWARD["cpu"] + many * width for many, width in sizes))
        assert found == min(costs)


def test_what_follows_the_last_prediction_is_not_read(
    model: Any, make_row: Callable[..., Row], branched: Row
) -> None:
    """An observation after the last reply, and a branch's place in the trunk is kept."""
    talk = [("prompt", PROMPT), ("said", FIRST)]
    long = make_row([*talk, ("prompt", [7] * 40)])
    for rows in ([long], [long, branched]):
        found = _hidden(model, rows)
        _close(found[0], _hidden(model, [make_row(talk)])[0])
    (batch,) = pack([long], max_tokens=1000, device=CPU)
    assert batch.ids_BT.tolist() == [[*PROMPT, *FIRST[:-1]]]


def test_a_row_is_found_again_in_its_batch(make_row: Callable[..., Row]) -> None:
    """tokens N run row by row in the members' order."""
    rows = [make_row([("prompt", [9] * n), ("said", [n, n + 10])]) for n in (5, 1, 3)]
    (batch,) = pack(rows, max_tokens=1000, device=CPU)
    for b, member in enumerate(batch.members):
        ids = rows[member].ids_T[:-1]
        assert batch.ids_BT[b, : len(ids)].tolist() == ids.tolist()
        assert batch.targets_N[batch.rows_N == b].tolist() == rows[member].ids_T[-2:].tolist()


def test_no_rows_make_no_batches() -> None:
    empty: list[Batch] = pack([], max_tokens=10, device=CPU)
    assert empty == []


class TestTeacher:
    def test_scores_equal_log_softmax_of_the_plain_logits(
        self, make_model: Callable[..., Any], make_row: Callable[..., Row], branched: Row
    ) -> None:
        """Over several batches, in the rows' order, on the vocabulary without the padding rows."""
        model = make_model(vocabulary=90, padding=11, seed=4)
        rows = [
            make_row([("prompt", [50] * n), ("said", [3 * n, 7, 11])]) for n in (9, 2, 25, 4)
        ] + [branched]
        found = TransformersTeacher(model, vocabulary=90, max_tokens=60).score(rows, Needs(k=6))
        for row, scores in zip(rows[:4], found[:4], strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row.ids_T.tolist()])).logits[0]
            expected = logits[-4:-1, :90].log_softmax(-1)
            said = torch.from_numpy(row.ids_T[-3:].astype(np.int64))
            torch.testing.assert_close(
                scores.sampled_N, expected.gather(1, said[:, None])[:, 0], rtol=0, atol=1e-5
            )
            top = expected.topk(6)
            assert torch.equal(scores.ids_NK, top.indices)
            _close(scores.logprobs_NK, top.values)
            assert scores.vocabulary == 90
        assert len(found[4]) == int(branched.action_mask_T.sum())

    def test_chunks_of_positions_do_not_show(
        self, model: Any, make_row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tutelage.distill.teachers import transformers as teachers

        rows = [make_row([("prompt", [50] * n), ("said", [n, 7, 11])]) for n in (9, 2, 5)]
        teacher = TransformersTeacher(model, vocabulary=101)
        whole = teacher.score(rows, Needs(k=3))
        monkeypatch.setattr(teachers, "CHUNK", 2 * 101)  # two positions at a time
        for one, other in zip(teacher.score(rows, Needs(k=3)), whole, strict=True):
            torch.testing.assert_close(one.sampled_N, other.sampled_N)
            assert torch.equal(one.ids_NK, other.ids_NK)
