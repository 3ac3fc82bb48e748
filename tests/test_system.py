"""Files and folders appear completely or not at all; locks end with their process."""

import math
import subprocess
import sys
import time

import pytest

from vpworkbench.errors import RunError
from vpworkbench.system import draft, lock, write_atomically


def test_a_file_is_replaced_completely_or_stays_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "one")
    with pytest.raises(ValueError), draft(path) as file:
        file.write_text("tw")
        raise ValueError
    assert path.read_text() == "one"
    write_atomically(path, "two", durable=False)
    assert path.read_text() == "two" and [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("")
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_appears_with_all_its_files(tmp_path):
    with draft(tmp_path / "set") as folder:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").write_text("x")
        assert not (tmp_path / "set").exists()
    assert (tmp_path / "set" / "deep" / "file").read_text() == "x"
    with pytest.raises(OSError), draft(tmp_path / "set") as folder:  # a folder with content is never replaced
        folder.mkdir()
    assert (tmp_path / "set" / "deep" / "file").read_text() == "x"
    assert [each.name for each in tmp_path.iterdir()] == ["set"]


KILLED = """
import os, signal, sys
from pathlib import Path
from vpworkbench.system import draft
with draft(Path(sys.argv[1])) as file:
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=60)
    assert path.read_text() == "old"
    (left,) = tmp_path.glob(".writing-a-*")
    assert (left / "a").read_text() == "half"


def test_a_lock_waits_as_long_as_it_is_told_and_serves_again(tmp_path):
    for patience_s in (0, math.inf):
        with lock(tmp_path / "x.lock", patience_s=patience_s):
            began = time.monotonic()
            with pytest.raises(RunError, match="in use by process"), lock(tmp_path / "x.lock", patience_s=0.3):
                pass
            assert 0.3 <= time.monotonic() - began < 5
