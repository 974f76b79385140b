"""Ray actors that die, hang or raise, on one node and on several: their work is done again, or the
run is told why not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.settings import cluster as cluster_of
from tutelage.distill.objectives import Needs
from tutelage.distill.teachers.service import Ask
from tutelage.scheduler.cluster import RayCluster
from tutelage.scheduler.episodes import Dropped, Episode, Order, Row, SamplingParams

pytestmark = pytest.mark.slow


def _fragile(plan: Path) -> Any:
    """Makes what stands for a worker and for a teacher. A file `METHOD.die`, `.hang` or `.raise` in
    `plan` makes the method go wrong: once, or always if it holds "always"."""
    import os
    import signal
    import time

    class Fragile:
        def num_episodes(self, task: str) -> int:
            return len(task)

        def play(self, orders: Any, *, sampling: Any, weights: Any, version: Any) -> list[Dropped]:
            _meet_fate("play")
            told = repr((weights, version))
            return [Dropped(order=o, reason="died", detail=told, attempts=1) for o in orders]

        def answer(self, ask: Any) -> list[int]:
            _meet_fate("answer")
            return [ask.k * row for row in ask.rows]

        def close(self) -> None:
            return

    def _meet_fate(method: str) -> None:
        for fate in ("die", "hang", "raise"):
            path = plan / f"{method}.{fate}"
            try:
                if path.read_text() != "always":
                    path.unlink()  # by one actor alone
            except FileNotFoundError:
                continue
            if fate == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if fate == "raise":
                raise ValueError("the teacher is out of words")
            time.sleep(600)

    _meet_fate("make")
    return Fragile()


TORCH = """
import sys
from pathlib import Path

own = sys.modules[__name__]

def set_num_threads(count):
    pass

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if sys.modules["torch"] is own:
        sys.path.remove(str(Path(own.__file__).parent.parent))
        del sys.modules["torch"]
    import torch

    return getattr(torch, name)
"""


@pytest.fixture(scope="module", autouse=True)
def _nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A Ray cluster of three raylets on this machine: here, and two with a resource `far`. Its
    actors, fifty of them, load neither these tests nor torch, which would take most of the time:
    they get a torch that is told of threads, and loads when it is asked for more."""
    import ray
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    (folder := tmp_path_factory.mktemp("path") / "torch").mkdir()
    (folder / "__init__.py").write_text(TORCH)
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(folder.parent))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes = {
        name: cluster.add_node(num_cpus=1, resources={"far": 1, name: 1}) for name in ("one", "two")
    }
    ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
    yield nodes | {"cluster": cluster}
    ray.shutdown()
    cluster.shutdown()
    patch.undo()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


Make = Callable[..., RayCluster]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made = []

    def make(workers: int = 2, **keys: Any) -> RayCluster:
        cluster = RayCluster(
            cluster_of(workers=workers, **keys),
            make_worker=lambda: _fragile(tmp_path),
            make_teachers={"t": lambda: _fragile(tmp_path)},
            weights=lambda: {"w": 1.5},
            stalled=tmp_path / "stalled",
        )
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.close()


def _collect(cluster: RayCluster, orders: list[Order]) -> list[Any]:
    return cluster.start(orders).outcomes()


def _ask(*rows: int, k: int = 1) -> SimpleNamespace:
    return SimpleNamespace(teacher="t", rows=rows, k=k)


def _score(cluster: RayCluster, *rows: int, k: int = 1) -> Any:
    (answer,) = cluster.score([_ask(*rows, k=k)])
    return answer


ORDERS = [Order(task="t", number=i, seed=i, index=i) for i in range(5)]


@pytest.mark.parametrize("fate", ["die", "hang"])
def test_a_lost_workers_share_is_played_again_with_the_same_weights(
    make: Make, tmp_path: Path, fate: str
) -> None:
    cluster = make(timeout=3.0)
    cluster.sync(7)
    (tmp_path / f"play.{fate}").touch()
    outcomes = _collect(cluster, ORDERS)
    assert [outcome.order for outcome in outcomes] == ORDERS
    assert {o.detail for o in outcomes if isinstance(o, Dropped)} == {"({'w': 1.5}, 7)"}
    assert cluster.restarts == 1
    assert [o.order for o in _collect(cluster, ORDERS)] == ORDERS and cluster.restarts == 1


@pytest.mark.parametrize("fate", ["die", "hang"])
def test_a_lost_teacher_scores_again(make: Make, tmp_path: Path, fate: str) -> None:
    cluster = make(workers=1, timeout=3.0)
    (tmp_path / f"answer.{fate}").touch()
    assert _score(cluster, 3, 5, k=2) == [6, 10]
    assert cluster.restarts == 1


@pytest.mark.parametrize("fate", ["die", "hang"])
def test_what_was_started_before_a_sync_is_played_with_the_weights_of_then(
    make: Make, tmp_path: Path, fate: str
) -> None:
    """Also when the worker is lost in the first of two: one fresh actor plays both again."""
    sent = iter([1.5, 2.5])
    cluster = make(workers=1, timeout=3.0)
    cluster._weights = lambda: {"w": next(sent)}
    (tmp_path / f"play.{fate}").touch()
    cluster.sync(7)
    first = cluster.start(ORDERS)
    cluster.sync(8)
    second = cluster.start(ORDERS[:2])
    assert {o.detail for o in first.outcomes()} == {"({'w': 1.5}, 7)"}  # type: ignore[union-attr]
    assert {o.detail for o in second.outcomes()} == {"({'w': 2.5}, 8)"}  # type: ignore[union-attr]
    assert cluster.restarts == 1


def test_answers_come_in_the_order_of_the_asks(make: Make) -> None:
    answers = make(workers=1).score([_ask(1, k=2), _ask(3, k=3)])
    assert answers == [[2], [9]]


def test_an_actor_that_dies_as_it_starts_is_replaced(make: Make, tmp_path: Path) -> None:
    (tmp_path / "make.die").touch()
    cluster = make(workers=1)
    assert cluster.restarts == 1
    assert [o.order for o in _collect(cluster, ORDERS)] == ORDERS


def test_actors_that_always_die_as_they_start_are_not_replaced_for_ever(
    make: Make, tmp_path: Path
) -> None:
    (tmp_path / "make.die").write_text("always")
    with pytest.raises(RuntimeError, match="worker-0: 2 actors were lost as they started"):
        make(workers=1, attempts=2)


def test_a_hung_actors_stack_is_kept(make: Make, tmp_path: Path) -> None:
    cluster = make(workers=1, timeout=3.0)
    (tmp_path / "answer.hang").touch()
    _score(cluster, 1)
    cluster.close()
    (dump,) = (tmp_path / "stalled").iterdir()  # those that never hung left none
    assert dump.name == "teacher-t.txt"
    assert "in _meet_fate" in dump.read_text() and "in answer" in dump.read_text()


def test_actors_are_not_replaced_for_ever(make: Make, tmp_path: Path) -> None:
    cluster = make(workers=1, attempts=2)
    (tmp_path / "answer.die").write_text("always")
    with pytest.raises(RuntimeError, match="teacher-t: 'answer' failed on 2 actors"):
        _score(cluster, 1)


def test_nobody_waits_for_a_cluster_without_nodes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the raylet is killed: an actor then neither answers nor dies."""
    import ray

    monkeypatch.setattr("tutelage.scheduler.cluster.LOOK", 0.5)
    cluster = make(workers=1)
    nodes = ray.nodes()
    (tmp_path / "answer.hang").touch()
    monkeypatch.setattr(ray, "nodes", lambda: [node | {"Alive": False} for node in nodes])
    with pytest.raises(RuntimeError, match="Ray has no node left"):
        _score(cluster, 1)
    monkeypatch.undo()


def test_an_error_of_the_actors_own_code_rises_as_itself_and_is_not_tried_again(
    make: Make, tmp_path: Path
) -> None:
    cluster = make(workers=1)
    (tmp_path / "answer.raise").touch()
    with pytest.raises(ValueError, match="out of words"):
        _score(cluster, 1)
    assert cluster.restarts == 0


def test_a_placement_group_spreads_its_actors(make: Make) -> None:
    import ray

    cluster = make(
        worker_resources={"CPU": 1}, teacher_resources={"CPU": 1}, strategy="STRICT_SPREAD"
    )
    everyone = (*cluster._workers, *cluster._teachers.values())
    assert len({ray.get(one.actor.node.remote()) for one in everyone}) == 3
    assert [o.order for o in _collect(cluster, ORDERS)] == ORDERS


def test_weights_of_one_version_travel_once(make: Make) -> None:
    sent = 0

    def weights() -> dict[str, float]:
        nonlocal sent
        sent += 1
        return {"w": float(sent)}

    cluster = make(workers=1)
    cluster._weights = weights
    for version in (1, 1, 2, 2):
        cluster.sync(version)
    (outcome,) = _collect(cluster, ORDERS[:1])
    assert isinstance(outcome, Dropped) and outcome.detail == "({'w': 2.0}, 2)"


def test_a_steps_episodes_are_read_where_ray_keeps_them(make_row: Callable[..., Row]) -> None:
    """By the learner and by the teacher: what a crossing copies is the worker's rows into columns,
    and the columns into Ray's memory. A copy would be writeable, and rows apart from each other."""

    class Worker:
        def play(self, orders: Any, **_: Any) -> list[Episode]:
            return [episodes[order.number] for order in orders]

        def close(self) -> None:
            return

    class Teacher:
        def answer(self, ask: Any) -> list[tuple[bool, int]]:
            return where(ask.rows)

    def where(rows: Sequence[Row]) -> list[tuple[bool, int]]:
        """Whether each row's ids may be written to, and how far they lie from the first row's."""
        first = rows[0].ids_T.ctypes.data
        return [(row.ids_T.flags.writeable, row.ids_T.ctypes.data - first) for row in rows]

    orders = [Order(task="t", number=i, seed=i, index=i) for i in range(256)]
    rows = [make_row([("prompt", range(9 + i)), ("said", [1, 2])]) for i in range(256)]
    episodes = [
        Episode(
            order=order,
            rows=(row,),
            turns=(),
            success=True,
            reward=1.0,
            task_type="",
            ended="terminated",
            sampling=SamplingParams(),
            version=0,
        )
        for order, row in zip(orders, rows, strict=True)
    ]
    cluster: RayCluster = RayCluster(
        cluster_of(workers=1),
        make_worker=lambda: Worker(),
        make_teachers={"t": lambda: Teacher()},
        weights=lambda: {},
    )
    cluster.sync(0)
    played = _collect(cluster, orders)
    sent = [row for episode in played for row in episode.rows]
    assert [row.ids_T.tolist() for row in sent] == [row.ids_T.tolist() for row in rows]
    ends = [0, *accumulate(row.ids_T.nbytes for row in rows[:-1])]
    assert where(sent) == [(False, end) for end in ends]
    (told,) = cluster.score([Ask(teacher="t", rows=sent, needs=Needs(k=1))])
    assert told == [(False, end) for end in ends]
    cluster.close()


def test_a_resource_that_no_node_has_is_named(make: Make) -> None:
    with pytest.raises(ValueError, match=r"no node has {'GPU': 1}: the nodes have .*'far': 1"):
        make(teacher_resources={"GPU": 1})


def test_actors_go_where_their_resources_are_also_after_the_loss_of_a_node(
    make: Make, _nodes: dict[str, Any]
) -> None:
    """Last in this file: a node is lost for good."""
    import ray

    def place(cluster: RayCluster) -> str:
        """The node of the one worker."""
        node: str = ray.get(cluster._workers[0].actor.node.remote())
        return node

    cluster = make(workers=1, worker_resources={"far": 1}, teacher_resources={"CPU": 1})
    cluster.sync(7)
    by_id = {
        node["NodeID"]: name
        for node in ray.nodes()
        for name in ("one", "two")
        if name in node["Resources"]
    }
    first = by_id[place(cluster)]
    _nodes["cluster"].remove_node(_nodes[first], allow_graceful=False)
    deadline = time.monotonic() + 30
    while not cluster.restarts and time.monotonic() < deadline:  # a node's actors die after it
        outcomes = _collect(cluster, ORDERS)
    assert [outcome.order for outcome in outcomes] == ORDERS
    assert {o.detail for o in outcomes if isinstance(o, Dropped)} == {"({'w': 1.5}, 7)"}
    assert {first, by_id[place(cluster)]} == {"one", "two"}
    assert cluster.restarts == 1
