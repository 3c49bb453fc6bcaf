"""What may change at a resume, and what is said of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from l1_jax.config.key import keys_of
from l1_jax.config.schema import Config
from l1_jax.devices.select import make_deterministic
from l1_jax.errors import UserError
from l1_jax.run import drift

ROOT = Path(__file__).parents[1]


def test_every_key_has_one_class():
    names = [name for name, _ in keys_of(Config)]
    assert [*names, *drift.FACTS] == list(drift.MEANINGS)
    assert set(drift.MEANINGS.values()) == {"never", "fatal", "warned", "free"}


@pytest.fixture
def resume(script, trained, tiny_config, prepared):
    """Resumes the run of 100 steps as another one: it is refused, or has nothing left to do."""

    def run(*args):
        keys = (f"data.path={prepared}", f"training.output_dir={trained}", "training.max_steps=100")
        return script("train", "--resume", "--config", tiny_config, *keys, *args)

    return run


def test_all_that_is_fatal_is_said_at_once(resume, trained):
    result = resume("training.seed=7", "data.document_mask=true", "training.fp16=true")
    assert result.code == 2
    assert result.err.splitlines()[-4:-1] == [
        "data.document_mask: false there, true now",
        "training.seed: 42 there, 7 now",
        "float16: false there, true now",
    ]
    assert result.error == (
        f"error: {trained}/checkpoint-100 was trained with other values of data.document_mask, training.seed, float16. "
        "Resume with that run's config and data, start a new run in another directory, or give "
        "--allow-change data.document_mask --allow-change training.seed --allow-change float16."
    )


def test_what_is_allowed_by_name_is_done_and_said(resume):
    result = resume("training.seed=7", "data.document_mask=true", "--allow-change", "training.seed")
    assert "another value of data.document_mask: false there, true now" in result.error
    result = resume("training.seed=7", "--allow-change", "training.seed")
    assert result.code == 0
    assert "warning: changed since step 100: training.seed 42 -> 7 (allowed)" in result.err


@pytest.mark.parametrize(
    ("name", "key", "why"),
    [
        (
            "model.n_layers",
            "model.n_layers=1",
            "blocks.attention.out.bias is float32[2, 32] there and float32[1, 32] here",
        ),
        (
            "float16",
            "training.fp16=true",
            "loss_scale.good_steps is missing there and int32[] here",
        ),
    ],
)
def test_other_arrays_are_refused_even_then(resume, name, key, why):
    result = resume(key, "--allow-change", name)
    assert result.code == 2
    assert f"checkpoint-100 does not fit this config: {why}" in result.error


def test_other_data_is_allowed_by_name(resume, trained, corpus, tmp_path):
    from l1_jax.data.prepare import prepare

    prepare([str(corpus)], str(tmp_path / "other"), vocab_size=300, train_ratio=0.7, val_ratio=0.2)
    result = resume(f"data.path={tmp_path / 'other'}")
    assert "was trained with other values of data, tokenizer" in result.error
    result = resume(
        f"data.path={tmp_path / 'other'}", "--allow-change", "data", "--allow-change", "tokenizer"
    )
    assert result.code == 0
    assert "warning: changed since step 100: data " in result.err


def test_what_is_warned_of_and_what_is_free(resume):
    keys = ("training.learning_rate=0.005", "training.save_steps=5", "training.schedule_steps=200")
    said = resume(*keys).err
    assert "warning: changed since step 100: training.learning_rate 0.01 -> 0.005 (warned)" in said
    assert "\nchanged since step 100: training.save_steps 20 -> 5 (free)" in said
    assert "warning: the learning rate of step 101 would have been 0.001, and is now 0.00" in said


def test_more_steps_are_free_on_one_schedule(resume):
    """The arrays are refused after the table, so nothing is trained."""
    longer = ("training.max_steps=120", "model.n_layers=1", "--allow-change", "model.n_layers")
    again = resume(*longer, "training.schedule_steps=100")
    assert "\nchanged since step 100: training.max_steps 100 -> 120 (free)" in again.err
    assert "the learning rate of step" not in again.err
    other = resume(*longer).err
    assert "warning: changed since step 100: training.max_steps 100 -> 120 (warned)" in other
    assert "warning: the learning rate of step 101 would have been 0.001, and is now 0.00" in other


def test_names_that_are_none_are_refused(script, tiny_config):
    result = script("train", "--config", tiny_config, "--resume", "--allow-change", "training.sed")
    assert (result.code, "did you mean 'training.seed'?" in result.error) == (2, True)
    result = script(
        "train", "--config", tiny_config, "--resume", "--allow-change", "training.learning_rate"
    )
    assert result.code == 2
    assert (
        "without --resume"
        in script("train", "--config", tiny_config, "--allow-change", "data").error
    )


@pytest.mark.slow
def test_the_deterministic_flag_is_there_before_jax_starts(tmp_path, tiny_config):
    flag = "--xla_gpu_deterministic_ops=true"
    code = f"""
import os, runpy, sys
import jax
from l1_jax.devices import select

def look(device):
    print("flag" if "{flag}" in os.environ["XLA_FLAGS"] else "no flag")
    print("started" if jax._src.xla_bridge.backends_are_initialized() else "not started")
    sys.exit(0)

select.select_devices = look
from l1_jax.run import start
start.select_devices = look
start.Prepared.open = lambda path: None
sys.argv = ["train.py", "--config", {str(tiny_config)!r}, "training.deterministic=true",
            "training.output_dir={tmp_path}/run"]
runpy.run_path("scripts/train.py", run_name="__main__")
"""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:2] == ["flag", "not started"], done.stderr


def test_a_gpu_that_has_started_without_the_flag_is_refused(monkeypatch):
    import jax

    jax.devices()
    flags = os.environ["XLA_FLAGS"]
    make_deterministic()
    assert os.environ["XLA_FLAGS"] == flags  # the CPU needs nothing
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="deterministic is set, and jax has started without it"):
        make_deterministic()
