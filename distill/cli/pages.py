"""Tables for a terminal of 80 columns: the plan, the doctor's findings."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tutelage.distill.config.credentials import hidden
from tutelage.distill.doctor.findings import Finding
from tutelage.distill.plan.footprint import Footprint
from tutelage.distill.plan.memory import device_name, memory_here
from tutelage.distill.plan.plan import Plan, notes

UNKNOWN = "?"


def show_plan(plan: Plan, console: Console, also: Sequence[str] = ()) -> None:
    """Print a plan; `also` stands with the notes."""
    config = plan.config
    parts = [f"{config.run}: {config.steps:,} steps, seed {config.seed}"]
    if len(config.tasks) > 1:
        parts.append(f"{len(config.tasks)} tasks by {config.schedule.policy}")
    console.print(", ".join(parts), highlight=False)
    for table in (_tasks(plan), _examples(plan), _placement(plan), _memory(plan)):
        console.print()
        console.print(table)
    console.print()
    for line in (*notes(plan), *also):
        # markup: a note may quote brackets, which rich would take for a style
        console.print(f"- {line}", highlight=False, markup=False)


COLOURS = {"ok": "green", "note": "yellow", "fault": "bold red"}


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print what the doctor found, by subject, each with its cure."""
    table = _table("", ["", "", ""], [], words=3)
    table.show_header = False
    for subject in sorted({finding.subject for finding in findings}, key=_place):
        table.add_row(Text(subject, style="bold"))
        for finding in findings:
            if finding.subject == subject:
                text = Text(hidden(finding.text))  # a server's message may quote its key
                if finding.cure:
                    text.append(f"\n-> {finding.cure}", style="italic")
                level = Text(finding.level, style=COLOURS[finding.level])
                table.add_row(Text(f"  {finding.check}"), level, text)
    console.print(table)
    counts = [sum(f.level == level for f in findings) for level in COLOURS]
    console.print(
        f"{len(findings)} checks: ok {counts[0]}, notes {counts[1]}, faults {counts[2]}",
        highlight=False,
    )


def _place(subject: str) -> tuple[int, str]:
    """A subject's place: student first, then teachers, tasks, the grader."""
    return ("student", "teachers", "tasks", "grader").index(subject.partition(".")[0]), subject


def _tasks(plan: Plan) -> Table:
    rows = [
        [
            task.name,
            f"{task.steps:,}",
            f"{task.episodes:,}" + (f", {task.group} a game" if task.group > 1 else ""),
            f"{task.run_episodes:,}",
            count(task.tokens),
            count(task.run_tokens),
            "every game" if task.evaluated is None else f"{task.evaluated:,}",
        ]
        for task in plan.tasks
    ]
    if len(rows) > 1:
        episodes = sum(task.run_episodes for task in plan.tasks)
        tokens = sum(task.run_tokens for task in plan.tasks)
        rows.append(["all", f"{plan.config.steps:,}", "", f"{episodes:,}", "", count(tokens), ""])
    headings = ["task", "steps", "episodes\na step", "in all", "tokens\na step", "in all"]
    return _table(
        "Episodes, and the tokens of the replies at most",
        [*headings, "episodes of\nevaluation"],
        rows,
        words=1,
    )


def _examples(plan: Plan) -> Table:
    rows = []
    for task in plan.tasks:
        sizes = [size(task.score_bytes), size(task.step_bytes)] if task.teacher else ["-", "-"]
        rows.append([task.name, task.teacher or "the expert", task.objective, *sizes])
    headings = ["task", "teacher", "objective", "scores\na token", "a step,\nat most"]
    return _table("Who teaches what", headings, rows, words=3)


def _placement(plan: Plan) -> Table:
    config, cluster = plan.config, plan.config.cluster
    own = [config.student.dtype, device_name(config.student.device)]
    rows = [["learner", *_model(plan.student), *own, "here"]]
    vllm = ", vLLM" * (config.rollout.engine == "vllm")
    if cluster is not None:
        rows.append(["rollouts", "(a copy each)", "", *own, f"Ray x {cluster.workers}{vllm}"])
    elif vllm:
        rows.append(["rollouts", "(a copy)", "", *own, f"here{vllm}"])
    else:
        rows.append(["rollouts", "(the learner's)", "", "", own[1], "here"])
    for name, teacher in config.teachers.items():
        model, where = _model(plan.teachers[name]), "here" if cluster is None else "Ray"
        if teacher.engine == "server":
            rows.append([name, *model, "", "", str(teacher.url)])
            continue
        where += ", vLLM" * (teacher.engine == "vllm")
        rows.append([name, *model, teacher.dtype, device_name(teacher.device), where])
    for name, task in config.tasks.items():
        rows.append([name, task.env, "", "", "cpu", _environments(plan, name)])
    headings = ["what", "model or environment", "size", "dtype", "device", "where"]
    return _table("Placement (here: this process)", headings, rows, words=6)


def _model(model: Footprint) -> list[str]:
    # without a shape the number is the one in the name, which is rounded
    about = "about " if model.parameters is not None and model.shape is None else ""
    return [model.reference.rstrip("/").rsplit("/", 1)[-1], about + count(model.parameters)]


def _environments(plan: Plan, name: str) -> str:
    processes = plan.settings[name].rollout.processes
    if not processes:
        return "with the rollouts"
    pools = 2 * plan.config.workers  # each worker's: one for training, one for evaluation
    return f"{pools * processes} processes"


def _memory(plan: Plan) -> Table:
    rows = []
    for device in dict.fromkeys(need.device for need in plan.needs):
        for need in plan.needs:
            if need.device == device:
                rows.append([device, need.what, size(need.least), size(need.most), need.knob])
        least, most, unknown = plan.total(device)
        room = memory_here(device)
        more = " + ?" if unknown else ""
        rows.append(
            [
                device,
                "all",
                size(least) + more,
                size(most) + more,
                "" if room is None else f"of {size(room)} here",
            ]
        )
    headings = ["device", "what", "at least", "at most", "depends on"]
    return _table("Memory", headings, rows, words=2)


def _table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, words: int
) -> Table:
    """The first `words` columns are left-aligned, the others right."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        show_edge=False,
        pad_edge=False,
    )
    for number, heading in enumerate(headings):
        # fold: rich cuts what is too long, and a plan's numbers must stay whole
        table.add_column(heading, justify="left" if number < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets are no markup here
    return table


def count(number: int | None) -> str:
    """12,345 in full; above that 1.2M, 7.6B."""
    return UNKNOWN if number is None else _short(number, ("", "K", "M", "B", "T"))


def size(number: int | None) -> str:
    """Decimal: 192 B, 134 MB, 15.2 GB."""
    return UNKNOWN if number is None else _short(number, (" B", " kB", " MB", " GB", " TB", " PB"))


def _short(number: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if number < 999.5:  # from there on .3g rounds to 1e+03
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}"
