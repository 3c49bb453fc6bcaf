"""Kills, signals, second runs and frozen processes: `campaign` runs scripts/train.py under them and counts.

As a script it is the victim: `kills.py PATTERN N DELAY SCRIPT ARGS...` runs a script that ends by SIGKILL, DELAY
seconds after its Nth operation on a path with PATTERN in it, or after its start where N is 0. Where PATTERN is
`no room`, process 1 cannot write the arrays of step N instead.
"""

import itertools
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
SAVE_STEPS, TOTAL = 20, 90
CONFIG = {
    "model": {"max_seq_length": 32, "n_layers": 2, "n_heads": 2, "n_embd": 32, "dropout": 0.1},
    "training": {
        "learning_rate": 0.01, "max_steps": TOTAL, "global_batch_size": 2, "eval_batches": 1, "logging_steps": 1,
        "save_steps": SAVE_STEPS, "save_total_limit": 2, "eval_steps": 30,
    },
}  # fmt: skip
Row = tuple[str, str, str, bool]
# What a kill aims at: the path that it waits for, and how many operations on it there are to choose from.
AIMS = {
    "save": (".saving-", 150),
    "best model": ("-best_model", 150),
    "deletion": (".deleting-", 4),
    "any": ("", 0),
}


class Runs:
    """Starts of scripts/train.py on one config, in `home`, with a cache of what was compiled."""

    def __init__(self, home: Path, processes: int = 1, undisturbed: bool = True):
        self.home, self.processes = home, processes
        home.mkdir(exist_ok=True)
        (home / "config.json").write_text(json.dumps(CONFIG))  # JSON is YAML
        if not (home / "data").exists():
            from l1_jax.data.prepare import prepare

            prepare(
                [str(text) for text in (ROOT / "docs").glob("*.md")], home / "data", vocab_size=300
            )
        self.expected = home / f"undisturbed-{processes}"
        if undisturbed and not self.expected.exists():
            keep = ("training.save_steps=10", "training.save_total_limit=1000")
            (code, err), *_ = ended(self.start(self.expected, *keep))
            assert code == 0, err

    def start(
        self, run_dir: Path, *args: object, victim: tuple[object, ...] = ()
    ) -> list[subprocess.Popen[str]]:
        """A start that resumes what is there; its processes."""
        flags = f"--xla_force_host_platform_device_count={2 // self.processes} {QUICK_COMPILE}"
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        if (
            self.processes == 1
        ):  # jaxlib 0.10.2: a program out of the cache mixes up the messages of its collectives
            env["JAX_COMPILATION_CACHE_DIR"] = str(self.home / "cache")
            env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [
            sys.executable,
            *((__file__, *victim) if victim else ()),
            ROOT / "scripts" / "train.py",
            "--resume",
        ]
        command += ["--config", self.home / "config.json", f"data.path={self.home / 'data'}"]
        command += [f"training.output_dir={run_dir}", *args]
        found = []
        for i in range(self.processes):
            joined = (
                "--coordinator",
                address,
                "--num-processes",
                self.processes,
                "--process-id",
                i,
            )
            words = map(str, [*command, *(joined if self.processes > 1 else ())])
            found.append(subprocess.Popen(list(words), env=env, stderr=subprocess.PIPE, text=True))
        return found

    def differing(self, run_dir: Path) -> list[str]:
        """The visible checkpoints that are damaged, or not those of the undisturbed run, byte for byte."""
        return [
            path.name
            for path in [*run_dir.glob("checkpoint-*"), *run_dir.glob("best_model")]
            if verify(path)
            or content(path) != content(self.expected / f"checkpoint-{info(path)['step']}")
        ]

    def is_the_same(self, run_dir: Path) -> bool:
        """Whether a finished run is the undisturbed one: last state, best model, and every logged value."""
        names = (f"checkpoint-{TOTAL}", "best_model")
        same = all((run_dir / name / "state").is_dir() for name in names) and not self.differing(
            run_dir
        )
        same &= info(run_dir / names[0]) == info(self.expected / names[0])
        same &= info(run_dir / names[1]) == info(self.expected / names[1])
        return same and values(run_dir) == values(self.expected)


def ended(processes: list[subprocess.Popen[str]], timeout: float = 600) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    return [(process.returncode, err) for process, err in zip(processes, errors, strict=True)]


def verify(checkpoint: Path) -> str | None:
    """The damage; imported here, for as a script this file is to start fast."""
    from l1_jax.checkpoint.manifest import find_damage

    return find_damage(checkpoint)


def info(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "checkpoint.json").read_text())


def content(checkpoint: Path) -> dict[str, bytes]:
    """Every array file of a checkpoint; what Orbax writes with the time in it is left out."""
    timed = ("_CHECKPOINT_METADATA", "commit_success.txt")
    files = [
        path
        for path in (checkpoint / "state").rglob("*")
        if path.is_file() and path.name not in timed
    ]
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in files}


def rows(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def values(run_dir: Path) -> list[dict]:
    """The rows without the speed, which is no value of the run."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(run_dir)]


def last_step(run_dir: Path) -> int:
    return max((row["step"] for row in rows(run_dir)), default=0)


def newest(run_dir: Path) -> int:
    """The step from which the next start goes on."""
    return max(
        (info(path.parent)["step"] for path in run_dir.glob("[cb]*/checkpoint.json")), default=0
    )


def wait_for_step(run_dir: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    while last_step(run_dir) < step:
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.02)


class Kills(NamedTuple):
    """What came of them."""

    hits: dict[str, int]  # by their aim
    inside: int  # those that left a part of a save, of a replacement or of a deletion
    bad: int  # visible checkpoints
    finished: int  # runs
    different: int  # of these
    most_lost: int  # steps, from the last save that had begun
    meanwhile: int  # steps since then


def kill(runs: Runs, count: int, seed: int, aims: dict[str, float]) -> Kills:
    """SIGKILL at `count` seeded moments, `aims` says with which weight at what; each resume is the next victim."""
    chance, hits = random.Random(seed), dict.fromkeys(aims, 0)
    bad, different, finished, most_lost, meanwhile, inside = 0, 0, 0, 0, 0, 0
    run_dir = runs.home / f"killed-{seed}-{finished}"
    while sum(hits.values()) < count:
        (aim,) = chance.choices(list(aims), list(aims.values()))
        pattern, operations = AIMS[aim]
        number = chance.randint(1, operations) if operations else 0
        delay = (
            chance.uniform(0, 15) if not number else chance.choice([0, 0, chance.uniform(0, 0.2)])
        )
        ((code, err),) = ended(runs.start(run_dir, victim=(pattern, number, delay)))
        if code == 0:  # the moment never came: this run is done, and the next one begins
            different += not runs.is_the_same(run_dir)
            finished += 1
            run_dir = runs.home / f"killed-{seed}-{finished}"
            continue
        assert code == -signal.SIGKILL, err
        hits[aim] += 1
        inside += any(
            next(run_dir.glob(f".{part}-*"), None) for part in ("saving", "old", "deleting")
        )
        bad += len(runs.differing(run_dir))
        # What is done while a save is being written is not yet in one.
        unfinished = [int(path.name.split("-")[1]) for path in run_dir.glob(".saving-*")]
        begun = max([newest(run_dir), *unfinished]) if unfinished else last_step(run_dir)
        most_lost = max(most_lost, begun - newest(run_dir))
        meanwhile = max(meanwhile, last_step(run_dir) - begun)
    ((code, err),) = ended(runs.start(run_dir))
    assert code == 0, err
    different += not runs.is_the_same(run_dir)
    return Kills(hits, inside, bad, finished + 1, different, most_lost, meanwhile)


def killed(runs: Runs, count: int, seeds: list[int], aims: dict[str, float]) -> Row:
    """`kill` with each of the seeds, side by side; together `count` of them."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda seed: kill(runs, count // len(seeds), seed, aims), seeds))
    hits = {aim: sum(one.hits[aim] for one in found) for aim in aims}
    inside, bad, finished, different = (sum(one[i] for one in found) for i in (1, 2, 3, 4))
    most_lost, meanwhile = (max(one[i] for one in found) for i in (5, 6))
    where = ", ".join(f"{number} {aim}" for aim, number in hits.items())
    figure = (
        f"{count} killed (aimed at: {where}), {inside} inside saves, {count} resumed; {bad} bad visible steps; "
        f"{finished} runs finished, {different} not bit-identical; at most {most_lost} steps lost "
        f"(and {meanwhile} done while a save was written)"
    )
    bar = f"all resumed, 0 bad visible steps, bit-identical, lost <= save_steps = {SAVE_STEPS}"
    passed = not bad and not different and most_lost <= SAVE_STEPS and inside >= 0.3 * count
    return f"kill -9 at {count} seeded moments", bar, figure, passed


def prepare_killed(home: Path, stride: int) -> Row:
    """SIGKILL of prepare_data.py at its file operations, at every one or every so many, over what is there already."""
    from l1_jax.data.prepare import prepare

    def tree(path: Path) -> dict[str, bytes]:
        return {
            p.relative_to(path).as_posix(): p.read_bytes()
            for p in sorted(path.rglob("*"))
            if p.is_file()
        }

    home /= "prepare"
    home.mkdir()
    (home / "raw.txt").write_text("".join(f"line {i} of a text\n" for i in range(2000)))
    settings: dict = {"tokenizer": "bytes", "overwrite": True}
    whole = []
    for seed in (1, 2):
        prepare([home / "raw.txt"], home / "out", vocab_size=257, seed=seed, **settings)
        whole.append(tree(home / "out"))
    killed = broken = hidden = code = 0
    for operation in itertools.count(1, stride):
        command = [
            sys.executable,
            __file__,
            home,
            operation,
            0,
            ROOT / "scripts" / "prepare_data.py",
        ]
        command += [
            "--input",
            home / "raw.txt",
            "--output",
            home / "out",
            "--seed",
            operation // stride % 2 + 1,
        ]
        command += ["--tokenizer", "bytes", "--vocab-size", 257, "--overwrite"]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if (code := result.returncode) != -signal.SIGKILL:
            break
        killed += 1
        name = "out" if (home / "out").exists() else ".old-out"  # the second between two renames
        hidden += name != "out"
        broken += tree(home / name) not in whole
    left = sorted(path.name for path in home.iterdir())
    works = code == 0 and left == ["out", "raw.txt"] and tree(home / "out") in whole
    figure = f"{killed} killed, {broken} broken outputs ({hidden} of the whole ones under the name .old-out); the next "
    figure += (
        "call leaves it whole and nothing beside it" if works else f"call FAILS: {code}, {left}"
    )
    fault = f"kill -9 of prepare_data at {'each' if stride == 1 else f'every {stride}th'} of its file operations"
    return fault, "the old output or the new one, the next call works", figure, works and not broken


def stopped(runs: Runs, count: int, seed: int) -> Row:
    """SIGTERM at `count` seeded moments, each to one of the processes."""
    chance, codes, lost, slowest, run_dir = (
        random.Random(seed),
        [],
        0,
        0.0,
        runs.home / f"stopped-{runs.processes}",
    )
    for _ in range(count):
        if last_step(run_dir) > TOTAL - 40:
            assert all(code == 0 for code, _ in ended(runs.start(run_dir)))
            run_dir = run_dir.with_name(f"{run_dir.name}-again")
        processes, at = runs.start(run_dir), last_step(run_dir) + chance.randint(1, 20)
        wait_for_step(run_dir, at, processes)
        began = time.monotonic()
        chance.choice(processes).send_signal(signal.SIGTERM)
        codes += [code for code, _ in ended(processes)]
        slowest = max(slowest, time.monotonic() - began)
        lost += last_step(run_dir) - newest(run_dir)
    finished = ended(runs.start(run_dir))
    assert all(code == 0 for code, _ in finished), finished
    same, saved = runs.is_the_same(run_dir), codes == [75] * count * runs.processes
    words = "bit-identical" if same else "NOT bit-identical"
    figure = f"{count} signals, exit codes {set(codes)}, {lost} steps lost, {slowest:.1f} s at most; the end {words}"
    fault = f"SIGTERM x {count}, {runs.processes} process{'es' * (runs.processes > 1)}"
    return fault, "all saved, exit 75, 0 steps lost", figure, saved and same and not lost


def twice(runs: Runs) -> Row:
    """A second run in the directory of a live one."""
    run_dir = runs.home / "twice"
    first = runs.start(run_dir)
    wait_for_step(run_dir, 1, first)
    ((code, err),) = ended(runs.start(run_dir))
    first_code, _ = ended(first)[0]
    named = f"by process {first[0].pid} on {socket.gethostname()}" in err
    passed = (code, first_code, named) == (75, 0, True) and runs.is_the_same(run_dir)
    figure = f"exit {code}, {'naming' if named else 'NOT naming'} host and process; the first unharmed: {passed}"
    return "two runs on one directory", "the second refused, the first unharmed", figure, passed


def lost_peer(runs: Runs, number: int, which: int, seconds: float = 90) -> Row:
    """Process `which` of two gets signal `number`; the other has to end, and a resume to be the undisturbed run."""
    name = signal.Signals(number).name
    run_dir = runs.home / f"peer-{name}-{which}"
    processes = runs.start(run_dir)
    wait_for_step(run_dir, 45, processes)
    began = time.monotonic()
    processes[which].send_signal(number)
    code = processes[1 - which].wait(600)
    took = time.monotonic() - began
    processes[which].kill()
    ended(processes)
    codes = [code for code, _ in ended(runs.start(run_dir))]
    same = codes == [0, 0] and runs.is_the_same(run_dir)
    figure = f"the other ended after {took:.0f} s with {code}; resumed, the end {'is' if same else 'is NOT'} the same"
    bar = f"ended in {seconds:.0f} s, non-zero, resumed"
    return (
        f"process {which} of two gets {name}",
        bar,
        figure,
        took < seconds and code not in (0, 75) and same,
    )


def failed_save(runs: Runs) -> Row:
    """One of two processes cannot write its part of a checkpoint."""
    run_dir = runs.home / "failed-save"
    began = time.monotonic()
    found = ended(
        runs.start(run_dir, "training.on_save_error=warn", victim=("no room", SAVE_STEPS, 0))
    )
    took = time.monotonic() - began
    said = f"step {SAVE_STEPS} could not be saved" in found[0][1]
    names = sorted(path.name for path in run_dir.glob("[cb]*/"))
    good = names == ["best_model", "checkpoint-80", "checkpoint-90"] and not any(
        verify(run_dir / n) for n in names
    )
    codes = [code for code, _ in found]
    figure = f"exit codes {codes} after {took:.0f} s, {'said' if said else 'NOT said'}; the later steps verify: {good}"
    bar = "known to both, training goes on, the next saves work"
    return (
        "process 1 of two cannot write its arrays, on_save_error: warn",
        bar,
        figure,
        codes == [0, 0] and said and good,
    )


def campaign(full: bool) -> list[Row]:
    """(fault, bar, figure, passed) of each."""
    import tempfile

    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as home:
        found = [prepare_killed(Path(home), 1 if full else 8)]
        one = Runs(Path(home))
        aims = (
            {"save": 4.0, "best model": 2.0, "deletion": 2.0, "any": 2.0} if full else {"save": 1.0}
        )
        found += [
            killed(one, 100 if full else 2, [1, 4] if full else [1], aims),
            stopped(one, 20 if full else 1, 2),
        ]
        if full:
            two = Runs(Path(home), processes=2)
            found += [stopped(two, 20, 3), twice(one), failed_save(two)]
            found += [
                lost_peer(two, number, i)
                for number in (signal.SIGKILL, signal.SIGSTOP)
                for i in (1, 0)
            ]
    return found


def die(delay: float) -> None:
    """Ends this process by SIGKILL, after so many seconds."""

    def kill() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    if delay:
        threading.Thread(target=kill, daemon=True).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def fail_to_save(step: int) -> None:
    """Lets process 1 write no long file while it saves `step`."""
    import resource

    sys.path.insert(0, str(ROOT))
    from l1_jax.checkpoint.saver import Saver
    from l1_jax.devices.processes import is_main

    save, publish, free = Saver.save, Saver._publish, resource.RLIM_INFINITY

    def limited_save(saver, state, info, *more):  # type: ignore[no-untyped-def]
        if info.step == step and not is_main():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, free))
        save(saver, state, info, *more)

    def limited_publish(saver, *args):  # type: ignore[no-untyped-def]
        try:
            publish(saver, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))

    Saver.save, Saver._publish = limited_save, limited_publish  # type: ignore[method-assign]


if __name__ == "__main__":
    PATTERN, N, DELAY = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    sys.argv = sys.argv[4:]
    seen = 0

    def watch(event: str, args: tuple) -> None:
        global seen
        is_file = event == "open" or event.startswith(("os.", "shutil."))
        if is_file and PATTERN in " ".join(str(arg) for arg in args[:2]):
            seen += 1
            if seen == N:
                die(DELAY)

    if PATTERN == "no room":
        fail_to_save(N)
    elif N:
        sys.addaudithook(watch)
    else:
        die(DELAY)
    runpy.run_path(sys.argv[0], run_name="__main__")
