"""What scripts/generate.py does with its flags."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax

from l1_jax.config import GenerationConfig
from l1_jax.config_file import config_from_text, dump_config
from l1_jax.errors import UserError
from l1_jax.inference.generate import Generator
from l1_jax.inference.sampling import Sampling
from l1_jax.loading import LoadedModel, load_model
from l1_jax.parallel.mesh import select_devices


def choose_sampling(model: LoadedModel, flags: dict[str, float | None], greedy: bool) -> Sampling:
    """The checkpoint's `generation` section with the flags over it, checked as the config is."""
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    overrides = [f"generation.{name}={flags[name]}" for name in names if flags[name] is not None]
    chosen = config_from_text(dump_config(model.config), str(model.path), overrides).generation
    return Sampling(**vars(dataclasses.replace(chosen, temperature=0.0) if greedy else chosen))


def run_generate(
    model_path: str,
    prompt: str,
    *,
    flags: dict[str, float | None],
    greedy: bool,
    max_tokens: int | None,
    seed: int,
    num_samples: int,
    stop: Sequence[str],
    device: str,
    stream: bool,
) -> dict[str, Any]:
    """Generates and returns what `--json` prints; with `stream`, writes the text to stdout as it comes.

    Raises:
        UserError: a flag, the prompt or the checkpoint is not usable.
    """
    if num_samples < 1:
        raise UserError(f"--num-samples is {num_samples}", "Give 1 or more")
    if seed < 0:
        raise UserError(f"--seed is {seed}", "Give 0 or more")
    model = load_model(model_path, select_devices(device)[:1])
    how = choose_sampling(model, flags, greedy)

    def show(row: int, text: str) -> None:
        if num_samples == 1:
            sys.stdout.write(text)
            sys.stdout.flush()

    if stream:
        show(0, prompt)
    with jax.set_mesh(model.mesh):
        completions = Generator(model)(
            [prompt] * num_samples, how, max_tokens=max_tokens, seed=seed, stop=stop,
            on_text=show if stream else lambda row, text: None,
        )  # fmt: skip
    if stream:
        print()
        for number, completion in enumerate(completions if num_samples > 1 else (), start=1):
            print(f"--- {number} of {num_samples} ---\n{prompt}{completion.text}")
    return {"prompt": prompt, "completions": [dataclasses.asdict(completion) for completion in completions]}
