"""The log file of a worker group: its name, its lines, its size, and folders that cannot be written to."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.host import group_log
from parallel.host.group_log import GroupLog


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    group_log.keep_in(tmp_path / "logs")
    yield tmp_path / "logs"
    group_log.keep_in(None)


def open_files() -> set[str]:
    return {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


def test_each_line_has_the_time_and_its_rank(folder: Path):
    file = GroupLog(["cuda:0", "cuda:1"])
    file.write("starting 100 % of the workers")
    file.write("one\ntwo", rank=1)
    file.close()
    assert file.path == folder / "workers-cuda0-cuda1.log"
    lines = file.path.read_text().splitlines()
    assert [line.partition(" [")[2] for line in lines] == [
        "host] starting 100 % of the workers",
        "rank 1] one",
        "rank 1] two",
    ]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[", line) for line in lines)


def test_the_next_group_on_the_same_devices_continues_the_file(folder: Path):
    for text in ("first", "second"):
        file = GroupLog(["cpu", "cpu"])
        file.write(text)
        file.close()
    (path,) = folder.iterdir()
    assert path.name == "workers-cpu-cpu.log"
    assert [line.rpartition("] ")[2] for line in path.read_text().splitlines()] == ["first", "second"]


def test_two_files_of_limited_size_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group_log, "MAX_BYTES", 1000)
    file = GroupLog(["cpu"])
    for i in range(100):
        file.write(f"line {i}", rank=0)
    file.close()
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found.keys() == {"workers-cpu.log", "workers-cpu.log.1"}
    assert all(0 < len(text) <= 1000 for text in found.values())
    assert found["workers-cpu.log"].endswith("line 99\n")


def test_what_is_written_after_the_end_opens_nothing(folder: Path):
    file = GroupLog(["cpu"])
    file.write("before")
    assert str(file.path) in open_files()
    file.close()
    file.write("after", rank=0)
    assert str(file.path) not in open_files()
    assert file.path is not None and "after" not in file.path.read_text()


def test_without_a_folder_there_is_no_file():
    file = GroupLog(["cpu"])
    file.write("text")
    file.close()
    assert file.path is None


def test_many_devices_make_a_name_that_a_file_may_have(folder: Path):
    file = GroupLog(["cuda:0"] * 64)
    file.write("text")
    file.close()
    assert file.path is not None and file.path.exists()


def test_a_folder_that_cannot_be_written_to_is_reported_once(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(group_log, "_refused", set())
    folder.write_text("a file in its place")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            file = GroupLog(["cpu"])
            file.write("one", rank=0)
            file.write("two", rank=0)
            file.close()
            assert file.path is None, "errors would name a file that is not there"
    (record,) = caplog.records
    assert str(folder) in record.getMessage()


def test_a_disk_that_becomes_full_ends_the_file(folder: Path, caplog: pytest.LogCaptureFixture):
    file = GroupLog(["cpu"])
    file.write("fits")
    assert file._file is not None
    file._file.stream.close()
    file._file.stream = open("/dev/full", "w")  # noqa: SIM115
    with caplog.at_level(logging.WARNING):
        file.write("does not")
        file.write("nor this")
    assert file.path is None
    assert "No space left" in caplog.text and len(caplog.records) == 1
    assert "/dev/full" not in open_files()
