"""The student as hidden states and a head: the dense student's numbers, whatever is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rounding import rounding
from tutelage.distill.objectives import (
    DenseStudent,
    SparseStudent,
    StudentView,
    TeacherScores,
    Tokens,
    build,
    sparse,
)

N, V, D, PADDING = 7, 11, 5, 3
Draw = Callable[..., torch.Tensor]
Scores = Callable[..., TeacherScores]
Variant = tuple[str, dict[str, Any]]
TOKENS = Tokens(
    segments_N=torch.tensor([0, 0, 0, 1, 1, 1, 1]),
    mask_N=torch.tensor([True, True, True, False, True, True, True]),
    uniforms_N=torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.6]),
    sampling_logprobs_N=torch.tensor([-0.3, -1.5, -2.5, -0.1, -3.0, -0.8, -1.2]),
)


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens of gathered rows, four rows of a block for two tokens, one token's whole logits:
    neither 7 tokens nor 11 ids divide evenly."""
    monkeypatch.setattr(sparse, "GATHERED", 2 * 4 * D)
    monkeypatch.setattr(sparse, "BLOCK", 4)
    monkeypatch.setattr(sparse, "CHUNK", 8)


@pytest.fixture
def head(draw: Draw) -> Callable[..., torch.nn.Linear]:
    """An output layer with padded rows that would take nearly all probability if they could."""

    def head(kind: torch.dtype, *, bias: bool) -> torch.nn.Linear:
        layer = torch.nn.Linear(D, V + PADDING, bias=bias, dtype=kind)
        with torch.no_grad():
            layer.weight.copy_(draw(V + PADDING, D, scale=1.0))
            layer.weight[V:] *= 30
            if bias:
                layer.bias.copy_(draw(V + PADDING, scale=1.0))
                layer.bias[V:] += 30
        return layer

    return head


def _dense(hidden_ND: torch.Tensor, layer: torch.nn.Linear) -> DenseStudent:
    return DenseStudent(layer(hidden_ND)[:, :V])


def _sparse(hidden_ND: torch.Tensor, layer: torch.nn.Linear) -> SparseStudent:
    return SparseStudent(hidden_ND, layer, vocabulary=V)


Make = Callable[[torch.Tensor, torch.nn.Linear], StudentView]


def _gradients(loss: torch.Tensor, layer: torch.nn.Linear) -> list[torch.Tensor]:
    """Of the head's own parameters; what a loss does not use has zero."""
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    ("kind", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["f64", "f32"]
)
def test_every_objective_has_the_dense_loss_and_gradients(
    variant: Variant,
    bias: bool,
    kind: torch.dtype,
    tolerance: float,
    draw: Draw,
    head: Callable[..., torch.nn.Linear],
    sampled_ids_N: torch.Tensor,
    make_scores: Scores,
) -> None:
    """Hidden states, weight and bias; padded rows get none."""
    name, options = variant
    objective, hidden_ND, teacher_NV = build(name, **options), draw(N, D).to(kind), draw(N, V)
    layer = head(kind, bias=bias)
    scores = make_scores(teacher_NV.to(kind), sampled_ids_N, k=V)
    with torch.no_grad():
        old_N = _dense(hidden_ND, layer).logprobs_at(sampled_ids_N[:, None])[:, 0]
        old_N += draw(N, scale=0.3).to(kind)
    found: dict[Make, Any] = {}
    for make in (_dense, _sparse):
        layer.zero_grad()
        point_ND = hidden_ND.clone().requires_grad_()
        loss_N, metrics = objective(
            make(point_ND, layer), scores, sampled_ids_N, old_N, tokens=TOKENS
        )
        gradients = _gradients(loss_N.sum(), layer)
        found[make] = loss_N.detach(), metrics, [point_ND.grad, *(g.clone() for g in gradients)]
    (loss_N, metrics, gradients), (sparse_N, sparse_metrics, sparse_gradients) = found.values()
    torch.testing.assert_close(sparse_N, loss_N, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sparse_metrics, metrics, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sparse_gradients, gradients, rtol=tolerance, atol=tolerance)
    assert gradients[0].any()
    assert not any(gradient[V:].any() for gradient in sparse_gradients[1:])


@pytest.mark.usefixtures("many_chunks")
def test_what_diagnostics_ask_is_the_dense_answer(
    draw: Draw, head: Callable[..., torch.nn.Linear]
) -> None:
    hidden_ND, layer = draw(N, D), head(torch.float64, bias=True)
    ids_NK = torch.stack([torch.arange(V).roll(n)[:6] for n in range(N)])
    with torch.no_grad():
        dense, gathered = _dense(hidden_ND, layer), _sparse(hidden_ND, layer)
        assert len(gathered) == N
        torch.testing.assert_close(gathered.logits_at(ids_NK), dense.logits_at(ids_NK))
        torch.testing.assert_close(gathered.logprobs_at(ids_NK), dense.logprobs_at(ids_NK))
        torch.testing.assert_close(gathered.entropy(), dense.entropy())
        assert torch.equal(gathered.top_k(6), dense.top_k(6))


@pytest.mark.usefixtures("many_chunks")
def test_an_id_asked_twice_is_taught_twice(
    draw: Draw, head: Callable[..., torch.nn.Linear]
) -> None:
    """In one token and over several, against the gather that autograd knows."""
    ids_NK = torch.tensor([[3, 3, 5]] * N)
    weights_NK, layer = draw(N, 3), head(torch.float64, bias=True)
    found = []
    for make in (_dense, _sparse):
        layer.zero_grad()
        point_ND = draw(N, D).mul(0).add(1.5).requires_grad_()
        loss = (make(point_ND, layer).logits_at(ids_NK) * weights_NK).sum()
        found.append([g.clone() for g in _gradients(loss, layer)] + [point_ND.grad])
    torch.testing.assert_close(found[1], found[0])
    assert set(found[1][1].nonzero().flatten().tolist()) == {3, 5}


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("name", ["local_support", "sampled_token", "full_vocabulary"])
def test_micro_batches_add_up(
    name: str,
    draw: Draw,
    head: Callable[..., torch.nn.Linear],
    sampled_ids_N: torch.Tensor,
    make_scores: Scores,
) -> None:
    objective = build(name, **({"k": 4} if name == "local_support" else {}))
    hidden_ND, layer = draw(N, D), head(torch.float64, bias=True)
    scores, old_N = make_scores(draw(N, V), sampled_ids_N, k=V), -draw(N).abs()
    found = []
    for cuts in ([slice(0, N)], [slice(0, 3), slice(3, 4), slice(4, N)]):
        layer.zero_grad()
        for part in cuts:
            loss_N, _ = objective(
                _sparse(hidden_ND[part], layer),
                scores.take(torch.arange(N)[part]),
                sampled_ids_N[part],
                old_N[part],
            )
            loss_N.sum().backward()
        found.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1])
    assert all(gradient.any() for gradient in found[0])


@pytest.mark.parametrize("make", [_dense, _sparse], ids=["dense", "sparse"])
def test_a_look_without_gradient_does_not_freeze_what_comes_after(
    make: Make, draw: Draw, head: Callable[..., torch.nn.Linear], sampled_ids_N: torch.Tensor
) -> None:
    """The normaliser is kept between calls: it must keep its gradient too."""
    layer, ids_N1, found = head(torch.float64, bias=False), sampled_ids_N[:, None], []
    hidden_ND = draw(N, D)
    for look in (False, True):
        point_ND = hidden_ND.clone().requires_grad_()
        student = make(point_ND, layer)
        if look:
            with torch.no_grad():
                assert not (student.logprobs_at(ids_N1) * 1).requires_grad
        (gradient,) = torch.autograd.grad(student.logprobs_at(ids_N1).sum(), point_ND)
        found.append(gradient)
    torch.testing.assert_close(found[0], found[1])


class TestNarrowWeights:
    """bfloat16 weights and hidden states: products and sums in float32, one rounding at the end."""

    TOKENS = 600

    @pytest.mark.usefixtures("many_chunks")
    @pytest.mark.parametrize("name", ["local_support", "sampled_token", "full_vocabulary"])
    def test_they_are_as_exact_as_their_gradients_type_lets_them(
        self,
        name: str,
        draw: Draw,
        head: Callable[..., torch.nn.Linear],
        make_scores: Scores,
    ) -> None:
        """Against the same rounded weights in float64: the loss to 2e-5; a token's gradient to one
        rounding (2^-8 relative), also where it is a small difference of its own row and the mean
        row; the head's to one rounding of the largest element. Sums in bfloat16 over the 300 chunks
        would be off by several times that."""
        objective = build(name, **({"k": 4} if name == "local_support" else {}))
        narrow = head(torch.bfloat16, bias=True)
        exact = torch.nn.Linear(D, V + PADDING, dtype=torch.float64)
        exact.load_state_dict({k: v.double() for k, v in narrow.state_dict().items()})
        hidden_ND = draw(self.TOKENS, D, scale=0.5).to(torch.bfloat16)
        ids_N = torch.arange(self.TOKENS) % V
        scores = make_scores(draw(self.TOKENS, V, scale=1.0), ids_N, k=V)
        old_N = _dense(hidden_ND.double(), exact).logprobs_at(ids_N[:, None])[:, 0].detach()
        wanted, found = [], []
        for layer, make, into in ((exact, _dense, wanted), (narrow, _sparse, found)):
            point_ND = hidden_ND.to(layer.weight.dtype).requires_grad_()
            loss_N, _ = objective(make(point_ND, layer), scores, ids_N, old_N)
            assert loss_N.dtype in (torch.float32, torch.float64)
            gradients = _gradients(loss_N.sum(), layer)
            into += [point_ND.grad, *gradients, loss_N.detach()]
        *wanted_gradients, wanted_N = wanted
        *found_gradients, found_N = found
        torch.testing.assert_close(found_N.double(), wanted_N, rtol=2e-5, atol=2e-5)
        ulp = 2.0**-8
        pairs = list(zip(found_gradients, wanted_gradients, strict=True))
        assert all(one.dtype == torch.bfloat16 for one, _ in pairs)
        (one, other), *of_head = pairs
        torch.testing.assert_close(one.double(), other, rtol=ulp, atol=2e-5)
        for one, other in of_head:
            largest = other.abs().max().item()
            torch.testing.assert_close(one.double(), other, rtol=ulp, atol=ulp * largest)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return found


class TestMemory:
    """N = 400 tokens of V = 3,000 ids: whole logits are 1.2M elements, the head is 24,000."""

    N, V, D, K = 400, 3000, 8, 16

    def _largest(
        self, name: str, options: dict[str, Any], *, dense: bool = False
    ) -> tuple[int, int]:
        """(the largest tensor of the forward, of the backward), in elements."""
        generator = torch.Generator().manual_seed(0)
        layer = torch.nn.Linear(self.D, self.V, bias=False)
        hidden_ND = torch.randn(self.N, self.D, generator=generator).requires_grad_()
        ids_N = torch.randint(self.V, (self.N,), generator=generator)
        teacher_NV = torch.randn(self.N, self.V, generator=generator)
        own_NJ = (hidden_ND @ layer.weight.T).detach().topk(self.K).indices
        scores = TeacherScores.from_logits(
            teacher_NV, ids_N, k=self.K, keep_full=False, query_ids_NJ=own_NJ
        )
        old_N = torch.full((self.N,), -8.0)  # about log 1/V: no ratio is clipped away
        with _Largest() as forward:
            student: StudentView = (
                DenseStudent(layer(hidden_ND))
                if dense
                else SparseStudent(hidden_ND, layer, vocabulary=self.V)
            )
            loss_N, _ = build(name, **options)(student, scores, ids_N, old_N)
        with _Largest() as backward:
            loss_N.sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.any()
        return forward.numel, backward.numel

    @pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
    @pytest.mark.parametrize(
        "support", ["teacher", "student", "teacher+sampled", "student+sampled"]
    )
    def test_the_renormalised_path_never_makes_whole_logits(
        self, direction: str, support: str
    ) -> None:
        """Forward: the gathered rows, N (K + 1) D. Backward: those and the head's own gradient."""
        options = {"k": self.K, "support": support, "direction": direction}
        forward, backward = self._largest("local_support", options)
        assert forward <= self.N * (self.K + 1) * self.D < self.N * self.V / 20
        assert backward <= self.N * (self.K + 1) * self.D

    @pytest.mark.parametrize("name", ["sampled_token", "trust_region"])
    def test_full_log_probabilities_come_in_pieces(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sparse, "BLOCK", 256)
        monkeypatch.setattr(sparse, "CHUNK", 1 << 14)
        options = {} if name == "sampled_token" else {"k": self.K}
        limit = max(self.N * (self.K + 1) * self.D, 1 << 14)
        assert max(self._largest(name, options)) <= limit < self.N * self.V / 20

    def test_the_dense_path_does_make_them(self) -> None:
        """The guard of the two above: what they look for is seen, forward and backward."""
        found = self._largest("local_support", {"k": self.K}, dense=True)
        assert min(found) >= self.N * self.V


def test_a_fused_kernels_cross_entropy_gives_the_same_normaliser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stands in for the kernel, which needs a GPU: what it is given, and what is made of it."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(6, 13, bias=False)  # 11 ids and two rows of padding
    hidden_ND = torch.randn(5, 6, generator=generator)
    ids_NK = torch.randint(11, (5, 3), generator=generator)

    def fused(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert c.shape == (11, 6)
        return torch.nn.functional.cross_entropy(e @ c.T, targets, reduction="none")

    found = []
    for kernel in (None, fused):
        monkeypatch.setattr(sparse, "fused_cross_entropy", lambda *_, kernel=kernel: kernel)
        point_ND = hidden_ND.clone().requires_grad_()
        head.zero_grad()
        logprobs_NK = SparseStudent(point_ND, head, vocabulary=11).logprobs_at(ids_NK)
        logprobs_NK.square().sum().backward()
        assert point_ND.grad is not None and head.weight.grad is not None
        found.append((logprobs_NK.detach(), point_ND.grad, head.weight.grad.clone()))
    for plain, by_kernel in zip(*found, strict=True):
        size = plain.abs().max().item()
        torch.testing.assert_close(plain, by_kernel, rtol=0, atol=rounding(sums=4 * 11, size=size))


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("k", [0, 3, 7, V])
def test_one_pass_over_the_head_tells_all_that_diagnostics_ask(
    k: int, draw: Draw, head: Callable[..., torch.nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entropy and most probable ids, also more than a block has; then log-probabilities."""
    hidden_ND, layer, passes = draw(N, D), head(torch.float64, bias=True), []
    blocks = sparse._blocks
    monkeypatch.setattr(sparse, "_blocks", lambda *given: passes.append(1) or blocks(*given))
    every_NV = torch.arange(V).expand(N, -1)
    with torch.no_grad():
        dense, student = _dense(hidden_ND, layer), _sparse(hidden_ND, layer)
        entropy_N, ids_NK = student.survey(k)
        logprobs_NV = student.logprobs_at(every_NV)
        assert len(passes) == 1
        torch.testing.assert_close(entropy_N, dense.entropy())
        torch.testing.assert_close(logprobs_NV, dense.logprobs())
        assert torch.equal(ids_NK, dense.survey(k)[1])
        assert ids_NK.shape == (N, k)
    assert student.logprobs_at(every_NV).requires_grad
