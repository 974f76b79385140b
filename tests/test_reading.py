"""Reading: scalars as YAML 1.2 has them, quoted is text, nothing is guessed, keys once each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tutelage.distill.config import reading
from tutelage.distill.config.reading import (
    Scalar,
    dump,
    parse,
    parse_value,
    plain,
    read_file,
    scalar,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e2", 300.0),
        ("-2e0", -2.0),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("+.5", 0.5),
        ("5.", 5.0),
        ("0", 0),
        ("-7", -7),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        (".inf", float("inf")),
        ("-.Inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("Null", None),
    ],
)
def test_a_scalar_has_the_value_of_version_1_2(text: str, value: Any) -> None:
    found = parse(f"key: {text}")["key"]
    assert isinstance(found, Scalar) and found.text == text
    assert (found.value, type(found.value)) == (value, type(value))


@pytest.mark.parametrize("text", ["2024-01-01", "2001-12-14t21:59:43.10-05:00", "e5", "1.2.3", "="])
def test_what_is_no_number_is_text(text: str) -> None:
    """Dates too: a folder may be called so."""
    assert parse(f"key: {text}") == {"key": text}


@pytest.mark.parametrize("text", ["'3e2'", '"3e2"', "'yes'", "'010'", "'null'", "'true'", "'1:30'"])
def test_quoted_is_always_text(text: str) -> None:
    assert parse(f"key: {text}") == {"key": text[1:-1]}
    assert parse_value(text) == text[1:-1]


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("010", "write 10"),
        ("-007", "write -7"),
        ("00", "write 0"),
        ("1:30", "write the number"),
        ("12:30:45.5", "write the number"),
        ("1_000", "plain digits"),
        ("1_0.5", "plain digits"),
        ("0b101", "plain digits"),
        ("yes", "true or false"),
        ("No", "true or false"),
        ("on", "true or false"),
        ("OFF", "true or false"),
        ("1" * 5000, "5000 characters"),
    ],
)
def test_what_the_versions_read_differently_has_no_value(text: str, instead: str) -> None:
    found = scalar(text)
    assert isinstance(found, Scalar) and instead in found.doubt and found.text == text
    with pytest.raises(ValueError, match=r"in quotes|characters"):
        plain({"key": [found]})


class TestKeys:
    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice, first in line 1"),
            ("a:\n  b:\n    c: 1\n    c: 2", "line 4: the key 'c' .* first in line 3"),
            ("a: {b: 1, b: 1}", "line 1: the key 'b'"),
            ("- a: 1\n  a: 1", "line 2: the key 'a'"),
            ("'a': 1\na: 2", "line 2: the key 'a'"),
            ("x: &x {p: 1}\ny: {<<: *x, <<: *x}", "line 2: the key '<<'"),
        ],
    )
    def test_one_given_twice_is_refused_at_any_depth(self, text: str, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            parse(text)

    @pytest.mark.parametrize("key", ["1", "true", "null", "~", "1.5", "[a]", "{a: 1}", ""])
    def test_one_that_is_not_text_is_refused(self, key: str) -> None:
        with pytest.raises(ValueError, match=r"line 2: the key .* is not text"):
            parse(f"a: 1\n? {key}\n: 2")

    def test_words_that_are_switches_elsewhere_are_keys(self) -> None:
        assert [*parse("on: a\n007: b\n'1': c")] == ["on", "007", "1"]


class TestAliases:
    def test_they_stand_for_their_value(self) -> None:
        found = parse("a: &a {p: 1, q: [2]}\nb: *a\nc: {<<: *a, p: 3}\nd: {<<: [{p: 4}, *a]}")
        assert plain(found)["b"] == {"p": 1, "q": [2]}
        assert plain(found)["c"] == {"p": 3, "q": [2]}
        assert plain(found)["d"] == {"p": 4, "q": [2]}  # the first of several

    def test_each_is_a_value_of_its_own(self) -> None:
        """Else an override of one key would change another."""
        found = parse("a: &a {p: x}\nb: *a")
        found["a"]["p"] = "y"
        assert found["b"] == {"p": "x"}

    @pytest.mark.parametrize("text", ["&a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}"])
    def test_one_inside_itself_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="inside its own value"):
            parse(text)

    def test_a_billion_of_them_are_not_written_out(self) -> None:
        text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        for at in range(1, 10):
            text += f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]\n"
        with pytest.raises(ValueError, match="more than 100,000 values"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: [1\nb: 2", "is not YAML: line 2, column 2"),
        ("a:\n\tb: 1", "line 2, column 1.*indented by spaces"),
        ("a: 1\n--- \nb: 2", "line 2, column 1: expected a single document"),
        ("a: *b", "line 1, column 4: found undefined alias"),
        ("a: \x07", "special characters"),
        ("a: !!python/object/apply:os.getcwd []", "line 1: the tag .*os.getcwd' is not taken"),
        ("a: !!int '3'", "the tag .*int' is not taken"),
        ("a: !own 3", "the tag '!own' is not taken"),
        ("[" * 10_000, "nested too deeply"),
        ("a: " + "{b: " * 3_000 + "}" * 3_000, "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as refused:
        parse(text)
    assert "\n" not in str(refused.value)


class TestCommandLine:
    @pytest.mark.parametrize(
        "text",
        [
            "{problem} Think step by step.",
            "{problem}\n\nReason, and put it in \\boxed{}.",
            "Solve: {problem}",
            "Solve this: {problem} now: quickly",
            "a # b",
            "*bold*",
            "@home",
            "- item",
            "[x](y) and more",
            "'quoted' and more",
            "a: {b",
            "100%",
            "!important",
            "&",
            "a=b=c",
            "> x",
        ],
    )
    def test_text_needs_no_quotes_where_it_can_be_nothing_else(self, text: str) -> None:
        assert parse_value(text) == text

    def test_what_begins_like_yaml_is_yaml(self) -> None:
        assert plain(parse_value("{a: [1, x], b: '2'}")) == {"a": [1, "x"], "b": "2"}
        assert plain(parse_value("[1e-4, true]")) == [1e-4, True]
        assert plain(parse_value(" 3 ")) == 3
        assert plain(parse_value("")) is None
        assert plain(parse_value("{problem}")) == {"problem": None}  # a mapping: refused as text

    @pytest.mark.parametrize(
        "text", ["[1", "{a: 1", "'a", '"a', "{a: 1]", "[1, {a]", "{a: 1, a: 2}"]
    )
    def test_what_is_left_open_is_refused_and_quotes_are_shown(self, text: str) -> None:
        with pytest.raises(ValueError) as refused:
            reading.parse_pair(f"a.b={text}", "key=value")
        message = str(refused.value)
        assert repr(f"a.b={text}") in message and "\"a.b='...'\"" in message


class TestDump:
    VALUES = (
        *("1e5", "010", "yes", "null", "", "~", ".inf", "1:30", "0o7", "<<", "=", "1_000", "0b1"),
        *(
            "2024-01-01",
            "\x85\u2028",
            "a\nb",
            "# x",
            " x",
            "k: v",
            "{x} y",
            "é",
            "-",
            "*a",
            "'",
            '"',
        ),
    )

    @pytest.mark.parametrize("text", VALUES)
    def test_text_reads_back_as_text_in_both_versions(self, text: str) -> None:
        data = {"a": text, text: [text], "b": {"c": text}}
        assert parse(dump(data)) == data
        assert yaml.safe_load(dump(data)) == data

    def test_numbers_read_back_as_they_were(self) -> None:
        data = {"a": [1e-5, 1e22, 0.1, -2.0, 3, 2**40, True, None, []], "b": {}}
        assert plain(parse(dump(data))) == data

    def test_one_value_twice_is_written_twice(self) -> None:
        shared = {"x": "y"}
        assert "&" not in dump({"a": shared, "b": shared})


class TestFiles:
    def test_line_ends_and_the_mark_of_utf_8_do_not_matter(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_bytes(b"\xef\xbb\xbfa: x\r\nb: y\r\n")
        assert read_file(path) == {"a": "x", "b": "y"}

    def test_a_huge_one_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text("# " + "x" * reading.MOST_BYTES)
        with pytest.raises(ValueError, match="is too large"):
            read_file(path)

    @pytest.mark.parametrize("content", [b"\x80\xff", "a: 1".encode("utf-16")])
    def test_one_that_is_not_text(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.yaml"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not text"):
            read_file(path)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be read: Is a directory"):
            read_file(tmp_path)
