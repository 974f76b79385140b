"""Checks environments, and the grader of mathematical answers."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env

from tutelage.distill.doctor.findings import Check, Finding
from tutelage.envs.grading import judge
from tutelage.envs.grading import pool as grading_pool
from tutelage.envs.grading.pool import Allowance
from tutelage.envs.pool import START_SECONDS, Act, EnvironmentPool, Failed, Observed, Reset
from tutelage.envs.worker import MAX_OBSERVATION, Undecided, num_episodes

GOLDS = 20
"""Gold answers that are graded against themselves."""


def check_environment(
    subject: str,
    env_id: str,
    env_args: Mapping[str, Any],
    *,
    expert: bool = False,
    admissible: bool = False,
    check: str = "environment",
    timeout: float = START_SECONDS,
) -> list[Finding]:
    """Run Gymnasium's own checker, and check what a task needs beyond it. expert, admissible: info
    must hold the expert's action, the admissible actions. timeout: seconds for all of it."""
    opens = Check(subject, check)
    found: list[Finding] = []
    if deadly := _deadly(opens, env_id, env_args, timeout):
        return [deadly]

    def examine() -> None:
        try:
            env = gymnasium.make(env_id, disable_env_checker=True, **env_args)
            num_episodes(env)
        except BaseException as error:  # somebody else's code
            cure = "correct env and env_args; `tutelage envs` lists both"
            found.append(opens.fault(_line(error), cure))
            return
        try:
            found.extend(_checked_by_gymnasium(opens, env))
            found.extend(_keys(subject, env, expert=expert, admissible=admissible))
            found.extend(_golds(subject, env))
        except Undecided as error:  # the machine's fault, not the environment's
            found.append(opens.note(f"not all could be looked at: {error}", LATER))
        except BaseException as error:  # somebody else's code
            cure = "answer an action that makes no sense with text, never with an exception"
            found.append(opens.fault(f"it raises {_line(error)}", cure))
        finally:
            with contextlib.suppress(BaseException):
                env.close()

    thread = threading.Thread(target=examine, daemon=True)  # left behind if it hangs
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        return [*found, opens.fault(f"it hangs: no answer within {timeout:g} s", WAITS)]
    return found


WAITS = "find what it waits for; rollouts would kill it at rollout.timeout, again and again"


def _deadly(
    check: Check, env_id: str, env_args: Mapping[str, Any], timeout: float
) -> Finding | None:
    """A crash or hang, looked for in a child process: this one would not survive it."""
    try:
        with EnvironmentPool(
            env_id, env_args, processes=1, timeout=timeout, max_observation=MAX_OBSERVATION
        ) as pool:
            pool.send([Reset(episode=0, seed=3)])
            (answer,) = pool.receive()
            if isinstance(answer, Observed):  # an action that makes no sense anywhere
                pool.send([Act(episode=0, action="zzz")])
                (answer,) = pool.receive()
    except ValueError:
        return None  # this process tells it better, or is the only one that knows the id
    except RuntimeError as error:
        return check.fault(str(error), "it must be possible to make it: see what ends its process")
    if isinstance(answer, Failed) and answer.reason == "timeout":
        return check.fault(f"it hangs: {answer.detail}", WAITS)
    if isinstance(answer, Failed) and answer.reason == "died":
        cure = "correct what ends its process: every such episode would be lost"
        return check.fault(f"its process ends: {answer.detail}", cure)
    return None


def _checked_by_gymnasium(check: Check, env: gymnasium.Env[Any, Any]) -> list[Finding]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # unwrapped: gymnasium.make's wrappers would hide faults from the checker
            # and without rendering: observations are text, and nothing here draws
            check_env(env.unwrapped, skip_render_check=True)
        except Undecided:  # the grader was too busy: no fault of the environment's
            raise
        except BaseException as error:
            return [
                check.fault(
                    f"gymnasium's check_env: {_line(error)}",
                    "correct the environment; check_env(env.unwrapped) repeats it",
                )
            ]
    said = [_plain(str(warning.message)) for warning in caught]
    if said:
        return [check.note(f"gymnasium's check_env passes, and warns: {said[0]}")]
    return [check.ok("gymnasium's check_env passes")]


def _keys(
    subject: str, env: gymnasium.Env[Any, Any], *, expert: bool, admissible: bool
) -> list[Finding]:
    first, info = env.reset(seed=3)
    again, _ = env.reset(seed=3)
    answer, _, _, _, after = env.step("zzz")
    found = []
    for said in (first, answer):
        if not isinstance(said, str):
            found.append(
                Check(subject, "text").fault(
                    f"it says {said!r:.40}, which is no text but {type(said).__name__}",
                    "return a str from reset and step: wrap the environment",
                )
            )
    repeats = Check(subject, "same seed")
    if first == again:
        found.append(repeats.ok("the same first observation twice"))
    else:
        found.append(
            repeats.fault(
                "two resets with one seed give different observations: no run can be repeated",
                "draw everything from self.np_random after super().reset(seed=seed)",
            )
        )
    success = Check(subject, "info['success']")
    if isinstance(info.get("success"), bool) and isinstance(after.get("success"), bool):
        found.append(success.ok("a bool at reset and at step"))
    else:
        found.append(
            success.note(
                "missing or no bool: an episode that ends with a positive reward counts as one",
                "put success, a bool, into every info",
            )
        )
    if expert:
        found.append(_given(subject, info, "expert_action", str))
    if admissible:
        found.append(_given(subject, info, "admissible_actions", list))
    return found


def _given(subject: str, info: Mapping[str, Any], key: str, kind: type) -> Finding:
    check = Check(subject, f"info[{key!r}]")
    if isinstance(info.get(key), kind):
        return check.ok("there")
    cure = (
        "rollout.context: without admissible and format"
        if key == "admissible_actions"
        else ("env_args: {expert: true}, or an environment that has an expert")
    )
    return check.fault("missing, and this task needs it", cure)


def _golds(subject: str, env: gymnasium.Env[Any, Any]) -> list[Finding]:
    """Whether gold answers, where info tells them, are graded as correct."""
    if "answer" not in env.reset(seed=0, options={"index": 0})[1]:
        return []
    check = Check(subject, "gold answers")
    count = min(GOLDS, num_episodes(env) or GOLDS)
    wrong: list[tuple[int, str, str]] = []
    for index in range(count):
        gold = str(env.reset(options={"index": index})[1]["answer"])
        info = env.step(f"\\boxed{{{gold}}}")[4]
        if not info["success"]:
            wrong.append((index, gold, str(info.get("reason", ""))))
    if not wrong:
        return [check.ok(f"the first {count} pass as their own answers")]
    index, gold, reason = wrong[0]
    text = (
        f"{len(wrong)} of the first {count} do not pass as their own answers, the first at index"
        f" {index}: {gold[:40]!r} ({reason})"
    )
    cure = "correct or drop those problems; answer_column and gold_format say where a file has them"
    # data sets have a few golds that the grader cannot read; if most fail, the column is wrong
    if 2 * len(wrong) > count:
        return [check.fault(text, cure)]
    return [check.note(text, cure)]


GRADES = (
    ("\\boxed{7}", "7", True),
    ("so the answer is \\boxed{\\frac{1}{2}}", "0.5", True),
    ("\\boxed{8}", "7", False),
    ("seven, I should think, is it not so", "7", False),
    ("\\boxed{7} is wrong, so \\boxed{9}", "7", False),  # the last one is the answer
)
SYMBOLIC = (("\\boxed{x(x+1)}", "x^2+x", True), ("\\boxed{x^2}", "x^2+x", False))
ENDLESS = "9^{9^{9}}"
"""An answer whose algebra never ends, in C code that no thread can interrupt."""


WAIT = 60.0
"""Seconds on the clock that the doctor waits for one grade, however busy the machine is."""
SLOW = 5.0
"""Seconds from which the grader's start is worth a note."""
LATER = "run it again when the machine is less busy: training waits for the grader, and plays again"
INSTALL = "pip install --upgrade 'tutelage[math]'"
PARTS = ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy")


def check_grader(*, timeout: float = 5.0) -> list[Finding]:
    """Grade answers whose grade is known, and one that never ends. timeout: processor seconds for
    one answer."""
    found = [_graded("known answers", GRADES, timeout)]
    if not grading_pool.available():
        text = "math-verify is not installed: answers that only algebra can compare count as wrong"
        return [*found, Check("grader", "by algebra").note(text, INSTALL)]
    started = _started()
    if not grading_pool.worker_pids():  # it did not start, and would grade nothing
        return [*found, started]
    return [*found, started, _graded("by algebra", SYMBOLIC, timeout), _bounded(timeout=1.0)]


def _started() -> Finding:
    """Whether math-verify works as it is installed (versions may not fit), and how long its process
    takes to be ready (the machine may be slow)."""
    check = Check("grader", "math-verify")
    try:
        seconds, used = grading_pool.start(WAIT)
    except grading_pool.Broken as error:
        return check.fault(f"it does not work here, with {_versions()}: {error}", INSTALL)
    except grading_pool.Late:
        return check.note(f"this machine is too busy: it did not start in {WAIT:g} s", LATER)
    except (grading_pool.Stalled, OSError) as error:
        text = f"its process was stopped or ended from outside ({error or type(error).__name__})"
        return check.note(text, "look for what kills processes here: memory, limits, a person")
    if seconds > SLOW:
        return check.note(_slow(seconds, used))
    return check.ok(f"{_versions()}; ready after {seconds:.1f} s")


def _slow(seconds: float, used: float) -> str:
    why = "busy" if seconds > 2 * used else "slow"  # busy: it waited for the processor
    return (
        f"this machine is {why}: the grader needed {seconds:.1f} s to start, of its processor"
        f" {used:.1f} s; no answer counts as wrong for that, but steps wait for it"
    )


def _versions() -> str:
    found = []
    for part in PARTS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{part} {metadata.version(part)}")
    return ", ".join(found)


def _graded(name: str, cases: Sequence[tuple[str, str, bool]], timeout: float) -> Finding:
    check = Check("grader", name)
    for said, gold, right in cases:
        verdict = judge(said, gold, timeout=timeout, wait=WAIT)
        if verdict.undecided or verdict.reason == "timeout":
            return check.note(
                f"this machine is too slow or too busy: {said!r} got no grade in {timeout:g} s of"
                f" its processor and {WAIT:g} s on the clock ({verdict.reason})",
                LATER,
            )
        if verdict.correct is not right:
            return check.fault(
                f"{said!r} against {gold!r} is graded {verdict.correct} ({verdict.reason}), with"
                f" {_versions() or 'no math-verify'}: every reward of mathematics depends on this",
                INSTALL,
            )
    return check.ok(f"{len(cases)} of {len(cases)} as they should be")


def _bounded(*, timeout: float) -> Finding:
    """Whether the process that does algebra ends when its processor time is used up."""
    check = Check("grader", "deadline")
    begun = time.monotonic()
    correct, reason = grading_pool.symbolic(ENDLESS, "x+1", Allowance.within(timeout, WAIT))
    seconds = time.monotonic() - begun
    if reason in grading_pool.UNDECIDED:
        return check.note(f"this machine is too busy to tell: {seconds:.1f} s ({reason})", LATER)
    if correct or reason != "timeout":
        return check.fault(
            f"an answer that never ends took {seconds:.1f} s of {timeout:g} ({reason})",
            "the grader's processes cannot be killed here: see envs/grading/pool.py",
        )
    return check.ok(f"algebra that never ends is killed in time ({reason})")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(_plain(str(error)).split())}"[:300]


def _plain(text: str) -> str:
    """Without the colours that Gymnasium gives its warnings."""
    return text.replace("\x1b[33m", "").replace("\x1b[0m", "").removeprefix("WARN: ")
