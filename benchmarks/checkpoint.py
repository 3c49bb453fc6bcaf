#!/usr/bin/env python3
"""How long a save keeps the training loop waiting, beside `torch.save`: `python benchmarks/checkpoint.py`.

The state is the real one of a config, with random numbers for its moments. In the place of the training step stands the
cheapest that, like it, reads the whole state and writes the new one into the same memory: a save that keeps hold of
that memory is seen. A round has, one after the other:

- `step`: a step with nothing beside it;
- `blocked`: what the loop waits for at a save: the check that all is finite, `Saver.save`, and what the next step takes
  longer than the ones after it, beside which the save is written;
- `lost`: what the save costs in all: the time with it, less that of as many steps without;
- `whole`: from the start of a save until its checkpoint has its name, written, flushed to disk and hashed, with nothing
  beside it;
- `torch.save` of the same numbers as tensors, without and with a flush to disk (fsync).
"""

import json
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_step import find_config, positive, timed  # and the path to l1_jax

from l1_jax.commands.flags import Parser
from l1_jax.commands.runner import run_command
from l1_jax.config.schema import Config
from l1_jax.errors import check_writable

Seconds = dict[str, float]


def make_round(
    config: Config, place: Path, steps: int, against: bool
) -> tuple[Callable[[], Seconds], int]:
    """A function that does everything once and returns seconds by name; and the bytes of the state."""
    import jax

    from l1_jax.checkpoint.manifest import CheckpointInfo
    from l1_jax.checkpoint.names import CONFIG_FILE
    from l1_jax.checkpoint.saver import Saver
    from l1_jax.config.resolve import Facts, rows_of_stream
    from l1_jax.config.yaml_file import dump_config
    from l1_jax.devices.memory import memory_limit
    from l1_jax.devices.select import keep_freed_memory, select_devices
    from l1_jax.parallel.mesh import create_mesh
    from l1_jax.planner.batch_size import resolve_auto
    from l1_jax.run.guard import check_finite
    from l1_jax.training.program import make_program
    from l1_jax.training.state import to_trees

    if config.training.device in ("auto", "cpu"):
        keep_freed_memory()
    mesh = create_mesh(config.parallelism, select_devices(config.training.device))
    facts = Facts(
        vocab_size=config.model.vocab_size,
        num_rows=rows_of_stream(2**30),
        mesh_shape=dict(mesh.shape),
        platform=mesh.devices.flat[0].platform,
    )
    limit_bytes = memory_limit(mesh.local_devices)
    config = resolve_auto(config, facts, mesh, limit_bytes)
    program = make_program(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract)

    def fill(state: Any) -> Any:  # zeros, as the moments are at first, are written faster
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(state))))
        return jax.tree.map(
            lambda x: jax.random.normal(next(keys), x.shape, x.dtype) if x.ndim else x, state
        )

    options: dict[str, Any] = {"donate_argnums": 0, "out_shardings": shardings}
    step = jax.jit(lambda state: jax.tree.map(lambda x: -x, state), **options)
    with jax.set_mesh(mesh):
        states = [jax.jit(fill, **options)(program.create())]
    info, texts = CheckpointInfo(1, 1, "line", "", ""), {CONFIG_FILE: dump_config(config)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(to_trees(states[0])))

    def one_step() -> None:
        states[0] = jax.block_until_ready(step(states[0]))

    def save(saver: Saver) -> None:
        check_finite(states[0], mesh, 0)
        saver.save(to_trees(states[0]), info, ["checkpoint-0"])

    def one_round() -> Seconds:
        one_step()
        found = {"step": statistics.median(timed(one_step)[0] for _ in range(steps))}
        with Saver(place, keep=1, texts=texts) as saver:
            saving = timed(lambda: save(saver))[0]
            beside = [timed(one_step)[0] for _ in range(steps)]
            found["blocked"] = saving + max(beside[0] - statistics.median(beside[1:5]), 0)
            found["lost"] = saving + sum(beside) - steps * found["step"]
        with Saver(place, keep=1, texts=texts) as saver:
            found["whole"] = timed(lambda: (save(saver), saver.wait()))[0]
        shutil.rmtree(place / "checkpoint-0")
        if against:
            found |= torch_seconds(jax.device_get(to_trees(states[0])), place / "state.pt")
        return found

    return one_round, size


def torch_seconds(state: Any, path: Path) -> Seconds:
    """Seconds to write `state`, NumPy arrays in dicts, with `torch.save`: without and with a flush to disk."""
    import jax
    import torch

    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    tensors = {
        str(number): torch.from_numpy(leaf)
        for number, leaf in enumerate(jax.tree.leaves(state))
        if leaf.ndim
    }

    def save(flushes: bool) -> None:
        with open(path, "wb") as file:
            torch.save(tensors, file)
            if flushes:
                os.fsync(file.fileno())

    found = {}
    for name, flushes in (("torch.save", False), ("torch.save, fsync", True)):
        found[name] = timed(lambda flushes=flushes: save(flushes))[0]
        path.unlink()
    return found


def main(argv: list[str]) -> int:
    parser = Parser("Measures how long a save keeps the training loop waiting.")
    parser.add_argument(
        "--config",
        default="base_config",
        metavar="NAME",
        help="a file, or a name in configs/ or here",
    )
    parser.add_argument("--against", choices=("torch",), help="also torch.save of the same state")
    parser.add_argument(
        "--directory", default=tempfile.gettempdir(), metavar="PATH", help="on the disk to measure"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=5,
        metavar="N",
        help="how often; the first is not counted",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=40,
        metavar="N",
        help="steps, beside which a save is written",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    overrides, args = parser.parse_overrides(argv)

    from l1_jax.config.yaml_file import load_config

    config = load_config(find_config(args.config), overrides)
    check_writable(Path(args.directory), "--directory")
    with tempfile.TemporaryDirectory(dir=args.directory) as place:
        one_round, size = make_round(config, Path(place), args.steps, bool(args.against))
        one_round()
        rounds = [one_round() for _ in range(args.rounds)]
    found: dict[str, Any] = {
        name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]
    }
    if args.against:
        found["ratio"] = statistics.median(
            seconds["blocked"] / seconds["torch.save"] for seconds in rounds
        )
    if args.json:
        print(
            json.dumps(
                {"config": args.config, "overrides": overrides, "bytes": size, "rounds": rounds}
                | found
            )
        )
        return 0
    print(f"{size / 1e9:.2f} GB; medians of {args.rounds} rounds, s")
    for name in rounds[0]:
        times = [seconds[name] for seconds in rounds]
        print(f"{name:18}{found[name]:>9.3f}   ({min(times):.3f} to {max(times):.3f})")
    if args.against:
        print(f"the loop waits {found['ratio']:.3f} x as long as torch.save without fsync takes")
    return 0


if __name__ == "__main__":
    run_command(main)
