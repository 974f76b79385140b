"""Compares the head on gathered rows with whole logits: time, peak memory, loss and gradients.

    python benchmarks/sparse_head.py [--threads 2] [--tokens 4096] [--vocabulary 151936] ...

Each runs in a process of its own, forward and backward of the mean loss, on the same inputs: random
hidden states and weights, supports drawn uniformly (the worst case: hardly two tokens share an id).
Memory is the peak above what was in use before the forward. On a GPU the defaults are 16,384 tokens
of 3,584 in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tutelage.distill.objectives import (
    DenseStudent,
    SparseStudent,
    StudentView,
    TeacherScores,
    build,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "renormalised top-K": ("local_support", {"k": 32}),
    "sampled token": ("sampled_token", {}),
    "trust region, K=64": ("trust_region", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=16_384 if gpu else 4_096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=3_584 if gpu else 896)
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # case, way, output file
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        _measure(arguments, *arguments.measure)
        return
    print(
        f"{arguments.tokens} tokens, D={arguments.hidden}, V={arguments.vocabulary},"
        f" {arguments.dtype}, {arguments.device}, {arguments.threads} threads,"
        f" torch {torch.__version__}; medians of {arguments.repeat}"
    )
    print(f"{'objective':20} {'way':7} {'seconds':>8} {'peak MB':>8}   loss")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = {way: _child(case, way, Path(folder) / way) for way in ("dense", "sparse")}
            for way, row in found.items():
                print(
                    f"{case:20} {way:7} {row['seconds']:8.2f} {row['peak_mb']:8.0f}"
                    f"   {row['loss']:.7f}"
                )
            _compare(found, Path(folder))


def _compare(found: dict[str, Any], folder: Path) -> None:
    dense, sparse = found["dense"], found["sparse"]
    errors = []
    for name in ("hidden", "weight"):
        one, other = (torch.load(folder / f"{way}.{name}", mmap=True) for way in found)
        errors.append(f"{name} {float((one - other).norm() / one.norm()):.1e}")
    print(
        f"{'':20} ratio   {dense['seconds'] / sparse['seconds']:7.1f}x"
        f" {dense['peak_mb'] / sparse['peak_mb']:7.1f}x"
        f"   loss differs by {abs(dense['loss'] - sparse['loss']):.1e},"
        f" gradients relatively by {', '.join(errors)}"
    )


def _child(case: str, way: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", case, way, str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def _measure(arguments: argparse.Namespace, case: str, way: str, path: str) -> None:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    count, vocabulary, size = arguments.tokens, arguments.vocabulary, arguments.hidden
    name, options = CASES[case]
    objective = build(name, **options)
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(size, vocabulary, bias=False)
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=generator)
    head = head.to(device, dtype)
    hidden_ND = torch.randn(count, size, generator=generator).to(device, dtype).requires_grad_()
    ids_N = torch.randint(vocabulary, (count,), generator=generator).to(device)
    top = torch.randn(count, max(1, objective.needs.k), generator=generator).sort(descending=True)
    scores = TeacherScores(
        ids_NK=torch.randint(vocabulary, top.values.shape, generator=generator),
        logprobs_NK=top.values.log_softmax(-1),
        sampled_N=torch.randn(count, generator=generator) - 12,
        vocabulary=vocabulary,
    ).to(device)
    behavior_logprobs_N = (torch.randn(count, generator=generator) - 12).to(device)
    seconds = []
    base = _reset_peak(device)
    for _ in range(arguments.repeat):
        hidden_ND.grad = head.weight.grad = None
        begun = time.perf_counter()
        student: StudentView = (
            DenseStudent(head(hidden_ND))
            if way == "dense"
            else SparseStudent(hidden_ND, head, vocabulary=vocabulary)
        )
        draws = torch.Generator(device=device).manual_seed(1)
        loss_N, _ = objective(student, scores, ids_N, behavior_logprobs_N, generator=draws)
        loss = loss_N.mean()
        loss.backward()
        value = loss.item()
        del student, loss_N, loss
        seconds.append(time.perf_counter() - begun)
    peak = _peak(device) - base
    assert hidden_ND.grad is not None and head.weight.grad is not None
    torch.save(hidden_ND.grad.float().cpu(), f"{path}.hidden")
    torch.save(head.weight.grad.float().cpu(), f"{path}.weight")
    print(
        json.dumps({"seconds": sorted(seconds)[len(seconds) // 2], "peak_mb": peak, "loss": value})
    )


def _reset_peak(device: torch.device) -> float:
    """Forget the peak so far; MB in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def _status(field: str) -> float:
    """MB, as Linux counts this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
