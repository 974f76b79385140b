"""The doctor finds each sickness that we seed, by its name, and none in what is sound."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tutelage.distill.cli import main as cli
from tutelage.distill.config.loading import parse_config
from tutelage.distill.doctor import environments, examination
from tutelage.distill.doctor import numbers as models
from tutelage.distill.doctor import texts as tokenizers
from tutelage.distill.doctor.examination import examine_teacher
from tutelage.distill.doctor.findings import Finding
from tutelage.distill.models.loading import load_model
from tutelage.distill.models.student import Student
from tutelage.distill.objectives import Needs, TeacherScores, build, weighted_sum
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.envs.grading import Verdict
from tutelage.envs.grading import pool as grading_pool
from tutelage.envs.math import env as math_env
from tutelage.scheduler.chat import Chat
from tutelage.scheduler.episodes import Row

CONFIGS = Path(__file__).parent.parent / "configs"
LATE = Verdict(correct=False, reason="late")
needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="the symbolic tier needs math-verify: pip install 'tutelage[math]'",
)
SIZE = 101
PROMPT = range(3, 43)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """Random weights of wide scale: it prefers some tokens, in no order that one could guess."""
    return make_model(vocabulary=SIZE, padding=3, scale=0.5).requires_grad_(False)


def _student(model: Any) -> Student:
    return Student(model, vocabulary=SIZE)


@pytest.fixture(scope="module")
def probes(model: Any) -> list[models.Probe]:
    return models.greedy_probes(_student(model), PROMPT)


@pytest.fixture(scope="module")
def rows(probes: list[models.Probe]) -> list[Row]:
    """Replies alone, as the engine sampled them."""
    return [
        replace(probe.row, turns_T=np.where(np.isfinite(probe.row.behavior_logprobs_T), 1, -1))
        for probe in probes
    ]


@pytest.fixture
def teacher(model: Any) -> TransformersTeacher:
    return TransformersTeacher(model, vocabulary=SIZE)


def _level(finding: Finding, level: str, text: str) -> None:
    assert finding.level == level, finding
    assert text in finding.text
    assert finding.cure or level != "fault"


# --- scores --------------------------------------------------------------------------------------


def _rolled(score: models.Score, by: int) -> models.Score:
    def shifted(rows: Sequence[Row], needs: Needs) -> list[TeacherScores]:
        return [
            found.take(torch.roll(torch.arange(len(found)), by)) for found in score(rows, needs)
        ]

    return shifted


@pytest.mark.slow
def test_sound_scores_stand_at_their_tokens(
    teacher: TransformersTeacher, probes: list[models.Probe]
) -> None:
    found = models.check_alignment("teachers.t", teacher.score, probes, within=1e-3)
    _level(found, "ok", "scored alike at every token")
    said = np.concatenate([probe.row.behavior_logprobs_T for probe in probes])
    assert f"{np.nanmean(said):.3f} nats" in found.text


@pytest.mark.parametrize(("by", "where"), [(-1, "after"), (1, "before")])
def test_scores_rolled_by_one_are_named(
    by: int, where: str, teacher: TransformersTeacher, probes: list[models.Probe]
) -> None:
    score = _rolled(teacher.score, by)
    found = models.check_alignment("teachers.t", score, probes, within=1e-3)
    _level(found, "fault", f"shifted by one: the scores at a token are those of the token {where}")


def test_hidden_states_read_one_too_late_are_named(
    teacher: TransformersTeacher, probes: list[models.Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token t scored by its own row of the logits, which predicts token t + 1."""
    monkeypatch.setattr(Row, "sources_T", lambda row: np.arange(len(row.ids_T)))
    found = models.check_alignment("teachers.t", teacher.score, probes, within=1e-3)
    _level(found, "fault", "shifted by one: the scores at a token are those of the token after it")


def _swapped(score: models.Score, field: str) -> models.Score:
    """One field wrong, the others right."""

    def sick(rows: Sequence[Row], needs: Needs) -> list[TeacherScores]:
        scores = score(rows, replace(needs, k=2))
        if field == "ids":  # the second best id, with its own log-probability
            return [
                replace(f, ids_NK=f.ids_NK[:, 1:], logprobs_NK=f.logprobs_NK[:, 1:]) for f in scores
            ]
        return [replace(found, sampled_N=found.sampled_N.roll(-1)) for found in scores]

    return sick


@pytest.mark.parametrize(
    ("field", "text"),
    [("ids", "not those of a plain forward"), ("sampled", "shifted by one")],
)
def test_each_part_of_the_scores_is_looked_at(
    field: str, text: str, teacher: TransformersTeacher, probes: list[models.Probe]
) -> None:
    score = _swapped(teacher.score, field)
    _level(models.check_alignment("t", score, probes, within=1e-3), "fault", text)


def test_scores_must_be_those_of_generation(
    teacher: TransformersTeacher, probes: list[models.Probe]
) -> None:
    other = [
        replace(
            probe, row=replace(probe.row, behavior_logprobs_T=probe.row.behavior_logprobs_T - 0.5)
        )
        for probe in probes
    ]
    found = models.check_alignment("t", teacher.score, other, within=1e-3)
    _level(found, "fault", "off by 0.5 nats in the mean")


def test_a_confident_teacher_in_bfloat16_is_checked_as_well(tokenizer: Any) -> None:
    """Where every log-probability is near 0, only the ids tell one token from the next."""
    model = load_model("builtin:arithmetic", dtype="bfloat16", device="cpu")
    size = len(tokenizer)
    teacher = TransformersTeacher(model, vocabulary=size)
    probes = models.greedy_probes(
        Student(model, vocabulary=size), Chat(tokenizer).opening("12+34=")
    )
    recorded_T = probes[0].row.behavior_logprobs_T
    assert np.isfinite(recorded_T).sum() == models.GREEDY_TOKENS  # an EOS does not end it
    assert np.nanmean(recorded_T) > -0.3
    within = models.tolerance(model)
    found = models.check_alignment("t", teacher.score, probes, within=within)
    _level(found, "ok", "scored alike")
    found = models.check_alignment("t", _rolled(teacher.score, -1), probes, within=within)
    _level(found, "fault", "shifted by one: the scores at a token are those of the token after")


def test_scores_at_another_temperature_do_not_fit(model: Any, probes: list[models.Probe]) -> None:
    hot = copy.deepcopy(model)
    hot.lm_head.weight.data /= 2
    score = TransformersTeacher(hot, vocabulary=SIZE).score
    found = models.check_alignment("teachers.t", score, probes, within=1e-3)
    _level(found, "fault", "not those of a plain forward")


def test_a_padded_vocabulary_is_named(model: Any, probes: list[models.Probe]) -> None:
    rows = [probe.row for probe in probes]
    padded = TransformersTeacher(model, vocabulary=SIZE + 3).score(rows, Needs(k=1))
    _level(models.check_support("t", padded, SIZE), "fault", "vocabulary padded")
    cut = TransformersTeacher(model, vocabulary=SIZE).score(rows, Needs(k=1))
    _level(models.check_support("t", cut, SIZE), "ok", "101")
    _level(tokenizers.check_padding("t", SIZE + 3, SIZE), "note", "3 are padding")
    _level(tokenizers.check_padding("t", SIZE - 1, SIZE), "fault", "last 1 tokens have no row")


def _teacher_findings(model: Any) -> dict[str, Finding]:
    teacher = TransformersTeacher(model, vocabulary=SIZE)
    found = examine_teacher("teachers.t", teacher, model, PROMPT, {}, size=SIZE)
    return {finding.check: finding for finding in found}


def test_lost_weights_are_named(model: Any) -> None:
    assert {f.level for f in _teacher_findings(model).values()} == {"ok"}
    lost = copy.deepcopy(model)
    for parameter in lost.parameters():
        parameter.zero_()
    found = _teacher_findings(lost)["uniform"]
    _level(found, "fault", "weights lost")
    assert f"{math.log(SIZE):.2f} nats of at most ln V = {math.log(SIZE):.2f}" in found.text


def test_weights_that_are_not_numbers_are_named(model: Any) -> None:
    broken = copy.deepcopy(model)
    broken.model.norm.weight[0] = math.nan
    (found,) = _teacher_findings(broken).values()
    _level(found, "fault", "NaN")


def test_scores_that_change_are_named(
    teacher: TransformersTeacher, probes: list[models.Probe]
) -> None:
    rows = [probe.row for probe in probes]
    noise = iter([0.0, 1e-3, 0.0, 0.0])

    def noisy(rows: Sequence[Row], needs: Needs) -> list[TeacherScores]:
        extra = next(noise)
        return [
            replace(found, sampled_N=found.sampled_N - extra)
            for found in teacher.score(rows, needs)
        ]

    found = models.check_determinism("t", noisy, rows, within=1e-3)
    _level(found, "fault", "scored twice differ by up to 0.001")

    def crowded(rows: Sequence[Row], needs: Needs) -> list[TeacherScores]:
        extra = 0.5 * (len(rows) > 1)
        return [
            replace(found, sampled_N=found.sampled_N - extra)
            for found in teacher.score(rows, needs)
        ]

    found = models.check_determinism("t", crowded, rows, within=1e-3)
    _level(found, "fault", "alone and in a batch differ by up to 0.5")
    _level(models.check_determinism("t", teacher.score, rows, within=1e-3), "ok", "same twice")


# --- the student against itself ------------------------------------------------------------------


def test_recorded_log_probabilities_must_be_the_learners(model: Any, rows: list[Row]) -> None:
    _level(models.check_engine("tasks.x", _student(model), rows), "ok", "on 36 tokens")
    tempered = [replace(row, behavior_logprobs_T=row.behavior_logprobs_T * 0.9) for row in rows]
    found = models.check_engine("tasks.x", _student(model), tempered)
    _level(found, "fault", "apart by")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local_support", {"k": 8}),
        ("local_support", {"k": 8, "support": "student", "renormalize": False}),
        ("full_vocabulary", {"direction": "jsd"}),
        ("sampled_token", {}),
        ("trust_region", {"k": 8}),
        ("entropy_aware", {}),
        ("reward_clipped", {}),
        ("advantage_gated", {}),
    ],
)
def test_a_student_has_nothing_to_learn_from_itself(
    name: str, options: dict[str, Any], model: Any, make_model: Callable[..., Any], rows: list[Row]
) -> None:
    objective = build(name, **options)
    found = models.check_self_distillation("tasks.x", _student(model), rows, objective)
    _level(found, "ok", f"{name}: |log q - log pi| = ")
    other = make_model(vocabulary=SIZE, padding=3, scale=0.5, seed=1)
    score = TransformersTeacher(other, vocabulary=SIZE).score
    found = models.self_distilled("tasks.x", _student(model), score, rows, objective)
    _level(found, "fault", "not 0")


def test_nothing_is_left_of_a_sum_of_distances(
    model: Any, make_model: Callable[..., Any], rows: list[Row]
) -> None:
    """Each at the ids that it needs; beside a reward the loss is no distance, and is not shown."""
    near, whole = build("local_support", k=8, support="student"), build("full_vocabulary")
    both = weighted_sum([(1.0, near), (0.5, whole)])
    found = models.check_self_distillation("tasks.x", _student(model), rows, both)
    _level(found, "ok", "local_support + full_vocabulary: |log q - log pi| = ")
    assert "loss = " in found.text
    score = TransformersTeacher(
        make_model(vocabulary=SIZE, padding=3, scale=0.5, seed=1), vocabulary=SIZE
    ).score
    found = models.self_distilled("tasks.x", _student(model), score, rows, both)
    _level(found, "fault", "not 0")
    mixed = weighted_sum([(1.0, near), (0.5, build("sampled_token"))])
    found = models.check_self_distillation("tasks.x", _student(model), rows, mixed)
    assert found.level == "ok" and "loss = " not in found.text


def test_a_teacher_of_another_task_is_noted(teacher: TransformersTeacher, rows: list[Row]) -> None:
    scores = teacher.score(rows, Needs(k=1))
    _level(models.check_teacher_on_student("t", "x", scores, rows), "ok", "on 36 tokens")
    far = [replace(found, sampled_N=found.sampled_N - 9) for found in scores]
    _level(models.check_teacher_on_student("t", "x", far, rows), "note", "all but impossible")


# --- tokenizers ----------------------------------------------------------------------------------

GOOD = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LAST_ALONE = GOOD.replace("in messages", "in messages[-1:]")
LAST_THREE = GOOD.replace("in messages", "in messages[-3:]")
LESS_REASONING = GOOD.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}",
)
REWRITING = GOOD.replace("<|{{ m.role }}|>", "<|{{ m.role }}|>{{ loop.revindex }}")
RAISING = "{{ raise_exception('only one turn') }}"


@pytest.fixture
def altered(tokenizer: Any) -> Callable[..., Any]:
    def alter(**fields: Any) -> Any:
        other = copy.deepcopy(tokenizer)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    return alter


@pytest.mark.parametrize(
    ("template", "level", "text"),
    [
        (GOOD, "ok", "keeps earlier turns"),
        (LAST_ALONE, "fault", "drops earlier turns: of three, 'first asked'"),
        (LAST_THREE, "fault", "drops earlier turns: of three, 'first asked', 'first said'"),
        (LESS_REASONING, "note", "drops the reasoning"),
        (REWRITING, "note", "rewrites earlier turns"),
        (RAISING, "fault", "only one turn"),
        (None, "note", "none"),
    ],
    ids=["good", "last alone", "last three", "reasoning", "rewriting", "raising", "none"],
)
def test_templates(
    template: str | None, level: str, text: str, altered: Callable[..., Any]
) -> None:
    sick = altered(chat_template=template)
    _level(tokenizers.check_template("student", sick), level, text)


def test_an_eos_of_its_own_is_named(tokenizer: Any, altered: Callable[..., Any]) -> None:
    student = Chat(tokenizer)
    _level(tokenizers.check_ends("t", student, Chat(altered())), "ok", "'<|end|>'")
    found = tokenizers.check_ends("t", student, Chat(altered(eos_token="<|pad|>")))
    _level(found, "fault", "it ends with '<|pad|>' (0), the student with '<|end|>' (1)")


def test_an_end_that_one_of_two_does_not_know_is_named(
    tokenizer: Any, altered: Callable[..., Any]
) -> None:
    """GLM ends a turn with the next speaker's name, which its generation settings say."""
    open_ended = GOOD.replace("<|end|>", "")
    taught = Chat(altered(chat_template=open_ended), stop_ids=[1, 2])
    assert taught.end_id == 2
    bare = Chat(altered(chat_template=None))
    found = tokenizers.check_ends("t", taught, bare)
    _level(found, "fault", "replies end with '<|user|>' (2), the teacher's with '<|end|>' (1)")
    found = tokenizers.check_ends("t", bare, taught)
    _level(
        found, "note", "may end with '<|end|>' (1), the teacher's with '<|end|>' (1), '<|user|>'"
    )


def test_a_reply_must_be_able_to_end(altered: Callable[..., Any]) -> None:
    _level(tokenizers.check_end_of_turn("student", altered(), [1]), "ok", "'<|end|>' (1)")
    # what the template closes with ends a reply, whatever the tokenizer's EOS
    found = tokenizers.check_end_of_turn("student", altered(eos_token="<|pad|>"))
    _level(found, "ok", "'<|end|>' (1), or with '<|pad|>' (0)")
    words = altered(chat_template=GOOD.replace("<|end|>", " over"))
    found = tokenizers.check_end_of_turn("student", words)
    _level(found, "note", "which ends no turn; replies end with '<|end|>'")
    found = tokenizers.check_end_of_turn("student", altered(), [1, 50, 5_000])
    _level(found, "note", "also say [50, 5000]")
    _level(tokenizers.check_end_of_turn("student", altered(eos_token=None)), "fault", "no EOS")


def test_another_vocabulary_is_named(tokenizer: Any, altered: Callable[..., Any]) -> None:
    _level(tokenizers.check_vocabulary("t", tokenizer, altered()), "ok", "equal")
    longer = altered()
    longer.add_tokens(["<extra>"])
    found = tokenizers.check_vocabulary("t", tokenizer, longer)
    _level(found, "fault", f"1 tokens have another id than the student's {len(tokenizer)}")
    assert f"'<extra>': {len(tokenizer)}, the student's none" in found.text


def test_a_teacher_under_another_template_is_noted(
    tokenizer: Any, altered: Callable[..., Any]
) -> None:
    _level(tokenizers.check_same_template("t", tokenizer, altered()), "ok", "the student's")
    other = altered(chat_template=REWRITING)
    _level(tokenizers.check_same_template("t", tokenizer, other), "note", "differs")


def test_masked_tokens_are_told_one_by_one(tokenizer: Any) -> None:
    ids = tokenizer.encode("zq", add_special_tokens=False)
    assert len(ids) == 2
    found = tokenizers.check_mask("tasks.x", tokenizer, ["zq"])
    _level(found, "note", "'zq' is 2 ids")
    assert all(str(i) in found.text for i in ids)
    _level(tokenizers.check_mask("tasks.x", tokenizer, ["<|end|>"]), "note", "EOS is among them")
    _level(tokenizers.check_mask("tasks.x", tokenizer, ["<|user|>"]), "ok", "'<|user|>': ")
    _level(tokenizers.check_mask("tasks.x", tokenizer, [""]), "fault", "gives no token")
    _level(tokenizers.check_mask("tasks.x", tokenizer, []), "ok", "none")


# --- environments --------------------------------------------------------------------------------


class Echo(gymnasium.Env[str, str]):
    """A sound environment of one turn, and ways to make it sick."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(self, sickness: str = "") -> None:
        self.observation_space = self.action_space = spaces.Text(max_length=20)
        self._sickness, self._resets = sickness, 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._resets += 1
        if self._sickness == "forgets its seed":
            return f"say{self._resets}", self._info()
        return f"say{self.np_random.integers(9)}", self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._sickness == "raises" and action == "zzz":
            raise KeyError(action)
        if self._sickness == "hangs":
            time.sleep(30)
        seen = 7 if self._sickness == "speaks in numbers" else "done"
        return seen, 1.0, True, False, self._info()  # type: ignore[return-value]

    def _info(self) -> dict[str, Any]:
        return {} if self._sickness == "keeps its success" else {"success": False}


gymnasium.register("EchoDoctor-v0", entry_point=Echo)


@pytest.mark.parametrize(
    ("sickness", "check", "level", "text"),
    [
        ("", "environment", "ok", "check_env passes"),
        ("speaks in numbers", "text", "fault", "it says 7, which is no text but int"),
        ("raises", "environment", "fault", "KeyError"),
        ("forgets its seed", "same seed", "fault", "different observations"),
        ("keeps its success", "info['success']", "note", "positive reward"),
    ],
)
def test_environments(sickness: str, check: str, level: str, text: str) -> None:
    found = environments.check_environment("tasks.x", "EchoDoctor-v0", {"sickness": sickness})
    _level({finding.check: finding for finding in found}[check], level, text)


@pytest.mark.parametrize(
    ("flavour", "count", "text"),
    [
        ("dies", 7, "its process ends: exit code 0"),
        ("loops", 7, "it hangs: no answer within 0.5 s"),
        ("exits", 7, "SystemExit: 0"),
        ("leaves", 7, "gymnasium's check_env: SystemExit: 0"),
        ("is beyond", 7, "Beyond: not to be made"),
        ("plain", 0, "ValueError: num_episodes is 0: "),
        ("plain", "many", "ValueError: num_episodes is 'many': "),
    ],
)
@pytest.mark.slow
def test_an_environment_that_ends_its_process_ends_no_examination(
    monkeypatch: pytest.MonkeyPatch, flavour: str, count: Any, text: str
) -> None:
    """One that holds the interpreter lock for ever is found, too."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    args = {"flavour": flavour, "num_episodes": count}
    within = 0.5 if flavour == "loops" else 60
    found = environments.check_environment("tasks.x", "pool_envs:Faulty-v0", args, timeout=within)
    _level(found[0], "fault", text)


def test_an_environment_that_hangs_is_left_behind() -> None:
    (found,) = environments.check_environment(
        "tasks.x", "EchoDoctor-v0", {"sickness": "hangs"}, timeout=0.3
    )
    _level(found, "fault", "no answer within 0.3 s")


def test_what_a_task_needs_of_info_is_asked_for() -> None:
    found = environments.check_environment(
        "tasks.x", "EchoDoctor-v0", {}, expert=True, admissible=True
    )
    named = {finding.check: finding for finding in found}
    _level(named["info['expert_action']"], "fault", "missing")
    _level(named["info['admissible_actions']"], "fault", "missing")
    (found_none,) = environments.check_environment("tasks.x", "NoSuchThing-v0", {})
    _level(found_none, "fault", "NoSuchThing")


def test_a_context_with_a_format_needs_the_admissible_actions() -> None:
    rollout = {"context": {"kind": "window", "format": "gigpo"}}
    data = {
        "run": "x",
        "steps": 1,
        "student": {"model": "org/student"},
        "tasks": {"echo": {"env": "EchoDoctor-v0", "rollout": rollout}},
        "objective": {"name": "imitation"},
    }
    config = parse_config(data, "test")
    found = examination._environments(config, config.resolve())
    named = {finding.check: finding for finding in found}
    _level(named["info['admissible_actions']"], "fault", "missing")


@pytest.mark.parametrize(
    ("answers", "level", "text"),
    [
        (["5", "6", "7"], "ok", "first 3 pass"),
        (["5", "\\frac{", "7"], "note", "1 of the first 3 do not pass"),
        (["\\frac{", "\\sqrt{", "5"], "fault", "2 of the first 3 do not pass"),
    ],
)
def test_gold_answers_pass_as_answers(
    answers: list[str], level: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"number {n}?", "answer": gold} for n, gold in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = environments.check_environment("tasks.x", "tutelage/Math-v0", {"problems": str(path)})
    _level({finding.check: finding for finding in found}["gold answers"], level, text)


def test_a_generous_grader_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environments, "judge", lambda *_, **__: Verdict(correct=True, reason="exact")
    )
    found = {finding.check: finding for finding in environments.check_grader()}
    _level(found["known answers"], "fault", "'\\\\boxed{8}' against '7' is graded True")
    assert found["deadline"].level == "ok"


def _grader_of(monkeypatch: pytest.MonkeyPatch, script: str) -> dict[str, Finding]:
    """The findings on a grader whose processes run `script` before they begin."""
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **how: popen(
            [*command[:3], f"{script}\n{command[3]}", *command[4:]], **how
        ),
    )
    try:
        return {finding.check: finding for finding in environments.check_grader()}
    finally:
        grading_pool.close()


@needs_math_verify
@pytest.mark.slow
def test_a_grader_that_is_slow_to_start_is_the_machines_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its grades are right all the same."""
    monkeypatch.setattr(environments, "SLOW", 1.0)
    found = _grader_of(monkeypatch, "import time; time.sleep(3)")
    text = r"this machine is busy: the grader needed \d+\.\d s to start, of its processor \d\.\d s"
    assert re.match(text, found["math-verify"].text)
    assert {name: one.level for name, one in found.items()} == {
        "known answers": "ok",
        "math-verify": "note",
        "by algebra": "ok",
        "deadline": "ok",
    }


@needs_math_verify
def test_a_machine_without_time_for_the_grader_is_no_broken_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environments, "WAIT", 0.3)
    found = _grader_of(monkeypatch, "import time; time.sleep(600)")
    assert found.keys() == {"known answers", "math-verify"}  # the rest could not be looked at
    _level(found["math-verify"], "note", "this machine is too busy: it did not start in 0.3 s")
    assert "install" not in found["math-verify"].cure
    monkeypatch.setattr(environments, "judge", lambda *_, **__: LATE)
    _level(environments._graded("x", environments.SYMBOLIC, 5.0), "note", "this machine is too")


@needs_math_verify
@pytest.mark.parametrize(
    "breaks",
    [
        "import sys; sys.modules['math_verify'] = None",
        "import importlib.metadata as m; v = m.version;"
        " m.version = lambda name: '4.13.1' if name.startswith('antlr') else v(name)",
        "import math_verify; math_verify.verify = lambda *_, **__: False",
    ],
    ids=["absent", "another ANTLR", "another verdict"],
)
def test_a_broken_install_is_a_fault_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    found = _grader_of(monkeypatch, breaks)
    _level(found["math-verify"], "fault", "it does not work here, with math-verify 0.9")
    assert found["math-verify"].cure == "pip install --upgrade 'tutelage[math]'"
    if "antlr" in breaks:
        assert "ANTLR version 4.13.1" in found["math-verify"].text
    assert "by algebra" not in found  # it could not be looked at


def test_an_absent_math_verify_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading_pool, "available", lambda: False)
    found = {finding.check: finding for finding in environments.check_grader()}
    _level(found["by algebra"], "note", "math-verify is not installed")
    assert found["known answers"].level == "ok"


def test_gold_answers_that_the_machine_had_no_time_for_are_not_the_environments_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "?", "answer": "7"}')
    monkeypatch.setattr(math_env, "judge", lambda *_, **__: LATE)
    found = environments.check_environment("tasks.x", "tutelage/Math-v0", {"problems": str(path)})
    assert not any(one.level == "fault" for one in found)
    assert "too busy" in found[-1].text


def test_a_fault_has_a_cure() -> None:
    with pytest.raises(ValueError, match="without a cure"):
        Finding(subject="student", check="EOS", level="fault", text="sick")


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run_doctor(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*pairs: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor", str(CONFIGS / "math_only.yaml"), "student.threads=1", *pairs])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def sick_teacher(tmp_path: Path, tokenizer: Any) -> Iterator[str]:
    """The arithmetic teacher after its weights went."""
    model = load_model("builtin:arithmetic", dtype="float32", device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "sick")
    tokenizer.save_pretrained(tmp_path / "sick")
    yield str(tmp_path / "sick")


ARITHMETIC = "tasks.math.env_args={problems: arithmetic}"


@pytest.fixture
def _no_grader(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at elsewhere, for seconds."""
    monkeypatch.setattr(examination, "check_grader", lambda: [])


@pytest.mark.slow
def test_a_sound_config_ends_with_0_and_a_sick_teacher_with_1(
    run_doctor: Callable[..., tuple[int, str, str]],
    sick_teacher: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, _ = run_doctor(ARITHMETIC, "student={model: builtin:start, threads: 1}")
    assert code == 0
    assert "faults 0" in out and "gold answers" in out
    monkeypatch.setattr(examination, "check_grader", lambda: [])
    code, out, _ = run_doctor(ARITHMETIC, f"teachers.calculator.model={sick_teacher}")
    assert code == 1
    assert "weights lost" in out and "faults 1" in out


@pytest.mark.usefixtures("_no_grader")
@pytest.mark.slow
def test_a_model_that_is_there_and_does_not_load_is_not_called_missing(
    run_doctor: Callable[..., tuple[int, str, str]], tmp_path: Path, tokenizer: Any
) -> None:
    model = load_model("builtin:arithmetic", dtype="float32", device="cpu")
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    code, out, _ = run_doctor(ARITHMETIC, f"teachers.calculator.model={tmp_path / 'broken'}")
    said = " ".join(out.split())
    assert code == 1 and "NaN" in said
    assert "do as it says" in said and "name a folder that is there" not in said


@pytest.mark.usefixtures("_no_grader")
@pytest.mark.slow
def test_what_is_missing_is_a_finding_and_a_mistake_in_the_config_is_not(
    run_doctor: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = run_doctor(ARITHMETIC, "teachers.calculator.model=./not/here")
    assert code == 1
    assert "there is no such folder" in out
    code, out, error = run_doctor("objectiv.k=3")
    assert (code, out) == (2, "")
    assert "did you mean 'objective'" in error
