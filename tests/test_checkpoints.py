"""Checkpoints and the journal: whole or not at all, whatever fails in the middle."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.models.student import Student
from tutelage.distill.run import checkpoints
from tutelage.distill.run.journal import Journal
from tutelage.evaluation import files, run_folder

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def model(make_model: Make) -> Any:
    return make_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def _save(folder: Path, step: int, model: Any, tokenizer: Any, *, keep: int = 9) -> Path:
    student, state = _student(model), {"step": step}
    return checkpoints.save(
        folder, step=step, student=student, tokenizer=tokenizer, state=state, keep=keep
    )


def _student(model: Any) -> Student:
    return Student(model, vocabulary=model.config.vocab_size)


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestSaving:
    def test_what_is_saved_comes_back(
        self, folder: Path, model: Any, tokenizer: Any, make_model: Make
    ) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        state = {"step": 4, "optimizer": optimizer.state_dict(), "position": 123}
        path = checkpoints.save(
            folder, step=4, student=_student(model), tokenizer=tokenizer, state=state, keep=1
        )
        assert path == folder / "000004" == run_folder.newest(folder)
        assert checkpoints.load_state(path) == state
        other = make_model(seed=8)
        _student(other).load(path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name

    def test_it_is_a_hugging_face_folder(self, folder: Path, model: Any, tokenizer: Any) -> None:
        from transformers import AutoModelForCausalLM

        from tutelage.distill.models.loading import load_tokenizer

        path = _save(folder, 1, model, tokenizer)
        assert (path / "model.safetensors").is_file() and (path / "config.json").is_file()
        loaded = AutoModelForCausalLM.from_pretrained(path)
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        again = load_tokenizer(str(path))
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.chat_template == tokenizer.chat_template
        text = "You are in a kitchen. 12 + 34 = 46<|end|>"
        assert again.encode(text) == tokenizer.encode(text)

    def test_weights_are_one_file_however_large(
        self, folder: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """transformers shards above a limit (5 GB in version 4): a 7B student's resume would not
        find model.safetensors. The limit is asked for, whatever the default."""
        asked = {}
        save_pretrained = type(model).save_pretrained

        def spy(self: Any, *args: Any, **options: Any) -> Any:
            asked.update(options)
            return save_pretrained(self, *args, **options)

        monkeypatch.setattr(type(model), "save_pretrained", spy)
        _save(folder, 1, model, tokenizer)
        assert asked["max_shard_size"] == "10000GB"

    def test_only_the_newest_are_kept(self, folder: Path, model: Any, tokenizer: Any) -> None:
        for step in (1, 20, 3, 40):
            _save(folder, step, model, tokenizer, keep=2)
        assert sorted(path.name for path in folder.iterdir()) == ["000020", "000040"]

    def test_newest_counts_in_numbers(self, folder: Path) -> None:
        """As text, 1000000 comes before 999999."""
        for step in (999_999, 1_000_000, 5):
            (folder / f"{step:06d}").mkdir(parents=True)
            (folder / f"{step:06d}" / run_folder.STATE).touch()
        assert run_folder.newest(folder) == folder / "1000000"

    def test_newest_of_nothing(self, folder: Path) -> None:
        assert run_folder.newest(folder) is None
        folder.mkdir()
        assert run_folder.newest(folder) is None

    def test_what_is_half_written_or_foreign_is_not_a_checkpoint(
        self, folder: Path, model: Any, tokenizer: Any
    ) -> None:
        """A kill in the middle leaves a hidden folder; a copy in the middle one without state."""
        path = _save(folder, 10, model, tokenizer)
        shutil.copytree(path, folder / ".000020.partial")
        shutil.copytree(path, folder / "000030")
        (folder / "000030" / run_folder.STATE).unlink()
        shutil.copytree(path, folder / "best")
        assert run_folder.newest(folder) == path
        _save(folder, 25, model, tokenizer)  # and what a killed run left takes no room for ever
        assert not (folder / ".000020.partial").exists()

    def test_a_step_saved_again_is_replaced(
        self, folder: Path, model: Any, tokenizer: Any, make_model: Make
    ) -> None:
        _save(folder, 5, make_model(seed=4), tokenizer)
        path = _save(folder, 5, model, tokenizer)
        saved = load_file(path / "model.safetensors")
        assert torch.equal(saved["lm_head.weight"], model.lm_head.weight)


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _half_then_full(path: Any, *_: Any, **__: Any) -> None:
    """Some bytes reach the disk before it is full."""
    target = Path(path)
    if target.suffix == ".pt":
        target.write_bytes(b"half")
    else:
        target.mkdir(parents=True, exist_ok=True)
        (target / "model.safetensors").write_bytes(b"half")
    _full()


class TestAFullDisk:
    @pytest.mark.parametrize(
        "where", ["weights", "weights, safetensors", "tokenizer", "state", "fsync"]
    )
    def test_earlier_checkpoints_stay_whole_and_nothing_partial_is_left(
        self,
        where: str,
        folder: Path,
        model: Any,
        tokenizer: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        _save(folder, 1, model, tokenizer)
        before = _contents(folder)
        with monkeypatch.context() as patch:
            if where == "weights":
                patch.setattr(model, "save_pretrained", _half_then_full)
            elif where == "weights, safetensors":
                # How safetensors reports it: an error of its own class, not an OSError.
                class SafetensorError(Exception):
                    pass

                def fail(path: Any, **_: Any) -> None:
                    Path(path).mkdir(parents=True)
                    raise SafetensorError("I/O error: No space left on device (os error 28)")

                patch.setattr(model, "save_pretrained", fail)
            elif where == "tokenizer":
                patch.setattr(type(tokenizer), "save_pretrained", _full)
            elif where == "state":
                patch.setattr(torch, "save", lambda _, path: _half_then_full(path))
            else:
                patch.setattr(checkpoints.os, "fsync", _full)
            with pytest.raises(OSError, match=r"000002 could not be saved.*No space left") as error:
                _save(folder, 2, model, tokenizer, keep=1)
        assert "free some space" in str(error.value) and "\n" not in str(error.value)
        assert _contents(folder) == before
        assert [path.name for path in folder.iterdir()] == ["000001"]
        path = _save(folder, 2, model, tokenizer, keep=1)  # space was freed
        assert [found.name for found in folder.iterdir()] == ["000002"]
        assert checkpoints.load_state(path) == {"step": 2}

    def test_torchs_own_message_is_understood(
        self, folder: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """torch.save on a full disk raises a RuntimeError of its zip writer."""

        def fail(*_: Any) -> None:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="could not be saved"):
            _save(folder, 2, model, tokenizer)

    def test_another_error_is_itself_and_leaves_nothing_either(
        self, folder: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _save(folder, 2, model, tokenizer)
        assert [*folder.iterdir()] == []

    def test_replacing_a_step_loses_nothing_until_the_new_one_is_whole(
        self, folder: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _save(folder, 2, model, tokenizer)
        before = _contents(folder)
        monkeypatch.setattr(torch, "save", lambda _, path: _half_then_full(path))
        with pytest.raises(OSError, match="could not be saved"):
            _save(folder, 2, model, tokenizer)
        assert _contents(folder) == before


class TestLoading:
    @pytest.mark.parametrize(
        ("other", "named"),
        [
            ({"vocabulary": 90}, r"lm_head.*another model or vocabulary"),
            ({"layers": 1}, r"layers\.1"),
            ({"layers": 3}, r"layers\.2"),
        ],
    )
    def test_another_architecture_or_vocabulary_is_refused_and_nothing_loaded(
        self,
        folder: Path,
        model: Any,
        tokenizer: Any,
        make_model: Make,
        other: dict[str, int],
        named: str,
    ) -> None:
        path = _save(folder, 1, make_model(**other, seed=5), tokenizer)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ConfigError, match=named) as refused:
            _student(model).load(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())

    def test_tied_weights_are_stored_once_and_stay_tied(
        self, folder: Path, tokenizer: Any, make_model: Make
    ) -> None:
        from transformers import AutoModelForCausalLM

        settings = make_model().config
        settings.tie_word_embeddings = True
        one, other = (AutoModelForCausalLM.from_config(settings) for _ in range(2))
        path = _save(folder, 1, one, tokenizer)
        assert "lm_head.weight" not in load_file(path / "model.safetensors")
        _student(other).load(path)
        assert torch.equal(other.lm_head.weight, one.lm_head.weight)
        assert other.lm_head.weight is other.model.embed_tokens.weight


SAVED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    run_folder.STATE,
    run_folder.SUMS,
)


def _flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit at its begin": lambda path: _flip(path, 0.0),
    "a bit in the middle": lambda path: _flip(path, 0.5),
    "a bit at its end": lambda path: _flip(path, 1.0),
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


class TestDamage:
    @pytest.fixture
    def two(self, folder: Path, model: Any, tokenizer: Any) -> Path:
        """Two checkpoints; the weights of the second differ."""
        _save(folder, 1, model, tokenizer)
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        _save(folder, 2, model, tokenizer)
        with torch.no_grad():
            model.lm_head.weight.sub_(1)
        return folder

    def test_every_file_is_listed(self, two: Path) -> None:
        """In the format of the tool that everybody has."""
        newest = two / "000002"
        names = {path.name for path in newest.iterdir()}
        assert names == {*SAVED}
        done = subprocess.run(
            ["sha256sum", "--strict", "-c", run_folder.SUMS],
            cwd=newest,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout.count(": OK") == len(names) - 1

    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("name", SAVED)
    @pytest.mark.slow
    def test_it_is_set_aside_and_the_one_before_it_taken(
        self, two: Path, make_model: Make, name: str, damage: str
    ) -> None:
        before = checkpoints.load_state(two / "000001")
        DAMAGES[damage](two / "000002" / name)
        if (name, damage) == (run_folder.SUMS, "gone"):  # nothing else is wrong
            with pytest.warns(UserWarning, match=r"000002 has no SHA256SUMS.*taken as it is"):
                found = checkpoints.load_newest(two, _student(make_model(seed=3)))
            assert found is not None and found[0].name == "000002"
            return
        if name == run_folder.STATE and damage in ("gone", "a folder"):  # half-copied: no number
            found = checkpoints.load_newest(two, _student(make_model(seed=3)))
        else:
            with pytest.warns(UserWarning, match=rf"000002 is damaged \(.*{name}.*set aside as"):
                found = checkpoints.load_newest(two, _student(make_model(seed=3)))
            assert (two / ".000002.damaged").is_dir()
        assert found is not None and found[0].name == "000001"
        assert found[1] == before

    def test_what_somebody_puts_beside_is_no_harm(self, two: Path, make_model: Make) -> None:
        (two / "000002" / "NOTES.md").write_text("the good one")
        found = checkpoints.load_newest(two, _student(make_model(seed=3)))
        assert found is not None and found[0].name == "000002"

    def test_the_only_one_is_left_where_it_is(
        self, folder: Path, model: Any, tokenizer: Any
    ) -> None:
        path = _save(folder, 1, model, tokenizer)
        _flip(path / "model.safetensors", 0.9)
        before = _contents(folder)
        with pytest.raises(
            RuntimeError, match=r"000001 is damaged \(model\.safetensors is not"
        ) as no:
            checkpoints.load_newest(folder, _student(model))
        assert "put it back from a copy" in str(no.value) and "\n" not in str(no.value)
        assert _contents(folder) == before

    @pytest.mark.parametrize("size", [0, 1, 100, 1000, -1])
    def test_a_state_cut_off_is_found_without_hashes_too(
        self, two: Path, make_model: Make, size: int
    ) -> None:
        """Of an earlier version: whatever torch makes of it, it is one warning."""
        state = two / "000002" / run_folder.STATE
        os.truncate(state, size if size >= 0 else state.stat().st_size - 1)
        (two / "000002" / run_folder.SUMS).unlink()
        with pytest.warns(UserWarning) as warned:
            found = checkpoints.load_newest(two, _student(make_model(seed=3)))
        assert found is not None and found[0].name == "000001"
        said = [str(one.message) for one in warned]
        assert "000002 has no SHA256SUMS" in said[0] and "000002 is damaged (" in said[1]
        assert not any("\n" in one for one in said)

    @pytest.mark.parametrize("name", [x for x in SAVED if x != run_folder.STATE])
    def test_nobody_loads_it_as_a_model(self, two: Path, name: str) -> None:
        """As a student, as a teacher, in an evaluation. What a trainer needs is not read there."""
        from tutelage.distill.models.loading import load_model, load_settings, load_tokenizer

        load_model(str(two / "000002"), dtype="float32", device="cpu")
        _flip(two / "000002" / run_folder.STATE, 0.5)
        load_model(str(two / "000002"), dtype="float32", device="cpu")
        _flip(two / "000002" / name, 0.5)
        for load in (
            partial(load_model, dtype="float32", device="cpu"),
            *(
                (load_tokenizer, load_settings)
                if name not in (run_folder.WEIGHTS, run_folder.SUMS)
                else ()
            ),
        ):
            with pytest.raises(ConfigError, match=r"000002 is damaged \(.*take another") as no:
                load(str(two / "000002"))
            assert "\n" not in str(no.value)


class TestKilledInTheMiddle:
    """Between any two of the system calls that put a checkpoint in place."""

    @pytest.mark.parametrize("call", range(6))
    def test_what_bears_a_number_is_whole(
        self,
        call: int,
        folder: Path,
        model: Any,
        tokenizer: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """One is replaced, another falls out: of the two that there are at least one stays."""

        class Killed(BaseException):
            pass

        _save(folder, 1, model, tokenizer)
        _save(folder, 2, model, tokenizer)
        before = {name: _contents(folder / name) for name in ("000001", "000002")}
        calls = iter(range(99))

        def deadly(function: Any) -> Any:
            def called(*args: Any, **options: Any) -> Any:
                if next(calls) >= call:
                    raise Killed
                return function(*args, **options)

            return called

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.os, "replace", deadly(os.replace))
            patch.setattr(checkpoints.shutil, "rmtree", deadly(shutil.rmtree))
            try:
                _save(folder, 2, model, tokenizer, keep=1)
                ended = True
            except Killed:
                ended = False
        checkpoints.tidy(folder)
        left = sorted(path.name for path in folder.iterdir())
        assert left in (["000002"], ["000001", "000002"])
        assert ended <= (left == ["000002"])
        for name in left:
            run_folder.check(folder / name)
            assert _contents(folder / name).keys() == before[name].keys()


class TestJsonFiles:
    def test_a_file_is_replaced_whole_or_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "eval.json"
        files.write_json(path, {"value": 1})
        with pytest.raises(TypeError):
            files.write_json(path, {"value": object()})
        monkeypatch.setattr(files, "put", _full)
        with pytest.raises(OSError, match="No space left"):
            files.write_json(path, {"value": 2})
        monkeypatch.undo()
        assert json.loads(path.read_text()) == {"value": 1}
        assert [found.name for found in tmp_path.iterdir()] == ["eval.json"]


class TestJournal:
    def test_lines_beyond_the_checkpoint_are_cut_off(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path)
        journal.write(0, "t", {"loss/mean": 1.5})
        position = journal.position
        journal.write(1, "t", {"loss/mean": 1.25})
        journal.close()
        resumed = Journal(tmp_path, position=position)
        resumed.write(1, "t", {"loss/mean": 1.0})
        assert resumed.position == (tmp_path / "metrics.jsonl").stat().st_size
        resumed.close()
        lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], line["loss/mean"]) for line in lines] == [(0, 1.5), (1, 1.0)]

    def test_a_file_shorter_than_the_checkpoint_says_is_not_filled_with_zeros(
        self, tmp_path: Path
    ) -> None:
        """Someone deleted metrics.jsonl and kept the checkpoints."""
        with pytest.warns(UserWarning, match=r"0 bytes.*knows of 4096: lines .* are lost"):
            journal = Journal(tmp_path, position=4096)
        journal.write(7, "t", {"loss/mean": 1.0})
        journal.close()
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line) == {"step": 7, "task": "t", "loss/mean": 1.0}

    def test_what_json_cannot_hold_is_refused(self, tmp_path: Path) -> None:
        """A bare NaN would make the line unreadable to every other reader."""
        journal = Journal(tmp_path)
        with pytest.raises(ValueError, match="JSON"):
            journal.write(0, "t", {"loss/mean": float("nan")})
        journal.close()
        assert (tmp_path / "metrics.jsonl").read_text() == ""
