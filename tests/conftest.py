"""Eight simulated devices and a compiler in a hurry for every test, set before jax is imported."""

import os
import pydoc_data.topics
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

# What is tested are equalities, not speed: unoptimised code compiles four times as fast.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILE}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = (
    "0"  # a test neither fills the user's directory nor depends on it
)
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real text and tools that lie beside the checkout on the project's own machines."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


@pytest.fixture
def script(capsys):
    """Runs a script in this process as the shell would: `script("train", "--config", ...)`."""

    def run(name: str, *args: object) -> Result:
        capsys.readouterr()
        argv, sys.argv = sys.argv, [f"scripts/{name}.py", *map(str, args)]
        handlers = {
            number: signal.getsignal(number)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            captured = capsys.readouterr()
            return Result(int(end.code or 0), captured.out, captured.err)
        finally:
            sys.argv = argv
            for number, handler in handlers.items():
                signal.signal(number, handler)
        raise AssertionError("a script ends with sys.exit")

    return run


@pytest.fixture
def mount():
    """Mounts something, which takes root; unmounted after the test."""
    mounted = []

    def run(*arguments):
        done = subprocess.run(
            ["mount", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        mounted.append(arguments[-1])

    yield run
    for place in reversed(mounted):
        subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Some 400 kB of English, a sample a line: the documentation of Python itself."""
    lines = (
        line.strip() for topic in pydoc_data.topics.topics.values() for line in topic.split("\n\n")
    )
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(" ".join(line.split()) for line in lines if line), encoding="utf-8")
    return path


TINY = {
    "model": {"max_seq_length": 32, "n_layers": 2, "n_heads": 2, "n_embd": 32, "dropout": 0.1},
    "training": {
        "batch_size": 1,
        "learning_rate": 0.01,
        "eval_steps": 50,
        "eval_batches": 4,
        "save_steps": 20,
    },
}


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    from l1_jax.data.prepare import prepare

    path = tmp_path_factory.mktemp("data") / "prepared"
    prepare([str(corpus)], str(path), vocab_size=300)
    return path


@pytest.fixture(scope="session")
def trained(prepared, tiny_config, tmp_path_factory) -> Path:
    """A run directory after 100 steps on eight devices."""
    from l1_jax.config.yaml_file import load_config
    from l1_jax.run.train import train

    path = tmp_path_factory.mktemp("run") / "run"
    overrides = [f"data.path={prepared}", f"training.output_dir={path}", "training.max_steps=100"]
    assert train(load_config(tiny_config, overrides)) == 0
    return path
