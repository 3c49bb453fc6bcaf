"""The benchmarks run, with sizes at which their figures mean nothing."""

import importlib
import json
import os
import runpy
import sys

import jax
import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY

from l1_jax.config.schema import Config
from l1_jax.errors import UserError
from l1_jax.inference.engine import Engine
from l1_jax.inference.sampling import Sampling
from l1_jax.inference.section import GenerationConfig
from l1_jax.model.section import ModelConfig


@pytest.fixture
def benchmark(capsys, monkeypatch, tmp_path):
    """Calls the main function of a benchmark and returns what it printed with --json."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))

    def run(name: str, *args: object) -> dict:
        main = importlib.import_module(name).main
        capsys.readouterr()
        assert main(["--config", str(config), "--json", *map(str, args)]) == 0
        return json.loads(capsys.readouterr().out)

    yield run
    for name in ("train_step", "checkpoint", "data", "startup", "loss_head", "growth"):
        sys.modules.pop(name, None)


def test_data(benchmark):
    found = benchmark(
        "data", "--sizes", 8, "--length", 16, "--tokens", 5000, "--seconds", 0, "--steps", 2
    )
    assert [row["document_mask"] for row in found["pipeline"]] == [False, True]
    assert 0 < found["loop"]["wait_share"] < 1


def test_loss_head(benchmark):
    found = benchmark("loss_head", "--batch", 2, "--calls", 1)
    assert found["l1_jax"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_train_step_against_pytorch(benchmark, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "compile", lambda function: function)  # which takes a while
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")  # which the benchmark would set
    flags = ("--against", "transformers", "--rounds", 2, "model.vocab_size=300")
    found = benchmark("train_step", *flags)
    # On several CPU devices nothing is kept.
    assert (found["compile_warm"], found["l1_jax"]["memory"]) == (None, found["compiler_memory"])
    assert jax.config.values["jax_compilation_cache_dir"] is None
    for side in ("l1_jax", "transformers"):
        assert found[side]["loss"] == pytest.approx(np.log(300), rel=0.02)  # of random weights
    assert found["ratio"] > 0
    with pytest.raises(UserError, match=r"norm, data.document_mask: PyTorch's side"):
        benchmark("train_step", *flags, "model.norm=rmsnorm", "data.document_mask=true")


@pytest.mark.slow
def test_growth(benchmark, monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    )
    tiny = ("model.vocab_size=300", "training.batch_size=4")
    found = benchmark("growth", "--only", "devices", "--values", 2, "--rounds", 1, *tiny)
    assert found["devices"]["2"].keys() == {"step", "memory", "compile"}
    for flags, message in [
        (("--values", 2), "--values is given"),
        (("--only", "devices", "--values", 3), "is not divided"),
        (("--rounds", 0), "no number of at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            benchmark("growth", *flags, *tiny)


@pytest.mark.slow
def test_checkpoint(benchmark, tmp_path):
    found = benchmark(
        "checkpoint", "--rounds", 1, "--steps", 2, "--against", "torch", "--directory", tmp_path
    )
    assert found["bytes"] > 1000
    assert {"blocked", "lost", "whole", "torch.save", "torch.save, fsync", "ratio"} <= found.keys()


@pytest.mark.slow
def test_startup(benchmark, prepared, monkeypatch):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    found = benchmark("startup", "--rounds", 1, "--data", prepared)
    assert found["warm"].keys() == {"import", "data", "mesh", "state", "compile", "first step"}
    assert found["ratios"]["warm to cold"] > 0


def test_generation_gives_the_tokens_of_transformers(tiny_config, capsys):
    pytest.importorskip("transformers")
    main = runpy.run_path(str(ROOT / "benchmarks/generate.py"))["main"]
    flags = [
        "--config",
        str(tiny_config),
        "model.vocab_size=300",
        "model.initializer_range=0.3",
        "--repeats",
        "1",
    ]
    flags += ["--against", "transformers", "--batch", "1", "3", "--prompt", "4", "--new", "20"]
    assert main([*flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(found["batch"], found["same_tokens"]) for found in result["results"]] == [
        (1, True),
        (3, True),
    ]
    for found in result["results"]:
        for side in ("l1_jax", "transformers"):
            assert found[side]["of_floor"] == pytest.approx(found["floor"] / found[side]["token"])
    assert main(flags) == 0
    assert capsys.readouterr().out.count("the tokens are the same") == 2
    with pytest.raises(UserError, match="--new is 2 or more"):
        main([*flags, "--new", "1"])
    modern = ["model.position_embedding=rope", "model.tie_embeddings=false", "model.n_kv_heads=1"]
    with pytest.raises(UserError, match=r"n_kv_heads.*does not do that"):
        main([*flags, *modern])
    flags = [flag for flag in flags if flag not in ("--against", "transformers")]
    assert main([*flags, *modern, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"][0]
    assert "transformers" not in found


@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_copies_neither_parameters_nor_cache(rows):
    """What the program of a token takes beside its arguments is less than any of the large ones."""
    load = runpy.run_path(str(ROOT / "benchmarks/generate.py"))["load"]
    config = Config(
        ModelConfig(vocab_size=128, max_seq_length=256, n_layers=2, n_heads=2, n_embd=128)
    )
    model = load(config)
    engine = Engine(model.graphdef, model.params, model.mesh, end_ids=[])
    sampling = Sampling.of([GenerationConfig()] * rows, [0] * rows, range(rows))
    with jax.set_mesh(model.mesh):
        state = engine.begin([[1]] * rows, 256)
        active, one = np.ones(rows, bool), np.int32(1)
        program = engine._decode.lower(
            engine.params, state, active, sampling, one, num_top=None
        ).compile()
    kernels = [leaf for leaf in jax.tree.leaves(engine.params) if leaf.ndim > 1]
    large = min(
        leaf.nbytes for leaf in (*kernels, *jax.tree.leaves(state.cache)) if leaf.nbytes > 2**16
    )
    assert program.memory_analysis().temp_size_in_bytes < large / 4
