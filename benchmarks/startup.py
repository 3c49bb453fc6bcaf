#!/usr/bin/env python3
"""From the command to the first training step, with cold and warm programs: `python benchmarks/startup.py`.

Each start is a process of its own that does what `scripts/train.py` does until its first step is done. A cold one has
an empty directory of compiled programs, a warm one that of the cold one before. With `--against torch` also the first
step of the same model in PyTorch under `torch.compile`, with empty caches. The parts of a start:

- `import`: from the start of the process until everything is imported;
- `data`: opening the prepared directory and comparing its hashes;
- `mesh`: starting the devices;
- `state`: the state of step 0, whose program is compiled or loaded too;
- `compile`: tracing, lowering, and compiling or loading the training step;
- `first step`: with its batch.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train_step import (  # and the path to l1_jax
    check_is_gpt2,
    find_config,
    make_torch_step,
    positive,
    resolved,
    timed,
)

from l1_jax.commands.flags import Parser
from l1_jax.commands.runner import run_command
from l1_jax.errors import RunError

PARTS = ("import", "data", "mesh", "state", "compile", "first step")
Seconds = dict[str, float]


def start_ours(begun: float, config_path: str, overrides: list[str]) -> None:
    """Starts a run and prints the seconds of each part; `begun` is when the process was, on the same clock."""
    import jax

    from l1_jax.checkpoint.run_directory import RunDirectory
    from l1_jax.config.yaml_file import load_config
    from l1_jax.data.store import FOR_TRAINING, Prepared
    from l1_jax.devices.compiled import keep_compiled
    from l1_jax.devices.select import keep_freed_memory, select_devices
    from l1_jax.parallel.mesh import create_mesh
    from l1_jax.parallel.placement import put_flag
    from l1_jax.run.setup import set_up
    from l1_jax.run.start import Request, Start

    times = [begun, time.perf_counter()]
    config = load_config(config_path, overrides)
    prepared = Prepared.open(config.data.path)
    prepared.check(FOR_TRAINING, (0, 1))
    times.append(time.perf_counter())
    if config.training.device in ("auto", "cpu"):
        keep_freed_memory()
    mesh = create_mesh(config.parallelism, devices := select_devices(config.training.device))
    keep_compiled(devices)
    times.append(time.perf_counter())
    with jax.set_mesh(mesh):
        home = RunDirectory(config.training.output_dir)
        run = set_up(Start(Request(config), prepared, mesh, home))
        jax.block_until_ready(run.state)
        times.append(time.perf_counter())
        batch = run.batches(0) | {"stop": put_flag(False, mesh)}
        train_step = run.train_step.lower(run.state, {}, batch).compile()
        times.append(time.perf_counter())
        jax.device_get(train_step(run.state, {}, batch)[1])
        times.append(time.perf_counter())
    run.batches.close()
    run.saver.close()
    print(json.dumps(dict(zip(PARTS, (b - a for a, b in itertools.pairwise(times)), strict=True))))


def start_torch(config_path: str, overrides: list[str]) -> None:
    """Prints the seconds of the first step in PyTorch, `torch.compile` in it."""
    from l1_jax.config.yaml_file import load_config

    config = load_config(config_path, overrides)
    check_is_gpt2(config)
    step = make_torch_step(resolved(config)[0])
    print(json.dumps({"compile": timed(lambda: step(1))[0]}))


def start(kind: str, arguments: list[str], **variables: str) -> Seconds:
    """What a process of this file printed."""
    command = [
        sys.executable,
        __file__,
        "--start",
        kind,
        "--begun",
        str(time.perf_counter()),
        *arguments,
    ]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise RunError(
            f"a start ended with exit code {done.returncode}", "See above", done.stderr.splitlines()
        )
    return json.loads(done.stdout.splitlines()[-1])


def prepare_bytes(place: Path) -> str:
    """A small prepared directory whose tokens are bytes."""
    from l1_jax.data.prepare import prepare

    text = place / "text.txt"
    text.write_text(
        "".join(f"{number} times {number} is {number * number}\n" for number in range(20_000))
    )
    prepare([str(text)], str(place / "data"), vocab_size=257, seed=0, tokenizer="bytes")
    return str(place / "data")


def main(argv: list[str]) -> int:
    parser = Parser("Measures the time from the command to the first training step.")
    parser.add_argument(
        "--config",
        default="cpu_5m_256",
        metavar="NAME",
        help="a file, or a name in configs/ or here",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="a prepared directory; without it a small one is made"
    )
    parser.add_argument(
        "--against", choices=("torch",), help="also torch.compile of the same model"
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, metavar="N", help="cold and warm starts of each"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument(
        "--start", choices=("ours", "torch"), help="for this program itself: be one of the starts"
    )
    parser.add_argument("--begun", type=float, help="for this program itself: when that was")
    overrides, args = parser.parse_overrides(argv)
    path = str(find_config(args.config))
    if args.start == "ours":
        start_ours(args.begun, path, overrides)
        return 0
    if args.start == "torch":
        start_torch(path, overrides)
        return 0

    starts: dict[str, list[Seconds]] = {"cold": [], "warm": []} | (
        {"torch": []} if args.against else {}
    )
    with tempfile.TemporaryDirectory() as place:
        data = args.data or prepare_bytes(Path(place))
        arguments = ["--config", path, *overrides]
        ours = [*arguments, f"data.path={data}", f"training.output_dir={place}/run"]
        for number in range(args.rounds):
            for kind in ("cold", "warm"):
                starts[kind].append(
                    start("ours", ours, JAX_COMPILATION_CACHE_DIR=f"{place}/{number}")
                )
            if args.against:
                starts["torch"].append(
                    start("torch", arguments, TORCHINDUCTOR_CACHE_DIR=f"{place}/torch-{number}")
                )
    found = {
        kind: {part: statistics.median(seconds[part] for seconds in rows) for part in rows[0]}
        for kind, rows in starts.items()
    }
    ratios = {"warm to cold": found["warm"]["compile"] / found["cold"]["compile"]}
    if args.against:
        ratios["cold to torch.compile"] = found["cold"]["compile"] / found["torch"]["compile"]
    if args.json:
        print(
            json.dumps(
                {"config": args.config, "overrides": overrides, "starts": starts, "ratios": ratios}
                | found
            )
        )
        return 0
    print(f"medians of {args.rounds} starts, s\n{'':12}{'cold':>8}{'warm':>8}")
    for part in PARTS:
        print(f"{part:12}{found['cold'][part]:>8.2f}{found['warm'][part]:>8.2f}")
    print(f"{'in all':12}{sum(found['cold'].values()):>8.2f}{sum(found['warm'].values()):>8.2f}")
    if args.against:
        print(f"the first step with torch.compile: {found['torch']['compile']:.2f}")
    for name, ratio in ratios.items():
        print(f"compile, {name}: {ratio:.2f}")
    return 0


if __name__ == "__main__":
    run_command(main)
