"""Runs and prepared data in object storage: fsspec's memory:// stands in for a bucket, file:// where processes meet."""

import json
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import pytest
from e2e.test_run import assert_identical, logged, start, state_of, train_args

from l1_jax.run import train
from l1_jax.storage.remote import Remote

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
    Remote(url).upload(directory)


def published(url: str) -> set[str]:
    return {name.split("/")[0] for name in Remote(url).files() if name.endswith(f"/{MARKER}")}


def local_copy(url: str, path: Path) -> Path:
    remote = Remote(url)
    remote.download(path, remote.files())
    return path


@pytest.mark.slow
def test_a_run_on_a_url_is_the_local_run(script, trained, prepared, tiny_config, tmp_path):
    upload(prepared, "memory://b/data")
    args = train_args(tiny_config, "memory://b/data", "memory://b/run", "training.max_steps=100")
    result = script("train", *args)
    assert result.code == 0, result.err
    assert "saved in memory://b/run" in result.err
    assert published("memory://b/run") == {
        "best_model-100",
        "checkpoint-60",
        "checkpoint-80",
        "checkpoint-100",
    }
    run = local_copy("memory://b/run", tmp_path / "run")
    assert {path.name for path in run.iterdir()} == published("memory://b/run") | {
        "config.yaml", "metrics.jsonl", "run.json", "tensorboard",
    }  # fmt: skip
    assert logged(run) == logged(trained)
    assert_identical(state_of(run / "checkpoint-100"), state_of(trained / "checkpoint-100"))
    assert_identical(state_of(run / "best_model-100"), state_of(trained / "best_model"))

    again = script("train", *args)
    assert (again.code, "memory://b/run holds a run already" in again.error) == (2, True)
    assert "nothing left to do" in script("train", "--resume", *args).err
    for data, model in (
        ("memory://b/data", "memory://b/run"),
        ("memory://b/data/test.txt", "memory://b/run/best_model"),
    ):
        ours, theirs = (
            script("evaluate", "--json", "--model", *pair)
            for pair in ((model, "--data", data), (trained, "--data", prepared / "test.txt"))
        )
        assert (ours.code, ours.out) == (0, theirs.out), ours.err
    Remote("memory://b").write("texts/a.txt", b"some text\nof nobody's\n")
    assert json.loads(
        script("evaluate", "--json", "--model", trained, "--data", "memory://b/texts/a.txt").out
    )["loss"]
    absent = script("evaluate", "--model", trained, "--data", "memory://b/texts/b.txt")
    assert (absent.code, "memory://b/texts cannot be used (FileNotFoundError" in absent.error) == (
        2,
        True,
    )


@pytest.mark.slow
def test_resume_from_an_older_checkpoint(script, trained, prepared, tiny_config, tmp_path):
    """Of a run that was copied to the bucket: its best model has its local name."""
    upload(trained, "memory://b/run")
    args = train_args(tiny_config, prepared, "memory://b/run", "training.max_steps=100")
    result = script("train", "--resume", "memory://b/run/checkpoint-60", *args)
    assert result.code == 0, result.err
    assert published("memory://b/run") == {
        "checkpoint-60", "checkpoint-80", "checkpoint-100", "best_model-100", "aside-checkpoint-80.1",
        "aside-checkpoint-100.1", "aside-best_model.1",
    }  # fmt: skip
    run = local_copy("memory://b/run", tmp_path / "run")
    assert logged(run) == logged(trained)
    for name in (
        "checkpoint-100",
        "aside-checkpoint-100.1",
        "best_model-100",
        "aside-best_model.1",
    ):
        assert_identical(state_of(run / name), state_of(trained / "checkpoint-100"))


@pytest.mark.slow
def test_a_checkpoint_of_another_run(script, trained, prepared, tiny_config, tmp_path):
    """From a bucket to a local run, from a local run to a bucket; each is then a run of its own."""
    upload(trained / "checkpoint-60", "memory://b/mine")
    steps = ("training.max_steps=62", "training.schedule_steps=100")
    result = script(
        "train",
        "--resume",
        "memory://b/mine",
        *train_args(tiny_config, prepared, tmp_path / "r", *steps),
    )
    assert (result.code, "steps 61 to 62" in result.err) == (0, True), result.err
    args = train_args(tiny_config, prepared, "memory://b/run", *steps)
    result = script(
        "train", "--resume", tmp_path / "r" / "checkpoint-62", *args, "training.max_steps=63"
    )
    assert (result.code, "steps 63 to 63" in result.err) == (0, True), result.err
    assert (
        script(
            "generate",
            "--model",
            "memory://b/run/best_model.pt",
            "--prompt",
            "A",
            "--max-tokens",
            1,
        ).code
        == 0
    )
    absent = script("generate", "--model", "memory://b/run/checkpoint-7", "--prompt", "A")
    message = "there is no checkpoint memory://b/run/checkpoint-7. Beside it are: best_model, best_model-63, checkpoint-63."
    assert message in absent.error
    assert (
        "Beside it"
        not in script("generate", "--model", "memory://b/run/best_modle", "--prompt", "A").error
    )
    assert (
        "memory://b/mine/5 is not a checkpoint"
        in script("generate", "--model", "memory://b/mine/5", "--prompt", "A").err
    )


@pytest.mark.slow
def test_what_has_no_marker_does_not_exist(script, trained, prepared, tiny_config):
    """What a kill left of an upload and of a deletion is not taken, and is cleared by the next run."""
    upload(trained, "memory://b/run")
    remote = Remote("memory://b/run")
    fsspec.filesystem("memory").rm(
        [f"/b/run/{name}/{MARKER}" for name in ("checkpoint-100", "best_model")]
    )
    remote.write("mine/notes.txt", b"not the run's")
    before = set(remote.files())
    config = ("training.max_steps=82", "training.schedule_steps=100", "training.save_total_limit=9")
    args = train_args(tiny_config, prepared, "memory://b/run", *config)
    refused = script("train", *args, "--resume", "model.n_embd=64", "training.max_steps=90")
    assert (
        "memory://b/run/checkpoint-80 was trained with other values of model.n_embd, model.n_inner"
        in refused.error
    )
    assert script("train", *args).code == 2
    assert set(remote.files()) == before  # a refused command changes nothing
    assert "steps 81 to 82" in script("train", *args, "--resume").err
    assert published("memory://b/run") == {
        "checkpoint-60",
        "checkpoint-80",
        "checkpoint-82",
        "best_model-82",
    }
    assert not [
        name for name in remote.files() if name.startswith(("checkpoint-100", "best_model/"))
    ]
    assert remote.read_text("mine/notes.txt")
    result = script("train", "--overwrite", *args, "training.max_steps=1")
    assert result.code == 0, result.err
    assert published("memory://b/run") == {"checkpoint-1", "best_model-1"}
    assert [json.loads(row)["step"] for row in remote.read_text("metrics.jsonl").splitlines()] == [
        1,
        1,
    ]
    assert remote.read_text("mine/notes.txt")


@pytest.mark.slow
def test_the_order_in_the_bucket(script, prepared, tiny_config, monkeypatch):
    """At every moment: metrics as far as the newest checkpoint, whole checkpoints, and a best model after the first."""
    url, seen = "memory://b/run", []
    asked = Remote._asked

    def watch(self):
        names = {path.removeprefix("/b/run/") for path in fsspec.filesystem("memory").store}
        marked = {name.split("/")[0] for name in names if name.endswith(MARKER)}
        steps = [int(name.split("-")[1]) for name in marked]
        rows = (
            fsspec.filesystem("memory").store["/b/run/metrics.jsonl"].getvalue() if marked else b""
        )
        assert not marked or json.loads(rows.splitlines()[-1])["step"] >= max(steps)
        for name in marked:
            arrays = {path.split("/", 1)[1] for path in names if path.startswith(f"{name}/state/")}
            assert len(arrays) == len(seen[0][1]) if seen else True
            seen.append((name, arrays))
        assert any(name.startswith("best") for name in marked) or not any(
            n.startswith("best") for n, _ in seen
        )
        return asked(self)

    monkeypatch.setattr(Remote, "_asked", watch)
    keys = (
        "training.max_steps=8",
        "training.eval_steps=2",
        "training.save_steps=4",
        "training.eval_batches=1",
    )
    keys = (*keys, "training.logging_steps=1", "training.save_total_limit=1")
    assert script("train", *train_args(tiny_config, prepared, url, *keys)).code == 0
    assert {name for name, _ in seen} == {
        "checkpoint-4",
        "checkpoint-8",
        *(f"best_model-{n}" for n in (2, 4, 6, 8)),
    }
    assert published(url) == {"checkpoint-8", "best_model-8"}


@pytest.mark.slow
def test_an_upload_that_fails_ends_the_run(script, prepared, tiny_config, monkeypatch):
    """A network that goes down for good while the second checkpoint is on its way."""
    bucket, down = fsspec.implementations.memory.MemoryFileSystem, []

    def failing(method):
        def call(self, *args, **options):
            down.extend(path for path in map(str, args) if "/run/checkpoint-4/state" in path)
            if down:
                raise TimeoutError("no answer")
            return method(self, *args, **options)

        return call

    for name in ("put_file", "pipe_file"):
        monkeypatch.setattr(bucket, name, failing(getattr(bucket, name)))
    keys = ("training.max_steps=8", "training.save_steps=2")
    result = script("train", *train_args(tiny_config, prepared, "memory://b/run", *keys))
    assert result.code == 1
    assert result.error.startswith(
        "error: memory://b/run/checkpoint-4 cannot be used (TimeoutError: no answer). Check"
    )
    assert published("memory://b/run") == {"checkpoint-2"}
    monkeypatch.undo()
    resumed = script(
        "train",
        "--resume",
        *train_args(tiny_config, prepared, "memory://b/run", "training.max_steps=3"),
    )
    assert "steps 3 to 3" in resumed.err


def test_of_two_runs_that_start_together_one_is_refused(script, prepared, tiny_config, monkeypatch):
    set_up = train.set_up

    def meanwhile(*args):
        Remote("memory://b/run").write("run.json", b"{}")
        return set_up(*args)

    monkeypatch.setattr(train, "set_up", meanwhile)
    result = script(
        "train", *train_args(tiny_config, prepared, "memory://b/run", "training.max_steps=1")
    )
    assert (result.code, "another run has just begun in memory://b/run" in result.error) == (
        2,
        True,
    )
    assert Remote("memory://b/run").files() == ["run.json"]


@pytest.mark.slow
def test_prepared_on_a_url(script, corpus, prepared, tiny_config, tmp_path, monkeypatch):
    args = ("--input", corpus, "--output", "memory://b/data", "--vocab-size", 300)
    assert script("prepare_data", *args).code == 0
    assert (
        local_copy("memory://b/data", tmp_path / "copy").joinpath("manifest.json").read_bytes()
        == (prepared / "manifest.json").read_bytes()
    )
    refused = script("prepare_data", *args)
    assert (refused.code, "memory://b/data is in the way" in refused.error) == (2, True)
    fsspec.filesystem("memory").rm("/b/data/manifest.json")  # as if killed
    run = train_args(tiny_config, "memory://b/data", tmp_path / "run", "training.max_steps=1")
    assert (
        "memory://b/data is not a prepared directory (manifest.json: No such file"
        in script("train", *run).error
    )
    assert script("prepare_data", *args, "--overwrite").code == 0
    Remote("memory://b/data").write("tokens/train.bin", b"broken")
    assert (
        "memory://b/data/tokens/train.bin is not what its manifest.json says"
        in script("train", *run).error
    )
    assert script("prepare_data", *args, "--overwrite").code == 0
    assert script("train", *run).code == 0
    fsspec.filesystem("memory").rm("/b/data/tokens/train.bin")
    assert script("train", "--overwrite", *run).code == 0  # from the cache
    by_url = script(
        "prepare_data", "--input", "memory://b/data/train.txt", "--output", tmp_path / "out"
    )
    assert (
        "the input memory://b/data/train.txt is a URL, and texts are read from the local disk"
        in by_url.error
    )
    Remote("memory://b/other").write("mine.txt", b"mine")
    result = script("prepare_data", *args[:3], "memory://b/other", "--overwrite")
    assert (result.code, Remote("memory://b/other").files()) == (2, ["mine.txt"])


def objects(prefix: str = "") -> dict[str, bytes]:
    """All that is in the bucket under a prefix, byte for byte, without asking the code under test."""
    store = fsspec.filesystem("memory").store
    return {name: file.getvalue() for name, file in store.items() if name.startswith(prefix)}


@pytest.mark.parametrize(("odd", "fits"), [("lr[1]", "lr1"), ("a*b", "a-b"), ("q?", "qq")])
def test_a_name_is_no_pattern(odd, fits, tmp_path):
    """The second name is what the first would mean as a pattern, and is never touched."""
    local = tmp_path / odd
    for name in ("manifest.json", "more[1]/x", "more1/x", "tokens/a*b"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_text(f"{odd}: {name}")
    names = sorted(
        path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()
    )
    content = {name: (local / name).read_bytes() for name in names}
    neighbour = Remote(f"memory://b/{fits}")
    for name in (*names, "only/here"):
        neighbour.write(name, b"the neighbour's")
    before = objects(f"/b/{fits}/")

    remote = Remote(f"memory://b/{odd}")
    assert (remote.entries(), remote.files(), remote.read_text("manifest.json")) == ({}, [], None)
    remote.delete()  # there is nothing yet
    remote.upload(local)
    assert remote.files() == names
    assert set(remote.entries()) == {"manifest.json", "more[1]", "more1", "tokens"}
    assert remote.read_text("more[1]/x") == f"{odd}: more[1]/x"
    remote.download(tmp_path / "back", names)
    assert {name: (tmp_path / "back" / name).read_bytes() for name in names} == content
    remote.copy(Remote(f"memory://b/copy/{odd}"))
    assert objects(f"/b/copy/{odd}/") == {
        f"/b/copy/{odd}/{name}": data for name, data in content.items()
    }

    (remote / "more[1]").delete()
    assert remote.files() == [name for name in names if name != "more[1]/x"]
    (remote / "tokens/a*b").delete()
    remote.delete()
    assert objects(f"/b/{odd}/") == {}
    assert objects(f"/b/{fits}/") == before


def test_prepared_under_a_name_that_is_a_pattern(script, corpus):
    args = ("--input", corpus, "--vocab-size", 300, "--output")
    assert script("prepare_data", *args, "memory://b/lr1").code == 0
    neighbour = objects("/b/lr1/")
    for again in ((), ("--overwrite", "--seed", 1), ("--overwrite",)):
        assert script("prepare_data", *args, "memory://b/lr[1]", *again).code == 0
        assert objects("/b/lr1/") == neighbour
    ours = {
        name.replace("/b/lr[1]/", "/b/lr1/"): data for name, data in objects("/b/lr[1]/").items()
    }
    assert ours == neighbour  # the same settings, so the same bytes
    assert set(
        json.loads(script("verify", "--json", "memory://b/lr[1]").out)["damage"].values()
    ) == {None}


@pytest.mark.slow
def test_a_run_under_a_name_that_is_a_pattern(script, prepared, tiny_config, tmp_path):
    """Saved, kept, resumed, replaced and read under a name that as a pattern means its neighbour's; then on a disk."""
    odd, fits = "run[1] a*b q?", "run1 a-b qq"
    url, local = f"memory://b/{odd}", tmp_path / odd
    keys = (
        "training.save_steps=1",
        "training.save_total_limit=1",
        "training.eval_steps=1",
        "training.eval_batches=1",
    )
    args = train_args(tiny_config, prepared, url, *keys)
    assert script("train", *args, "training.max_steps=1").code == 0
    for step in (1, 2):  # what a run has there, and will have
        for name in Remote(url).files():
            Remote(f"memory://b/{fits}").write(name.replace("-1/", f"-{step}/"), b"the neighbour's")
    before = objects(f"/b/{fits}/")

    assert script("train", "--resume", *args, "training.max_steps=2").code == 0
    assert published(url) == {"checkpoint-2", "best_model-2"}
    (Remote(url) / "checkpoint-2").copy(Remote("memory://b/kept"))
    assert script("train", "--overwrite", *args, "training.max_steps=1").code == 0
    assert published(url) == {"checkpoint-1", "best_model-1"}

    on_disk = train_args(tiny_config, prepared, local, *keys, "training.max_steps=2")
    assert script("train", "--resume", f"{url}/checkpoint-1", *on_disk).code == 0
    assert {path.name for path in local.glob("*-*")} == {"checkpoint-2"}
    assert_identical(
        state_of(local / "checkpoint-2"), state_of(local_copy("memory://b/kept", tmp_path / "kept"))
    )
    for place in (url, local):
        damage = json.loads(script("verify", "--json", place).out)["damage"]
        assert (len(damage), set(damage.values())) == (2, {None})
        assert json.loads(script("evaluate", "--json", "--model", place, "--data", prepared).out)[
            "loss"
        ]
    assert (
        script("generate", "--model", f"{url}/best_model", "--prompt", "A", "--max-tokens", 1).code
        == 0
    )
    assert objects(f"/b/{fits}/") == before


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "s3://b/run",
            "s3://b/run needs a package that is not installed (Install s3fs to access S3). "
            'Install it with pip install -e ".[s3]"',
        ),
        ("bucket://b/run", "bucket://b/run is in no storage that fsspec knows"),
    ],
)
def test_a_storage_that_is_not_there(script, prepared, tiny_config, url, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    result = script("train", *train_args(tiny_config, prepared, url))
    assert (result.code, message in result.error) == (2, True), result.error


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(
    script, trained, prepared, tiny_config, tmp_path, monkeypatch
):
    run = tmp_path / "bucket" / "run"
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the kill leaves a scratch directory
    process = start(tiny_config, prepared, run.as_uri(), "training.max_steps=100")
    while not (run / "checkpoint-60" / MARKER).exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()  # in the upload of best_model, or after it
    process.wait()
    result = script(
        "train",
        "--resume",
        *train_args(tiny_config, prepared, run.as_uri(), "training.max_steps=100"),
    )
    assert result.code == 0, result.err
    assert logged(run) == logged(trained)
    assert published(run.as_uri()) == {
        "best_model-100",
        "checkpoint-60",
        "checkpoint-80",
        "checkpoint-100",
    }
    for name in ("checkpoint-100", "best_model-100"):
        assert_identical(state_of(run / name), state_of(trained / "checkpoint-100"))


@pytest.fixture
def s3(monkeypatch):
    """A bucket on moto's S3 server. Not among our requirements: pip install "moto[server]" s3fs."""
    server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    _, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    running.stop()


@pytest.mark.slow
def test_s3(s3, script, corpus, tiny_config, tmp_path):
    assert (
        script(
            "prepare_data", "--input", corpus, "--output", f"{s3}/data", "--vocab-size", 300
        ).code
        == 0
    )
    steps = ("training.max_steps=2", "training.save_steps=1", "training.eval_batches=1")
    args = train_args(tiny_config, f"{s3}/data", f"{s3}/run", *steps)
    assert script("train", *args).code == 0
    result = script("train", "--resume", f"{s3}/run/checkpoint-1", *args)
    assert result.code == 0, result.err
    assert published(f"{s3}/run") == {
        "checkpoint-1", "checkpoint-2", "best_model-2", "aside-checkpoint-2.1", "aside-best_model.1",
    }  # fmt: skip
    run = local_copy(f"{s3}/run", tmp_path / "run")
    assert_identical(state_of(run / "best_model-2"), state_of(run / "aside-checkpoint-2.1"))
    assert (
        script(
            "generate", "--model", f"{s3}/run/best_model", "--prompt", "A", "--max-tokens", 1
        ).code
        == 0
    )
