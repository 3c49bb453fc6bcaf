"""NaN and inf, put into the loss, the gradient, a parameter or a moment of real runs at seeded steps."""

import contextlib
import dataclasses
import functools
import io
import json
import pydoc_data.topics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from l1_jax.config.yaml_file import config_from_text
from l1_jax.data.batches import Prefetch
from l1_jax.data.prepare import prepare
from l1_jax.errors import RunError
from l1_jax.objectives.next_token import NextToken
from l1_jax.objectives.objective import Terms
from l1_jax.parallel.sharding import named
from l1_jax.run import loop, setup, start, train
from l1_jax.training.step import make_eval_step

STEPS, SAVE_STEPS = 12, 4
CONFIG = f"""
model: {{max_seq_length: 16, n_layers: 2, n_heads: 2, n_embd: 16}}
training: {{global_batch_size: 8, learning_rate: 0.01, max_steps: {STEPS}, schedule_steps: {STEPS}, eval_batches: 1,
  eval_steps: 6, save_steps: {SAVE_STEPS}, save_total_limit: 9, logging_steps: 1}}
"""


def tiny_data(path: Path) -> Path:
    """A prepared directory of some English."""
    text = path.with_suffix(".txt")
    text.write_text(
        "\n".join(" ".join(topic.split())[:2000] for topic in pydoc_data.topics.topics.values())
    )
    prepare([str(text)], str(path), vocab_size=300, tokenizer="bytes")
    return path


@jax.custom_vjp
def _add_to_gradient(x: jax.Array, _: jax.Array) -> jax.Array:
    return x


_add_to_gradient.defvjp(lambda x, extra: (x, extra), lambda extra, g: (g + extra, None))


@contextlib.contextmanager
def poisoned(poisons: Mapping[int, tuple[float, float]]) -> Iterator[None]:
    """Adds to the loss and to a gradient of some steps: {step: (to the loss, to the gradient)}."""
    plain = NextToken.__call__

    def terms_of(
        self: NextToken, graphdef: Any, params: Any, borrowed: Any, batch: Any, keys: Any = None
    ) -> Terms:
        if (poison := batch.get("poison")) is None:  # validation
            return plain(self, graphdef, params, borrowed, batch, keys)
        table = _add_to_gradient(params["token_embedding"], poison[1])
        poisoned_params = params | {"token_embedding": table}
        terms = plain(self, graphdef, poisoned_params, borrowed, batch, keys)
        return terms._replace(loss=terms.loss + poison[0] * self.weight(batch))

    def prefetch(load: Any, end: int) -> Prefetch:
        def load_poisoned(step: int) -> Any:
            batch = load(step)
            place = named(batch["tokens"].sharding.mesh)
            return batch | {
                "poison": jax.device_put(np.array(poisons.get(step + 1, (0, 0)), np.float32), place)
            }

        return Prefetch(load_poisoned, end)

    with (
        mock.patch.object(NextToken, "__call__", terms_of),
        mock.patch.object(setup, "Prefetch", prefetch),
    ):
        yield


@contextlib.contextmanager
def corrupted(step: int, bad: float, choose: np.random.Generator) -> Iterator[None]:
    """Puts `bad` into one number of the parameters or moments after a step, as a fault of memory would."""
    accept = loop.accept

    def corrupting_accept(run: loop.Run, *others: Any, **metrics: Any) -> None:
        accept(run, *others, **metrics)
        if metrics["step"] == step:
            leaves, tree = jax.tree.flatten((run.state.params, run.state.opt_state))
            which = choose.choice([i for i, leaf in enumerate(leaves) if leaf.ndim])
            with jax.transfer_guard("allow"):
                values = np.array(leaves[which])
                values.flat[choose.integers(values.size)] = bad
                leaves[which] = jax.device_put(values, leaves[which].sharding)
            params, opt_state = jax.tree.unflatten(tree, leaves)
            run.state = dataclasses.replace(run.state, params=params, opt_state=opt_state)

    with mock.patch.object(loop, "accept", corrupting_accept):
        yield


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Lets runs on one device that differ in nothing that is compiled share their compiled functions."""
    make_program = setup.make_program
    programs: dict[Any, Any] = {}

    class Compiled:
        def __init__(self, function: Any):
            self.function = function

        def __call__(self, *inputs: Any) -> Any:
            return self.function(*inputs)

        def lower(self, *_: Any) -> Any:
            return self

        compile = lower

    def make_once(config: Any, mesh: Any, **others: Any) -> Any:
        key = config.replace("training", output_dir="", max_steps=None, save_steps=1, eval_steps=1)
        key = key.replace("data", path="")
        if key not in programs:
            program = make_program(config, mesh, **others)
            programs[key] = program._replace(train_step=Compiled(program.train_step))
        return programs[key]

    cached = functools.cache(make_eval_step)
    patches = {"make_program": make_once, "make_eval_step": cached}
    with (
        mock.patch.multiple(setup, **patches),
        mock.patch.object(start, "select_devices", return_value=jax.devices()[:1]),
    ):
        yield


def arrays(checkpoint: Path) -> list[np.ndarray]:
    """All arrays of a checkpoint, read without our code."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as reader:
        return [
            x
            for name in ("params", "optimizer", "average")
            if (checkpoint / "state" / name).is_dir()
            for x in jax.tree.leaves(reader.restore(checkpoint / "state" / name))
        ]


def train_quietly(data: Path, run_dir: Path, *overrides: str, **flags: Any) -> str:
    """What ended a run: "done", "stopped" by a signal, or its error."""
    config = config_from_text(
        CONFIG, "", [f"data.path={data}", f"training.output_dir={run_dir}", *overrides]
    )
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return {0: "done", 75: "stopped"}[train.train(config, **flags)]
        except RunError as error:
            return str(error)


def _inject(
    data: Path, run_dir: Path, place: str, mode: str, bad: float, seed: int
) -> tuple[str, int, int]:
    """One fault in one run: how it ended, and how many checkpoints there are and are bad."""
    choose = np.random.default_rng(seed)
    step = int(choose.integers(2, STEPS))
    poison = (bad, 0.0) if place == "loss" else (0.0, bad)
    with contextlib.ExitStack() as faults:
        faults.enter_context(poisoned({} if place == "parameter" else {step: poison}))
        if place == "parameter":
            faults.enter_context(corrupted(step, bad, choose))
        said = train_quietly(data, run_dir, f"training.on_nonfinite={mode}")
    found = [info.parent for info in run_dir.glob("*/checkpoint.json")]
    num_bad = sum(not all(np.isfinite(x).all() for x in arrays(path)) for path in found)
    skipped = run_dir / "skipped.jsonl"
    steps = (
        [json.loads(row)["step"] for row in skipped.read_text().splitlines()]
        if skipped.exists()
        else []
    )
    if place == "parameter":
        right = "stopped" if "holds numbers that are not finite" in said else ""
    elif mode == "stop":
        right = (
            "stopped"
            if f"step {step} is not finite" in said and (run_dir / f"nonfinite-{step}").is_dir()
            else ""
        )
    else:
        right = "skipped" if (said, steps) == ("done", [step]) else ""
    return right or "missed", len(found), num_bad


def campaign(full: bool) -> list[tuple[str, str, str, bool]]:
    """A run for each place, mode, value and seed; see `_inject`."""
    outcomes, checkpoints, num_bad, runs = Counter[str](), 0, 0, 0
    with tempfile.TemporaryDirectory() as home, compiled_once():
        data = tiny_data(Path(home, "data"))
        for _ in range(8 if full else 1):
            for place in ("loss", "gradient", "parameter"):
                for mode in ("stop", "skip"):
                    for bad in (
                        (np.nan, np.inf, -np.inf)
                        if full
                        else (np.nan if mode == "stop" else np.inf,)
                    ):
                        runs += 1
                        outcome, found, bad_ones = _inject(
                            data, Path(home, f"run-{runs}"), place, mode, bad, runs
                        )
                        outcomes[outcome] += 1
                        checkpoints, num_bad = checkpoints + found, num_bad + bad_ones
    figure = f"{outcomes['stopped']} stopped and {outcomes['skipped']} skipped of {runs}; {num_bad} bad of {checkpoints}"
    passed = outcomes["missed"] == num_bad == 0
    bar = "stopped or skipped before the update, 0 bad checkpoints"
    return [("NaN and inf in loss, gradient, parameter", bar, f"{figure} checkpoints", passed)]


if __name__ == "__main__":
    print(campaign(full=True))
