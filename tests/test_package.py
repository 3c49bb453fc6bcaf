"""What is installed: the public names, and every command from a wheel, outside of the checkout."""

import doctest
import json
import os
import shutil
import site
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import l1_jax

ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_no_jax():
    code = (
        "import l1_jax, sys; print('jax' in sys.modules, l1_jax.Config.__name__, dir(l1_jax)[:2])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False Config ['Config', 'RunError']\n", done.stderr


def test_every_public_name_is_there():
    for name in l1_jax.__all__:
        assert getattr(l1_jax, name), name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        l1_jax.trian  # noqa: B018


def test_the_examples_of_the_public_names(corpus, tmp_path, monkeypatch):
    shutil.copy(corpus, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(l1_jax)
    assert result.attempted == 11
    assert result.failed == 0


def test_what_python_calls_get_wrong_is_said(prepared, trained, corpus, tmp_path, tiny_config):
    """By the argument's name, and before anything is done."""
    config = l1_jax.load_config(tiny_config, f"data.path={prepared}")
    model = l1_jax.load(trained)
    out = tmp_path / "out"
    calls = {
        "`split` is 'foo'": lambda: l1_jax.prepare(corpus, out, split="foo"),
        "`documents` is 'foo'": lambda: l1_jax.prepare(corpus, out, documents="foo"),
        "`vocab_size` is 300.5": lambda: l1_jax.prepare(corpus, out, vocab_size=300.5),
        "`train_ratio` is '0.8'": lambda: l1_jax.prepare(corpus, out, train_ratio="0.8"),
        "`resume` is 'path'": lambda: l1_jax.train(config, resume="path"),
        "there is no checkpoint nope": lambda: l1_jax.train(config, resume_from="nope"),
        "the config is 'tiny'": lambda: l1_jax.train("tiny"),
        "`resume` and `overwrite`": lambda: l1_jax.train(config, resume=True, overwrite=True),
        "`seed` is -1": lambda: l1_jax.generate(model, "The", seed=-1),
        "`max_tokens` is 4.0": lambda: l1_jax.generate(model, "The", max_tokens=4.0),
        "`stop` has an empty": lambda: l1_jax.generate(model, "The", stop=[""]),
        "`temperature` is -1": lambda: l1_jax.generate(model, "The", temperature=-1),
        "`num_samples` is no setting": lambda: l1_jax.generate(model, "The", num_samples=2),
        "prepared data and not a checkpoint": lambda: l1_jax.load(prepared),
    }
    for message, call in calls.items():
        with pytest.raises(l1_jax.UserError, match=message):
            call()
    assert not out.exists()

    # What one line does not hold, a traceback shows.
    with pytest.raises(l1_jax.UserError, match="has 2 mistakes") as caught:
        l1_jax.load_config(tiny_config, ["training.max_stepz=3", "foo.x=1"])
    assert "did you mean" in "".join(traceback.format_exception(caught.value))

    # A single text is a single text.
    one = l1_jax.generate(model, "The", stop="he", max_tokens=9, temperature=0.0)
    assert one == l1_jax.generate(model, "The", stop=["he"], max_tokens=9, temperature=0.0)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory with the programs of a fresh venv, in which the wheel is installed.

    Its dependencies are those of the tests, by a path file: installing them again takes a minute.
    """
    home = tmp_path_factory.mktemp("installed")
    source = home / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info")
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    subprocess.run([*wheel, home, source], check=True)
    shutil.rmtree(source)

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    python = home / "venv" / "bin" / "python"
    (place,) = (home / "venv" / "lib").glob("python*/site-packages")
    (place / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    (file,) = home.glob("*.whl")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", "--force-reinstall"]
    subprocess.run([*install, file], check=True)
    return python.parent


@pytest.mark.slow
def test_every_command_from_a_wheel(installed, corpus, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    env = {**os.environ, **flags, "L1_CACHE_DIR": str(tmp_path / "cache")}
    env.pop("PYTHONPATH", None)

    def l1(*args: object, code: int = 0) -> str:
        command = [installed / "l1", *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]

    where = subprocess.run(
        [installed / "python", "-c", "import l1_jax; print(l1_jax.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(installed.parent) in where.stdout

    l1("prepare-data", "--input", corpus, "--output", "data", "--vocab-size", 300)
    keys = ("data.path=data", "training.output_dir=run", "training.max_steps=2", "model.n_embd=32")
    keys = (*keys, "model.max_seq_length=32", "training.eval_batches=1")
    l1("train", "--config", "tiny", *keys)
    found = json.loads(l1("evaluate", "--model", "run", "--data", "data/val.txt", "--json"))
    assert 0 < found["bits_per_byte"] < 20
    made = json.loads(
        l1("generate", "--model", "run", "--prompt", "The", "--max-tokens", 3, "--json")
    )
    assert len(made["completions"]) == 1
    assert "parameters" in l1("plan", "--config", "base_config", "--devices", 8)
    assert "checkpoint-2: ok" in l1("verify", "run")
    l1("make_demo_corpus", "--output", "corpus.txt", "--max-bytes", 10_000)

    assert "generate" in l1("--help")
    assert l1("--version") == f"l1_jax {l1_jax.__version__}\n"
    assert "l1 has no command trian; did you mean 'train'?" in l1("trian", code=2)
    assert "did you mean 'tiny'?" in l1("train", "--config", "tny", code=2)

    # A file of that name wins.
    (tmp_path / "tiny").write_text("training: {max_stps: 1}\n")
    assert "tiny:1: unknown key training.max_stps" in l1("train", "--config", "tiny", code=2)


def test_the_packages_are_those_that_are_there():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {path.parent for path in (ROOT / "l1_jax").rglob("*.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in there}
    assert set(listed) == names | {"l1_jax.configs"}
