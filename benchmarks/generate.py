#!/usr/bin/env python3
"""Speed of greedy generation, beside the same model in PyTorch: `python benchmarks/generate.py --config NAME`.

Both sides have the same random weights of the config's shape, the same prompts of random tokens and no end of text; the
other one is `transformers`' GPT-2 with its own `generate`. Calls of the two alternate, so that what else the machine
does falls on both; the ratio is the median of the ratios of neighbours.

The floor of a token is the time to read what it needs once: the parameters, without tables in which it looks up a row,
and the keys and values so far, at the rate at which this device sums a large array, measured between the calls.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from train_step import check_is_gpt2, find_config, timed

from l1_jax.commands.flags import Parser
from l1_jax.commands.runner import run_command
from l1_jax.config.schema import Config
from l1_jax.errors import UserError

Generate = Callable[[int], list[list[int]]]  # that many new tokens for each prompt


class Numbers:
    """In place of a tokenizer: a text is the numbers of its tokens, and none ends it."""

    end_ids = (-1,)
    beginning_id = None

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def token_bytes(self, token_id: int) -> bytes:
        return b" %d" % token_id


def load(config: Config) -> Any:
    """A model with random weights, as if from a checkpoint."""
    import jax
    import jax.numpy as jnp

    from l1_jax.devices.select import select_devices
    from l1_jax.loading import LoadedModel
    from l1_jax.model.transformer import build
    from l1_jax.parallel.mesh import create_mesh

    devices = select_devices(config.training.device)[:1]
    precision = config.training.precision
    if precision == "auto":
        precision = "float32" if devices[0].platform == "cpu" else "bfloat16"
    graphdef, initialise, _ = build(config.model, jnp.dtype(precision))
    mesh = create_mesh(config.parallelism, devices)
    with jax.set_mesh(mesh):
        params = jax.jit(initialise)(jax.random.key(0))
    return LoadedModel(Path("random"), config, None, Numbers(), mesh, graphdef, params)


def make_jax(model: Any, prompts: list[list[int]]) -> Generate:
    from l1_jax.inference.generate import Generator
    from l1_jax.inference.section import GenerationConfig

    generator, texts = Generator(model), [" ".join(map(str, prompt)) for prompt in prompts]

    def run(count: int) -> list[list[int]]:
        completions = generator(texts, GenerationConfig(temperature=0.0), max_tokens=count)
        return [Numbers().encode(completion.text) for completion in completions]

    return run


def make_torch(model: Any, prompts: list[list[int]]) -> Generate:
    """`transformers`' GPT-2 with the parameters of `model`."""
    import os

    os.environ.setdefault("USE_JAX", "0")
    import jax
    import numpy as np
    import torch
    import transformers

    shape, platform = model.config.model, model.mesh.devices.flat[0].platform
    device = torch.device("cpu" if platform == "cpu" else "cuda")
    dtype = torch.float32 if platform == "cpu" else torch.bfloat16
    network = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size, n_positions=shape.max_seq_length, n_embd=shape.n_embd, n_layer=shape.n_layers,
            n_head=shape.n_heads, n_inner=shape.hidden_size, activation_function="gelu", bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()  # fmt: skip
    params = jax.tree.map(np.array, model.params)
    weights = {
        "wte.weight": params["token_embedding"][: shape.vocab_size],
        "wpe.weight": params["position_embedding"],
    }
    weights |= {
        "ln_f.weight": params["final_norm"]["scale"],
        "ln_f.bias": params["final_norm"]["bias"],
    }
    for number in range(shape.n_layers):
        block = jax.tree.map(lambda leaf, number=number: leaf[number], params["blocks"])
        for name, layer in (
            ("ln_1", block["attention_norm"]), ("attn.c_attn", block["attention"]["qkv"]), ("ln_2", block["mlp_norm"]),
            ("attn.c_proj", block["attention"]["out"]), ("mlp.c_fc", block["mlp"]["up"]),
            ("mlp.c_proj", block["mlp"]["down"]),
        ):  # fmt: skip
            for ours, value in layer.items():
                weights[f"h.{number}.{name}.{'bias' if ours == 'bias' else 'weight'}"] = value
    state = network.transformer.state_dict()
    for name, value in weights.items():
        state[name].copy_(torch.from_numpy(value.reshape(state[name].shape)))
    network.to(device, dtype)
    tokens = torch.tensor(prompts, device=device)

    @torch.no_grad()
    def run(count: int) -> list[list[int]]:
        out = network.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, use_cache=True,
            pad_token_id=0,
        )  # fmt: skip
        return out[:, tokens.shape[1] :].tolist()

    return run


def read_rate(device: Any) -> Callable[[], float]:
    """Measures bytes/s of a sum over 512 MiB on `device`."""
    import jax
    import jax.numpy as jnp

    x, total = jax.device_put(jnp.ones(2**27, jnp.float32), device), jax.jit(jnp.sum)
    total(x).block_until_ready()
    return lambda: x.nbytes / min(timed(lambda: total(x).block_until_ready())[0] for _ in range(3))


def measure(
    model: Any, prompts: list[list[int]], args: Any, rate: Callable[[], float]
) -> dict[str, Any]:
    """The figures of one batch size, of both sides."""
    import jax
    from flax import nnx

    sides = {"l1_jax": make_jax(model, prompts)}
    if args.against:
        sides[args.against] = make_torch(model, prompts)
    first: dict[str, list[float]] = {name: [] for name in sides}
    whole: dict[str, list[float]] = {name: [] for name in sides}
    start, tokens = {}, {}
    for name, generate in sides.items():
        start[name], tokens[name] = timed(lambda generate=generate: generate(args.new))  # compiles
        generate(1)
    rates = []
    for _ in range(args.repeats):
        rates.append(rate())
        for name, generate in sides.items():
            first[name].append(timed(lambda generate=generate: generate(1))[0])
            whole[name].append(timed(lambda generate=generate: generate(args.new))[0])
    shape = model.config.model
    looked_up = (
        ("position_embedding",)
        if shape.tie_embeddings
        else ("position_embedding", "token_embedding")
    )
    read = {name: value for name, value in model.params.items() if name not in looked_up}
    size, item = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(read)),
        nnx.merge(model.graphdef, model.params).dtype.itemsize,
    )
    width = shape.n_embd // shape.n_heads * shape.kv_heads
    size += 2 * item * shape.n_layers * width * len(prompts) * (args.prompt + args.new // 2)
    floor = size / statistics.median(rates)
    found: dict[str, Any] = {
        "batch": len(prompts),
        "read_bytes_per_second": statistics.median(rates),
        "floor": floor,
    }
    for name in sides:
        token = statistics.median(
            (all_ - one) / (args.new - 1)
            for all_, one in zip(whole[name], first[name], strict=True)
        )
        found[name] = {
            "tokens_per_second": len(prompts) * args.new / statistics.median(whole[name]),
            "first_token": statistics.median(first[name]), "token": token, "of_floor": floor / token,
            "first_call": start[name],
        }  # fmt: skip
    if args.against:
        pairs = zip(whole[args.against], whole["l1_jax"], strict=True)
        found["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
        found["same_tokens"] = tokens["l1_jax"] == tokens[args.against]
    return found


def main(argv: list[str]) -> int:
    parser = Parser("Measures greedy generation.")
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a file, or a name in configs/ or here"
    )
    parser.add_argument(
        "--against", choices=("transformers",), help="also the same model in PyTorch, alternating"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="prompts at once"
    )
    parser.add_argument("--prompt", type=int, default=32, metavar="N", help="tokens of each prompt")
    parser.add_argument(
        "--new", type=int, default=128, metavar="N", help="new tokens for each prompt"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="measured calls of each"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    overrides, args = parser.parse_overrides(argv)
    if min(args.prompt, args.new - 1, args.repeats, *args.batch) < 1:
        what = "--batch, --prompt and --repeats are 1 or more, and --new is 2 or more: the first token is timed apart"
        raise UserError(what, "Give larger numbers")

    import numpy as np

    from l1_jax.config.yaml_file import load_config
    from l1_jax.model.flops import count_parameters

    config = load_config(find_config(args.config), overrides)
    if args.prompt + args.new > config.model.max_seq_length:
        what = f"--prompt {args.prompt} and --new {args.new} exceed the context of {config.model.max_seq_length}"
        raise UserError(what, "Give smaller numbers")
    if args.against:
        check_is_gpt2(Config(config.model))
    model = load(config)
    rate, results = read_rate(model.mesh.devices.flat[0]), []
    for batch in args.batch:
        prompts = (
            np.random.default_rng(0)
            .integers(0, config.model.vocab_size, (batch, args.prompt))
            .tolist()
        )
        results.append(measure(model, prompts, args, rate))
    parameters = count_parameters(config.model, model.params)
    if args.json:
        setting = {
            "config": args.config,
            "overrides": overrides,
            "prompt": args.prompt,
            "new": args.new,
        }
        print(json.dumps(setting | {"parameters": parameters, "results": results}))
        return 0
    print(f"{parameters:,.0f} parameters, {args.prompt} tokens and {args.new} new ones")
    print(
        f"{'':14}{'batch':>6}{'tokens/s':>10}{'first, ms':>11}{'token, ms':>11}{'floor, ms':>11}{'of it':>7}"
    )
    for found in results:
        for name in ("l1_jax", args.against) if args.against else ("l1_jax",):
            row = found[name]
            print(
                f"{name:14}{found['batch']:>6}{row['tokens_per_second']:>10,.1f}{1000 * row['first_token']:>11.1f}"
                f"{1000 * row['token']:>11.2f}{1000 * found['floor']:>11.2f}{row['of_floor']:>7.0%}"
            )
        if args.against:
            same = "the same" if found["same_tokens"] else "not the same"
            print(f"l1_jax is {found['ratio']:.2f} x as fast, and the tokens are {same}")
    return 0


if __name__ == "__main__":
    run_command(main)
