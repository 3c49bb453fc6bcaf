"""What plan says against real arrays, compilers and hand calculations."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec
from test_parallel import PARITY, sizes

from l1_jax.config.resolve import Facts, resolve, rows_of_stream
from l1_jax.config.schema import Config
from l1_jax.devices.kinds import device_kinds, find_kind, kind_of
from l1_jax.errors import UserError
from l1_jax.model.flops import flops_per_token
from l1_jax.model.section import ModelConfig
from l1_jax.objectives import chunks
from l1_jax.parallel.mesh import abstract_mesh, create_mesh
from l1_jax.planner.batch_size import resolve_auto
from l1_jax.planner.collectives import count_bytes
from l1_jax.planner.compile import compile_step, find_devices
from l1_jax.planner.estimate import estimate, kept_bytes
from l1_jax.planner.plan import plan, settle
from l1_jax.planner.variants import Search, cheaper_in_memory, rank_meshes
from l1_jax.training.program import batch_shapes, make_program
from l1_jax.training.section import TrainingConfig

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs" / "base_config.yaml"
MODEL = ModelConfig(
    vocab_size=100, max_seq_length=16, n_layers=4, n_heads=8, n_embd=64, dropout=0.0
)
TRAINING = TrainingConfig(max_steps=100, precision="float32", batch_size=8)


def settled(mesh, model=MODEL, **training):
    """A resolved config on a mesh, `"fsdp=4 tensor=2"`, without devices."""
    parallelism = sizes(mesh)
    count = int(np.prod([int(part.split("=")[1]) for part in mesh.split()]))
    config = Config(model, training=TRAINING, parallelism=parallelism).replace(
        "training", **training
    )
    mesh = abstract_mesh(parallelism, count)
    return resolve(
        config, Facts(model.vocab_size, rows_of_stream(10**6), dict(mesh.shape), "cpu")
    ), mesh


@pytest.mark.parametrize(
    ("mesh", "training"),
    [
        ("data=8", {}),
        ("pipeline=2 context=2 fsdp=2", {}),
        ("fsdp=4 tensor=2", {"optimizer": "muon", "moment_dtype": "bfloat16"}),
        ("fsdp=4 tensor=2", {"optimizer": "adafactor"}),
    ],
)
def test_state_bytes_are_those_of_the_arrays(mesh, training):
    config, abstract = settled(mesh, **training)
    state = make_program(config, create_mesh(sizes(mesh), jax.devices())).create()
    device = jax.devices()[3]
    real = [
        s.data.nbytes
        for leaf in jax.tree.leaves(state)
        for s in leaf.addressable_shards
        if s.device == device
    ]
    memory = estimate(config, abstract).memory
    assert memory["parameters"] + memory["optimizer"] == sum(real)


def test_what_the_backward_pass_keeps():
    layers, length, width, hidden = 4, 16, 64, 256
    kept = {
        remat: kept_bytes(MODEL, "float32", remat)
        for remat in ("none", "dots", "dots_no_batch", "full")
    }
    # The outputs of matmuls with weights that have heads or hidden units: queries, keys, values; the MLP's first.
    assert kept["dots_no_batch"].split == 4 * layers * length * (3 * width + hidden)
    assert (
        kept["dots"].split - kept["dots_no_batch"].split == 4 * layers * length * width
    )  # what attention gives
    assert (
        kept["none"].split - kept["dots"].split >= 4 * layers * 8 * length**2
    )  # and the attention scores
    assert kept["full"].split == 0
    assert kept["full"].whole >= 4 * layers * length * width  # the input of each block
    totals = [each.split + each.whole for each in kept.values()]
    assert totals == sorted(totals, reverse=True)


def test_what_the_recipe_changes_in_a_plan():
    """A table that is only looked up in costs no FLOPs; fewer keys are gathered; Muon computes more."""
    grouped = dataclasses.replace(MODEL, n_kv_heads=2)
    assert (
        kept_bytes(grouped, "float32", "none").keys
        == kept_bytes(MODEL, "float32", "none").keys // 4
    )
    untied = dataclasses.replace(MODEL, tie_embeddings=False)
    assert flops_per_token(10**6, MODEL) - flops_per_token(10**6, untied) == 6 * 100 * 64

    def found(model=MODEL, **training):
        return estimate(*settled("context=2 fsdp=4", model, **training), find_kind("H100")[0])

    assert (
        found(grouped).traffic["all-gather"]
        < found().traffic["all-gather"]
        < found(untied).traffic["all-gather"]
    )
    assert found(optimizer="muon").seconds["compute"] > found().seconds["compute"]


def test_hidden_units_are_told_from_the_width():
    def split(hidden):
        return kept_bytes(dataclasses.replace(MODEL, n_inner=hidden), "float32", "none").split

    assert split(64) - split(32) == split(96) - split(64)  # 64 is the width too


@pytest.fixture(scope="module")
def compiled_bytes():
    """By remat policy, the estimate and what the CPU compiler takes for arguments and temporaries, on one device."""
    model = ModelConfig(
        vocab_size=100, max_seq_length=128, n_layers=6, n_heads=4, n_embd=64, dropout=0.0
    )
    found = {}
    for remat in ("none", "dots", "dots_no_batch", "full"):
        config, _ = settled("data=1", model, gradient_checkpointing=remat)
        mesh = create_mesh(config.parallelism, jax.devices()[:1])
        program = make_program(config, mesh)
        with jax.set_mesh(mesh):
            compiled = program.train_step.lower(
                program.abstract, {}, batch_shapes(config, mesh)
            ).compile()
        memory = compiled.memory_analysis()
        real = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        found[remat] = (estimate(config, mesh).total_bytes, real)
    return found


def test_remat_saves_what_the_formula_says(compiled_bytes):
    estimates, real = zip(*compiled_bytes.values(), strict=True)
    assert list(estimates) == sorted(estimates, reverse=True)
    assert list(real) == sorted(real, reverse=True)
    for other in (
        "dots",
        "dots_no_batch",
        "full",
    ):  # the CPU compiler's working set is another one, so differences
        saved = [compiled_bytes["none"][i] - compiled_bytes[other][i] for i in (0, 1)]
        assert saved[0] == pytest.approx(saved[1], rel=0.3, abs=0.1 * real[0]), other


# GiB a device for base_config by the GPU compiler (an H100) and the TPU's (v5e:2x4), see docs/planning.md.
BY_COMPILERS = [
    ("data=1", {}, 4.14),
    ("data=1", {"gradient_checkpointing": "none"}, 14.30),
    ("data=1", {"attention": "blocked"}, 4.00),
    ("data=1", {"attention": "blocked", "gradient_checkpointing": "none"}, 6.32),
    ("data=1", {"attention": "blocked", "gradient_checkpointing": True}, 2.80),
    ("data=1", {"batch_size": 16}, 6.44),
    ("data=1", {"gradient_checkpointing": "dots_no_batch"}, 4.04),
    ("data=1", {"gradient_checkpointing": True}, 2.81),
    ("data=1", {"gradient_checkpointing": True, "batch_size": 16}, 3.80),
    ("data=1", {"gradient_accumulation_steps": 4}, 4.58),
    ("fsdp=8", {}, 2.98),
    ("data=2 tensor=4", {}, 1.35),
    ("pipeline=2 fsdp=4", {}, 1.37),
]


@pytest.mark.parametrize(("mesh", "training", "gib"), BY_COMPILERS)
def test_estimates_are_near_the_compilers(mesh, training, gib):
    config, mesh = settled(mesh, ModelConfig(), **({"precision": "bfloat16"} | training))
    assert estimate(config, mesh).total_bytes / 2**30 == pytest.approx(gib, rel=0.1)


def test_more_rows_need_more_and_a_mesh_needs_less():
    def total(*args, **keys):
        return estimate(*settled(*args, **keys)).total_bytes

    assert (
        total("data=1", batch_size=16)
        > total("data=1")
        > total("fsdp=4")
        > total("fsdp=4 tensor=2")
    )
    assert total("data=1", gradient_accumulation_steps=4) > total(
        "data=1"
    )  # a second set of gradients


def test_collectives_are_counted_with_their_trips():
    mesh = create_mesh(sizes("data=4 tensor=2"), jax.devices())
    on_data = NamedSharding(mesh, PartitionSpec("data"))

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def program(x, y):
        def body(total, _):
            # A sum over the rows, which lie on 4 devices: all-reduce of 32 float32.
            total = jax.lax.with_sharding_constraint(
                jnp.sin(x + total[None]).sum(axis=0), PartitionSpec()
            )
            return total, None

        return jax.lax.scan(body, jnp.zeros(32), None, length=5)[
            0
        ], y  # and y is gathered: 8 x 16 float32

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on_data) for shape in ((8, 32), (8, 16))
    ]
    with jax.set_mesh(mesh):
        hlo = program.lower(*shapes).compile().as_text()
    reduced = 5 * 2 * (32 * 4) * 3 // 4
    gathered = (8 * 16 * 4) * 3 // 4
    assert count_bytes(hlo, 8) == {"all-gather": gathered, "all-reduce": reduced}


TPU_HLO = """\
%all-reduce-scatter.1 (input: f32[8,128]) -> f32[1,128] {
  %input = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.2 = f32[8,128]{1,0:T(8,128)} all-reduce(%input), replica_groups=[1,8]<=[8], to_apply=%add
}

%body.1 (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.3 = f32[1,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %start.1 = (bf16[2,4]{1,0:T(8,128)}, bf16[2,4]{1,0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %gather.1 = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%condition.1 (arg: (s32[], f32[8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%counter, %constant.9), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %while.1 = (s32[], f32[8]{0}) while(%tuple), condition=%condition.1, body=%body.1
}
"""


def test_the_collectives_of_a_tpu():
    scattered, permuted, gathered = 8 * 128 * 4 * 7 // 8, 2 * 4 * 2, 16 * 4 * 3 // 4
    expected = {
        "all-gather": 3 * gathered,
        "collective-permute": 3 * permuted,
        "reduce-scatter": 3 * scattered,
    }
    assert count_bytes(TPU_HLO, 8) == expected


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "tensor=8", "context=8", "pipeline=4 data=2"])
def test_traffic_by_formula_is_near_the_compilers(mesh):
    model = ModelConfig(
        vocab_size=1024, max_seq_length=64, n_layers=4, n_heads=8, n_embd=128, dropout=0.0
    )
    config, abstract = settled(mesh, model)
    by_formula = estimate(config, abstract, find_kind("H100")[0]).traffic
    compiled = compile_step(config, "cpu", jax.devices()).traffic
    # A CPU reduces all of a gradient where others reduce and scatter: twice the bytes.
    total = sum(by_formula.values()) + by_formula.get("reduce-scatter", 0)
    assert total == pytest.approx(sum(compiled.values()), rel=0.25)


@pytest.mark.slow
def test_a_table_is_summed_over_the_devices_once_however_many_parts_the_loss_has(monkeypatch):
    model = ModelConfig(
        vocab_size=1024, max_seq_length=64, n_layers=2, n_heads=2, n_embd=32, dropout=0.0
    )
    for mesh in ("data=8", "fsdp=8", "fsdp=4 context=2"):
        config, _ = settled(mesh, model)
        monkeypatch.setattr(chunks, "MAX_LOGITS_BYTES", 2**30)
        whole = sum(compile_step(config, "cpu", jax.devices()).traffic.values())
        monkeypatch.setattr(
            chunks, "MAX_LOGITS_BYTES", 4 * 1024 * 8 * 8
        )  # eight positions at a time
        # Two gradients of the table are summed, the lookup's and the head's, and in one part they may be one.
        table = 4 * 1024 * 32
        parts = sum(compile_step(config, "cpu", jax.devices()).traffic.values())
        assert whole <= parts <= whole + 2.1 * table, mesh


def test_accumulated_gradients_are_summed_once():
    def sent(accumulation):
        config, abstract = settled("data=8", gradient_accumulation_steps=accumulation, batch_size=1)
        by_formula = estimate(config, abstract, find_kind("H100")[0]).traffic
        return sum(compile_step(config, "cpu", jax.devices()).traffic.values()), by_formula

    (one, formula), (four, same) = sent(1), sent(4)
    assert four <= one
    assert formula == same


@pytest.mark.parametrize("mesh", ["fsdp=4 tensor=2", "pipeline=2 fsdp=2 tensor=2"])
def test_muon_exchanges_each_matrix_twice_over_an_axis(mesh):
    """Six layers on eight devices, as if they were eight; nothing else is sent, in no iteration."""
    model = ModelConfig(
        vocab_size=128, max_seq_length=16, n_layers=6, n_heads=8, n_embd=64, dropout=0.0, bias=False
    )

    def compiled(optimizer):
        config, abstract = settled(mesh, model, optimizer=optimizer, batch_size=4)
        return compile_step(config, "cpu", jax.devices()).traffic, estimate(
            config, abstract, find_kind("H100")[0]
        )

    (muon, planned), (adamw, _) = compiled("muon"), compiled("adamw")
    assert muon["all-to-all"] == pytest.approx(planned.traffic["all-to-all"], rel=0.05)
    assert {
        kind: size for kind, size in muon.items() if size > 1.01 * adamw.get(kind, 0)
    }.keys() == {"all-to-all"}


def test_kinds_of_devices():
    assert len(device_kinds()) >= 10
    for name, kind in device_kinds().items():
        assert find_kind(name)[0] is kind_of(kind.jax[0]) is kind
        assert min(kind.peak_flops, kind.memory_gib, kind.bandwidth, kind.link) > 1
        for count, shape in kind.slices.items():
            assert find_kind(shape) == (kind, shape)
            assert np.prod([int(n) for n in shape.partition(":")[2].split("x")]) == count
    assert find_kind("rtx3080 12gb")[0].name == find_kind("RTX 3080")[0].name == "RTX 3080 12GB"
    assert kind_of("cpu") is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--devices", 8, "--device-kind", "H1000"),
            "--device-kind 'H1000' is not known; did you mean 'H100'?",
        ),
        (
            ("--device-kind", "v5e:3x3"),
            "--device-kind 'v5e:3x3' is no slice that is known here. Give one of v5e:2x2",
        ),
        (("--device-kind", "v5e:2x4", "--devices", 4), "--devices is 4, and v5e:2x4 has 8"),
        ((), "--devices is missing"),
        (("--devices", 0), "--devices is 0"),
        (
            ("--devices", 8, "--mesh", "fsdp=3"),
            "the parallelism data -1 x fsdp 3 does not fit 8 devices",
        ),
        (
            ("--devices", 8, "--mesh", "tensor=8"),
            "model.n_heads 12 is not divisible by parallelism.tensor 8",
        ),
        (("--devices", 8, "--mesh", "fspd=8"), "did you mean 'fsdp'?"),
        (("--devices", 8, "rows"), "'rows' is no override"),
        (
            ("--devices", 1, "training.batch_size=auto"),
            "training.batch_size is auto, and training.global_batch_size",
        ),
    ],
)
def test_bad_input_is_one_line(script, args, message):
    result = script("plan", "--config", BASE, *args)
    assert result.code == 2
    assert message in result.error
    assert not result.out


def test_the_guides_card(script):
    """An RTX 3080 with 12 GB holds base_config as it is, but not if everything is kept."""
    args = ("plan", "--config", BASE, "--devices", 1, "--device-kind", "RTX 3080 12GB")
    assert "\nit fits" in script(*args).out
    result = script(*args, "training.gradient_checkpointing=none")
    assert result.code == 0
    change = "training.batch_size=2 training.gradient_accumulation_steps=4"
    assert f"it does not fit. The cheapest change that does: {change}" in result.out


def test_a_way_of_attention_limits_the_search():
    """Only meshes on which it can run; and the largest microbatch is that of the devices' own way."""
    config, _ = settled("data=1", ModelConfig(dropout=0.0), attention="cudnn", precision="bfloat16")
    kind, limit = find_kind("H100")[0], 2**36
    found = rank_meshes(Search(config, None, kind, 4), limit)
    assert found
    assert all(v.config.parallelism.context == v.config.parallelism.pipeline == 1 for v in found)
    keys = {"batch_size": "auto", "global_batch_size": 512, "gradient_checkpointing": "none"}
    auto = Config(ModelConfig(dropout=0.0)).replace("training", **keys)
    both = auto, auto.replace("training", attention="plain")
    rows = [settle(each, kind, 1, limit).training.batch_size for each in both]
    assert rows[0] > rows[1]


def test_json(script):
    args = (
        "--config",
        BASE,
        "--devices",
        8,
        "--mesh",
        "fsdp=8",
        "--search",
        "--json",
        "training.max_steps=1000",
    )
    result = script("plan", *args)
    found = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert found["parameters"] == 124_439_808
    assert found["flops_per_token"] == 6 * 124_439_808 + 12 * 12 * 768 * 1024
    assert found["mesh"] == {"pipeline": 1, "data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert (found["device_kind"], found["devices"], found["global_batch_size"], found["fits"]) == (
        "H100",
        8,
        64,
        True,
    )
    assert found["tokens"] == 1000 * 64 * 1024
    assert found["hours"] == pytest.approx(1000 * found["seconds"]["step"] / 3600)
    assert found["memory_bytes"]["total"] == sum(
        v for k, v in found["memory_bytes"].items() if k != "total"
    )
    assert found["compiled"]["compiler"] == "cpu"
    assert set(found["traffic_bytes"]) == {"all-gather", "reduce-scatter"}
    assert {"precision", "usable_bytes", "change", "steps", "tokens_per_second"} < set(found)
    order = [(not row["fits"], row["step_seconds"]) for row in found["ranking"]]
    assert order == sorted(order)
    assert len(found["ranking"]) > 20


@pytest.mark.slow
def test_the_change_is_checked_and_keeps_the_global_batch():
    config = Config(training=TrainingConfig(batch_size=64, global_batch_size=512))
    result = plan(config, "L4", 8)
    assert not result.fits
    assert result.change
    changed = result.change.config
    assert changed.training.global_batch_size == 512
    again = plan(changed, "L4", 8)
    assert again.fits
    assert again.estimate == result.change.estimate


@pytest.mark.parametrize("asked", [64, None])
def test_the_microbatches_of_a_pipeline_are_among_the_changes(asked):
    """What plan proposes can be typed as it stands, also where pipeline_microbatches was given."""
    kind, mesh = find_kind("L4")[0], abstract_mesh(sizes("pipeline=2"), 2)
    config = Config(MODEL, training=TRAINING, parallelism=sizes("pipeline=2"))
    config = config.replace("training", batch_size=64).replace(
        "parallelism", pipeline_microbatches=asked
    )
    resolved = resolve(config, Facts(100, rows_of_stream(10**6), dict(mesh.shape), "cpu"))
    usable = estimate(resolved, mesh).total_bytes // 2
    for found in cheaper_in_memory(Search(resolved, asked, kind, 2), usable):
        typed = resolved.replace("parallelism", pipeline_microbatches=asked)
        for name, value in found.changes.items():
            section, _, key = name.partition(".")
            typed = typed.replace(section, **{key: value})
        mesh = abstract_mesh(typed.parallelism, 2)
        assert (
            estimate(
                resolve(typed, Facts(100, rows_of_stream(10**6), dict(mesh.shape), "cpu")),
                mesh,
                kind,
            )
            == found.estimate
        )
        assert asked or "parallelism.pipeline_microbatches" not in found.changes


def test_a_compiler_that_was_not_asked_is_told(script):
    args = ("--config", BASE, "--device-kind", "v5e", "--devices", 6, "--mesh", "data=6")
    out = script("plan", *args).out
    assert "The TPU compiler was not asked, for " in out
    assert find_devices(find_kind("v5e")[0], None, 6) is None


def test_no_change_is_enough():
    result = plan(Config(ModelConfig(n_layers=96, n_heads=96, n_embd=12288)), "L4", 2)
    assert not result.fits
    assert result.change is None


def test_the_largest_microbatch(script, prepared, tiny_config, tmp_path, monkeypatch):
    config = Config(MODEL, training=TRAINING).replace(
        "training", batch_size="auto", global_batch_size=64
    )
    mesh = abstract_mesh(config.parallelism, 4)

    def rows(limit):
        training = resolve_auto(
            config, Facts(100, rows_of_stream(10**6), dict(mesh.shape), "cpu"), mesh, limit
        ).training
        assert training.batch_size * training.gradient_accumulation_steps == 16
        return training.batch_size

    def needed(size):
        each = config.replace("training", batch_size=size)
        return (
            estimate(
                resolve(each, Facts(100, rows_of_stream(10**6), dict(mesh.shape), "cpu")), mesh
            ).total_bytes
            / 0.92
        )

    assert rows(2**40) == 16
    assert rows(int(needed(4)) + 2) == 4
    assert rows(int(needed(4)) - 2) == 2
    with pytest.raises(UserError, match="not even one sequence a device fits"):
        rows(10**5)
    args = ("--config", tiny_config, f"data.path={prepared}", f"training.output_dir={tmp_path}/run")
    auto = ("training.max_steps=2", "training.global_batch_size=16", "training.batch_size=auto")
    result = script("train", *args, *auto)
    assert result.code == 0, result.err
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]
    assert (
        written["batch_size"],
        written["gradient_accumulation_steps"],
        written["global_batch_size"],
    ) == (2, 1, 16)


TPU_SCRIPT = """
import dataclasses, json, sys
from l1_jax.planner.compile import compile_step, find_devices, use_cpu
from l1_jax.devices.kinds import find_kind
use_cpu(8)
from test_planner import PARITY, settled
from test_parallel import MODEL
for mesh in PARITY:
    config, _ = settled(mesh, dataclasses.replace(MODEL, max_seq_length=256), precision="bfloat16", batch_size=4,
                        gradient_accumulation_steps=2)
    found = compile_step(config, *find_devices(*find_kind("v5e:2x4"), 8))
    print(json.dumps([mesh, found._asdict()]), flush=True)
"""


@pytest.fixture(scope="module")
def on_tpu():
    """For each mesh of the parity table what the TPU compiler says of a small step on `v5e:2x4`."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: docs/planning.md says how")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", TPU_SCRIPT], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", PARITY)
def test_every_parallelism_compiles_for_a_tpu(on_tpu, mesh):
    found = on_tpu[mesh]
    assert found["fits"]
    assert found["peak_bytes"] > 0
    assert found["traffic"]
