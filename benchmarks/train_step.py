#!/usr/bin/env python3
"""Speed of the training step, beside the same model in PyTorch: `python benchmarks/train_step.py --config NAME`.

Both sides train the GPT-2 of the config, on the same random tokens, in the same precision, with AdamW and clipping; the
other one is `transformers`' GPT-2 under `torch.compile`. Steps of the two alternate, so that what else the machine does
falls on both; the ratio is the median of the ratios of neighbours. Between them is a pause, for PyTorch's threads spin
for a while after a step. On a CPU a step ends before the next begins, elsewhere several are in flight, as in training.

model FLOPs of a token = 6 N + 12 L D T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), N all parameters but a
table that is only looked up in. MFU is their rate over the device's peak; on a CPU, over the rate of this machine's own
float32 matrix product, measured between the steps. The loss is that of the first step, before any update: of random
weights. Memory is the most that was in use on the device; on a CPU what the compiler says, of our side alone. "From
disk" is how long a run takes to load what the one before has compiled.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from l1_jax.commands.flags import Parser
from l1_jax.commands.runner import run_command
from l1_jax.config.schema import Config
from l1_jax.errors import UserError

TOKENS_SEED = 0
Steps = Callable[[int], float]  # does so many steps, to their end; returns the last loss
PAUSE_SECONDS = 0.1


def find_config(name: str) -> Path:
    """A file, or the name of one in configs/ or benchmarks/configs/."""
    places = (
        Path(name),
        *(ROOT / place / f"{name}.yaml" for place in ("configs", "benchmarks/configs")),
    )
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise UserError(
        f"there is no config {name}",
        "Give a file, or the name of one in configs/ or benchmarks/configs/",
    )


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def resolved(config: Config) -> tuple[Config, Any]:
    """The config as a run here has it, and its mesh."""
    import jax

    from l1_jax.config.resolve import Facts, rows_of_stream
    from l1_jax.devices.memory import memory_limit
    from l1_jax.devices.select import keep_freed_memory, select_devices
    from l1_jax.parallel.mesh import create_mesh
    from l1_jax.planner.batch_size import resolve_auto

    if config.training.device in ("auto", "cpu"):
        keep_freed_memory()
    config = config.replace(
        "training", max_steps=config.training.max_steps or 10**6
    )  # the data would give it
    mesh = create_mesh(config.parallelism, select_devices(config.training.device))
    with jax.set_mesh(mesh):
        facts = Facts(
            vocab_size=config.model.vocab_size,
            num_rows=rows_of_stream(2**40),
            mesh_shape=dict(mesh.shape),
            platform=mesh.devices.flat[0].platform,
        )
        limit_bytes = memory_limit(mesh.local_devices)
        return resolve_auto(config, facts, mesh, limit_bytes), mesh


@contextlib.contextmanager
def kept_on_disk(mesh: Any) -> Iterator[bool]:
    """What is compiled is kept in a directory that was empty, and nothing after that; gives whether it is."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from l1_jax.devices.compiled import keep_compiled

    with (
        tempfile.TemporaryDirectory() as place,
        unittest.mock.patch.dict(os.environ, JAX_COMPILATION_CACHE_DIR=place),
    ):
        keep_compiled(list(mesh.devices.flat))
        yield str(jax.config.values["jax_compilation_cache_dir"]).startswith(place)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def make_jax_step(config: Config) -> tuple[Config, Steps, dict[str, Any]]:
    """The resolved config, steps of this project, and what is known of them: seconds to compile, and to load what was
    compiled from disk (None where nothing is kept); bytes by the compiler; peak FLOP/s (None of a CPU)."""
    import jax
    import numpy as np

    from l1_jax.data.sources import make_batch
    from l1_jax.devices.kinds import peak_flops
    from l1_jax.model.flops import count_parameters
    from l1_jax.parallel.placement import put_batch, put_flag
    from l1_jax.training.program import make_program

    config, mesh = resolved(config)
    vocab, length = config.model.vocab_size, config.model.max_seq_length
    with jax.set_mesh(mesh):
        program, size = make_program(config, mesh), config.training.global_batch_size
        assert size
        tokens = np.random.default_rng(TOKENS_SEED).integers(0, vocab, (size, length + 1), np.int32)
        batch = make_batch(tokens) | {"row_hash": np.zeros(size, np.uint32)}
        placed = put_batch(batch, program.dims, rows=range(size), mesh=mesh, global_batch_size=size)
        placed |= {"stop": put_flag(False, mesh)}
        state = [program.create()]

        def compiled() -> Any:
            return program.train_step.lower(state[0], program.borrowed, placed).compile()

        with kept_on_disk(mesh) as is_kept:
            compile_seconds, step = timed(compiled)
            jax.clear_caches()
            load_seconds = timed(compiled)[0] if is_kept else None

    def run(count: int) -> float:
        for _ in range(count):
            state[0], metrics = step(state[0], program.borrowed, placed)
        return float(metrics["loss"])

    analysis = step.memory_analysis()
    used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    used += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    facts = {
        "parameters": count_parameters(config.model, state[0].params),
        "compile": compile_seconds,
        "compile_warm": load_seconds,
        "compiler_memory": used,
        "peak": peak_flops(mesh),
    }
    return config, run, facts


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of a float32 matrix product on this machine's processor, the best of a few."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    return 2 * size**3 / min(timed(lambda: product(x, x).block_until_ready())[0] for _ in range(3))


def peak_memory(name: str) -> int | None:
    """Bytes that a side has had in use on the device at most; None on a CPU."""
    if name == "l1_jax":
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    import torch

    return torch.cuda.max_memory_allocated() or None if torch.cuda.is_available() else None


def check_is_gpt2(config: Config) -> None:
    """UserError where `transformers`' GPT-2 is not the model and AdamW not the optimizer of `config`."""
    plain = Config()
    alike = (
        "position_embedding",
        "norm",
        "qk_norm",
        "activation",
        "bias",
        "n_kv_heads",
        "tie_embeddings",
        "logit_softcap",
    )
    other = [
        f"model.{name}"
        for name in alike
        if getattr(config.model, name) != getattr(plain.model, name)
    ]
    for name in ("optimizer", "moment_dtype", "fp16"):
        if getattr(config.training, name) != getattr(plain.training, name):
            other.append(f"training.{name}")
    other += ["training.precision"] * (config.training.precision == "float16")
    other += ["data.document_mask"] * config.data.document_mask
    if other:
        raise UserError(
            f"{', '.join(other)}: PyTorch's side does not do that", "Leave --against away"
        )


def make_torch_step(config: Config) -> Steps:
    """Steps of `transformers`' GPT-2 under `torch.compile`, which the first of them does; `config` is resolved."""
    os.environ.setdefault("USE_JAX", "0")
    import numpy as np
    import torch
    import transformers

    model, training = config.model, config.training
    gpu = torch.cuda.is_available() and training.device != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    if gpu:
        torch.set_float32_matmul_precision("high")
    shape = transformers.GPT2Config(
        vocab_size=-(-model.vocab_size // 64) * 64, n_positions=model.max_seq_length, n_embd=model.n_embd,
        n_layer=model.n_layers, n_head=model.n_heads, n_inner=model.hidden_size, activation_function="gelu",
        resid_pdrop=model.dropout, embd_pdrop=model.dropout, attn_pdrop=model.dropout, attn_implementation="sdpa",
        use_cache=False,
    )  # fmt: skip
    network = transformers.GPT2LMHeadModel(shape).to(device).train()
    optimizer = torch.optim.AdamW(
        network.parameters(), training.learning_rate, (training.beta1, training.beta2), training.eps,
        training.weight_decay, fused=True,
    )  # fmt: skip
    accumulation, rows = training.gradient_accumulation_steps, training.batch_size
    count, length = accumulation * rows, model.max_seq_length
    drawn = np.random.default_rng(TOKENS_SEED).integers(
        0, model.vocab_size, (count, length + 1), np.int32
    )
    tokens = torch.from_numpy(drawn).long().to(device).reshape(accumulation, rows, length + 1)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
            logits = network(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    compiled = torch.compile(loss_of)

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for micro in tokens:
            loss = compiled(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) / accumulation
            loss.backward()
            total += loss.detach()
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    def run(count: int) -> float:
        return float([step() for _ in range(count)][-1])

    return run


def main(argv: list[str]) -> int:
    parser = Parser("Measures the training step.")
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a file, or a name in configs/ or here"
    )
    parser.add_argument(
        "--against", choices=("transformers",), help="also the same model in PyTorch, alternating"
    )
    parser.add_argument(
        "--rounds", type=positive, default=20, metavar="N", help="how often the two take turns"
    )
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="steps of a turn; by default 1 on a CPU, 10 elsewhere",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    overrides, args = parser.parse_overrides(argv)
    if args.against:
        os.environ.setdefault(
            "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45"
        )  # a GPU has to hold both sides

    import jax

    from l1_jax.config.yaml_file import load_config
    from l1_jax.model.flops import flops_per_token

    config = load_config(find_config(args.config), overrides)
    if args.against:
        check_is_gpt2(config)
    config, ours, facts = make_jax_step(config)
    sides: dict[str, Steps] = {"l1_jax": ours}
    found: dict[str, Any] = facts | {"config": args.config, "overrides": overrides}
    found |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if args.against:
        sides[args.against] = make_torch_step(config)
    count = args.steps or (1 if jax.default_backend() == "cpu" else 10)
    firsts = {name: timed(functools.partial(steps, 1)) for name, steps in sides.items()}
    found["compile_other"] = firsts[args.against][0] if args.against else None
    for steps in sides.values():
        steps(1)  # slower too
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    rates = []
    for _ in range(args.rounds):
        if facts["peak"] is None:
            rates.append(matmul_rate())
        for name, steps in sides.items():
            time.sleep(PAUSE_SECONDS)
            seconds[name].append(timed(functools.partial(steps, count))[0] / count)
    found["peak"] = peak = facts["peak"] or statistics.median(rates)
    tokens = config.training.global_batch_size * config.model.max_seq_length
    flops = flops_per_token(int(facts["parameters"]), config.model)
    for name, times in seconds.items():
        median = statistics.median(times)
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
        rate = tokens / median
        found[name] = {
            "tokens_per_second": rate, "step": median, "quartiles": [quarters[0], quarters[2]],
            "mfu": rate * flops / peak, "loss": firsts[name][1],
            "memory": peak_memory(name) or (facts["compiler_memory"] if name == "l1_jax" else None),
        }  # fmt: skip
    if args.against:
        pairs = zip(seconds[args.against], seconds["l1_jax"], strict=True)
        found["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    if args.json:
        print(json.dumps(found))
        return 0
    print(
        f"{facts['parameters']:,.0f} parameters, {tokens:,} tokens a step, {config.training.precision}"
    )
    print(
        f"peak {peak / 1e9:,.0f} GFLOP/s; {flops:.3g} model FLOPs a token, at the peak "
        f"{1000 * tokens * flops / peak:.1f} ms a step"
    )
    titles = f"{'quartiles':>18}{'of peak':>9}{'compile, s':>12}{'from disk':>11}{'memory, MiB':>13}{'loss':>9}"
    print(f"{'':14}{'tokens/s':>10}{'step, ms':>10}{titles}")
    for name in sides:
        row, low_high = found[name], found[name]["quartiles"]
        compile_seconds = facts["compile"] if name == "l1_jax" else found["compile_other"]
        spread = f"{1000 * low_high[0]:.1f} to {1000 * low_high[1]:.1f}"
        memory = f"{row['memory'] / 2**20:,.0f}" if row["memory"] else "unknown"
        again = f"{facts['compile_warm']:.1f}" if name == "l1_jax" and facts["compile_warm"] else ""
        print(
            f"{name:14}{row['tokens_per_second']:>10,.0f}{1000 * row['step']:>10.1f}{spread:>18}{row['mfu']:>9.0%}"
            f"{compile_seconds:>12.1f}{again:>11}{memory:>13}{row['loss']:>9.4f}"
        )
    if args.against:
        print(f"l1_jax is {found['ratio']:.2f} x as fast")
    return 0


if __name__ == "__main__":
    run_command(main)
