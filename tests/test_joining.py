"""A Ray cluster that runs already: joined from a node of it and from outside, by a driver whose
package the nodes lack, and whose files they may lack."""

from __future__ import annotations

import os
import signal
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.settings import cluster
from tutelage.scheduler.cluster import RayCluster
from tutelage.scheduler.episodes import Dropped, Order

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ORDERS = [Order(task="t", number=i, seed=i, index=i) for i in range(3)]


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """Of one cluster, as the config may name it."""
    from ray.cluster_utils import Cluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "ray_client_server_port": port}
    )
    yield {"auto": cluster.address, "client": f"ray://127.0.0.1:{port}"}
    cluster.shutdown()


def _maker() -> Any:
    """What makes a worker that says where it found the package. (Defined inside a function, it
    travels to actors, which cannot import the tests.)"""
    import os

    class Witness:
        def play(self, orders: Any, *, sampling: Any, weights: Any, version: int) -> list[Any]:
            import tutelage.scheduler.cluster as module

            detail = f"{module.__file__} {os.getpid()} {(weights, version)}"
            return [Dropped(order=o, reason="died", detail=detail, attempts=1) for o in orders]

        def close(self) -> None:
            return

    return Witness


def _join(address: str, make: Any, wheel: str | None = None) -> RayCluster:
    each = {"CPU": 1.0}
    keys = {"worker_resources": each, "teacher_resources": each, "strategy": "PACK"}
    return RayCluster(
        cluster(address=address, wheel=wheel, **keys),
        make_worker=make,
        make_teachers={},
        weights=lambda: {"w": 1.5},
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Enough of one: the folders that an actor imports, under their installed names."""
    path = tmp_path_factory.mktemp("wheel") / "tutelage-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for folder in ("envs", "scheduler"):
            for file in (ROOT / folder).rglob("*"):
                if file.suffix in (".py", ".json"):
                    archive.write(file, Path("tutelage") / file.relative_to(ROOT))
        archive.writestr("tutelage-0.1.0.dist-info/METADATA", "Name: tutelage\n")
    return str(path)


@pytest.mark.parametrize("way", ["auto", "client"])
def test_a_running_cluster_is_joined_and_its_lost_actors_replaced(
    addresses: dict[str, str], way: str, wheel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` finds it as Ray does; from outside the package travels as a wheel, and is what actors
    import, although the nodes have another."""
    monkeypatch.setenv("RAY_ADDRESS", addresses["auto"])
    address = "auto" if way == "auto" else addresses[way]
    cluster = _join(address, _maker(), wheel if way == "client" else None)
    try:
        cluster.sync(7)
        told = []
        for _ in range(2):
            outcomes = cluster.start(ORDERS).outcomes()
            assert [outcome.order for outcome in outcomes] == ORDERS
            assert isinstance(outcomes[0], Dropped)
            told.append(outcomes[0].detail.split(maxsplit=2))
            if len(told) == 1:
                os.kill(int(told[0][1]), signal.SIGKILL)
        assert told[0][1] != told[1][1] and cluster.restarts == 1
        assert {loaded for _, _, loaded in told} == {"({'w': 1.5}, 7)"}
        here = str(ROOT / "scheduler" / "cluster.py")
        assert all((file == here) == (way == "auto") for file, _, _ in told), told
        assert all(("py_modules" in file) == (way == "client") for file, _, _ in told), told
    finally:
        cluster.close()


def test_an_address_that_fails_at_first_is_tried_again_and_then_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray ends its own client's server when that takes more than 30 s to start."""
    import ray

    tries: list[str] = []

    def fail(address: str, **_: Any) -> None:
        tries.append(address)
        raise ConnectionAbortedError("Starting Ray client server failed")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(
        RuntimeError, match=r"ray://there:1 did not answer in 3 tries \(Starting Ray client"
    ):
        _join("ray://there:1", _maker())
    assert tries == ["ray://there:1"] * 3


def test_what_a_node_lacks_is_named_with_the_node(addresses: dict[str, str]) -> None:
    """The error rises as a mistake of the user's, after one try."""
    from tutelage.distill.config.run import RunConfig
    from tutelage.distill.config.teachers import TeacherConfig

    teachers = {"t": TeacherConfig(model="/not/on/this/node")}
    config = RunConfig.model_construct(teachers=teachers)

    def make() -> Any:
        from tutelage.distill.teachers.build import make_teacher

        return make_teacher("t", config, 2048)

    with pytest.raises(
        ValueError,
        match=rf"worker-0 on node {socket.gethostname()}: model '/not/on/this/node'.*no such folder"
        ".*every node",
    ):
        _join(addresses["auto"], make)
    import ray

    ray.shutdown()
