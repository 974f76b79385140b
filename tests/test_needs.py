"""What each objective needs of a teacher and of a row, stated once more here."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.distill.objectives import NAMES, Needs, build
from tutelage.distill.objectives.needs import union

DRAWS = {"draws": True}
SAMPLING = {"behavior": "sampling"}
NEEDS: list[tuple[str, dict[str, Any], Needs]] = [
    ("imitation", {}, Needs(generated_by="expert", given=True)),
    ("full_vocabulary", {}, Needs(k=1, full=True)),
    ("local_support", {"k": 5}, Needs(k=5)),
    ("local_support", {"k": 5, **SAMPLING}, Needs(k=5)),  # no draw matters
    ("local_support", {"k": 5, "support": "teacher+sampled"}, Needs(k=5, draws=True)),
    ("local_support", {"k": 5, "support": "student"}, Needs(k=1, student_k=5)),
    (
        "local_support",
        {"k": 5, "support": "student+sampled", **SAMPLING},
        Needs(k=1, student_k=5, draws=True, sampling=True),
    ),
    (
        "local_support",
        {"k": 5, "tail": "sampled", "renormalize": False},
        Needs(k=5, draws=True),
    ),
    ("sampled_token", {}, Needs(k=1, draws=True)),
    ("sampled_token", SAMPLING, Needs(k=1, draws=True, sampling=True)),
    ("trust_region", {"k": 6}, Needs(k=6, given=True, draws=True)),
    ("entropy_aware", {"k": 7}, Needs(k=7, entropy=True, draws=True)),
    ("advantage_gated", {"k": 8}, Needs(k=8, draws=True)),
    (
        "reward_clipped",
        {"share": 0.3, "switch": 0.6},
        Needs(k=1, draws=True, progress=True, undecided=0.3, undecided_from=0.6),
    ),
    ("reward_clipped", {"switch": 0}, Needs(k=1, draws=True, undecided=0.2, undecided_from=0)),
]


@pytest.mark.parametrize(("name", "options", "needs"), NEEDS)
def test_each_objective_says_what_it_needs(
    name: str, options: dict[str, Any], needs: Needs
) -> None:
    assert build(name, **options).needs == needs


def test_the_table_has_every_objective() -> None:
    assert {name for name, _, _ in NEEDS} == set(NAMES)


def test_imitation_alone_asks_no_teacher() -> None:
    assert {name for name, _, needs in NEEDS if not needs.teacher} == {"imitation"}


def test_a_teacher_names_as_many_ids_as_the_student() -> None:
    assert Needs(k=1, student_k=5).width == Needs(k=5, student_k=2).width == 5


class TestUnion:
    def test_it_is_what_either_needs_and_takes_what_both_take(self) -> None:
        parts = {
            "a": Needs(k=3, student_k=5, given=True, draws=True, sampling=True, undecided=0.2),
            "b": Needs(k=4, full=True, entropy=True, advantage=True, progress=True),
        }
        whole = Needs(
            k=4, student_k=5, full=True, entropy=True, given=False, advantage=True, draws=True,
            sampling=True, progress=True, undecided=0.2,
        )  # fmt: skip
        assert union(parts) == whole == union(dict(reversed(parts.items())))

    @pytest.mark.parametrize(("name", "options", "needs"), NEEDS)
    def test_of_one_it_is_its_own(self, name: str, options: dict[str, Any], needs: Needs) -> None:
        assert union({name: needs}) == needs

    def test_no_row_is_the_experts_and_the_students(self) -> None:
        parts = {name: build(name).needs for name in ("imitation", "local_support")}
        with pytest.raises(ValueError, match="imitation learns from the expert's, local_support"):
            union(parts)
