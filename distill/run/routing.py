"""Has every episode scored by its own teacher, makes training examples of it, keeps the ledger.

An episode's order names its teacher, so that no index can mix teachers up. All teachers of a step
are asked at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.resolved import TaskSettings
from tutelage.distill.objectives import Needs, TeacherScores
from tutelage.distill.student.examples import Example
from tutelage.distill.student.learner import Learner
from tutelage.distill.student.masks import loss_mask
from tutelage.distill.student.sampling_bias import with_sampling_logprobs
from tutelage.distill.teachers.answers import unpack_answer
from tutelage.distill.teachers.service import Answer, Ask
from tutelage.distill.teachers.transport import CompactScores
from tutelage.scheduler.episodes import Dropped, Episode, Order, Row
from tutelage.scheduler.placement import Placement

_Scored = tuple[CompactScores, TeacherScores]  # as the teacher sent them, and unpacked
Outcomes = Mapping[str, Sequence[Episode | Dropped]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """A step's training examples, task by task in the episodes' order.

    ledger: of each task, how much each teacher scored; `teacher/NAME/tokens` summed over a run are
    the tokens that were trained. costs: what scoring took, as metrics that may differ between two
    runs of one configuration.
    """

    examples: list[Example]
    ledger: dict[str, dict[str, float]]
    costs: dict[str, float]


class Routing:
    """From episodes to training examples.

    Args:
        special: ids that take no loss, by task.

    `references` are the teachers' fingerprints; an answer with another one is refused.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskSettings],
        special: Mapping[str, Sequence[int]],
        learner: Learner,
        placement: Placement[Ask, Answer],
        teachers: Iterable[str],
    ) -> None:
        self._tasks, self._special = tasks, special
        self._learner, self._placement = learner, placement
        # an ask without rows: every answer carries the teacher's fingerprint
        asks = [Ask(teacher=name, rows=(), needs=Needs(k=1)) for name in teachers]
        answers = zip(asks, placement.score(asks), strict=True)
        self.references = {ask.teacher: answer.fingerprint for ask, answer in answers}

    def sound(self, task: str, outcomes: Sequence[Episode | Dropped]) -> bool:
        """Whether enough of the task's episodes were played to learn from."""
        lost = sum(isinstance(outcome, Dropped) for outcome in outcomes)
        # the first half counts where lost is 1.0: without any episode there is nothing to learn
        return lost < len(outcomes) and lost <= self._tasks[task].lost * len(outcomes)

    def complete(self, outcomes: Outcomes) -> Outcomes:
        """The outcomes with the log-probabilities under their sampling parameters, where a task's
        objective needs them and the engine did not give them."""
        needy = {task for task in outcomes if self._tasks[task].objective.needs.sampling}
        return {
            task: with_sampling_logprobs(own, self._learner) if task in needy else own
            for task, own in outcomes.items()
        }

    def batch(self, outcomes: Outcomes) -> StepBatch:
        """The step's batch.

        Raises:
            RuntimeError: a greater share of a task's episodes was lost than rollout.lost allows, or
                a teacher's self-test has another result than at first.
            ConfigError: they were lost because their first prompts are too long.
        """
        rows = {task: self._rows(task, own) for task, own in outcomes.items()}
        scores, answers = self._scores(rows)
        examples: list[Example] = []
        ledger: dict[str, dict[str, float]] = {}
        for task, own in rows.items():
            found = scores.get(task, [None] * len(own))
            made = [
                Example(
                    task=task,
                    row=row,
                    scores=None if scored is None else scored[1],
                    mask_T=loss_mask(row, self._special[task]),
                    number=order.number,
                )
                for (order, row), scored in zip(own, found, strict=True)
            ]
            examples += made
            ledger[task] = _ledger(made, found)
        costs = {}
        if answers:  # not in the ledger: a resumed run finds scores in the cache, and asks less
            costs["time/teacher"] = round(sum(answer.seconds for answer in answers), 4)
            costs["perf/teacher_retries"] = float(sum(answer.retries for answer in answers))
            costs["perf/cache_hits"] = float(sum(answer.hits for answer in answers))
        return StepBatch(examples=examples, ledger=ledger, costs=costs)

    def _rows(self, task: str, outcomes: Sequence[Episode | Dropped]) -> list[tuple[Order, Row]]:
        """The rows of the episodes that were played, each with its episode's order."""
        if not self.sound(task, outcomes):
            lost = [outcome for outcome in outcomes if isinstance(outcome, Dropped)]
            most = self._tasks[task].lost
            # "too long" is the configuration's fault (exit code 2), the rest the environment's (1)
            kind = ConfigError if lost[0].reason == "too long" else RuntimeError
            raise kind(
                f"task {task!r}: {len(lost)} of {len(outcomes)} episodes were lost (rollout.lost"
                f" allows a share of {most}), the first ({lost[0].order.name}) because"
                f" {lost[0].why}"
            )
        return [
            (outcome.order, row)
            for outcome in outcomes
            if isinstance(outcome, Episode)
            for row in outcome.rows
        ]

    def _scores(
        self, rows: Mapping[str, Sequence[tuple[Order, Row]]]
    ) -> tuple[dict[str, list[_Scored | None]], Sequence[Answer]]:
        """Every teacher's scores, in the order of `rows`; and the teachers' answers."""
        asks: list[tuple[str, list[int], Ask]] = []  # (task, indexes of its rows, the ask)
        for task, own in rows.items():
            if self._tasks[task].objective.needs.teacher:
                by_teacher: dict[str, list[int]] = defaultdict(list)
                for place, (order, _) in enumerate(own):
                    assert order.teacher is not None
                    by_teacher[order.teacher].append(place)
                for teacher, places in by_teacher.items():
                    some = [own[place][1] for place in places]
                    asks.append((task, places, self._ask(task, teacher, some)))
        answers = self._placement.score([ask for _, _, ask in asks])
        scores: dict[str, list[_Scored | None]] = {}
        for (task, places, ask), answer in zip(asks, answers, strict=True):
            answer.fingerprint.check_same(self.references[ask.teacher])  # also of a restarted actor
            own_scores = scores.setdefault(task, [None] * len(rows[task]))
            unpacked = unpack_answer(ask, answer, vocabulary=self._learner.student.vocabulary)
            for place, sent, scored in zip(places, answer.scores, unpacked, strict=True):
                own_scores[place] = sent, scored
        return scores, answers

    def _ask(self, task: str, teacher: str, rows: Sequence[Row]) -> Ask:
        needs, query_ids = self._tasks[task].objective.needs, None
        if needs.student_k:
            # Once, before the step's updates, as in the authors' code (kl_topk_source=actor).
            query_ids = self._learner.own_support(rows, needs.student_k)
        return Ask(teacher=teacher, rows=rows, needs=needs, query_ids=query_ids)


def _ledger(examples: Sequence[Example], scores: Sequence[_Scored | None]) -> dict[str, float]:
    """Each row counts for the teacher that its scores name: evidence of who scored, not of who was
    asked."""
    found: dict[str, float] = defaultdict(float)
    for example, scored in zip(examples, scores, strict=True):
        if scored is None:
            continue
        sent, _ = scored
        found[f"teacher/{sent.teacher}/rows"] += 1
        found[f"teacher/{sent.teacher}/tokens"] += float(example.mask_T.sum())
        found[f"teacher/{sent.teacher}/positions"] += len(sent)
        found[f"teacher/{sent.teacher}/bytes"] += sent.nbytes
    return dict(found)
