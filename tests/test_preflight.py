"""What this machine lacks is told before a model loads, and modules beside a config are found."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tutelage.distill.cli import main as cli
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import load_config
from tutelage.distill.config.resolved import rollouts_of
from tutelage.distill.config.run import RunConfig
from tutelage.distill.models.loading import load_tokenizer
from tutelage.distill.models.scratch import scratch_settings
from tutelage.distill.run import training
from tutelage.distill.run.preflight import check_folder, check_machine, open_once
from tutelage.envs.names import nearest

Load = Callable[..., RunConfig]

CONFIG = """
run: {run}
steps: 2
student: {{model: builtin:start, device: cpu}}
teachers:
  calculator: {{model: builtin:arithmetic, device: cpu}}
tasks:
  math: {{env: tutelage/Math-v0, teacher: calculator, episodes: 2}}
objective: {{name: local_support, k: 4}}
"""

MODULE = """
import gymnasium
from tutelage.envs.math.env import AnyText

class Guess(gymnasium.Env):
    observation_space = action_space = AnyText()
    def __init__(self, breaks=False, render_mode=None):
        self.breaks = breaks
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.breaks:
            raise KeyError("lost")
        return "say 1", {"admissible_actions": ["1"]}
    def step(self, action):
        return "said", float(action == "1"), True, False, {}

gymnasium.register("Guess-v0", entry_point=Guess)
"""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(*overrides: str) -> RunConfig:
        return load_config(_written(tmp_path), list(overrides))

    return load


def _written(folder: Path) -> Path:
    path = folder / "a.yaml"
    path.write_text(CONFIG.format(run=folder / "run"), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """sys.path, and the modules that a test's own folder brought."""
    path, modules = [*sys.path], {*sys.modules}
    yield
    sys.path[:] = path
    for name in {*sys.modules} - modules:
        if name.startswith("my_games"):
            del sys.modules[name]


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that loads fails the test."""
    monkeypatch.setattr(training, "make_learner", lambda *_: pytest.fail("a model loaded"))


def _open_once(config: RunConfig) -> list[str]:
    return open_once(rollouts_of(config.resolve()))


class TestMachine:
    @pytest.mark.parametrize(
        ("pairs", "named"),
        [
            (["student.device=cuda"], r"^student\.device: cuda: this machine has no CUDA"),
            (["teachers.calculator.device=cuda:1"], r"^teachers\.calculator\.device: cuda:1: "),
            (
                ["student.device=cuda:0", "teachers.calculator.device=cuda"],
                r"^student\.device: cuda:0, teachers\.calculator\.device: cuda: this machine",
            ),
            (["cluster={wheel: /no/such.whl}"], r"^cluster\.wheel: there is no file '/no/such.whl"),
            (["cluster={wheel: WHEEL}"], r"^cluster\.wheel: .* is no wheel"),
        ],
    )
    def test_what_it_lacks_is_told_before_a_model_loads(
        self, load: Load, monkeypatch: pytest.MonkeyPatch, no_models: None, tmp_path: Path,
        pairs: list[str], named: str,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        (tmp_path / "x.whl").write_text("no zip")
        pairs = [pair.replace("WHEEL", str(tmp_path / "x.whl")) for pair in pairs]
        with pytest.raises(ConfigError, match=named):
            training.Run(load(*pairs))

    def test_a_device_that_is_not_among_those_here(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        check_machine(load("student.device=cuda:1"))
        with pytest.raises(ConfigError, match=r"^student\.device: cuda:2: this machine has 2 of"):
            check_machine(load("student.device=cuda:2"))

    def test_on_a_cluster_elsewhere_only_the_student_is_here(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        away = "cluster={address: 'ray://head:10001'}"
        check_machine(load("teachers.calculator.device=cuda", away))
        with pytest.raises(ConfigError, match=r"^student\.device"):
            check_machine(load("student.device=cuda", away))

    @pytest.mark.parametrize("key", ["student.model", "teachers.calculator.model"])
    @pytest.mark.parametrize(
        ("spoil", "named"),
        [
            (lambda f: f.unlink(), "holds no weights"),
            (lambda f: f.write_bytes(f.read_bytes()[:-1000]), "is damaged"),
            (lambda f: f.write_bytes(b""), "is damaged"),
            (
                lambda f: (f.parent / "model.safetensors.index.json").write_text(
                    '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
                ),
                "lacks model-00001-of-00002",
            ),
            (lambda f: (f.parent / f"{f.name}.index.json").write_text("[]"), "is damaged"),
        ],
    )
    def test_weights_that_are_not_whole(
        self, load: Load, no_models: None, tmp_path: Path, key: str, spoil: Any, named: str
    ) -> None:
        from tutelage.distill.models.loading import resolve

        folder = tmp_path / "model"
        shutil.copytree(resolve("builtin:start"), folder)
        spoil(folder / "model.safetensors")
        with pytest.raises(ConfigError, match=f"^{key}: .*{named}"):
            training.Run(load(f"{key}={folder}"))


class TestFolder:
    def test_a_run_does_not_fill_the_folder_one_stands_in(
        self, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = tmp_path / "project" / "deep"
        here.mkdir(parents=True)
        monkeypatch.chdir(here)
        for run in (".", "..", "../../project", str(tmp_path), "/", "~/"):
            with pytest.raises(ConfigError, match="holds more than a run"):
                check_folder(load(f"run={run}"))
        check_folder(load("run=run"))
        (here / "metrics.jsonl").touch()  # it is a run's own folder
        check_folder(load("run=."))

    @pytest.mark.parametrize("name", ["checkpoints", "episodes", "teachers", "tensorboard"])
    def test_a_file_where_a_folder_would_be_written_is_told_before_a_step(
        self, load: Load, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).touch()
        with pytest.raises(ConfigError, match=f"^run: .*/{name} is no folder.* move it away"):
            training.Run(load())

    @pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "changes.jsonl"])
    def test_a_folder_where_a_file_would_be_written_is_told_before_a_step(
        self, load: Load, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "run" / name).mkdir(parents=True)
        with pytest.raises(ConfigError, match=f"^run: .*/{name} is no file.* move it away"):
            training.Run(load())


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("student.model=/nowhere", "student.model: .*no such folder"),
        ("student.model=builtin:nobody", "student.model: .*not built in"),
        ("teachers.calculator.model=/nowhere", "teachers.calculator.model: .*no such folder"),
        ("tasks.math.env=tutelage/Maths-v0", "tasks.math: .*Did you mean"),
        ("tasks.math.env_args={problem: x}", "tasks.math: .*unknown option 'problem'"),
        ("tasks.math.eval_args={problems: /no.jsonl}", "tasks.math: .*no problem file"),
    ],
)
def test_what_is_missing_is_named_with_its_key(load: Load, pair: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        training.Run(load(pair))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train"], "required: config: "),
        (["play", "tutelage/Math-v0", "--index", "-1"], "argument --index: "),
        (["envs", "a=1"], "takes no key=value: a=1"),
    ],
)
def test_a_command_that_is_none_is_refused_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("tutelage: ") and said in line


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class TestScratch:
    @pytest.mark.parametrize(
        ("init", "named"),
        [
            ({}, "init.hidden_size: required"),
            ({"hidden_sise": 8}, "init.hidden_sise: a qwen2 has no such key: did you mean 'hidden"),
            (SIZES | {"layers": 2}, "init.layers: .*did you mean 'num_hidden_layers'"),
            (SIZES | {"model_type": "qwen9"}, "init.model_type: 'qwen9' is no kind.*qwen"),
            (SIZES | {"model_type": 5}, "init.model_type: 5 is no kind"),
            (SIZES | {"hidden_size": True}, r"init.hidden_size: .*\(got True\)"),
            (SIZES | {"hidden_size": "32"}, r"init.hidden_size: .*\(got '32'\)"),
            (SIZES | {"num_hidden_layers": 0}, r"init.num_hidden_layers: .*\(got 0\)"),
            (SIZES | {"num_attention_heads": 5}, "init.hidden_size: 32 is no multiple"),
            (SIZES | {"num_key_value_heads": 3}, "init.num_key_value_heads: 3, and"),
            (SIZES | {"vocab_size": 7}, "init.vocab_size: 7, and the tokenizer has"),
            (SIZES | {"eos_token_id": 0}, "init.eos_token_id: the tokenizer's"),
            (SIZES | {"dtype": "bfloat16"}, "init.dtype: set student.dtype"),
            (SIZES | {"hidden_act": "nope"}, "init: no qwen2 of these values"),
            (SIZES | {"rms_norm_eps": "x"}, "init: .*rms_norm_eps"),
            ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1}, "init.n_head: required"),
        ],
    )
    def test_what_no_student_can_be_made_of(self, init: dict[str, Any], named: str) -> None:
        with pytest.raises(ConfigError, match=f"^student.{named}") as refused:
            scratch_settings(init, load_tokenizer("builtin:vocabulary"))
        assert "\n" not in str(refused.value)

    def test_each_of_the_sizes_must_be_given(self) -> None:
        """Those that are not would be a 7B model's."""
        tokenizer = load_tokenizer("builtin:vocabulary")
        for size in SIZES:
            with pytest.raises(ConfigError, match=f"init.{size}"):
                scratch_settings({k: v for k, v in SIZES.items() if k != size}, tokenizer)

    @pytest.mark.parametrize(
        "init",
        [
            SIZES | {"rope_theta": 5000.0},
            {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4},
            SIZES | {"model_type": "llama", "head_dim": 16},
        ],
    )
    def test_what_is_given_is_taken(self, init: dict[str, Any]) -> None:
        tokenizer = load_tokenizer("builtin:vocabulary")
        settings = scratch_settings(init, tokenizer)
        assert (settings.hidden_size, settings.num_hidden_layers) == (32, 1)
        assert settings.eos_token_id == tokenizer.eos_token_id
        if "rope_theta" in init:
            assert settings.rope_parameters["rope_theta"] == 5000.0


class TestEnvironments:
    @pytest.mark.parametrize(
        ("pair", "named"),
        [
            ("tasks.math.env_args.promt=x", "tasks.math: .*did you mean 'prompt'"),
            ("tasks.math.env_args.system=hi", "tasks.math: .*unknown option 'system'"),
            ("tasks.math.eval_args.split=tset", "tasks.math: .*did you mean 'test'"),
            ("tasks.math.env=tutelage/Maths-v0", "tasks.math: .*Did you mean: `Math`"),
        ],
    )
    def test_plan_refuses_what_train_does(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: str, named: str
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", str(_written(tmp_path)), pair])
        assert ended.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "tutelage: " in line]
        (line,) = lines
        assert re.search(named, line)

    def test_a_wrong_column_leads_to_the_one_that_was_meant(
        self, load: Load, tmp_path: Path
    ) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"id": 1, "problem": "1+1?", "answer": "2", "solution": "2"}\n')
        args = f"tasks.math.env_args={{problems: {rows}, problem_column: question}}"
        with pytest.raises(ConfigError, match=r"no column 'question' \(did you mean 'problem'\?"):
            _open_once(load(args))
        assert _open_once(load(args.replace("question", "problem"))) == []

    def test_what_is_not_here_is_said_and_not_refused(self, load: Load) -> None:
        assert _open_once(load("tasks.math.env_args.problems=/no/such.jsonl")) == [
            "tutelage/Math-v0: no problem file at /no/such.jsonl"
        ]
        (said,) = _open_once(load("tasks.math.env=my_games_nowhere:Guess-v0"))
        assert said.startswith("my_games_nowhere:Guess-v0: there is no module 'my_games_nowhere'")

    def test_a_module_beside_the_config_is_found(self, load: Load, tmp_path: Path) -> None:
        (tmp_path / "my_games.py").write_text(MODULE)
        assert _open_once(load("tasks.math.env=my_games:Guess-v0")) == []
        (said,) = _open_once(load("tasks.math.env=my_game:Guess-v0"))
        assert (
            f"looked for in the installed packages, {tmp_path}"
            in said.replace(str(tmp_path.resolve()), str(tmp_path))
            or str(tmp_path.resolve()) in said
        )

    def test_it_takes_no_installed_ones_place(self, load: Load, tmp_path: Path) -> None:
        load()
        assert sys.path[-1] == str(tmp_path.resolve())

    def test_a_module_that_lacks_another_says_which(self, load: Load, tmp_path: Path) -> None:
        (tmp_path / "my_games_b.py").write_text("import no_such_package_x\n")
        (said,) = _open_once(load("tasks.math.env=my_games_b:Guess-v0"))
        assert "module 'my_games_b' imports 'no_such_package_x', which is not installed" in said


class TestPlay:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["tutelage/Math-v0", "prompt={problem}"], "is no text: write it in quotes"),
            (["tutelage/Math-v0", "prompt=[x"], "\"prompt='...'\""),
            (["tutelage/Math-v0", "split"], "key=value"),
            (["tutelage/Math-v0", "split=007"], "007 begins with a zero"),
            (["tutelage/Math-v0", "expert=yes"], "write true or false"),
            (["tutelage/Math-v0", "split=a", "split=b"], "split is given twice"),
            (["tutelage/Math-v0", "kinds=3"], "tutelage/Math-v0: "),
            (["tutelage/Math-v0", "--index", "-1"], "whole number of 0 or more"),
            (["tutelage/Math-v0", "--index", "x"], "whole number of 0 or more"),
            (["tutelage/Math-v0", "--seed", "-1"], "whole number of 0 or more"),
            (["tutelage/Math-v0", "--index", "9999999999"], "is outside 0.."),
            (["tutelage/Math-v0", "--policy", "hnad"], "did you mean 'hand'"),
            (["a:b:c"], "a:b:c: "),
            ([""], "environment ID"),
        ],
    )
    def test_a_mistake_is_one_line(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["play", *arguments])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and named in said and "Traceback" not in said

    def test_a_prompt_needs_no_quotes(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("builtins.input", lambda _: "\\boxed{0}")
        with pytest.raises(SystemExit) as ended:
            cli.main(["play", "tutelage/Math-v0", "prompt={problem} Think step by step."])
        assert ended.value.code == 0
        assert "= Think step by step." in capsys.readouterr().out

    def test_what_breaks_in_an_environment_is_one_line_too(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """A module of the current folder."""
        (tmp_path / "my_games_c.py").write_text(MODULE)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main(["play", "my_games_c:Guess-v0", "breaks=true"])
        assert ended.value.code == 1
        assert "its reset raised KeyError: 'lost'" in capsys.readouterr().err
        with pytest.raises(SystemExit) as ended:
            cli.main(["play", "my_games_c:Guess-v0", "--policy", "random"])
        assert ended.value.code == 0
        assert "won; reward 1" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flavour", "code", "named"),
        [
            ("exits", 2, "it calls sys.exit(0) while it is made"),
            ("leaves", 1, "its reset raised SystemExit: 0"),
            ("is beyond", 2, "not to be made"),
            ("stays", 1, "its close raised Beyond: not to be closed"),
        ],
    )
    def test_an_exit_of_an_environment_is_no_silent_end(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        flavour: str,
        code: int,
        named: str,
    ) -> None:
        monkeypatch.syspath_prepend(Path(__file__).parent)
        monkeypatch.setattr("builtins.input", lambda _: "end")
        with pytest.raises(SystemExit) as ended:
            cli.main(["play", "pool_envs:Faulty-v0", f"flavour={flavour}"])
        said = capsys.readouterr().err
        assert ended.value.code == code and named in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("said", "known", "meant"),
    [
        ("question", ["id", "problem", "solution"], "problem"),
        ("gold", ["problem", "answer"], "answer"),
        ("Problem", ["problem"], "problem"),
        ("topp", ["top_p", "top"], "top_p"),
        ("epsodes", ["episodes", "env"], "episodes"),
        ("zzz", ["episodes"], None),
    ],
)
def test_the_nearest_name(said: str, known: list[str], meant: str | None) -> None:
    assert nearest(said, known) == meant
