"""The command line.

Exit codes: 0 done; 2 the user's mistake, in one line; 130, 143 and 129 ended by Ctrl-C, SIGTERM and
a closed terminal, saved where a run was under way; 1 anything else.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tutelage.distill.cli.signals import Signals
from tutelage.distill.config.credentials import hidden, hide_in_tracebacks
from tutelage.evaluation import run_folder

CONFIGS = Path(__file__).parents[2] / "configs"

_show_warning = warnings.showwarning


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `tutelage`."""
    options = _parse(arguments)
    warnings.showwarning = _warn
    hide_in_tracebacks()
    # tokenizers' threads would not survive the fork of a child process, and warn of it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM's start warns of memory binding
    atexit.register(gc.freeze)  # else the exit searches all of torch for garbage, for seconds
    try:
        sys.exit(options.command(options))
    except KeyboardInterrupt as error:
        for said in ("stopped", *getattr(error, "__notes__", ())):
            print(f"tutelage: {said}", file=sys.stderr)
        # a KeyboardInterrupt of Python's own, outside of Signals, has no number
        sys.exit(128 + getattr(error, "number", signal.SIGINT))
    except (ValueError, FileNotFoundError) as error:  # the user's; other OSErrors are the machine's
        if os.environ.get("TUTELAGE_TRACEBACK"):
            raise
        _complain(error)
        sys.exit(2)
    except BrokenPipeError:  # `tutelage config | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit flushes
        sys.exit(128 + signal.SIGPIPE)
    except (OSError, RuntimeError, ArithmeticError) as error:  # others are bugs: a traceback
        if os.environ.get("TUTELAGE_TRACEBACK"):
            raise
        _complain(error)
        sys.exit(1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; key=value pairs may stand anywhere."""
    # argparse fills nargs="*" once: pairs that follow an option come back as unknown words
    parser = _parser()
    options, late = parser.parse_known_args(arguments)
    if wrong := [word for word in late if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if late and not hasattr(options, "pairs"):
        parser.error(f"this command takes no key=value: {late[0]}")
    if late:
        options.pairs = [*options.pairs, *late]
    return options


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Show our own warnings as one line each, others in Python's form."""
    if Path(filename).is_relative_to(CONFIGS.parent):
        print(f"tutelage: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        _show_warning(message, category, filename, lineno, file, line)


def _complain(error: BaseException) -> None:
    """Print the error as one line on stderr, and each of its notes; no traceback."""
    for said in (str(error) or type(error).__name__, *getattr(error, "__notes__", ())):
        print(f"tutelage: {' '.join(hidden(said).split())}", file=sys.stderr)
    if not isinstance(error, ValueError | FileNotFoundError):
        print("tutelage: TUTELAGE_TRACEBACK=1 shows where", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the command, and where the help is."""

    def error(self, message: str) -> NoReturn:
        from tutelage.envs.names import unknown  # which loads Gymnasium

        # argparse's own message lists all choices: ours names the nearest
        what, _, choices = message.partition(" (choose from ")
        known = re.findall(r"'([^']*)'", choices)
        if "invalid choice: " in what and known:
            name = what.partition("invalid choice: ")[2].strip("'")
            what = unknown(what.partition(":")[0].split()[-1].lower(), name, known)
        self.exit(2, f"tutelage: {what}: see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tutelage",
        description="Train one student language model, on its own trajectories, under several"
        " teachers at once.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run)
        return sub

    def configured(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = command(name, run, text)
        sub.add_argument("config", type=Path)
        sub.add_argument("pairs", nargs="*", default=[], metavar="key=value")
        return sub

    demo = command("demo", _demo, "the joint agent+math run on the CPU, end to end")
    demo.add_argument("pairs", nargs="*", default=[], metavar="key=value")
    configured("train", _train, "train; continues where the run folder left off")
    evaluate = configured("eval", _eval, "success rate, pass@1, intervals; writes eval.json")
    evaluate.add_argument(
        "--model", help="a folder, hub id or builtin:NAME; else the run's last checkpoint"
    )
    evaluate.add_argument("--out", type=Path, help="where eval.json goes; else the run folder")
    configured("plan", _plan, "what would run and what it takes; loads no weights")
    configured("doctor", _doctor, "preflight: tokenizers, templates, scores, environments")
    play = command("play", _play, "play an environment by hand, or watch a policy play")
    play.add_argument("env_id", metavar="ENV_ID")
    play.add_argument(
        "--policy", default="hand", help="hand (default), expert, random, or a model's folder"
    )
    play.add_argument("--index", type=_natural, help="which game or problem; else from --seed")
    play.add_argument("--seed", type=_natural, default=0)
    play.add_argument(
        "pairs", nargs="*", default=[], metavar="key=value", help="the environment's options"
    )
    study = command("study", _study, "an experiment on the objectives: table, plots, numbers")
    study.add_argument("which", choices=["estimators"])
    study.add_argument("--out", type=Path, default=Path("runs/studies/estimators"))
    study.add_argument("--seeds", type=int, nargs="+", help="of the toy's students and teachers")
    study.add_argument("--iterations", type=int, help="of the toy's students")
    command("envs", _envs, "every registered environment with its options")
    keys = command("config", _config, "every key of a config, its default and its reason")
    keys.add_argument("section", nargs="?", metavar="SECTION", help="or a key; else all of them")
    keys.add_argument("--markdown", action="store_true", help="as docs/config.md has it")
    return parser


def _train(options: argparse.Namespace) -> int:
    # commands import for themselves: `tutelage --help` waits for no torch
    _begin()
    from tutelage.distill.config.loading import load_config

    return _run_training(load_config(options.config, options.pairs))


def _run_training(config: Any) -> int:
    from tutelage.distill.run.progress import ConsoleObserver
    from tutelage.distill.run.training import Run

    _quiet()
    with ConsoleObserver() as watcher, Signals() as signals:
        with Run(config, watch=watcher) as run:
            signals.stop = run.stop
            run.train()
            signals.stop = None  # all is saved: another signal may end the process at once
        if run.stopped:
            watcher.say(f"stopped; {run.record.standing()}")
            return signals.code
        watcher.say(f"done: {run.folder}/metrics.jsonl, checkpoints, episodes")
    return 0


def _eval(options: argparse.Namespace) -> int:
    _begin()
    from tutelage.distill.config.loading import load_config
    from tutelage.distill.run.progress import ConsoleObserver
    from tutelage.distill.run.training import evaluate_model
    from tutelage.evaluation import files
    from tutelage.evaluation.tables import score_table, type_table

    _quiet()
    config = load_config(options.config, options.pairs)
    out = options.out or Path(config.run) / run_folder.SCORES
    files.check_place(out)  # before the games: no score is lost for want of a place
    last = run_folder.newest(Path(config.run) / run_folder.CHECKPOINTS)
    model = options.model or (str(last) if last else None)  # None: the untrained student
    with ConsoleObserver() as watcher:
        found = evaluate_model(config, model, watch=watcher)
    files.write_json(out, found)
    scores = found["scores"]
    watcher.console.print(type_table("by type", scores, config.evaluation.modes[0]))
    watcher.console.print(score_table(str(found["model"]), {"score": scores}))
    watcher.console.print(f"written: {out}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    _begin()
    from tutelage.distill.cli.demo import run_demo

    _quiet()
    return run_demo(CONFIGS / "demo.yaml", options.pairs)


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from tutelage.distill.cli.pages import show_plan
    from tutelage.distill.config.faults import ConfigError
    from tutelage.distill.config.loading import load_config
    from tutelage.distill.config.resolved import rollouts_of
    from tutelage.distill.plan.plan import make_plan
    from tutelage.distill.run.preflight import check_machine, open_once

    _quiet()
    config = load_config(options.config, options.pairs)
    plan = make_plan(config)
    with Console(stderr=True).status("opening environments"):
        also = [
            f"not opened, and not seen: {what}" for what in open_once(rollouts_of(plan.settings))
        ]
    try:
        check_machine(config)
    except ConfigError as error:  # only a note: the run may be planned for another machine
        also.append(f"here it would be refused: {error}")
    show_plan(plan, Console(), also)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from tutelage.distill.cli.pages import show_findings
    from tutelage.distill.config.loading import load_config
    from tutelage.distill.doctor.examination import examine

    _quiet()
    config = load_config(options.config, options.pairs)
    with Console(stderr=True).status("") as status:
        findings = list(examine(config, say=lambda what: status.update(f"examining: {what}")))
    show_findings(findings, Console())
    return int(any(finding.level == "fault" for finding in findings))


def _play(options: argparse.Namespace) -> int:
    from tutelage.distill.cli.play import play
    from tutelage.envs.plugins import look_beside

    look_beside(Path.cwd())  # an installed command has its own folder on sys.path, not this one
    _quiet()
    return play(
        options.env_id,
        env_args=_env_args(options.pairs),
        policy=options.policy,
        index=options.index,
        seed=options.seed,
    )


def _study(options: argparse.Namespace) -> int:
    from tutelage.distill.studies import estimators

    _quiet()
    estimators.run_study(
        options.out,
        seeds=options.seeds or estimators.SEEDS,
        iterations=estimators.ITERATIONS if options.iterations is None else options.iterations,
    )
    return 0


def _envs(options: argparse.Namespace) -> int:
    from tutelage.distill.cli.play import describe_environments

    print(describe_environments())
    return 0


def _config(options: argparse.Namespace) -> int:
    from tutelage.distill.cli.keys import as_markdown, as_text, chosen

    print((as_markdown if options.markdown else as_text)(chosen(options.section)).rstrip())
    return 0


def _env_args(pairs: Sequence[str]) -> dict[str, Any]:
    """An environment's options, each given once."""
    from tutelage.distill.config.reading import parse_pair, plain

    found: dict[str, Any] = {}
    for pair in pairs:
        parts, value = parse_pair(pair, "an environment's option, key=value")
        key = ".".join(parts)
        if key in found:
            raise ValueError(f"{pair!r}: {key} is given twice: leave one")
        try:
            found[key] = plain(value)
        except ValueError as error:
            raise ValueError(f"{pair!r}: {error}") from None
    return found


def _natural(text: str) -> int:
    """A whole number of 0 or more, of an option."""
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise argparse.ArgumentTypeError(f"it must be a whole number of 0 or more, not {text!r}")
    return int(text)


def _begin() -> None:
    """Say what lasts: the imports take seconds, the first time a minute."""
    print("loading torch and transformers", flush=True)


def _quiet() -> None:
    """Keep transformers' own progress bars and advice off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
