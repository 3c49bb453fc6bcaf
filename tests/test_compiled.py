"""Programs that are loaded instead of compiled are the same, and what is wrong with their files is no error."""

import json
import os
import re

import jax
import numpy as np
import pytest
import yaml
from conftest import TINY
from jax.experimental.compilation_cache import compilation_cache

from l1_jax.config.resolve import Facts, resolve, rows_of_stream
from l1_jax.config.yaml_file import config_from_text
from l1_jax.console import log
from l1_jax.devices import compiled
from l1_jax.devices.compiled import evict, keep_compiled
from l1_jax.parallel.mesh import ALL_DATA, create_mesh
from l1_jax.run import start
from l1_jax.training import program

DIRECTORY = "jax_compilation_cache_dir"
LEAST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The directory in which everything that is compiled for one device is kept."""
    monkeypatch.setattr(log, "propagate", True)
    before = {
        name: jax.config.values[name] for name in (DIRECTORY, LEAST, "jax_enable_compilation_cache")
    }
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(LEAST.upper(), "0")
    jax.config.update(LEAST, 0.0)
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def events():
    heard: list[str] = []
    jax.monitoring.register_event_listener(
        hear := lambda name, **_: heard.append(name.rpartition("/")[2])
    )
    yield heard
    jax.monitoring.unregister_event_listener(hear)


def test_a_run_of_loaded_programs_has_the_same_bits(
    cache, events, script, prepared, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(start, "select_devices", lambda _: jax.devices()[:1])

    def run(name):
        events.clear()
        args = (
            "--config",
            tiny_config,
            f"data.path={prepared}",
            f"training.output_dir={tmp_path / name}",
        )
        assert script("train", *args, "training.max_steps=6", "training.logging_steps=1").code == 0
        state = tmp_path / name / "checkpoint-6" / "state"
        arrays = {
            p.relative_to(state): p.read_bytes()
            for p in state.rglob("*")
            if re.fullmatch(r"[\d.]+", p.name)
        }
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return arrays, [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]

    jax.config.update("jax_enable_compilation_cache", False)
    alone = run("alone")
    assert len(alone[0]) > 20
    assert "cache_hits" not in events
    jax.config.update("jax_enable_compilation_cache", True)
    assert run("cold") == alone
    compiled_programs = events.count("cache_misses")
    assert compiled_programs >= 3  # the state, the step, the evaluation
    assert run("warm") == alone
    assert "cache_misses" not in events
    assert events.count("cache_hits") >= compiled_programs
    for file in cache.rglob("*-cache"):  # left so by a kill
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert run("damaged") == alone


def test_what_compiles_quickly_gives_the_same_bits(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # jax has read the tests' own
    mesh = create_mesh(ALL_DATA, jax.devices()[:1])
    assert program._compiled_quickly(mesh)
    config = config_from_text(yaml.safe_dump(TINY), "the test", ["training.max_steps=9"])
    create = program.make_program(
        resolve(config, Facts(300, rows_of_stream(2**20), dict(mesh.shape), "cpu")), mesh
    ).create
    fully = create.lower().compile(compiler_options={"xla_backend_optimization_level": 3})
    jax.tree.map(np.testing.assert_array_equal, create(), fully())


def test_what_was_not_used_for_longest_goes(tmp_path):
    (tmp_path / "2-cores").mkdir()
    for name, written, used in (("a", 1, 9), ("2-cores/b", 5, 5), ("c", 7, 7), ("d", 2, 3)):
        (tmp_path / name).write_bytes(b"0123456789")
        os.utime(tmp_path / name, (used, written))
    evict(tmp_path, 30)
    assert sorted(file.name for file in tmp_path.rglob("?")) == ["a", "b", "c"]
    evict(tmp_path, 29)
    assert sorted(file.name for file in tmp_path.rglob("?")) == ["a", "c"]


def test_where_programs_are_kept(cache, tmp_path, monkeypatch, caplog):
    one = jax.devices()[:1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    keep_compiled(one)
    assert jax.config.values[DIRECTORY] == str(cache / "3-cores")
    keep_compiled(jax.devices())  # their collectives hang
    assert jax.config.values[DIRECTORY] is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("L1_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    home = tmp_path / "home" / "l1_jax" / "compiled"
    keep_compiled(one)
    assert jax.config.values[DIRECTORY] == str(home / "3-cores")
    assert (home / "3-cores").stat().st_mode & 0o777 == 0o700
    home.chmod(0o777)
    caplog.set_level("INFO", "l1_jax")
    keep_compiled(one)
    assert jax.config.values[DIRECTORY] is None
    assert f"others may write to {home}" in caplog.text
    caplog.clear()
    home.chmod(0o700)
    monkeypatch.setattr(compiled.jax, "process_count", lambda: 2)
    keep_compiled(one)
    assert jax.config.values[DIRECTORY] is None
    assert not caplog.records


def test_a_place_that_cannot_be_written_is_one_line(cache, caplog):
    cache.write_text("a file")
    caplog.set_level("INFO", "l1_jax")
    keep_compiled(jax.devices()[:1])
    assert jax.config.values[DIRECTORY] is None
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "compiled programs are not kept, each start compiles them anew: "
    )
    assert str(cache) in record.getMessage()
