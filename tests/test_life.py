"""The life of a run: one writer, signals, the watchdog, the account of its time."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import fsspec
import jax
import numpy as np
import pytest
from conftest import ROOT
from e2e.test_run import logged, rows, train_args
from faults.kills import content
from faults.numerics import arrays, compiled_once, tiny_data, train_quietly

from l1_jax.checkpoint.manifest import CheckpointInfo
from l1_jax.checkpoint.mirror import Mirror
from l1_jax.checkpoint.names import BEST
from l1_jax.checkpoint.run_directory import RunDirectory, rewind
from l1_jax.data.prepare import prepare
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.devices import processes
from l1_jax.devices.processes import together
from l1_jax.errors import BusyError, RunError, UserError
from l1_jax.run import goodput, loop, signals, start, train
from l1_jax.run.goodput import Goodput
from l1_jax.run.loop import Life
from l1_jax.run.signals import StopSignals
from l1_jax.run.tracking import Tracker
from l1_jax.run.watchdog import Watchdog
from l1_jax.storage import files
from l1_jax.storage import lock as lock_module
from l1_jax.storage.lock import check_unlocked, lock
from l1_jax.storage.remote import Remote

HERE, ENDED = socket.gethostname(), 2**22 + 1  # no process has so high a number


def hold(path, **other):
    """Writes what a holder would have written."""
    started = lock_module._started(os.getpid())
    path.write_text(
        json.dumps({"host": HERE, "pid": os.getpid(), "started": started, "time": "noon"} | other)
    )


def attempt(path):
    with lock(path, "it is taken", "Wait") as last_alive:
        assert path.exists()
        return last_alive


def test_a_live_lock_is_refused_and_a_dead_one_taken(tmp_path):
    path = tmp_path / "run.lock"
    with lock(path, "it is taken", "Wait") as last_alive:
        assert last_alive is None
        before = path.read_bytes()
        for call in (attempt, lambda path: check_unlocked(path, "it is taken", "Wait")):
            with pytest.raises(
                UserError, match=f"it is taken by process {os.getpid()} on {HERE}, since .*Wait"
            ):
                call(path)
        assert path.read_bytes() == before
    assert not path.exists()
    hold(path)  # as a process that was killed leaves it
    os.utime(path, (1234, 1234))
    check_unlocked(path, "it is taken", "Wait")
    assert attempt(path) == 1234
    check_unlocked(path, "it is taken", "Wait")
    assert not path.exists()


@pytest.mark.parametrize("ends", [False, True])
def test_the_lock_of_another_host_is_waited_for(ends, tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "OTHER_HOST_SECONDS", 0.5)
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.1)
    path = tmp_path / "run.lock"
    hold(path, host="elsewhere", pid=7)
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        if ends:
            threading.Timer(0.1, lambda: fcntl.flock(other, fcntl.LOCK_UN)).start()
            attempt(path)
        else:
            with pytest.raises(UserError, match="by process 7 on elsewhere, since noon"):
                attempt(path)


@pytest.mark.parametrize(
    ("holder", "is_free"),
    [
        ({}, False),
        ({"pid": ENDED}, True),
        ({"started": "0"}, True),  # another process has its number by now
        ({"host": "elsewhere"}, True),
        ({"host": "elsewhere", "beats": True}, False),
    ],
)
def test_a_file_system_without_locks(holder, is_free, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock_module, "OTHER_HOST_SECONDS", 0.5)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lock_module.log, "propagate", True)
    path = tmp_path / "run.lock"
    hold(path, **holder)
    if "beats" in holder:
        threading.Timer(0.1, os.utime, (path, (1, 1))).start()
    if is_free:
        attempt(path)
        assert "this file system has no locks" in caplog.text
    else:
        with pytest.raises(UserError, match="it is taken by process"):
            attempt(path)


@pytest.mark.parametrize("beats", [False, True])
def test_locks_that_end_at_each_host(beats, tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.2)
    path = tmp_path / "run.lock"
    hold(path, host="elsewhere", pid=7)  # and the kernel here knows nothing of it
    if beats:
        threading.Timer(0.1, os.utime, (path,)).start()
        with pytest.raises(UserError, match="by process 7 on elsewhere, since noon"):
            attempt(path)
    else:
        attempt(path)


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine").write_text("of value")
    (tmp_path / "run.lock").symlink_to("mine")
    with pytest.raises(UserError, match=r"run\.lock is a link"):
        attempt(tmp_path / "run.lock")
    assert (tmp_path / "mine").read_text() == "of value"


def test_two_preparations_of_one_directory(corpus, tmp_path):
    out = tmp_path / "new" / "out"
    out.parent.mkdir()
    with (
        lock(out.with_name(".out.lock"), "", ""),
        pytest.raises(BusyError, match=rf"out is being prepared by process {os.getpid()} on"),
    ):
        prepare([corpus], out, vocab_size=300, tokenizer="bytes")
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("kind", [UserError, RunError, BusyError])
def test_the_exit_code_of_one_process_is_that_of_all(kind, monkeypatch):
    theirs = json.dumps([kind.exit_code, "it is taken. Wait."])
    monkeypatch.setattr(processes, "gather", lambda ours: [ours, theirs])
    with pytest.raises(kind, match="process 1 stopped: it is taken") as raised, together():
        pass
    assert type(raised.value) is kind
    with pytest.raises(ValueError, match="ours"), together():
        raise ValueError("ours")


def test_a_live_run_is_refused(script, trained, tiny_config, prepared):
    """Before anything is compiled, and whatever is asked for."""
    args = train_args(tiny_config, prepared, trained, "training.max_steps=200")
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    taken = RunDirectory(trained)
    taken.look()
    with taken.lock():
        for flag in ("--resume", "--overwrite"):
            result = script("train", flag, *args)
            assert (
                result.code,
                f"being written by process {os.getpid()} on {HERE}" in result.error,
            ) == (75, True)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path != trained} == {
        path: time for path, time in before.items() if path != trained
    }


def test_a_run_that_came_and_went_meanwhile(script, tiny_config, prepared, tmp_path, monkeypatch):
    set_up = train.set_up

    def meanwhile(*args):
        (tmp_path / "run.json").write_text("{}")
        return set_up(*args)

    monkeypatch.setattr(train, "set_up", meanwhile)
    result = script("train", *train_args(tiny_config, prepared, tmp_path, "training.max_steps=1"))
    assert (result.code, "another run was in" in result.error) == (75, True)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.slow
def test_in_a_bucket_the_later_start_wins(one_device, script, tiny_config, prepared, monkeypatch):
    fsspec.filesystem("memory").store.clear()
    remote, accept = Remote("memory://b/run"), loop.accept

    def take_over(run, tracker, clock, meter, step, metrics):
        if step == 3:
            run.saver.wait()
            remote.write("run.json", b'{"start": "of the other"}')
        accept(run, tracker, clock, meter, step, metrics)

    monkeypatch.setattr(loop, "accept", take_over)
    keys = ("training.max_steps=6", "training.save_steps=2")
    result = script("train", *train_args(tiny_config, prepared, remote.url, *keys))
    assert (
        result.code,
        "another start of the run has taken over memory://b/run" in result.error,
    ) == (1, True)
    assert [name for name in remote.files() if name.endswith("checkpoint.json")] == [
        "checkpoint-2/checkpoint.json"
    ]
    assert remote.read_text("run.json") == '{"start": "of the other"}'


@pytest.fixture
def left(monkeypatch):
    """The codes with which a process would have left."""
    codes = []

    def leave(code, message):
        codes.append(code)
        raise ConnectionError  # ends the thread

    monkeypatch.setattr(signals, "_leave", leave)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    return codes


def ask(number, until):
    os.kill(os.getpid(), number)
    end = time.monotonic() + 5
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_while_it_imports_a_signal_ends_it_with_75(tiny_config):
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [
            sys.executable,
            "-X",
            "importtime",
            ROOT / "scripts" / "train.py",
            "--config",
            tiny_config,
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while "jax" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(number)
        said = process.stderr.read()
        assert (process.wait(), "stopped by a signal before the first step" in said) == (
            75,
            True,
        ), said[-2000:]
        assert "Traceback" not in said


def interrupt(number, command, until):
    """Starts a command, sends it a signal at its first line that matches; returns what else it said, and its code."""
    # A shell ignores it in what it runs in the background, and a process hands that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not re.search(until, line := process.stderr.readline()):
        assert line
    process.send_signal(number)
    return process.communicate()[1], process.returncode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "module", ["rich", "jax"]
)  # before and after the command looks at its flags
def test_other_commands_end_as_a_shell_expects(module, number, code):
    command = ["-X", "importtime", "scripts/generate.py", "--model", "absent", "--prompt", "A"]
    said, returned = interrupt(number, command, rf"\b{module}\b")
    assert (returned, said.splitlines()[-1]) == (code, "interrupted")
    assert "Traceback" not in said


def test_a_signal_does_not_wait_for_a_compiler():
    text = """import hashlib, sys
from l1_jax.commands.runner import run_command
def main(argv):
    print("compiling", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without a line of Python
run_command(main)"""
    assert interrupt(signal.SIGINT, ["-c", text], "compiling") == ("interrupted\n", 130)


def test_a_preparation_that_is_interrupted_leaves_nothing(script, corpus, tmp_path, monkeypatch):
    def save(tokenizer, path):
        assert path.parent.is_dir()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Tokenizer, "save", save)
    result = script(
        "prepare_data",
        "--input",
        corpus,
        "--output",
        tmp_path / "new" / "out",
        "--tokenizer",
        "bytes",
    )
    assert (result.code, result.error) == (143, "interrupted")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads(tiny_config, prepared, tmp_path):
    more = (
        "training.max_steps=3",
        "training.eval_batches=1",
        "training.logging_steps=1",
        "parallelism.data=8",
    )
    command = [
        sys.executable,
        ROOT / "scripts" / "train.py",
        *train_args(tiny_config, prepared, tmp_path, *more),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    process.stderr.close()
    assert process.wait() == 0
    assert (tmp_path / "checkpoint-3").is_dir()


def test_signals(left):
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores it in what it runs in the background
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals(60):
        ask(signal.SIGINT, lambda: left == [75])  # nothing to save yet
    with StopSignals(60) as stop:
        stop.saving()
        ask(signal.SIGTERM, lambda: stop.received == signal.SIGTERM)
        ask(signal.SIGINT, lambda: left == [75, 130])
    with StopSignals(0.2) as stop:
        stop.saving()
        ask(signal.SIGTERM, lambda: left == [75, 130, 143])  # the grace is over
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_signals_after_all_is_done_end_with_0(left):
    with StopSignals(60) as stop:
        stop.finished()  # it was so from the start
        ask(signal.SIGTERM, lambda: stop.received == signal.SIGTERM)
        ask(signal.SIGINT, lambda: left == [0])
    with StopSignals(0.5) as stop:
        stop.saving()
        ask(
            signal.SIGTERM, lambda: stop.received == signal.SIGTERM
        )  # while the last step is being saved
        stop.finished()
        ask(signal.SIGWINCH, lambda: left == [0, 0])  # which is none that asks: the grace is over


ENDS = """import os, runpy, signal, sys
from l1_jax import console
number = getattr(signal, sys.argv.pop(1))
console.on_exit.callback(os.kill, os.getpid(), number)
runpy.run_path("scripts/train.py", run_name="__main__")"""


@pytest.mark.parametrize(
    ("number", "steps", "code"), [("SIGTERM", 100, 0), ("SIGHUP", 100, 0), ("SIGINT", 2, 2)]
)
def test_a_signal_to_a_process_that_has_ended_its_run(
    number, steps, code, tiny_config, prepared, trained
):
    """While it deletes its scratch directory; the second time after an error."""
    keys = (f"training.max_steps={steps}", "--resume", *(("training.seed=1",) if code else ()))
    command = [
        sys.executable,
        "-c",
        ENDS,
        number,
        *train_args(tiny_config, prepared, trained, *keys),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr


@pytest.mark.slow
def test_signals_while_a_finished_run_closes_its_logs(
    one_device, script, tiny_config, prepared, tmp_path, monkeypatch
):
    """The second one ends it at once."""
    codes, close = [], Tracker.__exit__

    def signalled(tracker, *error):
        assert (tmp_path / "checkpoint-2").is_dir()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        close(tracker, *error)

    def note(code, message):
        codes.append(code)

    monkeypatch.setattr(Tracker, "__exit__", signalled)
    monkeypatch.setattr(signals, "_leave", note)
    args = train_args(
        tiny_config, prepared, tmp_path, "training.max_steps=2", "training.eval_batches=1"
    )
    assert (script("train", *args).code, codes) == (0, [0])


@pytest.mark.parametrize(
    "hang", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"]
)  # the second holds Python's lock
def test_a_hang_ends_the_process(hang):
    text = f"""import ctypes, time
from l1_jax.run.watchdog import Watchdog
def hanging():
    {hang}
with Watchdog(0.3) as watchdog:
    watchdog.expects("the moon")
    hanging()"""
    result = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == -signal.SIGALRM, result.stderr
    assert ", line 4 in hanging" in result.stderr
    assert ("error: the moon has not ended in 0.3 s" in result.stderr) == hang.startswith("time")


def test_the_limit_follows_the_median_step(monkeypatch):
    now = [0.0]
    before = signal.getsignal(signal.SIGALRM)
    with Watchdog(1000.0) as watchdog:
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        for seconds in (10.0, 100.0, 100.0, 200.0):
            watchdog.expects("step", is_step=True)
            now[0] += seconds
        watchdog.expects("the evaluation")
        now[0] += 7000.0
        watchdog.expects("a step", is_step=True)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == pytest.approx(20 * 100 + 1, abs=1)
        monkeypatch.undo()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) == before


def test_goodput_over_a_kill(tmp_path, monkeypatch):
    now = [1000.0]

    def spend(clock, kind, seconds):
        with clock(kind):
            now[0] += seconds

    for name in ("time", "perf_counter"):
        monkeypatch.setattr(goodput.time, name, lambda: now[0])
    path = tmp_path / "run.json"

    def account():
        return json.loads(path.read_text())["goodput"]

    first = Goodput()
    now[0] += 2
    first.begin(path, {"start": "a"}, {}, 0, None)
    spend(first, "compile", 5)
    with first("step"):
        now[0] += 10
        spend(first, "data_wait", 1)
    first.saving(20)
    spend(first, "step", 4)
    first.saving(30)  # is never published
    spend(first, "step", 3)
    killed = now[0]
    now[0] += 30
    second = Goodput()
    now[0] += 1
    second.begin(path, {"start": "b"}, account(), 20, killed)
    expected = {
        "startup": 3,
        "compile": 5,
        "step": 10,
        "data_wait": 1,
        "eval": 0,
        "save": 0,
        "lost": 7,
        "idle": 30,
    }
    assert account()["seconds"] == expected
    assert sum(expected.values()) == now[0] - 1000
    spend(second, "step", 4)
    second.write()
    now[0] += 100
    third = Goodput()  # from the beginning, after an end that was orderly
    third.begin(path, {"start": "c"}, account(), 0, None)
    assert account()["seconds"] == expected | {
        "step": 0,
        "data_wait": 0,
        "lost": 7 + 15,
        "idle": 130,
    }
    assert str(third).startswith("goodput 0.0% of 160.0 s")
    spend(third, "step", 6)
    third.saving(10)
    spend(third, "step", 8)
    third.went_back(12)  # of which there is no note: what came after step 10 is lost
    third.write()
    assert (account()["seconds"]["step"], account()["seconds"]["lost"]) == (6, 22 + 8)
    monkeypatch.setattr(goodput, "NOTES", 3)
    for step in range(20, 60, 10):
        third.saving(step)
    assert list(account()["work"]) == ["30", "40", "50"]
    assert json.loads(path.read_text())["start"] == "c"


def test_the_account_of_a_run_is_its_wall_time(trained):
    said = json.loads((trained / "run.json").read_text())["goodput"]
    began = (
        (trained / "tensorboard").stat().st_ctime
    )  # made at the first start, before the first compile
    seconds = said["seconds"]
    assert all(
        seconds[kind] > 0 for kind in ("startup", "compile", "step", "data_wait", "eval", "save")
    )
    assert seconds["lost"] == seconds["idle"] == 0
    assert sum(seconds.values()) - seconds["startup"] == pytest.approx(
        said["written"] - began, rel=0.05, abs=0.5
    )


EVALUATED = (
    "training.max_steps=5",
    "training.eval_steps=2",
    "training.save_steps=4",
    "training.logging_steps=1",
)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(start, "select_devices", lambda _: jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 4])  # of step 1, step 2, and the two batches of its evaluation
def test_a_signal_at_an_evaluation_saves_first(
    call, one_device, script, tiny_config, prepared, tmp_path, tmp_path_factory, monkeypatch
):
    """Before it, and in its second batch; the start that resumes does it, and nothing tells the two runs apart."""
    args = train_args(tiny_config, prepared, tmp_path, *EVALUATED, "training.eval_batches=2")
    whole = tmp_path_factory.getbasetemp() / "evaluated"
    if not whole.exists():
        assert script("train", *args, f"training.output_dir={whole}").code == 0
    asked, calls = Life.asked, []

    def stop(life):
        calls.append(1)
        return len(calls) == call or asked(life)

    monkeypatch.setattr(Life, "asked", stop)
    result = script("train", *args)
    assert (result.code, rows(tmp_path)[-1]["step"]) == (75, 2), result.err
    assert "val/loss" not in rows(tmp_path)[-1]
    assert json.loads((tmp_path / "checkpoint-2" / "checkpoint.json").read_text())["evaluation_due"]
    monkeypatch.setattr(Life, "asked", asked)
    assert script("train", *args, "--resume").code == 0
    assert logged(tmp_path) == logged(whole)
    for name in ("checkpoint-5", "checkpoint-4", "best_model"):
        assert content(tmp_path / name) == content(whole / name)
        assert (tmp_path / name / "checkpoint.json").read_text() == (
            whole / name / "checkpoint.json"
        ).read_text()


@pytest.mark.slow
def test_a_signal_at_the_evaluation_that_stops_a_run_early(
    one_device, script, tiny_config, prepared, tmp_path, monkeypatch
):
    """The start that resumes knows by that evaluation only that step 10, no logging step, was the last."""
    more = (
        "training.max_steps=50",
        "training.eval_steps=5",
        "training.eval_batches=1",
        "training.learning_rate=1e-30",
    )
    args = train_args(
        tiny_config, prepared, tmp_path / "whole", *more, "training.early_stopping_patience=1"
    )
    args += ["training.save_steps=4", "training.logging_steps=7"]
    assert script("train", *args).code == 0
    asked, calls = Life.asked, []

    def stop(life):
        calls.append(1)
        return len(calls) == 12 or asked(
            life
        )  # of steps 1 to 10 and the batch of step 5, the one of step 10

    monkeypatch.setattr(Life, "asked", stop)
    args += [f"training.output_dir={tmp_path / 'stopped'}"]
    assert script("train", *args).code == 75
    assert rows(tmp_path / "stopped")[-1]["step"] == 7
    assert script("train", *args, "--resume").code == 0
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole")] == [1, 5, 7, 10, 10]
    for name in ("checkpoint-10", "best_model"):
        texts = [
            (tmp_path / run / name / "checkpoint.json").read_text() for run in ("whole", "stopped")
        ]
        assert texts[0] == texts[1]


@pytest.mark.slow
def test_in_a_bucket_nothing_is_written_over(
    one_device, script, tiny_config, prepared, monkeypatch
):
    """The evaluation that a signal left off, at a step whose checkpoint is there."""
    fsspec.filesystem("memory").store.clear()
    args = train_args(
        tiny_config, prepared, "memory://b/due", "training.max_steps=4", "training.eval_batches=1"
    )
    args += ["training.eval_steps=2", "training.save_steps=2"]
    asked, publish, calls, sent = Life.asked, Mirror.publish, [], []

    def stop(life):
        calls.append(1)
        return len(calls) == 2 or asked(life)

    def note(mirror, partial, name):
        sent.append(f"{name} of {partial.name}")
        publish(mirror, partial, name)

    monkeypatch.setattr(Life, "asked", stop)
    monkeypatch.setattr(Mirror, "publish", note)
    assert script("train", *args).code == 75
    assert script("train", *args, "--resume").code == 0
    assert sent == [
        f"{name} of .saving-{n}" for n, name in ((2, "checkpoint-2"), (2, BEST), (4, BEST))
    ]


@pytest.mark.slow
def test_in_a_bucket_a_kill_between_the_best_model_and_its_checkpoint(
    one_device, script, tiny_config, prepared, monkeypatch
):
    fsspec.filesystem("memory").store.clear()
    args = train_args(
        tiny_config, prepared, "memory://b/two", "training.max_steps=4", "training.eval_batches=1"
    )
    args += ["training.eval_steps=2", "training.save_steps=2"]
    sync, calls = Mirror.sync, []

    def killed(mirror):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(5, "killed")
        sync(mirror)

    monkeypatch.setattr(Mirror, "sync", killed)
    assert script("train", *args).code == 1
    published = {"best_model-2", "run.json", "config.yaml", "metrics.jsonl", "tensorboard"}
    assert set(Remote("memory://b/two").entries()) == published
    result = script("train", *args, "--resume")
    assert (result.code, "steps 3 to 4" in result.err) == (0, True)
    assert {"checkpoint-2", "checkpoint-4"} < set(Remote("memory://b/two").entries())


@pytest.mark.slow
def test_a_kill_between_the_renames_of_the_only_checkpoint(
    one_device, script, tiny_config, prepared, tmp_path, monkeypatch
):
    args = train_args(
        tiny_config, prepared, tmp_path, "training.schedule_steps=4", "training.eval_batches=1"
    )
    assert script("train", *args, "training.max_steps=2").code == 0
    (tmp_path / "checkpoint-2").rename(tmp_path / ".old-checkpoint-2")
    shutil.rmtree(tmp_path / "best_model")
    result = script("train", *args, "training.max_steps=3", "--resume")
    assert (result.code, "steps 3 to 3" in result.err) == (0, True)


def test_a_kill_while_a_run_is_replaced_leaves_one_that_can_be(tmp_path, monkeypatch):
    """Whatever was deleted of it: nothing half of it stands under a name that a run uses."""
    run = tmp_path / "run"
    for name in ("best_model", "checkpoint-8"):
        (run / name).mkdir(parents=True)
        for file in ("checkpoint.json", "manifest.json"):
            (run / name / file).write_text("{}")
    (run / "run.json").write_text('{"run_id": "one"}')
    (run / "tensorboard").mkdir()

    delete = files.delete
    killed = []

    def kill_first(path):
        """At the first attempt to delete something, half of it is gone."""
        if path.name in killed:
            return delete(path)
        killed.append(path.name)
        for file in ("checkpoint.json", "manifest.json"):
            (path / file).unlink(missing_ok=True)
        raise KilledError

    monkeypatch.setattr(files, "delete", kill_first)
    for _ in range(3):
        home = RunDirectory(run)
        home.check_free(overwrite=True)
        with pytest.raises(KilledError):
            home.clear()

    assert len(killed) == 3
    home = RunDirectory(run)
    home.check_free(overwrite=True)
    home.clear()
    home.take(CheckpointInfo(8, 9, "line", "", ""), {})
    assert not list(run.iterdir())


@pytest.mark.parametrize("due", [False, True])
def test_rows_that_will_be_written_again(due, tmp_path):
    found = [{"step": 1}, {"step": 2}, {"step": 2, "val/loss": 1.0}, {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    rewind(tmp_path, CheckpointInfo(8, 9, "line", "", "", step=2, evaluation_due=due))
    assert rows(tmp_path) == (found[:2] if due else found[:3])


@pytest.mark.slow
def test_a_kill_between_the_best_model_and_the_last_checkpoint(
    one_device, script, tiny_config, prepared, tmp_path, monkeypatch
):
    args = train_args(
        tiny_config, prepared, tmp_path, "training.max_steps=2", "training.eval_batches=1"
    )
    assert script("train", *args).code == 0
    expected = content(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2").rename(tmp_path / ".saving-2")
    assert script("train", *args, "--resume").code == 0
    assert content(tmp_path / "checkpoint-2") == expected
    assert not (tmp_path / ".saving-2").exists()
    assert "nothing left to do" in script("train", *args, "--resume").err


@pytest.mark.slow
def test_a_run_on_a_mount_point(one_device, mount, script, tiny_config, prepared, tmp_path):
    """All that a run renames lies inside of its directory, which it never renames itself."""
    run_dir = tmp_path / "volume"
    run_dir.mkdir()
    mount("-t", "tmpfs", "tmpfs", run_dir)
    (run_dir / "lost+found").mkdir()
    keys = (
        "training.save_steps=1",
        "training.eval_steps=1",
        "training.eval_batches=1",
        "training.save_total_limit=1",
    )
    args = train_args(tiny_config, prepared, run_dir, *keys)
    for last, more in ((1, []), (2, ["--resume"]), (1, ["--overwrite"])):
        result = script("train", *args, f"training.max_steps={last}", *more)
        assert result.code == 0, result.err
        assert {path.name for path in run_dir.iterdir()} == {
            "lost+found", "config.yaml", "metrics.jsonl", "run.json", "tensorboard", "best_model", f"checkpoint-{last}",
        }  # fmt: skip
        assert rows(run_dir)[-1]["step"] == last


OTHER = "training.weight_decay=0.3"  # than that of the run that the branches leave


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A run of 12 steps, saved at every fourth; the branches leave it at step 4."""
    home = tmp_path_factory.mktemp("branches")
    tiny_data(home / "data")
    with compiled_once():
        assert train_quietly(home / "data", home / "trunk") == "done"
        yield home / "trunk"


@pytest.fixture
def branch(trunk, monkeypatch):
    """Starts a branch, with the path that is given to `--resume`, or goes on with it; `killed_at` a step."""
    accept, last = loop.accept, [0]

    def accept_or_die(run, tracker, clock, meter, step, metrics):
        accept(run, tracker, clock, meter, step, metrics)
        if step == last[0]:
            raise KilledError

    monkeypatch.setattr(loop, "accept", accept_or_die)

    def start(run_dir, path=None, killed_at=0):
        last[0] = killed_at
        return train_quietly(
            trunk.parent / "data", run_dir, OTHER, resume=True, resume_from=path and str(path)
        )

    return start


@pytest.fixture
def whole_branch(trunk, branch):
    """That of which nothing was killed."""
    run_dir = trunk.with_name("whole")
    if not run_dir.exists():
        assert branch(run_dir, trunk / "checkpoint-4") == "done"
    return run_dir


def kill_early(branch, run_dir, path):
    with pytest.raises(KilledError):
        branch(run_dir, path, killed_at=6)
    assert not list(run_dir.glob("checkpoint-*"))


def test_a_branch_that_is_killed_before_its_first_save_is_one_still(
    trunk, branch, whole_branch, tmp_path
):
    """And while that is written; it is never begun from random weights."""
    run_dir = tmp_path / "branch"
    kill_early(branch, run_dir, trunk / "checkpoint-4")
    with pytest.raises(KilledError):
        branch(run_dir, killed_at=7)
    shutil.copytree(trunk / "checkpoint-8", run_dir / ".saving-8")
    assert branch(run_dir) == "done"
    assert logged(run_dir) == logged(whole_branch)
    assert logged(run_dir)[0]["step"] == 5
    for name in ("checkpoint-12", "best_model"):
        assert content(run_dir / name) == content(whole_branch / name)
    assert content(run_dir / "checkpoint-12") != content(trunk / "checkpoint-12")


def test_what_a_branch_came_from_is_noted(trunk, whole_branch):
    sha256 = json.loads((trunk / "checkpoint-4" / "manifest.json").read_text())["sha256"]
    origin = {"path": str(trunk / "checkpoint-4"), "step": 4, "sha256": sha256}
    assert json.loads((whole_branch / "run.json").read_text())["origin"] == origin
    assert "origin" not in json.loads((trunk / "run.json").read_text())


@pytest.mark.parametrize("again", ["the same", "a copy"])
def test_the_command_that_began_a_branch_may_be_given_again(
    again, trunk, branch, whole_branch, tmp_path, monkeypatch
):
    """Before the first save, and after it; another path is another run's."""
    kill_early(branch, run_dir := tmp_path / "branch", trunk / "checkpoint-4")
    path = trunk / "checkpoint-4"
    if again == "a copy":
        path = shutil.copytree(path, tmp_path / "copy")
    with pytest.raises(KilledError):
        branch(run_dir, path, killed_at=9)
    assert [row["step"] for row in logged(run_dir)][:2] == [5, 6]
    assert (run_dir / "checkpoint-8").is_dir()
    with pytest.raises(UserError, match="branch holds a run already"):
        branch(run_dir, trunk / "checkpoint-8")
    before = (run_dir / "checkpoint-8" / "manifest.json").read_text()
    assert branch(run_dir, path) == "done"
    assert (run_dir / "checkpoint-8" / "manifest.json").read_text() == before
    assert logged(run_dir) == logged(whole_branch)


def test_where_the_origin_is_not_there_any_more_nothing_is_begun(trunk, branch, tmp_path):
    other = shutil.copytree(trunk, tmp_path / "other")
    kill_early(branch, run_dir := tmp_path / "branch", other / "checkpoint-4")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    (other / "checkpoint-4").rename(other / "elsewhere")
    said = re.escape(f"the run came from {other}/checkpoint-4, step 4, which ")
    with pytest.raises(UserError, match=f"{said}is not there any more"):
        branch(run_dir)
    shutil.copytree(trunk / "checkpoint-8", other / "checkpoint-4")
    with pytest.raises(UserError, match=f"{said}has other content now"):
        branch(run_dir)
    shutil.rmtree(other / "checkpoint-4")
    shutil.copytree(other / "elsewhere", other / "checkpoint-4")
    with open(next((other / "checkpoint-4" / "state" / "params").rglob("0*")), "r+b") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="checkpoint-4 is damaged: state/params"):
        branch(run_dir)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    shutil.rmtree(other / "checkpoint-4")
    shutil.rmtree(other / "best_model")
    (other / "elsewhere").rename(other / "best_model")  # the same one under its other name
    assert branch(run_dir) == "done"


@pytest.mark.parametrize("there", ["a bucket", "a disk"])
def test_a_branch_in_a_bucket_knows_what_it_came_from(there, trunk, branch, whole_branch, tmp_path):
    fsspec.filesystem("memory").store.clear()
    url, path = "memory://b/branch", trunk / "checkpoint-4"
    if there == "a bucket":
        Remote("memory://b/trunk").upload(trunk)
        path = "memory://b/trunk/checkpoint-4"
    with pytest.raises(KilledError):
        branch(url, path, killed_at=6)
    assert json.loads(Remote(url).read_text("run.json"))["origin"]["path"] == str(path)
    assert not [name for name in Remote(url).files() if "checkpoint" in name]
    assert branch(url) == "done"
    copy = tmp_path / "copy"
    Remote(url).download(copy, Remote(url).files())
    assert logged(copy) == logged(whole_branch)
    pairs = zip(arrays(copy / "checkpoint-12"), arrays(whole_branch / "checkpoint-12"), strict=True)
    assert all(np.array_equal(ours, theirs) for ours, theirs in pairs)
