"""Configurations: every mistake is one line that names the file, the key and the cure."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import load_config, parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.objectives import DenseStudent, TeacherScores, Tokens, build
from tutelage.distill.objectives.sums import Sum

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
        tasks = load(
            "tasks.math.objective={name: sampled_token}",
            "tasks.math.rollout={max_turns: 1, context: {kind: window}}",
        ).resolve()
        assert tasks["math"].objective.name == "sampled_token"
        assert tasks["household"].objective.name == "local_support"
        math, household = tasks["math"].rollout, tasks["household"].rollout
        assert (math.max_turns, household.max_turns) == (1, 30)
        assert math.sampling.top_p == household.sampling.top_p == 0.9
        # Inside a section too, the task's keys replace the run's one by one.
        assert (math.context.kind, math.context.repeat_task) == ("window", True)
        assert household.context.kind == "full"

    def test_evaluation_plays_its_own_split_without_the_expert(self, load: Load) -> None:
        household = load(
            "tasks.household.env_args={split: train, difficulty: tiny, expert: true}",
            "tasks.household.eval_args={split: valid_unseen}",
        ).resolve()["household"]
        assert household.rollout.env_args["expert"] is True
        assert household.evaluation.env_args == {
            "split": "valid_unseen",
            "difficulty": "tiny",
        }


class TestTypes:
    """A value is of its key's type, or refused; text keeps its spelling."""

    @pytest.mark.parametrize(
        ("written", "text"),
        [
            ("1e5", "1e5"),
            ("007", "007"),
            ("3e2", "3e2"),
            ("'3e2'", "3e2"),
            ("5", "5"),
            ("1:30", "1:30"),
            ("2024-01-01", "2024-01-01"),
            ("yes", "yes"),
            ("1_000", "1_000"),
            ("'null'", "null"),
        ],
    )
    def test_text_is_what_was_written(self, load: Load, written: str, text: str) -> None:
        """The run folder 1e5 is called so, from the file and from the command line."""
        file = BASE.replace("runs/joint", written).replace("builtin:start", written)
        config = load(f"rollout.context.system={written}", text=file)
        assert (config.run, config.student.model) == (text, text)
        assert config.rollout.context.system == text
        assert load(f"run={written}").run == text
        assert load(f"objective.mask_tokens=[{written}]").objective.mask_tokens == (text,)

    def test_a_problems_prompt_may_be_any_text(self, load: Load) -> None:
        prompt = "{problem} Think step by step."
        for written in (prompt, f"'{prompt}'", f'"{prompt}"'):
            config = load(f"tasks.math.env_args.prompt={written}")
            assert config.tasks["math"].env_args == {"prompt": prompt}
        file = BASE.replace("Math-v0,", "Math-v0, env_args: {prompt: '2e3 {problem}'},")
        assert load(text=file).tasks["math"].env_args == {"prompt": "2e3 {problem}"}

    def test_numbers_keep_their_type_where_any_is_taken(self, load: Load) -> None:
        written = "{a: 3, b: 3.0, c: 1e2, d: '3', e: true, f: null, g: [1, x, {h: 2e0}]}"
        args = load(f"tasks.math.env_args={written}").tasks["math"].env_args
        assert args == {
            "a": 3, "b": 3.0, "c": 100.0, "d": "3", "e": True, "f": None,
            "g": [1, "x", {"h": 2.0}],
        }  # fmt: skip
        assert [type(args[key]) for key in "abcd"] == [int, float, float, str]

    def test_a_whole_number_may_be_written_with_an_exponent(self, load: Load) -> None:
        assert load("steps=1e3").steps == 1000 and type(load("steps=2.0").steps) is int

    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            (["steps=true"], "steps: it must be a whole number (got true)"),
            (["steps=1.5"], "steps: it must be a whole number (got 1.5)"),
            (["steps='5'"], "steps: it must be a whole number, without quotes (got '5')"),
            (["steps=null"], "steps: it must be a whole number (got nothing)"),
            (["steps=010"], "steps: 010 begins with a zero"),
            (["steps=1:30"], "steps: 1:30 is a number to the base of sixty"),
            (["steps=1_000"], "steps: 1_000 is a number in one version"),
            (["steps=1e30"], "steps: "),
            (["steps=1e8"], "steps: "),
            (["seed=4294967296"], "seed: "),
            (["optimizer.lr='3e-4'"], "optimizer.lr: it must be a number, without quotes"),
            (["optimizer.lr=true"], "optimizer.lr: it must be a number (got true)"),
            (["optimizer.betas=[true, 0.9]"], "optimizer.betas.0: it must be a number (got true)"),
            (["evaluation.final=yes"], "evaluation.final: yes is text in YAML 1.2: write true or"),
            (["evaluation.final=1"], "evaluation.final: it must be true or false (got 1)"),
            (["evaluation.final='true'"], "evaluation.final: it must be true or false"),
            (["run=true"], "run: it must be text, in quotes"),
            (["run=null"], "run: it must be text"),
            (["run={a}"], "run: it must be text"),
            (["tasks.math.env_args={expert: no}"], "tasks.math.env_args.expert: no is text in YA"),
            (["tasks.math.env_args={n: [010]}"], "tasks.math.env_args.n.0: 010 begins with"),
            (["objective.renormalize=off"], "objective.renormalize: off is text in YAML 1.2"),
            (["objective.k=true"], "objective: local_support: k=True"),
            (["tasks.math.rollout={max_turns: true}"], "tasks.math.rollout.max_turns: it must"),
            (["teachers.calculator.model=5.0"], ""),
        ],
    )
    def test_nothing_turns_into_another_type(
        self, load: Load, overrides: Sequence[str], named: str
    ) -> None:
        if not named:
            assert load(*overrides).teachers["calculator"].model == "5.0"
        else:
            assert _refused(load, *overrides).startswith(named)

    @pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
    @pytest.mark.parametrize(
        "key",
        [
            "optimizer.lr",
            "optimizer.weight_decay",
            "optimizer.clip",
            "optimizer.floor",
            "rollout.timeout",
            "rollout.temperature",
            "rollout.top_p",
            "journal.stall",
            "learner.timeout",
            "tasks.math.weight",
            "tasks.math.expert_share",
            "tasks.math.env_args.timeout",
            "tasks.math.rollout.timeout",
            "objective.importance_clip",
        ],
    )
    def test_no_number_is_infinite(self, load: Load, key: str, value: str) -> None:
        assert _refused(load, f"{key}={value}").startswith(f"{key}: it must be a finite number")

    def test_no_number_inside_a_list_or_mapping_is_infinite(self, load: Load) -> None:
        for pair, key in (
            ("optimizer.betas=[0.9, .nan]", "optimizer.betas.1"),
            ("tasks.math.expert_share=[1, .inf]", "tasks.math.expert_share.1"),
            ("tasks.math.teacher={calculator: .inf}", "tasks.math.teacher.calculator"),
            ("cluster={worker_resources: {CPU: .inf}}", "cluster.worker_resources.CPU"),
            ("student={tokenizer: x, init: {rope_theta: .nan}}", "student.init.rope_theta"),
        ):
            assert _refused(load, pair).startswith(f"{key}: it must be a finite number")

    def test_plain_data_is_held_to_the_same(self, load: Load) -> None:
        """From Python as from a file."""
        data = yaml.safe_load(BASE) | {"optimizer": {"lr": 1e-4, "betas": (0.8, 0.9)}}
        assert parse_config(data, "here").optimizer.betas == (0.8, 0.9)
        for wrong in ({"steps": True}, {"steps": "60"}, {"run": 5}, {"seed": float("nan")}):
            with pytest.raises(ConfigError, match=f"here: {next(iter(wrong))}: it must be"):
                parse_config(data | wrong, "here")
        for key in (1, True, None):
            with pytest.raises(ConfigError, match=r"env_args\.a: the key .* is not text"):
                task = {"env": "e-v0", "teacher": "calculator", "env_args": {"a": {key: 2}}}
                parse_config(data | {"tasks": {"math": task}}, "here")

    def test_half_a_character_is_refused_with_its_key(self, load: Load) -> None:
        message = _refused(load, 'rollout.context.system="\\ud800"')
        assert message.startswith("rollout.context.system: the text '\\ud800' holds half")


class TestPlaces:
    def test_home_and_variables_stand_for_what_they_do_in_a_shell(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv("SCRATCH", "/scratch")
        assert load("run=~/x/run").run == "/home/me/x/run"
        assert load("run=${HOME}/x/run").run == "/home/me/x/run"
        config = load("run=$SCRATCH/run", "student.model=~/m", "teachers.calculator.cache=~/c")
        assert (config.run, config.student.model) == ("/scratch/run", "/home/me/m")
        assert config.teachers["calculator"].cache == "/home/me/c"
        config = load("cluster={wheel: $SCRATCH/tutelage.whl}")
        assert config.cluster is not None and config.cluster.wheel == "/scratch/tutelage.whl"

    @pytest.mark.parametrize(
        ("run", "named"),
        [
            ("''", "run: it must not be empty"),
            ("'  '", "run: it must not be empty"),
            ("~nobody_of_that_name/x", "run: ~nobody_of_that_name stands for nothing"),
            ("${TUTELAGE_UNSET}/x", "run: ${TUTELAGE_UNSET} stands for nothing"),
            ("a/$TUTELAGE_UNSET", "run: $TUTELAGE_UNSET stands for nothing"),
            ('"a\\0b"', "run: "),
        ],
    )
    def test_what_is_no_place_is_refused(self, load: Load, run: str, named: str) -> None:
        assert _refused(load, f"run={run}").startswith(named)

    @pytest.mark.parametrize(
        ("device", "near"),
        [
            ("gpu", "cuda"),
            ("GPU:0", "cuda"),
            ("tpu", None),
            ("cuda:x", "cuda"),
            ("cuda:-1", "cuda"),
            ("cpu:0", "cpu"),
            ("''", None),
            ("meta", None),
        ],
    )
    def test_an_unknown_device(self, load: Load, device: str, near: str | None) -> None:
        for key in ("student.device", "teachers.calculator.device"):
            message = _refused(load, f"{key}={device}")
            assert message.startswith(f"{key}: a device is auto, cpu, cuda or cuda:N")
            assert (f"did you mean {near!r}" in message) == (near is not None)

    @pytest.mark.parametrize(
        "address",
        [
            "lokal",
            "head",
            "head:",
            "head:x",
            "head:0",
            "head:99999",
            "http://head:1",
            "ray://head",
            "ray://",
            "''",
            "a b:5",
            "ray://u@h:1",
        ],
    )
    def test_an_address_that_is_none(self, load: Load, address: str) -> None:
        message = _refused(load, f"cluster={{address: {address!r}}}".replace('"', "'"))
        assert message.startswith("cluster.address: it is local, auto, HOST:PORT or ray://HOST:PO")

    @pytest.mark.parametrize(
        "address",
        ["local", "auto", "head:6379", "10.0.0.1:6379", "ray://head-1.x.org:10001", "[::1]:6379"],
    )
    def test_an_address(self, load: Load, address: str) -> None:
        cluster = load(f"cluster={{address: '{address}'}}").cluster
        assert cluster is not None and cluster.address == address


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "a/b",
            "../a",
            "..",
            "a+b",
            "evaluation:a",
            "a b",
            "",
            "-a",
            "a.b",
            "é",
            "a" * 65,
            "a\\nb",
            "~",
            "a\\0",
        ],
    )
    def test_what_names_files_and_metrics_is_plain(self, load: Load, name: str) -> None:
        quoted = f'"{name}"'
        task = f"tasks={{{quoted}: {{env: e-v0, teacher: calculator}}}}"
        message = _refused(load, task, "teachers={calculator: {model: m}}")
        assert message.startswith("tasks.") and "1 to 64 letters" in message
        teachers = f"teachers={{{quoted}: {{model: m}}}}"
        message = _refused(load, teachers, f"tasks={{a: {{env: e-v0, teacher: {quoted}}}}}")
        assert message.startswith("teachers.") and "1 to 64 letters" in message

    @pytest.mark.parametrize("name", ["math", "Math-2", "_x", "7b", "a" * 64])
    def test_a_plain_one(self, load: Load, name: str) -> None:
        task = f"tasks={{'{name}': {{env: e-v0, teacher: '{name}'}}}}"
        assert [*load(task, f"teachers={{'{name}': {{model: m}}}}").tasks] == [name]

    @pytest.mark.parametrize("name", ["1", "true", "null", "1.5"])
    def test_one_that_is_not_text_says_so(self, load: Load, name: str) -> None:
        message = _refused(load, text=BASE.replace("  math:", f"  {name}:"))
        assert message.startswith(f"line 10: the key {name} is not text")


class TestNeverPlayed:
    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            (["tasks.math.start=60"], "tasks.math.start: 60 is not before the run's 60 steps"),
            (["tasks.math.start=5", "tasks.math.end=5"], "5 is not before end, 5"),
            (["tasks.math.start=5", "tasks.math.end=3"], "5 is not before end, 3"),
            (["tasks.math.start=70", "tasks.math.end=90"], "70 is not before the run's 60 steps"),
            (["tasks.math.steps=0"], "tasks.math.steps: "),
            (["tasks.math.end=0"], "tasks.math.end: "),
            (["tasks.math.group=33"], "tasks.math.group: 32 episodes are no whole number of gro"),
            (["tasks.math.group=5"], "tasks.math.group: 32 episodes"),
            (["evaluation.modes=[]"], "evaluation.modes: "),
            (["evaluation.live_modes=[]", "evaluation.every=5"], "evaluation.live_modes: "),
            (["evaluation.modes=[greedy, greedy]"], "evaluation.modes: each once"),
            (["schedule={policy: weighted, weights: {math: 0}}"], "schedule.weights.math: "),
            (["schedule={policy: weighted, weights: {math: -1}}"], "schedule.weights.math: "),
            (["schedule={policy: weighted, weights: {mth: 1}}"], "schedule.weights: unknown task"),
            (["optimizer.betas=[0.9, 1]"], "optimizer.betas.1: "),
            (["optimizer.betas=[-0.1, 0.9]"], "optimizer.betas.0: "),
            (["optimizer.betas=[0.9]"], "optimizer.betas"),
            (["optimizer.weight_decay=-0.1"], "optimizer.weight_decay: "),
            (["objective.mask_tokens=['']"], "objective.mask_tokens.0: it must not be empty"),
        ],
    )
    def test_it_is_refused(self, load: Load, overrides: Sequence[str], named: str) -> None:
        assert named in _refused(load, *overrides)

    def test_the_last_possible_step_is_enough(self, load: Load) -> None:
        assert load("tasks.math.start=59", "tasks.math.end=60").tasks["math"].start == 59


def test_a_warmup_longer_than_the_run_is_told(load: Load) -> None:
    with pytest.warns(UserWarning, match=r"optimizer\.warmup: 9 steps, and the run has 8: it ends"):
        load("steps=8", "optimizer.warmup=9")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("steps=8", "optimizer.warmup=8")


class TestOtherPeoplesWords:
    @pytest.mark.parametrize(
        ("pair", "meant"),
        [
            ("learning_rate=1", "optimizer.lr"),
            ("lr=1", "optimizer.lr"),
            ("optimizer.learning_rate=1", "'lr'"),
            ("temp=1", "rollout.temperature"),
            ("temperature=1", "rollout.temperature"),
            ("rollout.temp=1", "'temperature'"),
            ("tasks.math.temperature=1", "tasks.math.rollout.temperature"),
            ("max_length=1", "rollout.max_new_tokens"),
            ("rollout.max_tokens=1", "'max_new_tokens'"),
            ("batch_size=1", "tasks.NAME.episodes"),
            ("tasks.math.batch_size=1", "'episodes'"),
            ("tasks.math.num_generations=1", "'group'"),
            ("epochs=1", "'steps'"),
            ("num_steps=1", "'steps'"),
            ("gradient_accumulation_steps=1", "optimizer.micro_tokens"),
            ("optimizer.max_grad_norm=1", "'clip'"),
            ("kl_coef=1", "tasks.NAME.weight"),
            ("teacher_model=x", "'teachers'"),
            ("output_dir=x", "'run'"),
            ("k=5", "objective.k"),
            ("tasks.math.k=5", "tasks.math.objective.k"),
            ("student.precision=x", "'dtype'"),
            ("rollout.top_k=5", "no top-k sampling"),
            ("bf16=true", "student.dtype=bfloat16"),
            ("system_prompt=x", "rollout.context.system"),
            ("tasks.math.env_kwargs={}", "'env_args'"),
            ("Steps=3", "'steps'"),
            ("student.dtype=bf16", "did you mean 'bfloat16'"),
            ("student.dtype=fp32", "did you mean 'float32'"),
            ("student.dtype=half", "did you mean 'bfloat16'"),
            ("teachers.calculator.engine=hf", "did you mean 'transformers'"),
            ("schedule.policy=round_robin", "did you mean 'alternate'"),
            ("optimizer.name=AdamW", "did you mean 'adamw'"),
            ("optimizer.decay=cos", "did you mean 'cosine'"),
            ("objective.name=reverse_kl", "did you mean 'local_support'"),
            ("objective={name: sft}", "did you mean 'imitation'"),
            ("evaluation.modes=[argmax]", "did you mean 'greedy'"),
        ],
    )
    def test_ours_is_named_with_its_whole_path(self, load: Load, pair: str, meant: str) -> None:
        message = _refused(load, pair)
        assert message.startswith(pair.partition("=")[0].split(".")[0]) and meant in message

    @pytest.mark.parametrize("pair", ["teacher.calculator=3", "steps.x=1", "run.folder=x"])
    def test_a_value_is_not_replaced_by_a_key_inside_it(self, load: Load, pair: str) -> None:
        parts = pair.partition("=")[0].split(".")
        place = f"tasks.math.{pair}" if parts[0] == "teacher" else pair
        message = _refused(load, place)
        assert "holds no keys in the file" in message and place.rpartition(".")[0] in message


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
            ("objective.kk=3", "objective.kk", "k"),
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


SUM = "[{name: local_support, k: 4, mask_tokens: [x]}, {name: sampled_token, weight: 0.5}]"


class TestSums:
    """An objective that is a list: the run's, and a task's own."""

    @pytest.mark.parametrize("key", ["objective", "tasks.math.objective"])
    def test_its_losses_and_weights_are_read(self, load: Load, key: str) -> None:
        config = load(f"{key}={SUM}", f"{key}.0.k=8", f"{key}.1.clip=0.3")
        task = config.resolve()["math"]
        assert [(one.name, one.options) for one in task.losses] == [
            ("local_support", {"k": 8}),
            ("sampled_token", {"clip": 0.3}),
        ]
        rule = task.objective.rule
        assert isinstance(rule, Sum) and [weight for weight, _ in rule.terms] == [1.0, 0.5]
        assert task.mask_tokens == ("x",)  # of the task, whichever loss names them
        again = parse_config(config.model_dump(mode="json"), "").resolve()["math"]
        assert again.losses == task.losses and again.mask_tokens == task.mask_tokens

    def test_a_weight_outside_a_list_leads_to_where_it_may_stand(self, load: Load) -> None:
        said = r"objective\.weight: weights are for losses in a list; .*tasks\.NAME\.weight"
        with pytest.raises(ConfigError, match=said):
            load("objective={name: sampled_token, weight: 2}")

    def test_one_alone_is_the_same_as_without_a_list(self, load: Load) -> None:
        plain = load("objective={name: sampled_token}").resolve()["math"].objective
        one = load("objective=[{name: sampled_token}]").resolve()["math"].objective
        half = load("objective=[{name: sampled_token, weight: 0.5}]").resolve()["math"].objective
        assert type(one.rule) is type(plain.rule) and one.needs == plain.needs == half.needs
        assert isinstance(half.rule, Sum)

    @pytest.mark.parametrize("key", ["objective", "tasks.math.objective"])
    @pytest.mark.parametrize(
        ("value", "place", "message"),
        [
            ("[]", "", "name at least one"),
            ("[sampled_token]", ".0", "it must be a"),
            ("[{name: sampled_token, weight: 0}]", ".0.weight", "greater than 0"),
            (f"{SUM[:-1]}, {{name: trust_region, weight: -1}}]", ".2.weight", "greater than 0"),
            ("[{name: sampled_token}, {name: imitation, bet: 2}]", ".1.bet", "'beta'"),
            ("[{name: sampled_token}, {nam: imitation}]", ".1.nam", "'name'"),
            ("[{name: sampled_token}, {name: imitaton}]", ".1.name", "'imitation'"),
            ("[{name: sampled_token}, {name: trust_region, k: 0}]", ".1", "k=0"),
            ("[{name: sampled_token}, {name: sampled_token, clip: 0.3}]", "", "is there twice"),
            ("[{name: sampled_token}, {name: imitation}]", "", "make several tasks"),
            (f"{SUM[:-2]}, mask_tokens: [y]}}]", "", "local_support ['x'] and sampled_token ['y']"),
        ],
    )
    def test_what_is_no_sum_is_refused_at_its_place(
        self, load: Load, key: str, value: str, place: str, message: str
    ) -> None:
        refusal = _refused(load, f"{key}={value}")
        assert refusal.startswith(f"{key}{place}: ") and message in refusal

    @pytest.mark.parametrize("key", ["objective", "tasks.math.objective"])
    @pytest.mark.parametrize("entry", ["2.k", "k", "-1.k", "name"])
    def test_an_argument_names_an_entry_that_is_there(
        self, load: Load, key: str, entry: str
    ) -> None:
        refusal = _refused(load, f"{key}={SUM}", f"{key}.{entry}=8")
        assert f"'{key}.{entry}=8': {key} is a list of 2 in the file" in refusal

    def test_its_teacher_must_say_what_either_needs(self, load: Load) -> None:
        value = "[{name: sampled_token}, {name: full_vocabulary}]"
        refusal = _refused(load, SERVER, f"tasks.math.objective={value}")
        assert "objective 'sampled_token + full_vocabulary' needs the teacher's whole" in refusal


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
                tokens=Tokens(sampling_logprobs_N=behaviour),
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
            (["tasks.math.teacher={calculator: 0}"], [".math.teacher.calculator: ", "than 0"]),
            (["optimizer.betas=[0.9]"], ["optimizer.betas.1: required"]),
            (["optimizer.betas=[0.9, 0.95, 1]"], ["optimizer.betas: ", "at most 2 items, not 3"]),
            (["evaluation.modes=[]"], ["evaluation.modes: it must have at least 1 item"]),
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
