#!/usr/bin/env python3
"""Speed of the training step, beside the same model in PyTorch: `python benchmarks/train_step.py --config NAME`.

Both sides train the GPT-2 of the config, on the same random tokens, in the same precision, with AdamW and clipping; the
other one is `transformers`' GPT-2 under `torch.compile`. Steps of the two alternate, so that what else the machine does
falls on both; the ratio is the median of the ratios of neighbours.

model FLOPs of a token = 6 N + 12 L D T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), N all parameters. MFU is
their rate over the device's peak; on a CPU, over the rate of this machine's own float32 matrix product.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from l1_jax.cli import Parser, run_command, split_overrides
from l1_jax.config import Config
from l1_jax.errors import UserError

Step = Callable[[], float]  # does a step to its end; returns the loss


def find_config(name: str) -> Path:
    """A file, or the name of one in configs/ or benchmarks/configs/."""
    places = (Path(name), *(ROOT / place / f"{name}.yaml" for place in ("configs", "benchmarks/configs")))
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise UserError(f"there is no config {name}", "Give a file, or the name of one in configs/ or benchmarks/configs/")


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def make_jax_step(config: Config) -> tuple[Config, Step, dict[str, float]]:
    """The resolved config, a step of this project, and what is known of it: seconds to compile, bytes, peak FLOP/s."""
    import jax
    import numpy as np

    from l1_jax.data.batches import make_batch
    from l1_jax.model.transformer import count_parameters
    from l1_jax.parallel.mesh import create_mesh, keep_freed_memory, peak_flops, select_devices
    from l1_jax.parallel.sharding import put_batch, put_flag
    from l1_jax.planner.variants import memory_limit, resolve_auto
    from l1_jax.training.program import make_program

    if config.training.device in ("auto", "cpu"):
        keep_freed_memory()
    mesh = create_mesh(config.parallelism, select_devices(config.training.device))
    vocab, length = config.model.vocab_size, config.model.max_seq_length
    with jax.set_mesh(mesh):
        config = resolve_auto(config, vocab, 2**40, mesh, None, memory_limit(mesh))
        program, size = make_program(config, mesh), config.training.global_batch_size
        assert size
        tokens = np.random.default_rng(0).integers(0, vocab, (size, length + 1), np.int32)
        batch = make_batch(tokens) | {"row_hash": np.zeros(size, np.uint32)}
        placed = put_batch(batch, range(size), mesh, size) | {"stop": put_flag(False, mesh)}
        state = [program.create()]
        compile_seconds, step = timed(lambda: program.train_step.lower(state[0], placed).compile())

    def run() -> float:
        state[0], metrics = step(state[0], placed)
        return float(metrics["loss"])

    analysis = step.memory_analysis()
    used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    used += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    facts = {
        "parameters": count_parameters(config.model, state[0].params),
        "compile": compile_seconds,
        "memory": used,
        "peak": peak_flops(mesh) or matmul_rate(),
    }
    return config, run, facts


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of a float32 matrix product on this machine's processor, the best of several."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    return 2 * size**3 / min(timed(lambda: product(x, x).block_until_ready())[0] for _ in range(10))


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
    other = [f"model.{name}" for name in alike if getattr(config.model, name) != getattr(plain.model, name)]
    if config.training.optimizer != plain.training.optimizer:
        other.append("training.optimizer")
    if other:
        raise UserError(f"{', '.join(other)}: PyTorch's side has no such model", "Leave --against away")


def make_torch_step(config: Config) -> tuple[Step, float]:
    """A step of `transformers`' GPT-2 under `torch.compile`, `config` is resolved; and the seconds of its first."""
    import os

    os.environ.setdefault("USE_JAX", "0")
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
    tokens = torch.randint(0, model.vocab_size, (accumulation, rows, model.max_seq_length + 1), device=device)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
            logits = network(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    compiled = torch.compile(loss_of)

    def run() -> float:
        total = 0.0
        for micro in tokens:
            loss = compiled(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) / accumulation
            loss.backward()
            total += loss.detach()
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return run, timed(run)[0]


def main(argv: list[str]) -> int:
    overrides, flags = split_overrides(argv)
    parser = Parser("Measures the training step.")
    parser.add_argument("--config", required=True, metavar="NAME", help="a file, or a name in configs/")
    parser.add_argument("--against", choices=("transformers",), help="also the same model in PyTorch, alternating")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="measured steps of each")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    args = parser.parse_args(flags)

    from l1_jax.config_file import load_config
    from l1_jax.training.tracking import flops_per_token

    config, ours, facts = make_jax_step(load_config(find_config(args.config), overrides))
    steps: dict[str, Step] = {"l1_jax": ours}
    found: dict[str, Any] = facts | {"config": args.config, "overrides": overrides}
    if args.against:
        check_is_gpt2(config)
        steps[args.against], found["compile_other"] = make_torch_step(config)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {name: (step(), step())[1] for name, step in steps.items()}  # the first steps are slower
    for _ in range(args.steps):
        for name, step in steps.items():
            seconds[name].append(timed(step)[0])
    tokens = config.training.global_batch_size * config.model.max_seq_length
    flops = flops_per_token(int(facts["parameters"]), config.model)
    for name, times in seconds.items():
        median = statistics.median(times)
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
        rate = tokens / median
        found[name] = {
            "tokens_per_second": rate, "step": median, "quartiles": [quarters[0], quarters[2]],
            "mfu": rate * flops / facts["peak"], "loss": losses[name],
        }  # fmt: skip
    if args.against:
        pairs = zip(seconds[args.against], seconds["l1_jax"], strict=True)
        found["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{facts['parameters']:,.0f} parameters, {tokens:,} tokens a step, {config.training.precision}")
    print(
        f"peak {facts['peak'] / 1e9:,.0f} GFLOP/s; {flops:.3g} model FLOPs a token; {facts['memory'] / 2**20:,.0f} MiB"
    )
    print(f"{'':14}{'tokens/s':>10}{'step, ms':>10}{'quartiles':>18}{'of peak':>9}{'compile, s':>12}{'loss':>9}")
    for name in steps:
        row, low_high = found[name], found[name]["quartiles"]
        compile_seconds = facts["compile"] if name == "l1_jax" else found["compile_other"]
        spread = f"{1000 * low_high[0]:.1f} to {1000 * low_high[1]:.1f}"
        print(
            f"{name:14}{row['tokens_per_second']:>10,.0f}{1000 * row['step']:>10.1f}{spread:>18}{row['mfu']:>9.1%}"
            f"{compile_seconds:>12.1f}{row['loss']:>9.4f}"
        )
    if args.against:
        print(f"l1_jax is {found['ratio']:.2f} x as fast")
    return 0


if __name__ == "__main__":
    run_command(main)
