"""The table of environment variables."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from dwconv import DepthwiseError, env


def test_every_variable_has_a_default_and_a_sentence():
    for row in env.describe():
        assert row.name.startswith("DWCONV_")
        assert isinstance(row.default, str)
        assert row.sentence.endswith("."), row


def test_sources_read_variables_through_the_table_only():
    for path in Path(env.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert path.name == "env.py" or not re.search(r"""(environ(\.get)?|getenv)[(\[]["']DWCONV_""", text), path
        for name in re.findall(r"""env\.read(?:_integer)?\(["'](\w+)["']""", text):
            assert name in env.VARIABLES, f"{path} reads {name}: add it to the table in env.py"


def test_default_where_unset_or_empty(set_variable):
    set_variable("DWCONV_CXX", None)
    assert env.read("DWCONV_CXX") == "g++"
    set_variable("DWCONV_CXX", "")
    assert env.read("DWCONV_CXX") == "g++"
    set_variable("DWCONV_CXX", "clang++")
    assert env.read("DWCONV_CXX") == "clang++"


def test_read_once(set_variable, monkeypatch):
    set_variable("DWCONV_CXX", "first")
    assert env.read("DWCONV_CXX") == "first"
    monkeypatch.setenv("DWCONV_CXX", "second")
    assert env.read("DWCONV_CXX") == "first"


@pytest.mark.parametrize(
    ("xdg", "expected"), [("/somewhere", "/somewhere/dwconv"), ("", "~/.cache/dwconv"), ("relative", "~/.cache/dwconv")]
)
def test_cache_folder_follows_xdg(set_variable, monkeypatch, xdg, expected):
    set_variable("DWCONV_CACHE_DIR", None)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert env.read("DWCONV_CACHE_DIR") == os.path.expanduser(expected)


@pytest.mark.parametrize("value", ["many", "-1", "1.5", "٣"])
def test_a_number_that_is_none_is_refused(set_variable, value):
    set_variable("DWCONV_CACHE_LIMIT", value)
    with pytest.raises(DepthwiseError, match=r"DWCONV_CACHE_LIMIT=.* is not a whole number"):
        env.read_integer("DWCONV_CACHE_LIMIT")


def test_describe_shows_what_is_set(set_variable):
    set_variable("DWCONV_CXX", "clang++")
    rows = {row.name: row for row in env.describe()}
    assert rows["DWCONV_CXX"].value == "clang++"
    assert rows["DWCONV_CXX"].default == "g++"
