"""Damage to the newest checkpoint of a small run: is it found and named, and is the step before used?"""

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from l1_jax.checkpoint.manifest import CheckpointInfo, find_damage, read_info
from l1_jax.checkpoint.names import step_directories
from l1_jax.checkpoint.resuming import find_resumed
from l1_jax.checkpoint.run_directory import RunDirectory
from l1_jax.checkpoint.saver import Saver
from l1_jax.config.yaml_file import load_config
from l1_jax.console import log
from l1_jax.data.prepare import prepare
from l1_jax.run.train import train
from l1_jax.training.health import Health
from l1_jax.training.state import TrainState, to_trees

SEED = 0
CONFIG = """
model: {max_seq_length: 8, n_layers: 2, n_heads: 2, n_embd: 8}
training: {batch_size: 1, max_steps: 6, save_steps: 2, eval_steps: 6}
parallelism: {data: 1}
"""


def small_run(home: Path) -> Path:
    """A run with the checkpoints 2, 4 and 6."""
    (home / "text.txt").write_text("".join(f"a line of text, the {n}th\n" for n in range(200)))
    (home / "config.yaml").write_text(CONFIG)
    prepare([home / "text.txt"], home / "data", vocab_size=300, seed=0, tokenizer="bytes")
    run = home / "run"
    train(
        load_config(
            home / "config.yaml", [f"data.path={home / 'data'}", f"training.output_dir={run}"]
        )
    )
    return run


def flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.unlink()  # it is a link to the file of the run
    path.write_bytes(content)
    return "sha256 does not match"


def cut(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: rng.randrange(len(content))])
    return "sha256 does not match" if path.name == "manifest.json" else "truncated"


def delete(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "missing"


def copies(run: Path, home: Path, count: int) -> Iterator[Path]:
    """So many times the checkpoints of a run, as hard links."""
    for _ in range(count):
        copy = home / "copy"
        copy.mkdir()
        shutil.copy(run / "run.json", copy)
        for path in step_directories(run).values():
            shutil.copytree(path, copy / path.name, copy_function=os.link)
        yield copy
        shutil.rmtree(copy)


class Lines(logging.Handler):
    """What is logged while entered."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        log.addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def is_found(copy: Path, harm: Callable[[Path, random.Random], str], rng: random.Random) -> bool:
    """Whether damage to a file of the newest checkpoint is named, the one before used, and the newest set aside."""
    before, newest = list(step_directories(copy).values())[-2:]
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    why = harm(path, rng)
    with Lines() as lines:
        chosen, damaged = find_resumed(RunDirectory(copy), None)
    name = path.relative_to(newest).as_posix()
    said = f"{newest.name} is damaged: {name} ({why}); using {before.name}"
    left = {
        path.relative_to(newest): path.read_bytes() for path in newest.rglob("*") if path.is_file()
    }
    RunDirectory(copy).take(read_info(chosen or before), {}, damaged)
    aside = copy / f"damaged-{newest.name}.1"
    kept = {
        path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()
    }
    alone = [path.name for path in step_directories(copy).values()][-1:] == [before.name]
    return said in lines and chosen == before and kept == left and alone and not newest.exists()


def strays(copy: Path, name: str) -> Iterator[Path]:
    """Things that are called like a checkpoint and are none."""
    path, whole = copy / name, next(iter(step_directories(copy).values()))
    path.mkdir()
    yield path
    (path / "notes.txt").write_text("mine")
    yield path
    shutil.copytree(whole / "state", path / "state")
    shutil.copy(whole / "config.yaml", path)
    yield path
    shutil.rmtree(path)
    path.write_text("a file")
    yield path
    path.unlink()
    path.symlink_to("nowhere")
    yield path
    path.unlink()
    path.symlink_to(copy.parent)
    yield path


def content(path: Path) -> object:
    if path.is_symlink():
        return os.readlink(path)
    return (
        path.read_bytes()
        if path.is_file()
        else sorted(p.relative_to(path) for p in path.rglob("*"))
    )


def strays_left_alone(copy: Path) -> list[bool]:
    """For each kind of stray: it is not taken, and a save of that step works and renames it."""
    newest, results = max(step_directories(copy).items()), []
    number = newest[0] + 20
    for stray in strays(copy, f"checkpoint-{number}"):
        before, ignored = content(stray), find_resumed(RunDirectory(copy), None) == (newest[1], ())
        array = jax.numpy.ones(2)
        saver = Saver(copy, keep=9, texts={})
        info = CheckpointInfo(1, number, "line", "", "", step=number)
        health = Health(*jax.numpy.zeros(4))
        saver.save(
            to_trees(TrainState(jax.numpy.int32(number), {"a": array}, {"a": array}, None, health)),
            info,
            [stray.name],
        )
        saver.close()
        aside = copy / f"damaged-{stray.name}.1"
        results.append(ignored and find_damage(stray) is None and content(aside) == before)
        shutil.rmtree(stray)
        aside.rename(stray)
    return results


def damage(
    run: Path, home: Path, flips: int, cuts: int, deletions: int
) -> list[tuple[str, str, str, bool]]:
    """The rows of the campaign on copies of a run, which are made in `home`."""
    rng, rows = random.Random(SEED), []
    log.setLevel(logging.INFO)
    harms = {
        "bit flips": (flip, flips),
        "truncations": (cut, cuts),
        "deletions": (delete, deletions),
    }
    for fault, (harm, count) in harms.items():
        found = sum(is_found(copy, harm, rng) for copy in copies(run, home, count))
        figure = f"{found} of {count} found, named, set aside"
        bar = "100 % detected; the step before is used"
        rows.append((f"{count} {fault} in a checkpoint", bar, figure, found == count))
    left = next(strays_left_alone(copy) for copy in copies(run, home, 1))
    figure = f"{sum(left)} of {len(left)} kinds not taken, not deleted"
    rows.append(
        ("stray directories", "the newest good one is used", figure, all(left) and len(left) == 6)
    )
    return rows


def campaign(full: bool) -> list[tuple[str, str, str, bool]]:
    """(fault, bar, figure, passed), on a run made for it."""
    with tempfile.TemporaryDirectory() as home:
        run = small_run(Path(home))
        return damage(run, Path(home), *((300, 100, 50) if full else (30, 10, 5)))
