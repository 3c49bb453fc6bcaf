"""A disk that is full or read-only while a checkpoint is written: a real one, which only root may mount."""

import contextlib
import dataclasses
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from faults import Row
from faults.numerics import CONFIG, SAVE_STEPS, STEPS, arrays, compiled_once, tiny_data
from l1_jax.checkpoint.manifest import CheckpointInfo, find_damage
from l1_jax.checkpoint.saver import Saver
from l1_jax.config.yaml_file import config_from_text
from l1_jax.errors import RunError
from l1_jax.run import loop
from l1_jax.run.train import train
from l1_jax.training.health import Health
from l1_jax.training.state import TrainState, to_trees

INFO = CheckpointInfo(
    global_batch_size=1, total_steps=9, documents="line", data_hash="", tokenizer_sha256=""
)
BIG = 2**21  # numbers of a checkpoint that has no room on the disk


def state_of_size(count: int, step: int = 0) -> TrainState:
    """With `count` random numbers, which no compression makes smaller, twice."""
    numbers = jax.random.bits(jax.random.key(step), (count,))
    return TrainState(
        jax.numpy.int32(step), {"a": numbers}, {"a": numbers}, None, Health(*jax.numpy.zeros(4))
    )


def save(saver: Saver, step: int, count: int = 8) -> None:
    saver.save(
        to_trees(state_of_size(count, step)),
        dataclasses.replace(INFO, step=step),
        [f"checkpoint-{step}"],
    )


def save_now(saver: Saver, step: int, count: int = 8) -> bool:
    save(saver, step, count)
    return saver.wait()


@contextlib.contextmanager
def disk(path: Path) -> Iterator[bool]:
    """A small disk of its own at `path`; false where none may be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=4000", "tmpfs", str(path)]
    is_there = (
        bool(shutil.which("mount")) and subprocess.run(mount, capture_output=True).returncode == 0
    )
    try:
        yield is_there
    finally:
        if is_there:
            subprocess.run(["umount", "-l", path], check=True)


def remount(path: Path, option: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"remount,{option}", "tmpfs", path], check=True)


@contextlib.contextmanager
def without_room(path: Path) -> Iterator[None]:
    """With bytes, but with few inodes: it is full in the middle of a save."""
    free = os.statvfs(path)
    remount(path, f"nr_inodes={free.f_files - free.f_ffree + 16}")
    yield
    remount(path, "nr_inodes=4000")


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    remount(path, "ro")
    yield
    remount(path, "rw")


def fails_once(run_dir: Path, fault: Callable[[], Any], reason: str, count: int = 8) -> list[bool]:
    """Saves under a fault. With `stop` it is an error, with `warn` the next one works; the older steps stay good."""
    found = []
    for warn in (False, True):
        saver, said = Saver(run_dir, keep=2, texts={"config.yaml": "x"}, warn=warn), ""
        found += [save_now(saver, step) for step in (1, 2)]
        with fault():
            try:
                found.append(not save_now(saver, 3, count))
            except RunError as error:
                said = str(error)
        if not warn:
            found.append(
                f"step 3 could not be saved in {run_dir} ({reason}): it needs at least " in said
            )
            found.append("MB are free now that what was written of it is deleted. See" in said)
        names = {
            path.name: find_damage(path)
            for path in run_dir.glob("*")
            if not path.name.startswith(".saving-3")
        }
        found.append(names == {"checkpoint-1": None, "checkpoint-2": None})
        if warn:
            found.append(save_now(saver, 4))
            names = {path.name: find_damage(path) for path in run_dir.glob("checkpoint-*")}
            found.append(names == {"checkpoint-2": None, "checkpoint-4": None})
        saver.close()
        for path in run_dir.iterdir():
            shutil.rmtree(path)
    return found


@contextlib.contextmanager
def filled(run_dir: Path, first: int, last: int) -> Iterator[None]:
    """Fills the disk of a run to the last byte after step `first`, until after step `last`."""
    accept, ballast = loop.accept, run_dir.parent / "ballast"

    def filling_accept(
        run: loop.Run, tracker: Any, clock: Any, meter: Any, step: int, metrics: Any
    ) -> None:
        if step == last + 1:
            ballast.unlink()
        accept(run, tracker, clock, meter, step, metrics)
        if step == first:
            run.saver.wait()
            with contextlib.suppress(OSError), io.FileIO(ballast, "w") as file:
                while file.write(b"x" * 4096):
                    pass

    with mock.patch.object(loop, "accept", filling_accept):
        yield


def trained_through(
    data: Path, home: Path, expected: Path, on_save_error: str
) -> tuple[str, list[bool]]:
    """A run whose disk is full around its second save: what it said, and whether all is as it should be."""
    run_dir = home / f"run-{on_save_error}"
    keys = [
        f"data.path={data}",
        f"training.output_dir={run_dir}",
        f"training.on_save_error={on_save_error}",
    ]
    config, found, said = config_from_text(CONFIG, "", keys), [], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            with filled(run_dir, SAVE_STEPS + 1, 2 * SAVE_STEPS):
                code = train(config)
        except RunError as error:
            print(error, file=said)
            code = 1
        text = said.getvalue()
        (home / "ballast").unlink(missing_ok=True)
        good = {path.name: find_damage(path) for path in run_dir.glob("checkpoint-*")}
        found.append(
            good.get(f"checkpoint-{SAVE_STEPS}", "missing") is None and not any(good.values())
        )
        if on_save_error == "stop":
            found += [code == 1, str(run_dir) in text and "No space left on device" in text]
            code = train(config, resume=True)
        else:
            found.append(f"checkpoint-{2 * SAVE_STEPS}" not in good)
    found.append(code == 0)
    end = f"checkpoint-{STEPS}"
    same = zip(arrays(run_dir / end), arrays(expected / end), strict=True)
    found.append(all((a == b).all() for a, b in same))
    lines = [
        (run_dir / "metrics.jsonl").read_text().splitlines() for run_dir in (run_dir, expected)
    ]
    found.append(len(lines[0]) == len(lines[1]))
    return text, found


def campaign(full: bool) -> list[Row]:
    """Full and read-only disks, under the saver alone and under whole runs."""
    bar = "older steps verify, the error names path and need, the next save works"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as home, disk(Path(home, "disk")) as is_there:
        if not is_there:
            return [
                (
                    "disk full and read-only during save",
                    bar,
                    "not run: only root may mount a disk",
                    None,
                )
            ]
        place = Path(home, "disk")
        saves = place / "saves"
        saves.mkdir()
        for fault, how, reason, count in (
            ("too small a disk", contextlib.nullcontext, "No space left on device", BIG),
            (
                "no inodes left in the middle of a save",
                lambda: without_room(place),
                "No space left on device",
                8,
            ),
            ("read-only disk", lambda: read_only(place), "Read-only file system", 8),
        ):
            found = fails_once(saves, how, reason, count)
            rows.append((fault, bar, f"{sum(found)} of {len(found)} checks hold", all(found)))
        with compiled_once():
            data, expected = tiny_data(Path(home, "data")), Path(home, "undisturbed")
            keys = [f"data.path={data}", f"training.output_dir={expected}"]
            with contextlib.redirect_stderr(io.StringIO()):
                train(config_from_text(CONFIG, "", keys))
            for mode in ("stop", "warn"):
                _, found = trained_through(data, place, expected, mode)
                fault = f"disk full for {SAVE_STEPS - 1} steps and a save of a run, on_save_error: {mode}"
                end = "resumed" if mode == "stop" else "goes on"
                figure = f"{end}, {sum(found)} of {len(found)} checks hold: older steps, error, end, rows"
                rows.append(
                    (fault, f"{bar}; the end bit-identical, no row lost", figure, all(found))
                )
    return rows
