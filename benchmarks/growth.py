#!/usr/bin/env python3
"""How a step grows with the model, the batch and the devices: `python benchmarks/growth.py --plot FILE.svg`.

One thing grows at a time, from `--config`: depth, width (heads of one size), length, rows of the batch, and simulated
CPU devices that share the machine's cores and one batch, where a step as long as on one device loses nothing. Each
point is a process of `train_step.py`. Step time is its median, memory is the compiler's count for a device, compile
time that of a cold cache. `--plot` needs matplotlib.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_step import find_config, positive  # and the path to l1_jax

from l1_jax.commands.flags import Parser
from l1_jax.commands.runner import run_command
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import load_config
from l1_jax.errors import RunError, UserError

VALUES = {
    "depth": (2, 4, 8, 16, 32),
    "width": (128, 256, 512, 1024),
    "length": (128, 256, 512, 1024, 2048),
    "batch": (2, 4, 8, 16, 32),
    "devices": (1, 2, 4, 8),
}
ROWS = {"step": "step, s", "memory": "memory of a device, GiB", "compile": "compile, s"}


def overrides_for(config: Config) -> dict[str, Callable[[int], list[str]]]:
    """By what grows: the keys for a value of it."""
    model, rows = config.model, config.training.batch_size
    assert isinstance(rows, int)
    return {
        "depth": lambda n: [f"model.n_layers={n}"],
        "width": lambda n: [
            f"model.n_embd={n}",
            f"model.n_heads={max(1, n * model.n_heads // model.n_embd)}",
        ],
        "length": lambda n: [f"model.max_seq_length={n}"],
        "batch": lambda n: [f"training.batch_size={n}"],
        "devices": lambda n: [f"training.batch_size={rows // n}"],
    }


def measure(config: str, overrides: list[str], devices: int, rounds: int) -> dict[str, float]:
    """What `train_step.py` says of one point: `step` and `compile` in seconds, `memory` in bytes."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("train_step.py")),
        "--config",
        config,
        "--json",
    ]
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    env = os.environ | ({"XLA_FLAGS": flags} if devices > 1 else {})
    command += ["--rounds", str(rounds), *overrides]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RunError(
            f"{' '.join(overrides)} ended with exit code {done.returncode}",
            "See above",
            [done.stderr],
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "step": found["l1_jax"]["step"],
        "memory": found["compiler_memory"],
        "compile": found["compile"],
    }


def plot(found: dict[str, dict[int, dict[str, float]]], title: str, path: Path) -> None:
    """A column for each thing that grows, a row for each figure; dashed is growth in proportion."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"], plt.rcParams["svg.fonttype"] = "l1_jax", "none"
    figure, axes = plt.subplots(
        len(ROWS), len(found), figsize=(3 * len(found), 7), squeeze=False, layout="constrained"
    )
    for column, (grows, points) in enumerate(found.items()):
        for row, (figure_name, label) in enumerate(ROWS.items()):
            unit = 2**30 if figure_name == "memory" else 1
            x, y = list(points), [point[figure_name] / unit for point in points.values()]
            panel: Any = axes[row][column]
            panel.plot(x, y, marker="o")
            panel.plot(
                x, [y[-1] * n / x[-1] for n in x], linestyle="--", linewidth=0.8, color="grey"
            )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set_ylim(min(y) / 2, max(y) * 2)
            panel.set_xticks(x, map(str, x))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set_xlabel(grows if row == len(ROWS) - 1 else "")
            panel.set_ylabel(label if column == 0 else "")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str]) -> int:
    parser = Parser("Measures how a training step grows.")
    parser.add_argument(
        "--config",
        default="cpu_5m_256",
        metavar="NAME",
        help="a file, or a name in configs/ or here",
    )
    parser.add_argument("--only", choices=tuple(VALUES), help="the one thing that grows")
    parser.add_argument("--values", type=positive, nargs="+", metavar="N", help="its values")
    parser.add_argument(
        "--rounds", type=positive, default=5, metavar="N", help="steps of each point"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the figures, as .svg or .png"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    overrides, args = parser.parse_overrides(argv)
    if args.values and not args.only:
        raise UserError("--values is given, and not what they are of", "Add --only")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib", "Run: pip install matplotlib")
    path = find_config(args.config)
    config = load_config(path, overrides)
    rows, devices = (
        config.training.batch_size,
        args.values if args.only == "devices" and args.values else (),
    )
    if not isinstance(rows, int) or any(rows % value for value in devices):
        raise UserError(
            f"--values: training.batch_size {rows} is not divided by each", "Give divisors of it"
        )
    keys = overrides_for(config)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for grows in [args.only] if args.only else VALUES:
        for value in args.values or VALUES[grows]:
            devices = value if grows == "devices" else 1
            point = measure(str(path), overrides + keys[grows](value), devices, args.rounds)
            found.setdefault(grows, {})[value] = point
            if not args.json:
                text = f"step {1000 * point['step']:9.1f} ms{point['memory'] / 2**20:10,.0f} MiB"
                print(f"{grows:8} {value:5}  {text}  compile {point['compile']:5.1f} s", flush=True)
    if args.plot:
        plot(found, f"{args.config} on {os.cpu_count()} cores; dashed: in proportion", args.plot)
    if args.json:
        print(json.dumps({"config": args.config, "overrides": overrides} | found))
    return 0


if __name__ == "__main__":
    run_command(main)
