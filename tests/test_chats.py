"""Chat templates of every kind: what the student sees is the template's own text, replies end where
the model was taught to end them, and the run trains; or one line says why not."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chats import BAD, MISTRAL, PARTS, SILENT, STYLES, Style, save_student, styled
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.run import RunConfig
from tutelage.distill.doctor import texts as tokenizers
from tutelage.distill.doctor.examination import examine
from tutelage.distill.models.conversations import stop_ids
from tutelage.distill.models.loading import load_tokenizer
from tutelage.distill.run.training import Run, evaluate_model
from tutelage.scheduler.chat import Chat
from tutelage.scheduler.templates import conversation, in_parts, render

pytestmark = pytest.mark.runs

DAY = datetime.date(2024, 7, 26)
TEXTS = ["What is 2+3?", "5", "And 4+4?", "8", "Bye"]


def _config(folder: Path, model: str, **more: Any) -> RunConfig:
    data: dict[str, Any] = {
        "run": str(folder / "run"),
        "steps": 2,
        "student": {"model": model},
        "teachers": {"t": {"model": model}},
        "tasks": {"math": {"env": "tutelage/Math-v0", "teacher": "t", "episodes": 2}},
        "rollout": {"max_turns": 1, "max_new_tokens": 8, "processes": 0},
        "journal": {"tensorboard": False},
        "checkpoint": {"every": 1},
        "evaluation": {"episodes": 2, "modes": ["greedy"]},
    }
    return parse_config(data | more, "test")


@pytest.mark.parametrize("name", STYLES)
def test_every_style_is_examined_and_trains(
    name: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutelage.distill.doctor.examination.check_grader", lambda: [])
    style = STYLES[name]
    config = _config(tmp_path, save_student(tmp_path / "model", tokenizer, style))
    assert [found for found in examine(config) if found.level == "fault"] == []
    with Run(config) as run:
        run.train()
        ends = run.placement._worker.chat("math").eos_ids  # type: ignore[attr-defined]
    saved = tmp_path / "run" / "checkpoints" / "000002"
    again = Chat(load_tokenizer(str(saved)), stop_ids=stop_ids(str(saved)))
    assert again.eos_ids == ends  # an evaluation of the checkpoint stops where the run did


@pytest.mark.parametrize("name", STYLES)
def test_a_reply_ends_where_the_model_was_taught_to(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    style = STYLES[name]
    model = save_student(tmp_path, tokenizer, style)
    chat = Chat(load_tokenizer(model), stop_ids=stop_ids(model))
    ids = chat.tokenizer.convert_tokens_to_ids([style.end, style.eos, *style.ends])
    assert chat.end_id == ids[0]
    assert {*ids} <= chat.eos_ids


@pytest.mark.parametrize("name", [name for name in STYLES if name not in ("none", "silent")])
def test_each_prompt_is_the_templates_own(name: str, tokenizer: Any) -> None:
    """What a chat server would send at that turn, but for what a template takes back of turns that
    are over (the system message of Mistral, the open <think> of R1)."""
    chat = Chat(made := styled(tokenizer, STYLES[name]), date=DAY)
    spoken = in_parts if STYLES[name] is PARTS else str
    trunk: list[int] = []
    for turn in (0, 1, 2):
        text = TEXTS[2 * turn]
        trunk += chat.following(text, closed=True) if turn else chat.opening(text)
        messages = conversation(TEXTS[: 2 * turn + 1], system=None, spoken=spoken)
        shown = render(made, messages, date=DAY)
        if name == "r1":
            said = shown.replace("<|Assistant|>", "<|Assistant|><think>\n")
            shown = said.replace("<think>\n<think>\n", "<think>\n")
        if name == "mistral":  # a blank that its history has before each reply
            shown = shown.replace("[/INST] ", "[/INST]")
        if name != "plain":  # whose turns end with a line break, and EOS in a rollout
            assert made.decode(trunk) == shown
        trunk += chat.reply(TEXTS[2 * turn + 1]) if turn < 2 else []


def test_a_system_message_stands_once(tokenizer: Any) -> None:
    """Mistral's template has it before the last user message, wherever that is."""
    for style in STYLES.values():
        if style.template is None or "System role" in style.template:
            continue
        chat = Chat(styled(tokenizer, style), system="Be brief.", date=DAY)
        ids = [*chat.opening("one"), *chat.reply("two"), *chat.following("three", closed=True)]
        assert chat.tokenizer.decode(ids).count("Be brief.") == 1


def test_what_opens_a_reply_is_written_where_the_template_forgets_it(tokenizer: Any) -> None:
    chat = Chat(made := styled(tokenizer, SILENT))
    ids = [*chat.opening("one"), *chat.reply("two"), *chat.following("three", closed=True)]
    assert made.decode(ids).count("<|im_start|>assistant\n") == 2
    assert made.decode(ids).endswith("three<|im_end|>\n<|im_start|>assistant\n")
    assert Chat(styled(tokenizer, MISTRAL)).pieces.unasked == ""  # it has none to write
    found = tokenizers.check_template("student", made)
    assert found.level == "note" and "ignores add_generation_prompt" in found.text


def test_the_next_speakers_name_is_not_lost_behind_another_end(tokenizer: Any) -> None:
    """GLM: `<|user|>` ends a turn and opens the next."""
    glm = Chat(styled(tokenizer, STYLES["glm"]))
    user, end = glm.tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    assert glm.following("x", closed=True, end=user)[0] != user
    assert glm.following("x", closed=True, end=end)[0] == user


@pytest.mark.parametrize("name", BAD)
def test_a_template_that_does_not_do_is_one_line_before_weights_load(
    name: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, why = BAD[name]
    model = save_student(tmp_path / "model", tokenizer, Style(template=template))
    config = _config(tmp_path, model)
    found = tokenizers.check_template("student", load_tokenizer(model))
    assert found.level == "fault" and (why in found.text or "drops earlier" in found.text)
    monkeypatch.setattr("tutelage.distill.models.loading.load_model", None)  # none is asked for
    with pytest.raises(ConfigError, match="the chat template of") as refused:
        Run(config)
    assert str(refused.value).startswith("student.model: ") and why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_system_message_that_the_template_refuses_or_drops_is_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"takes no system message .*rollout.context.system"):
        Chat(styled(tokenizer, STYLES["gemma2"]), system="Be brief.")
    deaf = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves the system message out"):
        Chat(styled(tokenizer, Style(template=deaf)), system="Be brief.")


# --- today ---------------------------------------------------------------------------------------


class _Tomorrow(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date(2031, 1, 2)


def test_a_run_keeps_the_day_on_which_it_began(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_student(tmp_path / "model", tokenizer, STYLES["llama3"])
    began = _config(tmp_path, model, date="2024-07-26", steps=1)
    with Run(began) as run:
        run.train()
    made = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert str(made["date"]) == "2024-07-26"
    monkeypatch.setattr(datetime, "date", _Tomorrow)
    later = _config(tmp_path, model, steps=1)
    with Run(later) as run:
        assert run.config.date == DAY
        chat = run.placement._worker.chat("math")  # type: ignore[attr-defined]
        assert "Today Date: 26 Jul 2024" in chat.tokenizer.decode(chat.opening("x"))
    checkpoint = str(tmp_path / "run" / "checkpoints" / "000001")
    assert evaluate_model(later, checkpoint)["date"] == "2024-07-26"
    elsewhere = _config(tmp_path / "other", model)
    with Run(elsewhere) as run:
        assert run.config.date == datetime.date(2031, 1, 2)


def test_a_day_is_recorded_where_a_template_asks_for_it_alone(
    tokenizer: Any, tmp_path: Path
) -> None:
    config = _config(tmp_path, save_student(tmp_path / "model", tokenizer, STYLES["phi3"]))
    with Run(config) as run:
        assert run.config.date is None


# --- teachers ------------------------------------------------------------------------------------


def test_a_teacher_that_ends_otherwise_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """Two models of one vocabulary and one EOS: the teacher knows nothing of the end of a turn."""
    student = save_student(tmp_path / "student", tokenizer, STYLES["phi3"])
    style = Style(template=None, special=STYLES["phi3"].special, eos="<|text|>")
    teacher = save_student(tmp_path / "teacher", tokenizer, style)
    config = _config(tmp_path, student, teachers={"t": {"model": teacher}})
    with pytest.raises(ConfigError, match=r"teachers.t: in tasks.math a reply ends with '<\|stop"):
        Run(config)
