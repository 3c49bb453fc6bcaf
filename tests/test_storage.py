"""Runs and prepared data in object storage: fsspec's memory:// stands in for a bucket, file:// where processes meet."""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import pytest
from conftest import ROOT
from e2e.test_run import assert_identical, logged, rows, start, state_of, train_args

from l1_jax import storage
from l1_jax.storage import Remote

MARKER = "checkpoint.json"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """An empty bucket, and nothing left behind in the scratch space."""
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]
    monkeypatch.setenv("L1_CACHE_DIR", str(tmp_path / "cache"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert not list(scratch.glob("l1_jax-*"))


def upload(directory: Path, url: str) -> None:
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    Remote(url).upload(directory, names)


def published(url: str) -> set[str]:
    return {name.split("/")[0] for name in Remote(url).files() if name.endswith(f"/{MARKER}")}


def test_a_run_on_a_url(script, trained, prepared, tiny_config):
    """Prepared data and run directory in a bucket: the run is that of local directories, and so is what it leaves."""
    upload(prepared, "memory://b/data")
    args = train_args(tiny_config, "memory://b/data", "memory://b/run", "training.max_steps=100")
    result = script("train", *args)
    assert result.code == 0, result.err
    assert "saved in memory://b/run" in result.err
    assert published("memory://b/run") == {"best_model-100", "checkpoint-60", "checkpoint-80", "checkpoint-100"}
    names = Remote("memory://b/run").files()
    assert {name.split("/")[0] for name in names} == published("memory://b/run") | {
        "config.yaml", "metrics.jsonl", "run.json", "tensorboard",
    }  # fmt: skip
