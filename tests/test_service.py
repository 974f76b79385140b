"""A teacher at work: it is who it was, keeps its weights, and is not asked the same thing twice."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.settings import serving
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.sections import OptimizerConfig
from tutelage.distill.models.dtypes import TOLERANCE
from tutelage.distill.models.student import Student
from tutelage.distill.objectives import Needs, build
from tutelage.distill.objectives import scores as objective_scores
from tutelage.distill.student.examples import Example, TaskObjective
from tutelage.distill.student.learner import Learner
from tutelage.distill.teachers.answers import unpack_answer
from tutelage.distill.teachers.fingerprint import Fingerprint, digest_of
from tutelage.distill.teachers.service import Answer, Ask, TeacherService
from tutelage.distill.teachers.transformers import TransformersTeacher
from tutelage.scheduler.episodes import Row

VOCABULARY = 101
FIELDS = ("ids_NK", "logprobs_NK", "sampled_N", "entropy_N", "query_logprobs_NJ", "full_NV")
Service = Callable[..., TeacherService]


@pytest.fixture
def serve(make_model: Callable[..., Any]) -> Service:
    """A teacher named `one`, of a model that is nobody else's."""

    def serve(model: Any = None, *, digest: str = "d", **options: Any) -> TeacherService:
        teacher = TransformersTeacher(model or make_model(seed=9), vocabulary=VOCABULARY)
        return serving(teacher, digest=digest, **options)

    return serve


@pytest.fixture
def rows(make_row: Callable[..., Row]) -> list[Row]:
    plain = [
        make_row([("prompt", [1, 2, 3]), ("said", list(range(4, 4 + n)))], seed=n) for n in (2, 9)
    ]
    branched = [("prompt", [5, 6]), ("branch", [7, 8]), ("said", [9, 10]), ("prompt", [11])]
    return [*plain, make_row(branched)]


def _same(one: Answer, other: Answer) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        if getattr(a, name) is not None
        else getattr(b, name) is None
        for a, b in zip(one.scores, other.scores, strict=True)
        for name in FIELDS
    )


def _zero(model: Any) -> Any:
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model


class TestExam:
    def test_lost_weights_are_refused_at_the_first_load(
        self, serve: Service, make_model: Callable[..., Any]
    ) -> None:
        with pytest.raises(ConfigError, match=r"teachers\.one: it prefers no token.*4\.6151 nats"):
            serve(_zero(make_model()))

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            *(("head", value) for value in (math.nan, math.inf, -math.inf, 1e38)),
            *(("embedding", value) for value in (math.nan, math.inf)),
        ],
    )
    def test_weights_that_give_no_numbers_are_named_as_such(
        self, value: float, where: str, serve: Service, make_model: Callable[..., Any]
    ) -> None:
        """Also finite ones that overflow. One id's row: the head's touches every token."""
        model = make_model()
        part = model.get_output_embeddings() if where == "head" else model.get_input_embeddings()
        with torch.no_grad():
            part.weight[: VOCABULARY // 2 if where == "embedding" else 8] = value
        said = r"in its self-test its logits are NaN or infinite at token \d+ \(id \d+\)"
        said = rf"teachers\.one: {said}"
        with pytest.raises(ConfigError, match=said):
            serve(model)

    def test_a_row_that_breaks_it_later_is_named_with_its_token(
        self, serve: Service, make_model: Callable[..., Any], rows: list[Row]
    ) -> None:
        """The second row holds an id whose embedding is none; attention takes it everywhere."""
        teacher = serve(make_model())
        with torch.no_grad():
            teacher.model.get_input_embeddings().weight[7] = math.nan
        said = r"teachers\.one: its logits .* at token 3 \(id 4\) of row 1 of 2: .*dtype to float32"
        with pytest.raises(RuntimeError, match=said):
            teacher.score(rows[:2], Needs(k=4))

    def test_an_id_that_is_ruled_out_is_no_broken_weight(
        self, serve: Service, make_model: Callable[..., Any], rows: list[Row]
    ) -> None:
        """A head may give -inf to ids that are none."""
        model = make_model()
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
        with torch.no_grad():
            head.bias[50] = -math.inf
        (scores,) = serve(model).teacher.score(rows[:1], Needs(k=4, full=True))
        assert (scores.full()[:, 50] == -math.inf).all()

    def test_a_head_alone_that_was_lost_is_refused_too(
        self, serve: Service, make_model: Callable[..., Any]
    ) -> None:
        model = make_model()
        _zero(model.get_output_embeddings())
        with pytest.raises(ConfigError, match="its weights are lost"):
            serve(model)

    def test_weights_that_are_no_numbers_are_refused(
        self, serve: Service, make_model: Callable[..., Any]
    ) -> None:
        model = make_model()
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="check the teacher's weights"):
            serve(model)

    def test_a_model_never_trained_is_not_taken_for_a_lost_one(
        self, serve: Service, make_model: Callable[..., Any]
    ) -> None:
        """The usual initial scale and a hidden size of 32: as flat as a model that is there gets.
        It stands eight times further from uniform than what is refused."""
        found = serve(make_model(scale=0.02)).fingerprint
        short = 1 - float(np.mean(found.entropies)) / math.log(VOCABULARY)
        assert 8e-4 < short < 1e-2

    def test_another_model_is_far_outside_the_tolerance_and_rounding_far_inside(
        self, serve: Service, make_model: Callable[..., Any]
    ) -> None:
        here = serve(make_model(seed=9)).fingerprint
        assert serve(make_model(seed=9)).fingerprint == here
        assert serve(make_model(seed=10)).fingerprint.distance(here) > 1000 * TOLERANCE["float32"]
        narrow = serve(make_model(seed=9).bfloat16(), dtype="bfloat16").fingerprint
        assert 1e-4 < narrow.distance(here) < TOLERANCE["bfloat16"] / 3
        narrow.check_same(here)
        with pytest.raises(RuntimeError, match="lost or changed"):
            replace(narrow, dtype="float32").check_same(here)

    def test_what_cannot_be_compared_is_not_the_same(self, serve: Service) -> None:
        here = serve().fingerprint
        other = replace(here, logprobs=here.logprobs[:-1])
        broken = replace(here, entropies=(math.nan, *here.entropies[1:]))
        assert here.distance(other) == here.distance(broken) == math.inf

    def test_it_comes_back_from_the_run_folder(self, serve: Service, tmp_path: Path) -> None:
        path = tmp_path / "teachers" / "one.json"
        here = serve().fingerprint
        assert Fingerprint.read(path) is None
        here.write(path)
        assert Fingerprint.read(path) == here
        path.write_text(path.read_text()[:-20])
        assert Fingerprint.read(path) is None


class TestSleeping:
    def test_it_answers_as_one_that_never_slept(self, serve: Service, rows: list[Row]) -> None:
        sleeper, waking = serve(sleeps=True), serve()
        for _ in range(2):
            assert _same(sleeper.score(rows, Needs(k=4)), waking.score(rows, Needs(k=4)))

    @pytest.mark.parametrize("part", ["everything", "one layer"])
    def test_weights_lost_in_sleep_are_seen_before_they_teach(
        self, serve: Service, rows: list[Row], part: str
    ) -> None:
        """One layer of two: far from uniform, and still another teacher."""
        teacher = serve(sleeps=True)
        teacher.score(rows, Needs(k=4))
        _zero(teacher.model if part == "everything" else teacher.model.base_model.layers[1])
        with pytest.raises(RuntimeError, match=r"teachers\.one: its weights were lost or changed"):
            teacher.score(rows, Needs(k=4))

    def test_it_is_on_its_device_only_while_it_works(self, serve: Service, rows: list[Row]) -> None:
        """The moves, as told to the model; this machine has one device."""
        moves: list[str] = []
        teacher = serve(sleeps=True)
        move = teacher.model.to
        teacher.model.to = lambda device: moves.append(str(device)) or move(device)
        teacher.teacher._device = torch.device("cpu", 0)
        teacher.score(rows, Needs(k=4))
        assert moves == ["cpu:0", "cpu"]


class TestCache:
    NEEDED: Sequence[Needs] = (Needs(k=4), Needs(k=5), Needs(k=4, full=True))

    def test_what_was_scored_before_takes_no_teachers_work(
        self, serve: Service, rows: list[Row], tmp_path: Path
    ) -> None:
        """Another process of the same teacher: its network raises when it is called."""
        asked = [np.arange(3 * n, dtype=np.int32).reshape(n, 3) for n in (2, 9, 4)]
        wanted: list[tuple[Any, ...]] = [(needs,) for needs in self.NEEDED]
        wanted.append((Needs(k=4, student_k=3), asked))
        first = serve(cache=tmp_path)
        answers = [first.score(rows, *one) for one in wanted]
        assert [answer.hits for answer in answers] == [0, 0, 0, 0]
        plain = [serve().score(rows, *one) for one in wanted]
        assert all(_same(a, b) for a, b in zip(answers, plain, strict=True))
        second = serve(cache=tmp_path)

        def fail(*_: object, **__: object) -> None:
            raise AssertionError("the teacher worked")

        second.teacher.score = fail  # type: ignore[method-assign, assignment]
        for answer, one in zip(answers, wanted, strict=True):
            again = second.score(rows, *one)
            assert (again.hits, again.seconds) == (3, 0.0)
            assert _same(again, answer)
            assert {scores.teacher for scores in again.scores} == {"one"}
        with pytest.raises(AssertionError, match="the teacher worked"):
            second.score(rows, Needs(k=6))

    def test_known_rows_and_new_ones_come_back_in_order(
        self, serve: Service, rows: list[Row], tmp_path: Path
    ) -> None:
        teacher = serve(cache=tmp_path)
        teacher.score(rows[1:2], Needs(k=4))
        mixed = teacher.score(rows, Needs(k=4))
        assert mixed.hits == 1
        for found, exact in zip(mixed.scores, serve().score(rows, Needs(k=4)).scores, strict=True):
            assert np.array_equal(found.ids_NK, exact.ids_NK)
            assert np.allclose(found.sampled_N, exact.sampled_N, atol=1e-5)

    def test_everything_that_scores_depend_on_is_in_the_key(
        self, serve: Service, rows: list[Row], tmp_path: Path
    ) -> None:
        """A hit on any of these would be the answer to another question."""
        serve(cache=tmp_path).score(rows, Needs(k=4))
        row = rows[1]
        other_ids, fewer = row.ids_T.copy(), row.turns_T.copy()
        other_ids[0] += 1
        fewer[4] = -1
        flat = replace(rows[2], branches_T=np.zeros_like(rows[2].branches_T))
        asked = [np.zeros((9, 2), dtype=np.int32)]
        changed: list[tuple[list[Row], tuple[Any, ...]]] = [
            ([replace(row, ids_T=other_ids)], (Needs(k=4),)),
            ([replace(row, turns_T=fewer)], (Needs(k=4),)),
            ([flat], (Needs(k=4),)),
            ([row], (Needs(k=3),)),
            ([row], (Needs(k=4, full=True),)),
            ([row], (Needs(k=4, student_k=2), asked)),
            ([row], (Needs(k=4, student_k=2), [asked[0] + 1])),
        ]
        for given, wanted in changed:
            assert serve(cache=tmp_path).score(given, *wanted).hits == 0
        assert serve(cache=tmp_path, digest="another").score([row], Needs(k=4)).hits == 0
        longer = replace(
            row,
            **{
                n: np.append(getattr(row, n), [x])
                for n, x in zip(
                    ("ids_T", "turns_T", "behavior_logprobs_T", "branches_T"),
                    (3, -1, math.nan, 0),
                    strict=True,
                )
            },
        )
        assert (
            serve(cache=tmp_path).score([longer], Needs(k=4)).hits == 1
        )  # nothing sees what follows

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "swapped", "numbers"])
    def test_a_damaged_file_is_recomputed_and_written_anew(
        self, serve: Service, rows: list[Row], tmp_path: Path, damage: str
    ) -> None:
        teacher = serve(cache=tmp_path)
        answer = teacher.score(rows[:2], Needs(k=4))
        paths = sorted(tmp_path.rglob("*.npz"))
        whole = [path.read_bytes() for path in paths]
        for path, own, next_one in zip(paths, whole, reversed(whole), strict=True):
            flipped = bytearray(own)
            flipped[len(own) // 3] ^= 255
            changed = {"cut": own[:-9], "flipped": bytes(flipped), "empty": b""}
            changed |= {"other": b"PK\x03\x04 no", "swapped": next_one}
            arrays = io.BytesIO()
            np.savez(arrays, ids_NK=np.int32(1), logprobs_NK=np.float16(1), sampled_N=np.float32(1))
            changed["numbers"] = arrays.getvalue()
            path.write_bytes(changed[damage])
        again = teacher.score(rows[:2], Needs(k=4))
        assert _same(again, answer)
        assert again.hits == 0
        assert teacher.score(rows[:2], Needs(k=4)).hits == 2
        assert not list(tmp_path.rglob(".*"))  # nothing half-written

    def test_a_folder_that_cannot_be_written_is_named(
        self, serve: Service, rows: list[Row], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"teachers\.one\.cache: .*set cache: null"):
            serve(cache=tmp_path / "file").score(rows, Needs(k=4))


class TestDigest:
    def test_it_changes_with_any_file_that_makes_the_teacher(
        self, make_model: Callable[..., Any], tmp_path: Path
    ) -> None:
        """Shards too, where no file is called model.safetensors."""
        folder = tmp_path / "sharded"
        make_model().save_pretrained(folder, max_shard_size="20KB")
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 1
        first = digest_of(str(folder), dtype="float32")
        (folder / "README.md").write_text("words")
        assert digest_of(str(folder), dtype="float32") == first
        found = {first, digest_of(str(folder), dtype="bfloat16")}
        for path in (shards[-1], folder / "config.json"):
            data = bytearray(path.read_bytes())
            whole = copy.copy(data)
            data[-2] ^= 1
            path.write_bytes(data)
            found.add(digest_of(str(folder), dtype="float32"))
            path.write_bytes(whole)
        shards[0].rename(shards[0].with_name("a.safetensors"))
        found.add(digest_of(str(folder), dtype="float32"))
        assert len(found) == 5


def test_a_score_is_looked_at_twice_as_logits_and_in_its_message(
    make_model: Callable[..., Any], make_row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 rows, one forward of the teacher and one micro-batch of the student: what is cut, joined
    or moved on the way is not looked at again."""
    rows = [make_row([("prompt", [1]), ("said", [2 + i, 3 + i])], seed=i) for i in range(32)]
    objective = build("local_support", k=8)
    teacher = TransformersTeacher(make_model(seed=9), vocabulary=VOCABULARY)
    service = serving(teacher, digest="d")
    looks: list[int] = []
    look = objective_scores._check_values

    def counted(parts: Sequence[tuple[str, torch.Tensor]], vocabulary: int) -> None:
        looks.append(len(parts[0][1]))
        look(parts, vocabulary)

    monkeypatch.setattr(objective_scores, "_check_values", counted)
    ask = Ask(teacher="one", rows=rows, needs=objective.needs)
    scores = unpack_answer(ask, service.answer(ask), vocabulary=VOCABULARY)
    assert looks == [64, 64]
    examples = [
        Example(task="t", row=row, scores=one, mask_T=row.action_mask_T)
        for row, one in zip(rows, scores, strict=True)
    ]
    student = Student(make_model(seed=1), vocabulary=VOCABULARY)
    learner = Learner(student, config=OptimizerConfig(lr=1e-3), steps=1)
    learner.update(examples, {"t": TaskObjective(objective=objective, weight=1.0)}, seed=0)
    assert looks == [64, 64]
