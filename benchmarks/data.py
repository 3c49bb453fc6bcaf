#!/usr/bin/env python3
"""How fast batches are made, and how long a step waits for one: `python benchmarks/data.py --config NAME`.

The stream is random tokens in a memory-mapped file, with the end of a document every 500 tokens or so. Two things are
measured:

- the pipeline alone: batches of B sequences, read, cut, hashed and masked on one thread and put on the device, with and
  without `data.document_mask`;
- the loop: the real training step of the config with its batches prefetched, as `train.py` does it, and the share of
  the time in which it waits for a batch.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from train_step import find_config, positive, timed  # and the path to l1_jax

from l1_jax.commands.flags import Parser
from l1_jax.commands.runner import run_command
from l1_jax.config.schema import Config
from l1_jax.errors import UserError

EOT, DOCUMENT_TOKENS = 0, 500


def make_stream(path: Path, num_tokens: int, vocab_size: int) -> np.ndarray:
    """A memory-mapped file of random tokens, and end-of-text tokens among them."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, vocab_size, num_tokens, np.uint16)
    tokens[random.integers(0, num_tokens, num_tokens // DOCUMENT_TOKENS)] = EOT
    tokens.tofile(path)
    return np.memmap(path, np.uint16, "r")


def pipeline_rates(
    config: Config, stream: np.ndarray, sizes: list[int], length: int, seconds: float
) -> list[dict[str, Any]]:
    """Batches and tokens a second of each size, with and without a mask of documents."""
    import jax

    from l1_jax.config.stages import Stage
    from l1_jax.data.batches import TrainingBatches
    from l1_jax.data.sources import TokenSource
    from l1_jax.devices.select import select_devices
    from l1_jax.parallel.mesh import create_mesh
    from l1_jax.parallel.placement import put_batch

    mesh, found = create_mesh(config.parallelism, select_devices(config.training.device)), []
    for size in sizes:
        for masked in (False, True):
            source = TokenSource(stream, EOT, document_mask=masked, digest="")
            batches = TrainingBatches(source, (Stage(0, size, length),), seed=0)

            def make(step: int, batches: TrainingBatches = batches, size: int = size) -> None:
                batch = batches(step, range(size))
                placed = put_batch(
                    batch, batches.dims, rows=range(size), mesh=mesh, global_batch_size=size
                )
                jax.block_until_ready(placed)

            first = timed(lambda make=make: make(0))[0]
            count = min(max(3, int(seconds / first)), 1000)
            median = statistics.median(
                timed(lambda step=step, make=make: make(step))[0] for step in range(1, count)
            )
            row = {"batch_size": size, "document_mask": masked, "batches_per_second": 1 / median}
            found.append(row | {"tokens_per_second": size * length / median})
    return found


def loop_waits(config: Config, stream: np.ndarray, steps: int) -> dict[str, float]:
    """Seconds of a median step and wait, and the share of the whole time that was waited."""
    import jax

    from l1_jax.config.resolve import Facts, rows_of_stream, stages
    from l1_jax.data.batches import Prefetch, TrainingBatches
    from l1_jax.data.sources import TokenSource
    from l1_jax.devices.memory import memory_limit
    from l1_jax.devices.select import select_devices
    from l1_jax.parallel.mesh import create_mesh
    from l1_jax.parallel.placement import process_rows, put_batch, put_flag
    from l1_jax.planner.batch_size import resolve_auto
    from l1_jax.training.program import make_program

    mesh = create_mesh(config.parallelism, select_devices(config.training.device))
    with jax.set_mesh(mesh):
        facts = Facts(
            vocab_size=config.model.vocab_size,
            num_rows=rows_of_stream(len(stream)),
            mesh_shape=dict(mesh.shape),
            platform=mesh.devices.flat[0].platform,
        )
        limit_bytes = memory_limit(mesh.local_devices)
        config = resolve_auto(config, facts, mesh, limit_bytes)
        program, size = make_program(config, mesh), config.training.global_batch_size
        assert size
        rows, stop = process_rows(mesh, size), {"stop": put_flag(False, mesh)}
        source = TokenSource(stream, EOT, document_mask=config.data.document_mask, digest="")
        batches = TrainingBatches(source, stages(config), seed=0)

        def place(step: int) -> dict[str, jax.Array]:
            batch = batches(step, rows)
            return put_batch(batch, program.dims, rows=rows, mesh=mesh, global_batch_size=size)

        load = Prefetch(place, steps + 2)
        state = program.create()
        train_step = program.train_step.lower(state, {}, load(0) | stop).compile()
        waits, times = [], []
        for step in range(1, steps + 2):
            wait, batch = timed(lambda step=step: load(step))
            seconds, (state, metrics) = timed(
                lambda state=state, batch=batch: train_step(state, {}, batch | stop)
            )
            waits.append(wait)
            times.append(wait + seconds + timed(lambda metrics=metrics: jax.device_get(metrics))[0])
        load.close()
    median, wait = (
        statistics.median(times[1:]),
        statistics.median(waits[1:]),
    )  # the first step is slower
    return {"step": median, "wait": wait, "wait_share": sum(waits[1:]) / sum(times[1:])}


def main(argv: list[str]) -> int:
    parser = Parser("Measures how fast batches are made, and how long a step waits for one.")
    parser.add_argument(
        "--config", default="cpu_5m_256", metavar="NAME", help="of the loop: a file, or a name"
    )
    sizes = (8, 32, 128, 512)
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=sizes, metavar="B", help="sequences of a batch"
    )
    parser.add_argument(
        "--length", type=positive, default=1024, metavar="T", help="tokens of a sequence"
    )
    parser.add_argument(
        "--tokens", type=positive, default=20_000_000, metavar="N", help="of the stream"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="about so long for each size"
    )
    parser.add_argument(
        "--steps", type=positive, default=20, metavar="N", help="measured steps of the loop"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    overrides, args = parser.parse_overrides(argv)

    from l1_jax.config.yaml_file import load_config
    from l1_jax.devices.select import keep_freed_memory

    if args.tokens <= max(args.sizes) * args.length:
        raise UserError(
            f"--tokens {args.tokens} is less than one batch",
            "Give more, or smaller --sizes and --length",
        )
    config = load_config(find_config(args.config), overrides)
    if config.training.device in ("auto", "cpu"):
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as place:
        stream = make_stream(Path(place, "tokens"), args.tokens, config.model.vocab_size)
        rates = pipeline_rates(config, stream, args.sizes, args.length, args.seconds)
        waits = loop_waits(config, stream, args.steps)
    if args.json:
        print(
            json.dumps(
                {"config": args.config, "overrides": overrides, "pipeline": rates, "loop": waits}
            )
        )
        return 0
    print(f"{'sequences':>9}{'mask':>6}{'batches/s':>11}{'tokens/s':>14}")
    for row in rates:
        mask = "yes" if row["document_mask"] else "no"
        print(
            f"{row['batch_size']:>9}{mask:>6}{row['batches_per_second']:>11,.1f}{row['tokens_per_second']:>14,.0f}"
        )
    print(
        f"a step of {args.config} takes {1000 * waits['step']:.1f} ms, of which it waits for its batch "
        f"{1000 * waits['wait']:.3f} ms; {waits['wait_share']:.3%} of the time of all"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
