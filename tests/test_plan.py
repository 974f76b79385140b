"""What `tutelage plan` says, against numbers worked out by hand; and that it loads no weights."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tutelage.distill.cli import main as cli
from tutelage.distill.cli.pages import count, show_plan, size
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import load_config, parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.models import loading as models
from tutelage.distill.models.student import Student
from tutelage.distill.objectives import TeacherScores, build
from tutelage.distill.plan import footprint, memory
from tutelage.distill.plan import plan as planning
from tutelage.distill.plan.gpus import suggestion
from tutelage.distill.plan.memory import Need
from tutelage.distill.plan.plan import Plan, make_plan
from tutelage.distill.plan.tasks import score_bytes
from tutelage.distill.student.optimizers import Optimizer
from tutelage.distill.teachers.transport import CompactScores

CONFIGS = Path(__file__).parent.parent / "configs"
DEMO = CONFIGS / "demo.yaml"


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that loads weights, or asks the hub, fails."""
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan reads no weights and asks no network")

    monkeypatch.setattr(models, "load_model", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def _need(plan: Plan, what: str) -> Need:
    (need,) = [need for need in plan.needs if what in need.what]
    return need


def _page(config: RunConfig, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    show_plan(make_plan(config), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_shipped_config_has_a_plan_of_80_columns(path: Path) -> None:
    config = load_config(path)
    page = _page(config)
    assert max(map(len, page.splitlines())) <= 80
    for name in (*config.tasks, *config.teachers):
        assert name in page


SIZES = ["steps=600", "tasks.household.episodes=16", "tasks.math.episodes=128"]
"""What is counted below, whatever the demo is tuned to."""


def test_the_demo_in_numbers() -> None:
    plan = make_plan(load_config(DEMO, ["student.device=cpu", "evaluation.every=200", *SIZES]))
    household, math = plan.tasks
    assert (household.steps, household.run_episodes) == (300, 300 * 16)
    assert (household.tokens, household.run_tokens) == (16 * 16 * 12, 300 * 16 * 16 * 12)
    assert (math.tokens, math.run_episodes) == (128 * 40, 300 * 128)
    assert household.evaluated == 600 // 200 * 200  # greedy alone while training
    assert (household.teacher, math.teacher) == ("housekeeper", "calculator")
    assert math.score_bytes == 16 * (4 + 2) + 4 + 2
    assert math.step_bytes == 102 * 128 * 40
    # Qwen2: embedding (the head too), 4 layers of 4 attention matrices with 3 biases, 3
    # feed-forward matrices, 2 norms, and the last norm.
    hidden = 4 * (4 * 128 * 128 + 3 * 128 * 512)
    weights = 4 * (825 * 128 + hidden + 4 * (3 * 128 + 2 * 128) + 128)
    assert _need(plan, "student: weights").most == weights
    assert _need(plan, "gradients").most == weights
    assert _need(plan, "optimizer").most == 2 * weights - 4 * hidden  # one moment of those
    assert _need(plan, "teacher calculator").most == weights
    keys_and_values = 4 * (4 * 2 * 4 * 32)  # layers, two, heads, head size
    cache = _need(plan, "keys and values, 128 sessions")
    assert cache.least == keys_and_values * 128 * 16 * 12
    assert cache.most == keys_and_values * 128 * 2048
    assert _need(plan, "logits [tokens, 825]").most == 3 * 4 * 825 * 2048


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_learner_over_four_processes_has_a_quarter_in_each(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights, gradients and moments; micro-batches are each one's own, and one keeps a copy."""
    config = load_config(DEMO, ["student.device=cpu"])
    if device == "cuda":
        monkeypatch.setattr("tutelage.distill.plan.memory.device_name", lambda name: "cuda")
    alone = make_plan(config)
    four = make_plan(load_config(DEMO, ["student.device=cpu", "learner.processes=4"]))
    weights, kept = (_need(alone, what) for what in ("student: weights", "activations"))
    assert weights.most and kept.most
    if device == "cpu":
        assert _need(four, "student: weights, 4 parts").most == weights.most
        assert _need(four, "activations of a micro-batch, 4 times").most == 4 * kept.most
    else:
        for rank in range(4):
            found = _need(four, f"rank {rank}: student: weights")
            assert (found.most, found.device) == (
                weights.most // 4,
                f"cuda:{rank}" * (rank > 0) or "cuda",
            )
            assert _need(four, f"rank {rank}: activations").most == kept.most
    assert _need(four, "student: weights, a whole copy").most == weights.most


@pytest.mark.parametrize(
    ("policy", "household", "math"),
    [
        ("{policy: mixed}", 80, 80),
        ("{policy: weighted, weights: {household: 3}}", 60, 20),
        ("{policy: token_budget}", 50, 30),  # 3,072 tokens a step against 5,120
    ],
)
def test_steps_are_the_schedules(policy: str, household: int, math: int) -> None:
    plan = make_plan(load_config(DEMO, [*SIZES, "steps=80", f"schedule={policy}"]))
    assert [task.steps for task in plan.tasks] == [household, math]


def test_a_task_that_starts_late_and_ends_early_has_its_steps_alone() -> None:
    plan = make_plan(load_config(DEMO, ["steps=40", "tasks.math.start=10", "tasks.math.steps=4"]))
    assert [task.steps for task in plan.tasks] == [36, 4]


def test_the_count_is_that_of_the_loaded_model(
    tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    """Grouped queries, an untied head, padding rows: as torch and the optimizer count them."""
    model = make_model(vocabulary=len(tokenizer), padding=7)
    model.config.save_pretrained(tmp_path)
    found = footprint.footprint(str(tmp_path))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.shape is not None
    assert found.shape.rows == len(tokenizer) + 7
    section = load_config(DEMO, ["optimizer.name=muon"]).optimizer
    muon = Optimizer(Student(model, vocabulary=len(tokenizer)), section)._parts[1]
    by_muon = sum(p.numel() for group in muon.param_groups for p in group["params"])
    assert found.shape.hidden_matrices == by_muon


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(
    make_model: Callable[..., Any], recompute: bool
) -> None:
    """With recomputing, what one layer keeps comes on top: it is there in the backward alone."""
    model = make_model(layers=4)
    for layer in Student(model, vocabulary=101).recomputing() if recompute else []:
        layer.training = True
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = 4 * 128
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(4, 128, dtype=torch.long), use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    shape = footprint._measured("", model.config).shape
    assert shape is not None
    kept_layer = 10 * shape.hidden + 4 * shape.inner if recompute else 0
    expected = shape.activations(recompute=recompute) - kept_layer
    assert measured == pytest.approx(4 * tokens * expected, rel=0.1)


AWAY: dict[str, Any] = {
    "run": "x",
    "steps": 4,
    "student": {"model": "org/student-7B", "device": "cuda:0"},
    "teachers": {"t": {"model": "org/teacher-7B", "dtype": "bfloat16", "device": "cuda:1"}},
    "tasks": {"a": {"env": "x:Y-v0", "teacher": "t", "group": 8, "weight": 0.5}},
    "objective": {"name": "local_support", "k": 32},
}


def test_a_model_of_another_machine_is_known_by_its_name() -> None:
    plan = make_plan(parse_config(AWAY, "test"))
    assert not plan.student.here
    assert _need(plan, "student: weights").least == 28e9  # 7B in float32
    assert _need(plan, "optimizer").least == 56e9
    assert _need(plan, "teacher t").least == 14e9  # in bfloat16
    assert _need(plan, "keys and values").most is None
    assert [task.score_bytes for task in plan.tasks] == [198]  # 192 of the 32 ids, and 6
    least, _, unknown = plan.total("cuda:0")
    assert least > 112e9 and unknown
    page = " ".join(_page(parse_config(AWAY, "test"), width=200).split())
    assert "known by name alone: org/student-7B, org/teacher-7B" in page
    assert "about 7B" in page
    assert "cuda:0: at least one GPU of 141 GB, and what is unknown" in page
    assert "cuda:1: at least one GPU of 24 GB" in page and "sized by" not in page


def _qwen2(*, rows: int, hidden: int, inner: int, kept: int, tied: bool = False) -> int:
    """Parameters of 28 layers of Qwen2, from its description: three biased projections, one without
    a bias, a gated feed-forward, two norms; `kept` numbers in a key, as in a value."""
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * kept + kept)
    layer = attention + 3 * hidden * inner + 2 * hidden
    return (1 if tied else 2) * rows * hidden + 28 * layer + hidden


@pytest.mark.parametrize(
    ("reference", "parameters", "by_hand"),
    [
        # What the hub counts in the safetensors files, and what the architecture comes to.
        (
            "Qwen/Qwen2.5-7B-Instruct",
            7_615_616_512,
            _qwen2(rows=152_064, hidden=3584, inner=18_944, kept=512),
        ),
        (
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
            1_777_088_000,
            _qwen2(rows=151_936, hidden=1536, inner=8960, kept=256),
        ),
        (
            "Qwen/Qwen2.5-1.5B-Instruct",
            1_543_714_304,
            _qwen2(rows=151_936, hidden=1536, inner=8960, kept=256, tied=True),
        ),
    ],
)
def test_published_architectures_have_their_published_sizes(
    reference: str, parameters: int, by_hand: int
) -> None:
    found = footprint.footprint(reference)
    assert found.parameters == parameters == by_hand
    assert found.published and not found.here


def test_rollouts_with_vllm_have_a_copy_of_the_weights_and_a_cache_of_a_set_size() -> None:
    config = load_config(DEMO, ["rollout.engine=vllm", "student.device=cpu", "vllm.kv_cache_gib=2"])
    plan = make_plan(config)
    assert _need(plan, "vLLM: weights").least == _need(plan, "student: weights").least
    cache = _need(plan, "rollouts: vLLM's cache")
    assert (cache.least, cache.most, cache.knob) == (2 << 30, 2 << 30, "vllm.kv_cache_gib")
    assert not any("keys and values" in need.what for need in plan.needs)
    page = " ".join(_page(config, width=200).split())
    assert "rollouts (a copy) float32 cpu here, vLLM" in page
    two = load_config(DEMO, ["rollout.engine=vllm", "student.device=cpu", "cluster={workers: 2}"])
    assert _need(make_plan(two), "rollouts: vLLM's cache").least == 2 << 30  # 1 GiB each


def test_processes_that_share_a_vllm_model_are_counted() -> None:
    options = ["rollout.engine=vllm", "student.device=cpu", "vllm.kv_cache_gib=2"]
    one = make_plan(load_config(DEMO, options))
    two = make_plan(load_config(DEMO, [*options, "vllm.tensor_parallel_size=2"]))
    assert _need(two, "rollouts: vLLM's cache").least == 4 << 30  # 2 GiB each
    assert _need(two, "on their way").least == _need(two, "student: weights").least
    assert not any("on their way" in need.what for need in one.needs)
    each = _need(one, "Python and libraries").least
    assert _need(two, "Python and libraries, 3 processes").least == 3 * each


PAPERS = CONFIGS / "papers"


def test_the_joint_paper_in_numbers() -> None:
    """Table A1's setting, and its memory as it comes from the architecture."""
    plan = make_plan(load_config(PAPERS / "revisiting_joint.yaml"))
    household, math = plan.tasks
    assert (household.steps, math.steps) == (200, 200)
    assert (household.episodes, household.group) == (math.episodes, math.group) == (128, 8)
    assert household.tokens == 128 * 30 * 512 and math.tokens == 128 * 16_384
    assert (household.teacher, math.teacher) == ("agent", "mathematician")
    assert household.score_bytes == math.score_bytes == 32 * (4 + 2) + 6
    assert math.step_bytes == 198 * 128 * 16_384
    weights = 7_615_616_512
    assert _need(plan, "student: weights").least == 4 * weights
    assert _need(plan, "optimizer").least == 8 * weights
    assert _need(plan, "teacher agent").least == _need(plan, "mathematician").least == 2 * weights
    a_row = 30 * 3584 + 10 * 3584 + 4 * 18_944  # inputs of layers and norm, one layer's inside
    assert _need(plan, "activations").least == 4 * 16_384 * a_row
    a_token = 28 * 2 * 512 * 4  # layers, key and value, 4 heads of 128, float32
    assert _need(plan, "keys and values, 32 sessions").least == 32 * 16_384 * a_token
    (suggested,) = [note for note in planning.notes(plan) if note.startswith("cuda:1: at least")]
    assert suggested == "cuda:1: at least one GPU of 48 GB"  # two teachers of 15.2 GB


def test_trust_region_in_numbers() -> None:
    """512 rollouts beside 128 that begin with the teacher's words, which take a cache of theirs."""
    config = load_config(PAPERS / "trust_region_1_5b.yaml")
    plan = make_plan(config)
    (math,) = plan.tasks
    assert (math.steps, math.tokens) == (200, 640 * 8096)
    assert math.score_bytes == 64 * 6 + 6
    prefixes = _need(plan, "prefixes of math")
    assert prefixes.device == "cuda:1"
    assert prefixes.least == 13 * 8096 * 28 * 2 * 512 * 2  # a fifth of 64 in flight, bfloat16
    guidance = config.tasks["math"].guidance
    assert guidance is not None and guidance.share * 640 == 128
    assert _need(plan, "student: weights").least == 4 * 1_777_088_000


@pytest.mark.parametrize("path", sorted(PAPERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_configs_leave_nothing_unknown(path: Path) -> None:
    plan = make_plan(load_config(path))
    assert all(need.least and need.most for need in plan.needs)
    page = " ".join(_page(load_config(path), width=200).split())
    assert "sized by their published config.json: " in page and "by name alone" not in page
    assert "vocabularies go unchecked" in page  # until the tokenizers are here


@pytest.mark.parametrize(
    ("needed", "suggested"),
    [
        (23e9, "one GPU of 24 GB"),
        (80e9, "one GPU of 80 GB"),
        (80e9 + 1, "one GPU of 141 GB"),
        (388e9, "5 of 80 GB or 3 of 141 GB, split evenly: more than any one GPU holds"),
    ],
)
def test_gpus_that_hold_it(needed: float, suggested: str) -> None:
    assert suggestion(int(needed)) == suggested


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7e9),
        ("Qwen/Qwen3-0.6B", 0.6e9),
        ("./models/GiGPO-Qwen2.5-7B-Instruct-ALFWorld/", 7e9),
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("openai-community/gpt2", None),
        ("org/model-4bit-v2", None),
    ],
)
def test_the_size_in_a_name(name: str, parameters: float | None) -> None:
    assert footprint.named_size(name) == parameters


def test_a_full_distribution_costs_the_vocabulary() -> None:
    plan = make_plan(load_config(DEMO, ["student.device=cpu", "objective={name: full_vocabulary}"]))
    assert plan.tasks[0].score_bytes == 6 + 6 + 2 * 825
    assert _need(plan, "full distributions").most == 4 * 825 * 2048


def test_a_sums_scores_hold_what_either_loss_needs() -> None:
    losses = "{name: full_vocabulary}, {name: local_support, k: 8, tail: false, weight: 0.5}"
    plan = make_plan(load_config(DEMO, ["student.device=cpu", f"objective=[{losses}]"]))
    household, _ = plan.tasks
    assert household.objective == "full_vocabulary + 0.5 local_support k=8"
    assert household.score_bytes == 8 * 6 + 6 + 2 * 825
    assert _need(plan, "full distributions")


def test_imitation_sends_no_scores() -> None:
    plan = make_plan(load_config(CONFIGS / "tiny" / "arithmetic.yaml"))
    (task,) = plan.tasks
    assert (task.teacher, task.score_bytes, task.step_bytes) == (None, 0, 0)


@pytest.mark.parametrize("name", ["local_support", "full_vocabulary"])
def test_score_bytes_are_those_that_travel(name: str) -> None:
    objective = build(name)
    ids_N = torch.arange(5)
    scores = TeacherScores.from_logits(
        torch.randn(5, 100), ids_N, k=objective.needs.k, keep_full=objective.needs.full
    )
    assert CompactScores.pack(scores, teacher="").nbytes == 5 * (
        score_bytes(objective.needs, 100) or 0
    )


def test_a_student_support_is_asked_for_and_answered() -> None:
    objective = build("local_support", k=8, support="student")
    assert score_bytes(objective.needs, 825) == 8 * 6 + 6 + 8 * (4 + 2)


def test_ray_workers_have_weights_and_caches_of_their_own() -> None:
    alone = make_plan(load_config(DEMO, ["student.device=cpu"]))
    plan = make_plan(load_config(DEMO, ["student.device=cpu", "cluster={workers: 2}"]))
    weights = _need(alone, "student: weights").most
    assert weights is not None
    assert _need(plan, "rollout workers: 2 x weights").most == 2 * weights
    assert "100 sessions a worker" in _need(plan, "keys and values").what  # of 200 evaluated
    assert _need(plan, "Python").least == 5 * memory.LIBRARIES  # and two teachers


def test_what_does_not_fit_says_which_key_to_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "memory_here", lambda device: 500_000_000)
    config = load_config(DEMO, ["student.device=cpu", "teachers.calculator.device=cpu"])
    assert any("does not fit" in note for note in planning.notes(make_plan(config)))
    monkeypatch.setattr(planning, "memory_here", lambda device: 1_000_000_000)
    notes = planning.notes(make_plan(config))
    assert any("full contexts would not fit" in note and "max_live" in note for note in notes)


def test_vocabularies_on_this_machine_are_compared(
    tmp_path: Path, tokenizer: Any, save_model: Callable[..., str]
) -> None:
    teacher = save_model(tmp_path / "teacher", tokenizer, seed=1)
    text = (tmp_path / "teacher" / "tokenizer.json").read_text()
    (tmp_path / "teacher" / "tokenizer.json").write_text(text.replace('"<|user|>"', '"<|usr|>"'))
    config = load_config(DEMO, [f"teachers.calculator.model={teacher}"])
    with pytest.raises(ConfigError, match=r"teachers\.calculator: its vocabulary differs"):
        make_plan(config)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("stesp=3", "stesp: unknown key"),
        ("rollout.vllm.max_model_len=99", "rollout.vllm: 'vllm' is a key of the run's, at the top"),
        ("tasks.math.teachers=calculator", "did you mean 'teacher'?"),  # it may be a slip
        ("tasks.math.teacher=calculatr", "did you mean 'calculator'"),
        ("teachers.calculator.model=builtin:arithmatic", "'builtin:arithmatic' is not built in"),
        ("objective.k=5000", "lower objective.k"),
    ],
)
def test_a_broken_config_is_one_line_and_exit_code_2(
    pair: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(DEMO), pair])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_command_prints_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(DEMO), "steps=7"])
    assert ended.value.code == 0
    assert "runs/demo: 7 steps" in capsys.readouterr().out


def test_sizes_are_short() -> None:
    assert [count(n) for n in (7, 5120, 7_615_616_512)] == ["7", "5.12K", "7.62B"]
    assert [size(n) for n in (192, 1_074_000_000, None)] == ["192 B", "1.07 GB", "?"]


def test_groups_and_weights_are_shown() -> None:
    objective = {"name": "local_support", "k": 8, "support": "student", "renormalize": True}
    page = " ".join(_page(parse_config(AWAY | {"objective": objective}, "test"), width=100).split())
    assert "16, 8 a game" in page
    assert "local_support k=8 support=student (weight 0.5)" in page  # defaults go unsaid
