"""A key is seen by the server that it is for, and by nobody else: not in a line, a traceback, a
file of the run, or a log of Ray's."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hostile_server import Caller, HostileServer
from tests.stand_in_server import StandIn
from tutelage.distill.cli.main import main
from tutelage.distill.config.credentials import HIDDEN, api_key, hidden
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.distill.config.teachers import TeacherConfig
from tutelage.distill.doctor import examination
from tutelage.distill.models.loading import load_model
from tutelage.distill.teachers.server import ServerTeacher

pytestmark = pytest.mark.runs

KEY = "sk-7secretQ9of/the+run=w3"


def _config(url: str = "http://h:1", **teacher: Any) -> dict[str, Any]:
    return {
        "run": "runs/none",
        "steps": 1,
        "student": {"model": "builtin:start", "threads": 1, "device": "cpu"},
        "teachers": {"one": {"engine": "server", "url": url, "model": "m"} | teacher},
        "tasks": {
            "math": {
                "env": "tutelage/Math-v0",
                "env_args": {"problems": "arithmetic"},
                "teacher": "one",
                "episodes": 2,
                "rollout": {"max_turns": 1, "max_new_tokens": 4},
            }
        },
        "objective": {"k": 4},
    }


class TestKeys:
    @pytest.mark.parametrize("around", ["{}", "{}\n", " {}\r\n", "\t{} ", "\ufeff{}"])
    def test_what_an_editor_or_a_shell_leaves_around_it_is_taken_off(
        self, monkeypatch: pytest.MonkeyPatch, around: str
    ) -> None:
        monkeypatch.setenv("A_KEY", around.format(KEY))
        if around[0] == "\ufeff":
            with pytest.raises(ValueError, match="A_KEY holds spaces, control"):
                api_key("teachers.one", "A_KEY")
        else:
            assert api_key("teachers.one", "A_KEY") == KEY

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            ("", "A_KEY is empty"),
            (" \n", "A_KEY is empty"),
            (f"{KEY}\r\nHost: evil", "A_KEY holds spaces"),
            (f"{KEY}\x1b", "A_KEY holds spaces"),
            (f"{KEY} {KEY}", "A_KEY holds spaces"),
            (f"{KEY}\u00e9", "A_KEY holds spaces"),
            (f"{KEY}\udcff", "A_KEY holds spaces"),
        ],
    )
    def test_one_that_no_header_carries_is_refused_by_its_variables_name(
        self, monkeypatch: pytest.MonkeyPatch, value: str, says: str
    ) -> None:
        monkeypatch.setenv("A_KEY", value)
        config = TeacherConfig(engine="server", url="http://h:1", model="m", api_key_env="A_KEY")
        with pytest.raises(ConfigError, match=rf"teachers\.one\.api_key_env: {says}") as raised:
            ServerTeacher("one", config, vocabulary=9)
        assert "secret" not in str(raised.value)

    def test_no_object_shows_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("A_KEY", KEY)
        config = TeacherConfig(engine="server", url="http://h:1", model="m", api_key_env="A_KEY")
        teacher = ServerTeacher("one", config, vocabulary=9)
        assert KEY not in f"{config!r} {teacher!r} {teacher._client!r} {config.model_dump()}"

    @pytest.mark.parametrize("name", [KEY, "hf_" + "a" * 34, "A KEY", "", "1A", "$A_KEY", "ключ"])
    def test_a_key_in_the_place_of_its_variables_name_is_not_repeated(self, name: str) -> None:
        with pytest.raises(ConfigError, match="api_key_env is not the name of an env") as raised:
            parse_config(_config(api_key_env=name), "test")
        assert not name or name not in str(raised.value)

    def test_a_variable_that_may_be_a_key_is_not_repeated_where_it_is_not_set(self) -> None:
        with pytest.raises(ValueError, match="the environment has no variable") as raised:
            api_key("teachers.one", "q7x2some9key")
        assert "q7x2" not in str(raised.value)
        with pytest.raises(ValueError, match="the environment has no A_KEY_OF_NONE"):
            api_key("teachers.one", "A_KEY_OF_NONE")


URLS = {
    "http://me:secret@h:8000": "holds a user or password.*api_key_env",
    "http://me@h:8000": "holds a user or password.*api_key_env",
    "http://:secret@h": "holds a user or password.*api_key_env",
    "http://h:8000?api_key=secret": "holds a query.*api_key_env",
    "http://h:8000/v1?x": "holds a query",
    "http://h:8000#secret": "holds a query",
    "http://h:99999": "is no address",
    "http://h:eight": "is no address",
    "http://h:0": "engine: server needs url",
    "http://h:-1": "is no address",
    "http://[::1": "is no address",
    "http://" + "h" * 64 + ".org": "is no address",
    "http://": "engine: server needs url",
    "h:8000": "engine: server needs url",
    "localhost": "engine: server needs url",
    "": "engine: server needs url",
    "ftp://h": "engine: server needs url",
    "file:///etc/passwd": "engine: server needs url",
    "http://h /v1": "holds spaces",
    "http://h/v1\r\nX-Evil: 1": "holds spaces",
    "http://h/\u00e9": "holds spaces",
}


@pytest.mark.parametrize("url", URLS)
def test_an_address_that_holds_a_secret_or_leads_nowhere_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(_config(url), "test.yaml")
    text = str(raised.value)
    assert text.startswith("test.yaml: teachers.one") and re.search(URLS[url], text), text
    assert "secret" not in text


@pytest.mark.parametrize(
    "url",
    ["http://h", "https://h:8000/v1/", "http://[::1]:8000", "http://10.0.0.7/a/b", "HTTP://H"],
)
def test_an_address_is_taken(url: str) -> None:
    assert parse_config(_config(url), "test").teachers["one"].url == url


def test_a_key_in_the_config_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="api_key_env") as raised:
        parse_config(_config(api_key=KEY), "test")
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://u:p@h/x: no", f"at https://{HIDDEN}@h/x: no"),
        ("token hf_" + "aB3" * 11 + " is bad", f"token {HIDDEN} is bad"),
        ("Bearer abc.def", f"Bearer {HIDDEN}"),
        (f"(bad key Bearer {HIDDEN}): set it", f"(bad key Bearer {HIDDEN}): set it"),  # twice
        ("http://h/?a=1&api_key=abc&b=2", f"http://h/?a=1&api_key={HIDDEN}&b=2"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("half \ud800", "half \\ud800"),
        ("token 3 has a log-probability of nan", "token 3 has a log-probability of nan"),
        ("tasks.math@home: 1 + 1", "tasks.math@home: 1 + 1"),
    ],
)
def test_what_is_shown_holds_no_credential_and_no_command_to_the_terminal(
    text: str, shown: str
) -> None:
    assert hidden(text) == shown


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> Iterator[Callable[[Any], Any]]:
    model = load_model("builtin:arithmetic", dtype="float32", device="cpu")
    stand_in = StandIn(model)
    yield stand_in._scored
    stand_in.close()


@pytest.fixture
def server(sound: Callable[[Any], Any]) -> Iterator[HostileServer]:
    """It repeats the key wherever it can: in good answers, and in an error that comes late."""
    count = iter(range(10**6))

    def act(caller: Caller) -> None:
        if caller.path == "/v1/models":
            return caller.reply({"data": [{"id": "m"}, {"id": caller.key}], "key": caller.key})
        if caller.path == "/detokenize":
            return caller.reply({"error": caller.key}, status="404 Not Found")
        if next(count) >= 16:
            error = {"error": {"message": f"incorrect API key {caller.key}"}}
            return caller.reply(error, status="401 Unauthorized", WWW_Authenticate=caller.key)
        caller.reply({**caller.sound, "key": caller.key}, X_Key=caller.key)

    made = HostileServer(act, sound)
    yield made
    made.close()


@pytest.fixture
def path(tmp_path: Path, server: HostileServer) -> Path:
    """A config that is taught by that server."""
    config = _config(server.url, api_key_env="A_KEY", attempts=2, timeout=20.0)
    config |= {"run": str(tmp_path / "run"), "steps": 50, "checkpoint": {"every": 1}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "ray"])
def test_nothing_that_training_leaves_behind_holds_the_key(path: Path, where: str) -> None:
    """The server refuses it, and repeats it, after some answers; every traceback is asked for."""
    with tempfile.TemporaryDirectory(dir="/tmp") as ray:
        # The folder of Ray's logs stays, to be looked into.
        keep = "from tutelage.scheduler import ray_start as r; r.shutil = __import__('types')"
        keep += ".SimpleNamespace(rmtree=lambda *_, **__: None); "
        code = f"{keep}from tutelage.distill.cli.main import main; main()"
        pairs = ["cluster={address: local}"] if where == "ray" else []
        done = subprocess.run(
            [sys.executable, "-c", code, "train", str(path), *pairs],
            env=os.environ | {"A_KEY": f"{KEY}\n", "TUTELAGE_TRACEBACK": "1", "RAY_TMPDIR": ray},
            capture_output=True,
            text=True,
            timeout=240,
        )
        texts = _texts(Path(ray)) | _texts(path.parent / "run")
    assert (where == "ray") == any(name.startswith(ray) for name in texts)
    assert KEY not in done.stdout + done.stderr
    assert [name for name, data in texts.items() if KEY.encode() in data] == []
    assert done.returncode == 1 and "refuses the key" in done.stderr, done.stderr
    assert HIDDEN in done.stderr
    mode = stat.S_IMODE((path.parent / "run" / "config.yaml").stat().st_mode)
    assert mode == 0o600
    assert list((path.parent / "run" / "checkpoints").iterdir())  # nothing was lost


@pytest.mark.parametrize("command", ["doctor", "plan"])
def test_nothing_that_a_look_leaves_behind_holds_the_key(
    path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A_KEY", f"{KEY}\n")
    monkeypatch.setenv("TUTELAGE_TRACEBACK", "1")
    monkeypatch.setattr(examination, "check_grader", lambda: [])  # it is told of no server
    with pytest.raises(SystemExit):
        main([command, str(path)])
    said = capfd.readouterr()
    assert KEY not in said.out + said.err and "teacher" in said.out
    assert [name for name, data in _texts(path.parent).items() if KEY.encode() in data] == []


def _texts(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
