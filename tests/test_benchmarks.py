"""The benchmarks run, with sizes at which their figures mean nothing."""

import importlib
import json
import os
import sys

import pytest
import yaml
from conftest import ROOT, TINY


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
    for name in ("train_step", "checkpoint", "data", "startup"):
        sys.modules.pop(name, None)


def test_data(benchmark):
    found = benchmark("data", "--sizes", 8, "--length", 16, "--tokens", 5000, "--seconds", 0, "--steps", 2)
    assert [row["document_mask"] for row in found["pipeline"]] == [False, True]
    assert 0 < found["loop"]["wait_share"] < 1


@pytest.mark.slow
def test_checkpoint(benchmark, tmp_path):
    found = benchmark("checkpoint", "--rounds", 1, "--steps", 2, "--against", "torch", "--directory", tmp_path)
    assert found["bytes"] > 1000
    assert {"blocked", "lost", "whole", "torch.save", "torch.save, fsync", "ratio"} <= found.keys()


@pytest.mark.slow
def test_startup(benchmark, prepared, monkeypatch):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    found = benchmark("startup", "--rounds", 1, "--data", prepared)
    assert found["warm"].keys() == {"import", "data", "mesh", "state", "compile", "first step"}
    assert found["ratios"]["warm to cold"] < 1
