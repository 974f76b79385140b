"""The student: what others ask of its weights, and that all of it is of the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rounding import FORWARD_SUMS, rounding
from tutelage.distill.models.batches import pack
from tutelage.distill.models.decoders import Decoder, decoder_of
from tutelage.distill.models.student import Student
from tutelage.scheduler.episodes import Row

VOCABULARY, PADDING = 101, 11
Make = Callable[..., Any]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def make(request: pytest.FixtureRequest, make_model: Make) -> Callable[..., Student]:
    def make(seed: int, **options: Any) -> Student:
        model = make_model(seed=seed, padding=PADDING, tied=request.param)
        return Student(model, vocabulary=VOCABULARY, **options)

    return make


@torch.no_grad()
def test_what_takes_anothers_weights_says_what_it_says(make: Callable[..., Student]) -> None:
    """Rows of padding do not travel, and stay what they were."""
    one, other = make(1), make(2)
    ids_T = torch.tensor([5, 6, 7, 8])
    padding = other.model.get_input_embeddings().weight[VOCABULARY:].clone()
    assert not torch.equal(one.plain_logprobs(ids_T), other.plain_logprobs(ids_T))
    other.take(one.weights(), version=1)
    assert torch.equal(one.plain_logprobs(ids_T), other.plain_logprobs(ids_T))
    assert torch.equal(other.model.get_input_embeddings().weight[VOCABULARY:], padding)


class Flipped(Student):
    """Another forward, as one with adapters would be."""

    @property
    def decoder(self) -> Decoder:  # type: ignore[override]
        return lambda ids_BT, **given: -decoder_of(self.model)(ids_BT, **given)


@torch.no_grad()
@pytest.mark.parametrize("dense_vocabulary", [0, VOCABULARY], ids=["sparse", "dense"])
def test_one_forward_serves_updates_and_play(
    make_model: Make, make_row: Callable[..., Row], dense_vocabulary: int
) -> None:
    model = make_model(seed=1)
    how: dict[str, Any] = {"vocabulary": VOCABULARY, "dense_vocabulary": dense_vocabulary}
    whose = [Student(model, **how), Flipped(model, **how)]
    row = make_row([("prompt", [2, 3, 4]), ("said", [20, 21])])
    (batch,) = pack([row], max_tokens=24, device=whose[0].device)
    ids_NV = torch.arange(VOCABULARY).expand(2, -1)
    own_NV, other_NV = (one.view(batch).logits_at(ids_NV) for one in whose)
    torch.testing.assert_close(other_NV, -own_NV, rtol=0, atol=0)  # the head has no bias


@torch.no_grad()
@pytest.mark.parametrize("dense_vocabulary", [0, VOCABULARY], ids=["sparse", "dense"])
def test_its_view_of_a_batch_is_the_plain_forward_row_by_row(
    make: Callable[..., Student], make_row: Callable[..., Row], dense_vocabulary: int
) -> None:
    student = make(1, dense_vocabulary=dense_vocabulary)
    shapes = [(3, 2), (5, 7), (9, 1)]
    rows = [make_row([("prompt", range(2, 2 + p)), ("said", range(20, 20 + n))]) for p, n in shapes]
    found: dict[int, torch.Tensor] = {}
    for batch in pack(rows, max_tokens=24, device=student.device):
        own_N = student.view(batch).logprobs_at(batch.targets_N[:, None])[:, 0]
        found |= batch.by_row(own_N)
    assert sorted(found) == [0, 1, 2]
    for i, (prompt, said) in enumerate(shapes):
        ids_T = torch.from_numpy(rows[i].ids_T).long()
        logprobs_TV = student.plain_logprobs(ids_T)[prompt - 1 : prompt + said - 1]
        wanted_N = logprobs_TV.gather(1, ids_T[prompt:, None])[:, 0]
        torch.testing.assert_close(
            found[i], wanted_N, rtol=0, atol=rounding(sums=FORWARD_SUMS, size=6.0)
        )


def test_a_replica_stays_where_it_is_until_it_is_told(make: Callable[..., Student]) -> None:
    student = make(1)
    replica = student.replica()
    shapes = [[p.shape for p in one.trainable()] for one in (student, replica)]
    assert shapes[0] == shapes[1]
    before = {name: tensor.clone() for name, tensor in replica.weights().items()}
    with torch.no_grad():
        for parameter in student.trainable():
            parameter += 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in replica.weights().items())
    assert not any(parameter.requires_grad for parameter in replica.trainable())
    replica.take(student.weights(), version=1)
    own = student.weights()
    assert all(torch.equal(tensor, own[name]) for name, tensor in replica.weights().items())
