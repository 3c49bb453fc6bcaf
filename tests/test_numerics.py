"""What is not finite or spikes: nothing of it is applied, saved or ranked, and it can be done again."""

import dataclasses
import json
import shutil
from unittest.mock import Mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from faults import numerics
from faults.numerics import arrays, compiled_once, corrupted, poisoned, tiny_data, train_quietly
from test_training import TRAINING, make_batch, setup

from l1_jax.checkpoint import resuming
from l1_jax.checkpoint.run_directory import RunDirectory
from l1_jax.checkpoint.saver import Saver
from l1_jax.config.stages import Stage
from l1_jax.data.batches import TrainingBatches
from l1_jax.data.prepare import prepare
from l1_jax.data.sources import TokenSource
from l1_jax.run import loop, train
from l1_jax.storage.remote import Remote
from l1_jax.training import health as health_module
from l1_jax.training.health import Health, judge
from l1_jax.training.section import TrainingConfig

NAN = float("nan")


def identical(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in leaves)


def test_the_estimate_by_hand():
    """Means over what was seen, later over the last 100 or so; from the 50th loss on an outlier counts 3 deviations."""
    losses = 3 + np.random.default_rng(0).normal(0, 0.1, 200)
    losses[[20, 150]] = 30.0  # the first while the estimate is not known yet
    judged = jax.jit(
        lambda h, loss: judge(h, loss, np.True_, np.False_, TrainingConfig(on_spike="skip"))
    )
    health, spikes, mean, deviation = Health(0.0, 0.0, 0, 0), [], 0.0, 0.0
    for n, loss in enumerate(losses):
        health, spike = judged(health, loss)
        spikes += [n] if spike else []
        mean = mean if n else loss
        excess = loss - mean
        if n >= 50:
            excess = np.clip(excess, -3 * deviation, 3 * deviation)
        rate = max(1 / (n + 1), 0.01)
        mean, deviation = mean + rate * excess, deviation + rate * (abs(excess) - deviation)
        np.testing.assert_allclose(
            [health.mean, health.deviation, health.seen], [mean, deviation, n + 1], rtol=1e-4
        )
        assert health.refused == (n == 150)
    assert spikes == [150]


def test_after_a_stop_nothing_changes_any_more():
    _, state, step = setup()
    state, _ = step(state, make_batch())
    batch = make_batch()
    batch["weights"][0, 0] = np.nan
    bad, metrics = step(state, batch)
    after, _ = step(bad, make_batch())  # what an accelerator has begun before the host knows
    before = dataclasses.replace(
        state, health=dataclasses.replace(state.health, refused=bad.health.refused)
    )
    assert metrics["refused"] == TRAINING.max_skipped_steps
    assert identical(bad, before)
    assert identical(after, before)


def test_skipped_steps_are_consumed_and_counted():
    training = dataclasses.replace(
        TRAINING, on_nonfinite="skip", on_spike="skip", max_skipped_steps=3
    )
    _, state, step = setup(training=training)
    bad = make_batch()
    bad["weights"][0, 0] = np.inf
    first, _ = step(state, bad)
    certain = dataclasses.replace(
        first.health, mean=np.float32(-9), seen=np.int32(50)
    )  # any loss is a spike
    second, metrics = step(dataclasses.replace(first, health=certain), make_batch())
    assert (bool(metrics["finite"]), bool(metrics["spike"])) == (True, True)
    assert [int(s.step) for s in (state, first, second)] == [0, 1, 2]
    assert [int(s.health.refused) for s in (first, second)] == [1, 2]
    assert identical((second.params, second.opt_state), (state.params, state.opt_state))
    good, _ = step(dataclasses.replace(second, health=first.health), make_batch())
    assert (good.step, good.health.refused) == (3, 0)
    assert not identical(good.params, second.params)
    ended, _ = step(step(second, bad)[0], make_batch())
    assert (ended.step, ended.health.refused) == (2, 3)


def test_the_documents_of_a_batch():
    stream = np.random.default_rng(0).integers(0, 9, 2000)
    stream[[0, -1]] = 0  # the end of a text
    tokens = TokenSource(stream, eot_id=0, document_mask=False, digest="")
    batches, owner = TrainingBatches(tokens, (Stage(0, 4, 32),), seed=1), np.cumsum(stream == 0)
    for step in (0, 7, 20):
        for row, source in enumerate(batches.where(step)):
            start = source["row"] * 32
            np.testing.assert_array_equal(
                batches(step, [row])["targets"][0], stream[start + 1 : start + 33]
            )
            ids = [
                owner[at - 1] - 1 for at in range(start + 1, start + 33)
            ]  # an EOT closes the one before it
            assert source["documents"] == [ids[0], ids[-1]]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("numerics")
    tiny_data(path / "data")
    with pytest.MonkeyPatch.context() as patch, compiled_once():
        patch.setattr(health_module, "ESTIMATE_WARMUP", 5)
        yield path


@pytest.fixture(scope="module")
def run(home):
    def run_poisoned(name, poisons, *overrides, **flags):
        with poisoned(poisons):
            return train_quietly(home / "data", home / name, *overrides, **flags)

    return run_poisoned


@pytest.fixture(scope="module")
def undisturbed(home, run):
    assert run("undisturbed", {}) == "done"
    return home / "undisturbed"


def rows(run_dir, name="metrics.jsonl"):
    found = [json.loads(row) for row in (run_dir / name).read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")} for row in found
    ]


def test_a_stopped_run_leaves_the_step_to_be_done_again(home, run, undisturbed):
    run_dir, bundle = home / "stopped", home / "stopped" / "nonfinite-7"
    said = run("stopped", {7: (0, NAN)})
    assert said.startswith(
        "the loss or gradient of step 7 is not finite; its update was not applied"
    )
    assert f"`resume_from` {bundle} does it again" in said
    report = json.loads((bundle / "report.json").read_text())
    hashes = {
        row["step"]: row["data/batch_hash"] for row in rows(undisturbed) if "data/batch_hash" in row
    }
    assert (report["step"], report["batch_hash"], report["grad_norm"]) == (7, hashes[7], "nan")
    assert len(report["rows"]) == 8
    assert run("six", {}, "training.max_steps=6") == "done"
    assert identical(arrays(bundle), arrays(home / "six" / "checkpoint-6"))

    # Of step 6: never the bundle.
    assert resuming.find_resumed(RunDirectory(run_dir), None).path.name == "best_model"
    assert run("stopped", {7: (0, NAN)}, resume=True, resume_from=str(bundle)) == said
    assert run("stopped", {}, resume=True, resume_from=str(bundle)) == "done"
    assert identical(arrays(run_dir / "checkpoint-12"), arrays(undisturbed / "checkpoint-12"))
    assert rows(run_dir) == rows(undisturbed)
    RunDirectory(run_dir).clear()
    assert not bundle.exists()


def test_a_bundle_that_cannot_be_saved_hides_nothing(home, run, monkeypatch, caplog):
    def full(saver, partial, names, more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Saver, "_begin", full)
    said = run("no-bundle", {3: (0, NAN)})
    assert said.startswith(
        "the loss or gradient of step 3 is not finite; its update was not applied"
    )
    assert "resume_from" not in said
    assert "step 2 could not be saved" in caplog.text


def test_a_bundle_in_object_storage(home, run):
    url = "memory://numerics/run"
    output = f"training.output_dir={url}"
    said = run("nowhere", {7: (NAN, 0)}, output)
    assert f"`resume_from` {url}/nonfinite-7 does it again" in said
    assert (
        run("nowhere", {7: (NAN, 0)}, output, resume=True, resume_from=f"{url}/nonfinite-7") == said
    )
    assert run("nowhere", {}, output, resume=True) == "done"


def test_a_skipped_run_goes_on_and_says_what_it_left_out(home, run):
    run_dir, skip = home / "skipped", ("training.on_nonfinite=skip", "training.max_skipped_steps=3")
    bad = {5: (NAN, 0), 6: (0, np.inf), 9: (NAN, NAN)}
    assert run("skipped", bad, *skip) == "done"
    assert [row["step"] for row in rows(run_dir, "skipped.jsonl")] == [5, 6, 9]
    assert [(row["step"], row["train/skipped"]) for row in rows(run_dir) if "train/skipped" in row] == [
        (5, 1), (6, 2), (9, 1),
    ]  # fmt: skip
    info = json.loads((run_dir / "checkpoint-12" / "checkpoint.json").read_text())
    assert (
        info["best_step"] == 12
    )  # the validation at step 6, whose update was skipped, is not ranked
    done = arrays(run_dir / "checkpoint-12")
    assert (
        run("skipped", bad, *skip, resume=True, resume_from=str(run_dir / "checkpoint-4")) == "done"
    )
    assert identical(arrays(run_dir / "checkpoint-12"), done)
    assert [row["step"] for row in rows(run_dir, "skipped.jsonl")] == [5, 6, 9]
    said = run("too-many", bad | {7: (NAN, 0)}, *skip)
    assert "step 7 is not finite; its update was not applied, as those of 3 steps in a row" in said
    assert sorted(path.name for path in run_dir.glob("nonfinite-*")) == [
        "nonfinite-5",
        "nonfinite-9",
    ]
    report = json.loads((run_dir / "nonfinite-9" / "report.json").read_text())
    assert report == json.loads((run_dir / "skipped.jsonl").read_text().splitlines()[-1])
    assert (
        run("skipped", bad, *skip, resume=True, resume_from=str(run_dir / "nonfinite-9")) == "done"
    )
    assert identical(arrays(run_dir / "checkpoint-12"), done)


@pytest.mark.parametrize("what", ["warn", "rewind"])
def test_a_spike(home, run, undisturbed, what, caplog, monkeypatch):
    """A loss that jumps at step 7; the run is then done again, with a stop and a checkpoint at step 6."""
    seen, accept = {}, loop.accept

    def watching_accept(run, tracker, clock, meter, step, metrics):
        accept(run, tracker, clock, meter, step, metrics)
        seen[step] = jax.device_get(run.state)
        run.stopping |= step == stop

    monkeypatch.setattr(loop, "accept", watching_accept)
    key, stop, poison = f"training.on_spike={what}", None, {7: (50, 0), 12: (50, 0)}
    assert run(what, poison, key) == "done"
    done, info = (
        home / what / "checkpoint-12",
        json.loads((home / what / "checkpoint-12" / "checkpoint.json").read_text()),
    )
    assert info["best_step"] == 6  # and not 12
    there = arrays(home / what / "checkpoint-4")
    if what == "warn":
        assert "the loss of step 7 jumped to 5" in caplog.text
        assert identical(
            seen[12].params,
            arrays(undisturbed / "checkpoint-12")[: len(jax.tree.leaves(seen[12].params))],
        )
        return
    params = jax.tree.leaves(seen[7].params)
    assert identical(params, there[: len(params)])
    assert (seen[7].step, seen[7].health.refused, seen[8].health.refused) == (7, 1, 0)
    assert not identical(seen[8].params, seen[7].params)
    stop = 6
    assert run("again", poison, key) == "stopped"
    stop = None
    assert run("again", poison, key, resume=True) == "done"
    assert identical(arrays(home / "again" / "checkpoint-12"), arrays(done))
    (home / "again" / "checkpoint-8").rename(home / "again" / "aside")
    monkeypatch.setattr(resuming, "find_missing", lambda *_, **__: [])
    said = run("again", poison, key, resume=True, resume_from=str(home / "again" / "aside"))
    assert "checkpoint-8, to go back to, cannot be used: manifest.json (missing)" in said
    shutil.copytree(home / "again" / "aside", home / "again" / "checkpoint-8")
    with open(
        next((home / "again" / "checkpoint-8" / "state" / "params").rglob("0*")), "r+b"
    ) as file:
        file.write(b"x")
    said = run("again", poison, key, resume=True, resume_from=str(home / "again" / "aside"))
    assert "checkpoint-8, to go back to, cannot be used: state/params/" in said


@pytest.fixture(scope="module")
def noise(home):
    """Other data with the same tokenizer, of which every loss is far above that of English."""
    text, letters = (
        home / "noise.txt",
        np.random.default_rng(0).integers(33, 127, (400, 80), np.uint8),
    )
    text.write_text("\n".join(row.tobytes().decode() for row in letters))
    prepare([str(text)], str(home / "noise"), vocab_size=300, tokenizer="bytes")
    return home / "noise"


def info_of(checkpoint):
    return json.loads((checkpoint / "checkpoint.json").read_text())


def seen(checkpoint):
    """How many losses the estimate of the next one is made of."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as reader:
        return reader.restore(checkpoint / "state" / "optimizer")["health"]["seen"]


@pytest.mark.parametrize("checkpoints", ["all", "the best model alone"])
def test_other_data_has_a_best_model_and_an_estimate_of_its_own(
    home, run, noise, checkpoints, monkeypatch
):
    """Also where the best model is all that there is of the last step, and a kill comes at once."""
    run_dir, skip = home / f"moved-{checkpoints.split()[0]}", "training.on_spike=skip"
    assert run(run_dir.name, {}, skip, "training.max_steps=6") == "done"
    english = info_of(run_dir / "best_model")
    if checkpoints != "all":
        for path in run_dir.glob("checkpoint-*"):
            shutil.rmtree(path)

    moved = {"resume": True, "allow_change": ["data"]}
    keys = (
        skip,
        f"data.path={noise}",
        "training.early_stopping_patience=1",
        "training.eval_steps=3",
    )
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_steps", kill := Mock(side_effect=ConnectionError))
        patch.setattr(train, "train_steps", kill)
        with pytest.raises(ConnectionError):
            run(run_dir.name, {}, *keys, **moved)
    assert info_of(run_dir / "checkpoint-6")["step"] == 6
    assert run(run_dir.name, {}, *keys, **moved) == "done"

    losses = {row["step"]: row["val/loss"] for row in rows(run_dir) if "val/loss" in row}
    assert min(losses[9], losses[12]) > losses[6] == english["best_loss"]
    last = info_of(run_dir / "checkpoint-12")
    assert last["best_loss"] == losses[last["best_step"]] == min(losses[9], losses[12])
    assert info_of(run_dir / "best_model")["data_hash"] == last["data_hash"] != english["data_hash"]
    aside = [info_of(path) for path in run_dir.glob("aside-best_model*")]
    assert aside == ([english] if checkpoints == "all" else [])
    assert seen(run_dir / "checkpoint-12") == 6
    assert not (run_dir / "skipped.jsonl").exists()


def test_another_measure_has_a_best_model_of_its_own(home, run):
    """What the first batch of the validation split said is not compared with what all of it says."""
    assert run("measured", {}, "training.max_steps=6") == "done"
    run_dir, keys = home / "measured", ("training.eval_batches=2", "training.learning_rate=1e-30")
    assert run("measured", {}, *keys, resume=True) == "done"
    assert info_of(run_dir / "checkpoint-12")["best_step"] == 12
    assert info_of(run_dir / "aside-best_model.1")["best_step"] == 6
    assert seen(run_dir / "checkpoint-12") == 12  # the training loss is the same one


def test_a_branch_goes_back_to_what_it_came_from(home, run, monkeypatch):
    """Stopped on the way or not, from a disk or a bucket, it is the run that it left at a multiple of save_steps."""
    accept, stop = loop.accept, None

    def stopping_accept(run, tracker, clock, meter, step, metrics):
        accept(run, tracker, clock, meter, step, metrics)
        run.stopping |= step == stop

    monkeypatch.setattr(loop, "accept", stopping_accept)
    poison = {7: (50, 0)}
    keys = ("training.on_spike=rewind", "training.ema_decay=0.9")
    assert run("trunk", poison, *keys) == "done"
    trunk, bucket = home / "trunk" / "checkpoint-4", Remote("memory://numerics/trunk/checkpoint-4")
    bucket.upload(trunk)
    for name, path in (("from-disk", trunk), ("from-bucket", bucket.url)):
        assert run(name, poison, *keys, resume=True, resume_from=str(path)) == "done"
        assert identical(
            arrays(home / name / "checkpoint-12"), arrays(home / "trunk" / "checkpoint-12")
        )
        assert [row["step"] for row in rows(home / name, "skipped.jsonl")] == [7]

    stop, origin = 6, shutil.copytree(trunk, home / "origin")
    assert run("stopped-branch", poison, *keys, resume=True, resume_from=str(origin)) == "stopped"
    stop = None
    origin.rename(home / "away")
    said = run("stopped-branch", poison, *keys, resume=True)
    assert (
        f"the loss of step 7 jumped, and the run came from {origin}, step 4, which is not there any more."
        in said
    )
    assert "Restore it, or resume with training.on_spike: skip" in said
    (home / "away").rename(origin)
    assert run("stopped-branch", poison, *keys, resume=True) == "done"
    assert identical(
        arrays(home / "stopped-branch" / "checkpoint-12"), arrays(home / "trunk" / "checkpoint-12")
    )


def test_a_branch_that_began_between_two_saves_says_what_helps(home, run):
    poison = {7: (50, 0)}
    assert run("stem", {}, "training.max_steps=6") == "done"
    branch = {"resume": True, "resume_from": str(home / "stem")}
    said = run("between", poison, "training.on_spike=rewind", **branch)
    assert (
        "checkpoint-4, to go back to, is from before step 6, where the run began. Resume with"
        in said
    )
    assert run("between", poison, "training.on_spike=skip", resume=True) == "done"
    assert [row["step"] for row in rows(home / "between", "skipped.jsonl")] == [7]


def test_what_is_gone_back_to_may_be_of_other_data(home, run, noise):
    keys = ("training.on_spike=rewind", "training.save_steps=8")
    assert run("back", {}, *keys, "training.max_steps=8") == "done"
    keys += (f"data.path={noise}", "training.max_steps=17")
    assert run("back", {14: (50, 0)}, *keys, resume=True, allow_change=["data"]) == "done"
    assert [row["step"] for row in rows(home / "back", "skipped.jsonl")] == [14]
    assert seen(home / "back" / "checkpoint-17") == 3


def test_a_corrupted_number_is_never_saved(home, run):
    with corrupted(4, np.inf, np.random.default_rng(0)):
        said = run("corrupted", {})
    assert "holds numbers that are not finite at step 4; nothing of this step was saved" in said
    assert not list((home / "corrupted").glob("*/checkpoint.json"))


@pytest.mark.slow
def test_the_campaign():
    assert [row for row in numerics.campaign(full=False) if not row[-1]] == []
