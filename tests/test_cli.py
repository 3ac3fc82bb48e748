"""`vpw` as it is called: exit codes, short messages, no traceback, no kernel left behind."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from small_notebooks import OPEN, PARAMETERS, STUMBLE, TRAIN, write_notebook

from vpworkbench import cli

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def vpw(tmp_path):
    """Run `vpw` in the test's own folder, which is also where its runs go."""
    paths = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"VPW_RUNS": str(tmp_path / "runs"), "PYTHONPATH": paths}

    def call(*arguments, start=False):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "vpworkbench.cli", *arguments]
        # Whoever runs the tests in the background has Python ignore SIGINT, and children inherit that.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=heard, **pipes)
        if start:
            return process
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    return call


def test_help_comes_at_once(vpw):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = vpw("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and all(word in result.stdout for word in ("run", "runs", "scenes"))
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime <= 1  # whatever else the machine does


def test_version(vpw):
    assert vpw("--version").stdout.startswith("vpworkbench")


def test_a_run_completes_once(vpw, tmp_path):
    write_notebook(tmp_path / "trial.ipynb", PARAMETERS, OPEN.format(notebook="trial"), TRAIN, STUMBLE)
    call = ("run", "trial.ipynb", "--name", "a", "-p", "seed", "3")
    first = vpw(*call)
    assert first.returncode == 0, first.stderr
    assert json.loads((tmp_path / "runs/trial/a/summary.json").read_text()) == {"seed": 3, "lines": 1}
    again = vpw(*call)
    assert again.returncode == 0 and "trial/a is complete, nothing to do" in again.stdout
    head, row = vpw("runs").stdout.splitlines()
    assert head.split() == ["notebook", "name", "complete", "seed", "lines"]
    assert row.split() == ["trial", "a", "True", "3", "1"]


def test_a_failed_run_is_reported_in_a_few_lines(vpw, tmp_path):
    cells = OPEN.format(notebook="trial"), "raise MemoryError('line\\n' * 50)"
    write_notebook(tmp_path / "trial.ipynb", PARAMETERS, *cells)
    result = vpw("run", "trial.ipynb", "--name", "a")
    message = result.stderr[result.stderr.index("error: ") :]  # the kernel may have logged something before
    assert result.returncode == 1 and len(message.splitlines()) <= 12 and "Traceback" not in message
    assert message.startswith("error: trial/a failed in cell In [4]: MemoryError\n")
    assert str(tmp_path / "runs/trial/a/trial.ipynb") in result.stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["-p", "stepz", "9"], "stepz: 01_pretrain has no such parameter; did you mean 'steps'?"),
        (["-p", "steps", "1e1"], "steps: must be a whole number, like 0 (given: '1e1')"),
        (["-p", "preset", "tinny"], "did you mean 'tiny'"),
        (["-p", "overrides", '{"mask.bugdet": 3}'], "did you mean 'mask.budget'"),
        (["-p", "seed", "-1"], "seed: "),
        (["-p", "steps"], "a parameter needs a value"),
        (["--name", "../b"], "cannot name a folder"),
    ],
)
def test_a_wrong_parameter_stops_everything(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VPW_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    parameters = 'name = ""\npreset = "tiny"\nsteps = 0\nseed = 0\noverrides = {}'
    notebook = write_notebook(tmp_path / "01_pretrain.ipynb", parameters)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(notebook), *arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and expected in message and len(message.splitlines()) <= 12
    assert not (tmp_path / "runs").exists()


def test_wrong_parameters_end_the_process_with_code_2(vpw):
    result = vpw("run", "01_pretrane", "-p", "steps", "9")
    assert result.returncode == 2 and result.stderr.startswith("error: 01_pretrane: no such notebook")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "options", [["--weights", "w.pth"], ["--detector", "fasterrcnn_resnet50_fpn", "--epochs", "1"]]
)
def test_regions_refuse_options_of_the_other_way(options, tmp_path, capsys):
    """Scenes train a CNN, photographs are given to a detector: no option may be ignored."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["regions", "scenes", str(tmp_path / "made"), *options])
    assert stop.value.code == 2 and "--weights goes with --detector" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "made").exists()


def test_scenes_are_written_and_refused(vpw, tmp_path):
    done = vpw("scenes", "small", "--images", "3", "--val", "2", "--test", "2", "--seed", "5")
    assert done.returncode == 0 and done.stdout.strip() == "small", done.stderr
    assert any((tmp_path / "small").iterdir())
    wrong = vpw("scenes", "other", "--images", "0", "--difficulty", "mild")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 2 and not (tmp_path / "other").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupt_leaves_no_kernel(vpw, tmp_path, number, code):
    """Passed on to the kernel; after SIGKILL of `vpw` it ends by itself."""
    write_notebook(tmp_path / "trial.ipynb", PARAMETERS, SLEEP)
    process = vpw("run", "trial.ipynb", "--name", "a", start=True)
    try:
        wait_until((tmp_path / "pid").exists)
        kernel = int((tmp_path / "pid").read_text())
        assert is_alive(kernel)
        process.send_signal(number)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code
    assert number == signal.SIGKILL or "interrupted; the same call resumes" in said
    wait_until(lambda: not is_alive(kernel))


FEW = {"train.images": 4, "data.workers": 1, "data.scenes.images": 60, "data.scenes.val": 20, "data.scenes.test": 10}


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["vpw", "kernel", "both", "stopped"])
def test_a_killed_job_resumes_to_the_same_weights(vpw, tmp_path, victims):
    """SIGKILL of `vpw run`, of its kernel, of both, and SIGTERM of `vpw run`; once in training, then to the end."""

    def call(name, **how):
        parameters = ("-p", "steps", "16", "-p", "checkpoint_every", "2", "-p", "overrides", json.dumps(FEW))
        return vpw("run", "01_pretrain", "--name", name, *parameters, **how)

    folder = tmp_path / "runs" / "01_pretrain" / "killed"
    process = call("killed", start=True)
    wait_until((folder / "checkpoint" / "step-000004").exists, limit_s=600)
    kernel = int((folder / ".writer.holder").read_text().split()[0])
    if victims == "stopped":
        process.send_signal(signal.SIGTERM)
    else:
        for victim in {"vpw": [process.pid], "kernel": [kernel], "both": [process.pid, kernel]}[victims]:
            os.kill(victim, signal.SIGKILL)
    code = 143 if victims == "stopped" else 1 if victims == "kernel" else -9
    process.communicate(timeout=300)
    assert process.returncode == code
    again, whole = call("killed"), call("whole")
    assert again.returncode == whole.returncode == 0, again.stderr
    weights = [folder.parent / name / "checkpoint" / "model.safetensors" for name in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_run_executed_again_trains_nothing(vpw, tmp_path):
    call = ("run", "01_pretrain", "--name", "a")
    done = vpw(*call, "-p", "steps", "4", "-p", "overrides", json.dumps(FEW))
    folder = tmp_path / "runs" / "01_pretrain" / "a"
    metrics, weights = folder / "metrics.jsonl", folder / "checkpoint" / "model.safetensors"
    before = metrics.read_bytes(), weights.read_bytes(), weights.stat().st_mtime_ns
    summary = json.loads((folder / "summary.json").read_text())
    again = vpw(*call, "--again")
    assert done.returncode == again.returncode == 0, again.stderr
    assert (metrics.read_bytes(), weights.read_bytes(), weights.stat().st_mtime_ns) == before
    repeated = json.loads((folder / "summary.json").read_text())
    assert repeated.pop("wall_s") != summary.pop("wall_s") and repeated == summary


def test_a_second_job_on_a_run_is_refused(vpw, tmp_path):
    write_notebook(tmp_path / "trial.ipynb", PARAMETERS, SLEEP)
    process = vpw("run", "trial.ipynb", "--name", "a", start=True)
    try:
        wait_until((tmp_path / "pid").exists)
        second = vpw("run", "trial.ipynb", "--name", "a")
        assert second.returncode == 1 and f"in use by process {process.pid} on " in second.stderr
    finally:
        process.kill()
        process.communicate()


SLEEP = """
import os, time
open("part", "w").write(str(os.getpid()))
os.rename("part", "pid")
time.sleep(99)
"""


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, limit_s=60):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_full_disk_is_reported_with_its_remedy(capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "summary.json")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["runs"])
    assert exit_.value.code == 1
    assert "summary.json" in (message := capsys.readouterr().err) and "free some space" in message


def test_an_error_of_our_own_making_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


@pytest.mark.parametrize(
    "given, joined",
    [
        (["run", "a", "-p", "k", "v", "--name", "x"], ["run", "a", "-p", "k=v", "--name", "x"]),
        (["-p", "k", '{"a": "b=c"}'], ["-p", 'k={"a": "b=c"}']),
        (["-p", "k=v", "-p", "n", "-1"], ["-p", "k=v", "-p", "n=-1"]),
        (["-p", "k"], ["-p", "k"]),
        (["-p"], ["-p"]),
    ],
)
def test_two_words_become_one_pair(given, joined):
    assert cli._paired(given) == joined
