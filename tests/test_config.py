"""Configurations: every mistake is one line that names the file, the key and the cure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tutelage.distill.config import ConfigError, RunConfig, load_config
from tutelage.distill.objectives import DenseStudent, TeacherScores, Tokens, build

Load = Callable[..., RunConfig]

BASE = """
run: runs/joint
steps: 60
student: {model: builtin:start}
teachers:
  housekeeper: {model: builtin:household}
  calculator: {model: builtin:arithmetic}
tasks:
  household: {env: tutelage/Household-v0, env_args: {split: train}, teacher: housekeeper}
  math: {env: tutelage/Math-v0, teacher: calculator, episodes: 32}
objective: {name: local_support, k: 32}
rollout: {temperature: 1.0, top_p: 0.9, max_turns: 30, context: {repeat_task: true}}
optimizer: {lr: 1e-4}
"""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(*overrides: str, text: str = BASE) -> RunConfig:
        path = tmp_path / "joint.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return load


def _refused(load: Load, *overrides: str, text: str = BASE) -> str:
    """The message: one line, the file first."""
    with pytest.raises(ConfigError) as refused:
        load(*overrides, text=text)
    message = str(refused.value)
    assert "\n" not in message
    file, _, rest = message.partition("joint.yaml: ")
    assert file.endswith("/") and rest
    return rest


class TestReading:
    def test_the_contracts_example_reads(self, load: Load) -> None:
        config = load()
        assert [*config.tasks] == ["household", "math"]  # in the file's order: it is the schedule's
        assert config.tasks["math"].episodes == 32
        assert config.objective.options == {"k": 32}
        assert config.cluster is None and config.seed == 0

    def test_numbers_with_an_exponent_are_numbers(self, load: Load) -> None:
        """YAML 1.1 reads 1e-4 as text."""
        assert load().optimizer.lr == 1e-4
        assert load("optimizer.lr=3e-5").optimizer.lr == 3e-5

    def test_the_resolved_config_reads_back_as_itself(self, load: Load) -> None:
        """What the run folder keeps must be a config again."""
        config = load(
            "tasks.math.objective={name: sampled_token, clip: 0.3}", "cluster={workers: 2}"
        )
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        assert load(text=text) == config

    def test_a_task_has_its_own_objective_and_rollout_or_the_runs(self, load: Load) -> None:
        config = load(
            "tasks.math.objective={name: sampled_token}",
            "tasks.math.rollout={max_turns: 1, context: {kind: window}}",
        )
        assert config.objective_of("math").name == "sampled_token"
        assert config.objective_of("household").name == "local_support"
        math, household = config.rollout_of("math"), config.rollout_of("household")
        assert (math.max_turns, household.max_turns) == (1, 30)
        assert math.top_p == household.top_p == 0.9
        # Inside a section too, the task's keys replace the run's one by one.
        assert (math.context.kind, math.context.repeat_task) == ("window", True)
        assert household.context.kind == "full"

    def test_evaluation_plays_its_own_split_without_the_expert(self, load: Load) -> None:
        config = load(
            "tasks.household.env_args={split: train, difficulty: tiny, expert: true}",
            "tasks.household.eval_args={split: valid_unseen}",
        )
        assert config.task_rollout("household").env_args["expert"] is True
        assert config.task_rollout("household", evaluation=True).env_args == {
            "split": "valid_unseen",
            "difficulty": "tiny",
        }


class TestOverrides:
    def test_a_key_of_any_depth_is_set(self, load: Load) -> None:
        config = load(
            "tasks.math.episodes=8", "evaluation.every=20", "rollout.context.system='Be brief.'"
        )
        assert config.tasks["math"].episodes == 8
        assert config.tasks["household"].episodes == 16
        assert config.evaluation.every == 20
        assert config.rollout.context.system == "Be brief."

    def test_the_last_one_wins(self, load: Load) -> None:
        assert load("steps=5", "steps=7").steps == 7

    def test_a_value_may_hold_an_equals_sign(self, load: Load) -> None:
        assert load("rollout.context.system=a=b").rollout.context.system == "a=b"

    @pytest.mark.parametrize(
        ("override", "named"),
        [
            ("steps", "write it as key.path=value"),
            ("=5", "write it as key.path=value"),
            ("steps=[1", "not YAML"),
            ("tasks.math.epsodes=8", "'episodes'"),
        ],
    )
    def test_mistakes_are_named(self, load: Load, override: str, named: str) -> None:
        message = _refused(load, override)
        assert named in message and override.split("=")[0].split(".")[-1] in message


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "key", "nearest"),
        [
            ("step=3", "step", "steps"),
            ("rollout.topp=0.9", "rollout.topp", "top_p"),
            ("rollout.context.repeat_tasks=true", "rollout.context.repeat_tasks", "repeat_task"),
            ("tasks.math.teachr=calculator", "tasks.math.teachr", "teacher"),
            ("tasks.math.rollout={max_turn: 1}", "tasks.math.rollout.max_turn", "max_turns"),
            ("teachers.calculator.modle=x", "teachers.calculator.modle", "model"),
            ("cluster={adress: local}", "cluster.adress", "address"),
            ("optimizer.learning_rate=1", "optimizer.learning_rate", "lr"),
            ("objective.kk=3", "objective", "k"),
            ("objective.name=local_suport", "objective", "local_support"),
            ("tasks.math.objective={name: imitaton}", "tasks.math.objective", "imitation"),
            (
                "tasks.math.objective={name: local_support, suport: x}",
                "tasks.math.objective",
                "support",
            ),
        ],
    )
    def test_the_nearest_known_one_is_named(
        self, load: Load, override: str, key: str, nearest: str
    ) -> None:
        message = _refused(load, override)
        assert message.startswith(key) or f" {key}" in message
        assert nearest in message


class TestTeachers:
    def test_a_task_whose_teacher_is_missing(self, load: Load) -> None:
        message = _refused(load, "tasks.math.teacher=calculater")
        assert "tasks.math.teacher" in message and "'calculator'" in message

    def test_a_task_without_a_teacher(self, load: Load) -> None:
        message = _refused(load, "tasks.math.teacher=null")
        assert "tasks.math has no teacher" in message and "local_support" in message
        assert "tasks.math.teacher" in message  # the cure

    def test_imitation_needs_none(self, load: Load) -> None:
        config = load(
            "tasks={math: {env: tutelage/Math-v0}}", "teachers={}", "objective={name: imitation}"
        )
        assert config.tasks["math"].teacher is None

    def test_no_teachers_at_all(self, load: Load) -> None:
        message = _refused(load, "teachers={}")
        assert "tasks.household.teacher is 'housekeeper', but teachers is empty" in message

    def test_a_teacher_that_teaches_nothing(self, load: Load) -> None:
        message = _refused(load, "teachers.idle={model: builtin:start}")
        assert message.startswith("teachers.idle teaches no task")


SERVER = "teachers.calculator={engine: server, url: 'http://host:8000/v1', model: m}"
VLLM = "teachers.calculator={engine: vllm, model: builtin:arithmetic}"


class TestEngines:
    """Which engine takes which key, and what each can say of which objective."""

    def test_a_server_needs_no_model_here(self, load: Load) -> None:
        teacher = load(SERVER).teachers["calculator"]
        assert (teacher.files, teacher.dtype) == (None, "bfloat16")
        assert load(SERVER, "teachers.calculator.weights=w").teachers["calculator"].files == "w"
        assert load(VLLM).teachers["calculator"].files == "builtin:arithmetic"

    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            (
                ["teachers.calculator.url=http://x"],
                "url is for engine: server, and .* transformers",
            ),
            ([VLLM, "teachers.calculator.url=http://x"], "url is for engine: server, and .* vllm"),
            ([VLLM, "teachers.calculator.device=cpu"], "device is for engine: transformers, and"),
            (["teachers.calculator.vllm={}"], "vllm is for engine: vllm, and .* transformers"),
            ([SERVER, "teachers.calculator.cache=x"], "cache is for engine: transformers or vllm"),
            ([SERVER, "teachers.calculator.sleeps=true"], "sleeps is for engine: transformers or"),
            ([SERVER, "teachers.calculator.url=null"], "server needs url, such as http.* None"),
            ([SERVER, "teachers.calculator.url=host:80"], "server needs url, .* 'host:80'"),
            ([SERVER, "teachers.calculator.timeout=0"], r"calculator\.timeout"),
            ([VLLM, "teachers.calculator.vllm={dtype: bfloat16}"], "is its own dtype"),
            ([VLLM, "teachers.calculator.vllm={max_len: 3}"], r"vllm\.max_len.*max_model_len"),
            (["teachers.calculator.engine=vlm"], r"calculator\.engine"),
            ([VLLM, "teachers.calculator.sleeps=true"], "sleep frees a CUDA device, and this mach"),
            (
                [SERVER, "tasks.math.guidance={by: teacher}", "objective={name: trust_region}"],
                r"math\.guidance: the teacher would play.*engine: server it only scores",
            ),
        ],
    )
    def test_a_key_of_another_engine_is_refused(
        self, load: Load, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str], named: str
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert re.search(named, _refused(load, *overrides))

    LACKS: Sequence[tuple[str, str]] = (
        ("{name: full_vocabulary}", "teacher's whole distribution, and engine: {} answers with"),
        ("{name: entropy_aware}", "teacher's entropy over the whole vocabulary, and engine: {} "),
        ("{name: local_support, support: student}", "teacher at the student's own ids, "),
        ("{name: local_support, support: student+sampled}", "teacher at the student's own ids, "),
    )

    @pytest.mark.parametrize("engine", [SERVER, VLLM])
    @pytest.mark.parametrize(("objective", "needs"), LACKS)
    def test_what_a_top_k_does_not_tell_is_refused_with_reason_and_cure(
        self, load: Load, monkeypatch: pytest.MonkeyPatch, engine: str, objective: str, needs: str
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        message = _refused(load, engine, f"tasks.math.objective={objective}")
        name = "vllm" if engine is VLLM else "server"
        assert "tasks.math: objective" in message and needs.format(name) in message
        assert "set teachers.calculator.engine to transformers" in message

    def test_students_ids_are_scored_by_vllm_on_cuda(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And on a cluster the actor's devices count, not this machine's."""
        objective = "tasks.math.objective={name: local_support, support: student}"
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        load(VLLM, objective, "cluster={}")
        assert "on CUDA alone" in _refused(load, VLLM, objective)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        load(VLLM, objective)
        assert "tasks.math: objective" in _refused(load, SERVER, objective)

    def test_refused_is_what_a_top_k_is_too_little_for_and_nothing_else(
        self, load: Load, variant: tuple[str, dict[str, Any]]
    ) -> None:
        """Every objective, computed with what a server sends."""
        name, options = variant
        logits = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
        ids = torch.arange(5)
        scores = TeacherScores.from_logits(logits[0], ids, k=8, keep_full=False)
        student = DenseStudent(logits[1])
        behaviour = student.logprobs_at(ids[:, None])[:, 0]
        sent = replace(scores, entropy_N=None)
        own = yaml.safe_dump({"name": name, **options}, default_flow_style=True).strip()
        try:
            build(name, **options)(
                student,
                sent,
                ids,
                behaviour,
                generator=torch.Generator(),
                tokens=Tokens(law_N=behaviour),
            )
        except ValueError as error:
            assert "engine: transformers" in str(error)
            assert "calculator.engine" in _refused(load, SERVER, f"tasks.math.objective={own}")
        else:
            load(SERVER, f"tasks.math.objective={own}")

    def test_it_reads_back_as_itself(self, load: Load) -> None:
        """Also the keys that other engines have, at their defaults."""
        for engine in (SERVER, VLLM):
            config = load(engine)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            assert load(text=text) == config


class TestValues:
    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            (["steps=0"], ["steps", "got 0"]),
            (["steps=many"], ["steps", "'many'"]),
            (["seed=-1"], ["seed", "-1"]),
            (["rollout.top_p=0"], ["rollout.top_p", "0"]),
            (["rollout.top_p=1.5"], ["rollout.top_p", "1.5"]),
            (["rollout.temperature=-1"], ["rollout.temperature", "-1"]),
            (["tasks.math.rollout={top_p: 2}"], ["tasks.math.rollout", "top_p", "2"]),
            (["rollout.context.kind=rolling"], ["rollout.context.kind", "full", "window"]),
            (["optimizer.lr=0"], ["optimizer.lr", "0"]),
            (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
            (["optimizer.decay=linear"], ["optimizer.decay", "cosine"]),
            (["optimizer.aggregate=mean"], ["optimizer.aggregate", "sequence"]),
            (["tasks.math.expert_share=1.5"], ["tasks.math.expert_share", "1.5"]),
            (["tasks.math.weight=0"], ["tasks.math.weight", "0"]),
            (["objective.k=0"], ["objective", "k=0"]),
            (["objective.k=lots"], ["objective", "k='lots'"]),
            (
                ["tasks.math.objective={name: sampled_token, clip: -1}"],
                ["tasks.math.objective", "clip=-1"],
            ),
            (["tasks.math.objective=sampled_token"], ["tasks.math.objective", "sampled_token"]),
            (["student.init={hidden_size: 8}"], ["student", "exactly one"]),
            (["student={init: {hidden_size: 8}}"], ["student", "tokenizer"]),
            (["student={}"], ["student", "exactly one"]),
            (["evaluation.episodes=some"], ["evaluation.episodes"]),
            (["tasks={}"], ["tasks is empty"]),
            (["tasks=[a, b]"], ["tasks"]),
            (["tasks.math=5"], ["tasks.math"]),
            (["tasks.math.env=null"], ["tasks.math.env"]),
            (["student=null"], ["student"]),
            (["rollout=fast"], ["rollout"]),
            (["teachers=[a]"], ["teachers"]),
        ],
    )
    def test_bad_values_are_named_with_their_key(
        self, load: Load, overrides: Sequence[str], named: Sequence[str]
    ) -> None:
        message = _refused(load, *overrides)
        assert all(word in message for word in named), message

    @pytest.mark.parametrize("key", ["run", "steps", "student", "tasks"])
    def test_required_keys(self, load: Load, key: str) -> None:
        data = yaml.safe_load(BASE)
        del data[key]
        message = _refused(load, text=yaml.safe_dump(data))
        assert key in message and "required" in message.lower()


class TestFiles:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
            load_config(tmp_path / "none.yaml")

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("run: [1\nsteps: 3", "is not YAML"),
            ("- a\n- b", "must be a mapping"),
            ("", "must be a mapping"),
            ("just words", "must be a mapping"),
        ],
    )
    def test_a_file_that_is_no_config(self, load: Load, text: str, named: str) -> None:
        assert named in _refused(load, text=text)

    def test_a_file_that_is_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "model.yaml"
        path.write_bytes(b"\x80\x81\xff")
        with pytest.raises(ConfigError, match=r"model\.yaml: ") as refused:
            load_config(path)
        assert "\n" not in str(refused.value)


def test_every_key_of_a_message_can_be_pasted_as_an_override(load: Load) -> None:
    """tasks.NAME.KEY is how the message spells it and how the command line takes it."""
    message: Any = _refused(load, "tasks.math.episodes=0")
    key = message.split(": ")[0]
    assert load(f"{key}=4").tasks["math"].episodes == 4
