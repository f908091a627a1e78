"""What a program checks about the folder it writes to, and what it leaves there."""

import errno
import os
from pathlib import Path

from fastvideo.cli import FlagError
from fastvideo.io.files import check_writable, write_json

import pytest

# --- places that can't be written to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("place", ["new/folder/x", "there/x"])
def test_a_place_that_can_be_written_to_is_left_as_it_was(tmp_path, file, place):
    (tmp_path / "there").mkdir()
    check_writable("output_dir", tmp_path / place, file)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize(
    "place,file,problem",
    [
        ("/proc/x", False, "can't be written: "),  # read-only
        ("/proc/x/y.json", True, "can't be written: "),
        ("file", False, "file is not a folder"),
        ("file/x", False, "file is not a folder"),
        ("link/x", False, "link is not a folder"),  # to nowhere
        ("n" * 300, False, "File name too long"),
        (".", True, "is not a file"),
        ("/dev/null", True, "is not a file"),
    ],
)
def test_a_place_that_cant_be_written_to_is_named(tmp_path, place, file, problem):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FlagError, match=problem):
        check_writable("output_dir", tmp_path / place, file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_place_that_is_too_small_is_named_with_what_is_needed(tmp_path):
    with pytest.raises(FlagError, match=r"needs 1048576.0 GiB .* but has [\d.]+ GiB free"):
        check_writable("output_dir", tmp_path, needed=1 << 50)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FlagError, match="can't be written: No space left on device"):
        check_writable("output_dir", tmp_path)


def test_a_file_system_that_refuses_fsync_still_gets_files(tmp_path, monkeypatch):
    def refuse(number):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    check_writable("output_dir", tmp_path)
    write_json(tmp_path / "x.json", 1)
    assert Path(tmp_path / "x.json").read_text() == "1\n"
