#!/usr/bin/env python3
"""The loss and its gradient beside that of plain logits: `python benchmarks/loss_head.py`.

Both get the hidden states of a batch and the head's table, and give the sum of the negative log-likelihoods and its
gradient with respect to both. The plain one makes the float32 logits of the whole batch and leaves the gradient to
jax. Memory is the compiler's count of what the program takes beside its arguments and results, and for the whole
training step with the one and the other all that it takes; calls of the two alternate.
"""

import json
import statistics
from typing import Any
from unittest import mock

from train_step import find_config, positive, resolved, timed  # and the path to l1_jax

from l1_jax.commands.flags import Parser
from l1_jax.commands.runner import run_command
from l1_jax.config.schema import Config


def plain_loss_sum(model: Any, x_BTD: Any, targets_BT: Any, weights_BT: Any, *_: Any) -> Any:
    """What `loss_sum` computes, from the logits of the whole batch."""
    import optax

    from l1_jax.objectives.cross_entropy import LossSums

    logits_BTV = model.logits(x_BTD)
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return LossSums((weights_BT * nll_BT).sum(), z_loss=None)


def step_bytes(config: Config, loss: Any) -> int:
    """Memory of the whole training step with this loss, by the compiler."""
    import jax

    from l1_jax.training.program import batch_shapes, make_program

    config, mesh = resolved(config)
    with jax.set_mesh(mesh), mock.patch("l1_jax.objectives.next_token.loss_sum", loss):
        program = make_program(config, mesh)
        memory = (
            program.train_step.lower(program.abstract, {}, batch_shapes(config, mesh))
            .compile()
            .memory_analysis()
        )
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def main(argv: list[str]) -> int:
    parser = Parser("Measures the loss and its gradient.")
    parser.add_argument(
        "--config",
        default="base_config",
        metavar="NAME",
        help="a file, or a name in configs/ or here",
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="B", help="sequences")
    parser.add_argument(
        "--calls", type=positive, default=3, metavar="N", help="measured calls of each"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    overrides, args = parser.parse_overrides(argv)

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from l1_jax.config.yaml_file import load_config
    from l1_jax.devices.select import keep_freed_memory
    from l1_jax.model.transformer import build
    from l1_jax.objectives.chunks import choose_num_chunks
    from l1_jax.objectives.cross_entropy import loss_sum

    keep_freed_memory()
    config = load_config(find_config(args.config), overrides)
    model = config.model
    length, width, vocab = model.max_seq_length, model.n_embd, model.padded_vocab_size
    graphdef, initialise, _ = build(model)
    params, keys = jax.jit(initialise)(jax.random.key(0)), jax.random.split(jax.random.key(1))
    table, rest = params.pop("token_embedding" if model.tie_embeddings else "head"), params
    x_BTD = jax.random.normal(keys[0], (args.batch, length, width))
    targets_BT = jax.random.randint(keys[1], (args.batch, length), 0, model.vocab_size)
    weights_BT = jnp.ones((args.batch, length))
    chunks = choose_num_chunks(args.batch, length, vocab)

    def network(table: jax.Array) -> nnx.Module:
        return nnx.merge(
            graphdef, rest | {"token_embedding" if model.tie_embeddings else "head": table}
        )

    def in_parts(x_BTD: jax.Array, table: jax.Array) -> jax.Array:
        return loss_sum(network(table), x_BTD, targets_BT, weights_BT, chunks).nll

    def plain(x_BTD: jax.Array, table: jax.Array) -> jax.Array:
        return plain_loss_sum(network(table), x_BTD, targets_BT, weights_BT).nll

    config = config.replace("training", batch_size=args.batch)
    whole = {"l1_jax": step_bytes(config, loss_sum), "plain": step_bytes(config, plain_loss_sum)}
    found: dict = {
        "config": args.config,
        "parts": chunks,
        "shape": [args.batch, length, width, vocab],
    }
    programs, seconds, losses = {}, {}, {}
    for name, function in (("l1_jax", in_parts), ("plain", plain)):
        programs[name] = jax.jit(jax.value_and_grad(function, (0, 1))).lower(x_BTD, table).compile()
        losses[name] = float(jax.block_until_ready(programs[name](x_BTD, table))[0])
        seconds[name] = []
    for _ in range(args.calls):
        for name, program in programs.items():
            seconds[name].append(
                timed(lambda program=program: jax.block_until_ready(program(x_BTD, table)))[0]
            )
    for name, program in programs.items():
        memory = program.memory_analysis().temp_size_in_bytes
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "bytes": memory,
            "loss": losses[name],
        }
        found[name]["step_bytes"] = whole[name]
    pairs = zip(seconds["l1_jax"], seconds["plain"], strict=True)
    found["time_ratio"] = statistics.median(ours / other for ours, other in pairs)
    found["memory_ratio"] = found["l1_jax"]["bytes"] / found["plain"]["bytes"]
    found["step_memory_ratio"] = whole["l1_jax"] / whole["plain"]
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"B {args.batch}, T {length}, D {width}, V {vocab}, float32; in {chunks} parts")
    print(f"{'':10}{'time, s':>10}{'memory, MiB':>14}{'whole step, MiB':>18}{'loss':>14}")
    for name in programs:
        row = found[name]
        sizes = f"{row['bytes'] / 2**20:>14,.0f}{row['step_bytes'] / 2**20:>18,.0f}"
        print(f"{name:10}{row['seconds']:>10.2f}{sizes}{row['loss']:>14.2f}")
    print(
        f"{found['time_ratio']:.2f} of the time, {found['memory_ratio']:.2f} of the memory; "
        f"{found['step_memory_ratio']:.2f} of the whole step's"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
