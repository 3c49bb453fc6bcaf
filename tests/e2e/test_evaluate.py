"""evaluate.py gives the number that training logged."""

import errno
import json
import os

import numpy as np
import pytest


def evaluate(script, *args):
    result = script("evaluate", *args, "--json")
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    return json.loads(result.out)


@pytest.fixture(scope="module")
def fully_evaluated(prepared, tiny_config, tmp_path_factory):
    from l1_jax.config.yaml_file import load_config
    from l1_jax.run.train import train

    path = tmp_path_factory.mktemp("evaluated")
    keys = [
        f"data.path={prepared}",
        f"training.output_dir={path}",
        "training.max_steps=20",
        "training.eval_batches=null",
    ]
    assert train(load_config(tiny_config, keys)) == 0
    return path


def test_evaluation_is_what_training_logged(script, fully_evaluated, prepared, tmp_path):
    logged = json.loads((fully_evaluated / "metrics.jsonl").read_text().splitlines()[-1])
    result = evaluate(script, "--model", fully_evaluated, "--data", prepared / "val.txt")
    manifest = json.loads((prepared / "manifest.json").read_text())["splits"]["val"]
    assert result.keys() == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert result[name] == pytest.approx(logged[f"val/{name}"], rel=1e-5)
    assert (result["tokens"], result["bytes"]) == (manifest["tokens"] - 1, manifest["bytes"])

    alone = tmp_path / "copy.txt"  # no prepared directory around it: tokenised anew
    alone.write_bytes((prepared / "val.txt").read_bytes())
    assert evaluate(script, "--model", fully_evaluated, "--data", alone) == result
    other_batch = evaluate(script, "--model", fully_evaluated, "--data", alone, "--batch-size", 3)
    assert other_batch["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_a_prepared_directory_means_its_test_split(script, fully_evaluated, prepared):
    by_directory = evaluate(
        script, "--model", fully_evaluated / "checkpoint-20", "--data", prepared
    )
    by_file = evaluate(
        script, "--model", fully_evaluated / "checkpoint-20", "--data", prepared / "test.txt"
    )
    assert by_directory == by_file


def test_document_mask_through_training_evaluation_and_generation(
    script, prepared, tiny_config, tmp_path
):
    keys = (
        f"data.path={prepared}",
        f"training.output_dir={tmp_path}",
        "training.max_steps=5",
        "data.document_mask=true",
    )
    trained = script("train", "--config", tiny_config, *keys, "training.eval_batches=null")
    assert trained.code == 0, trained.err
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    masked = evaluate(script, "--model", tmp_path, "--data", prepared / "val.txt")
    assert masked["loss"] == pytest.approx(logged["val/loss"], rel=1e-5)
    generated = script(
        "generate", "--model", tmp_path, "--prompt", "The", "--max-tokens", 4, "--json"
    )
    assert json.loads(generated.out)["completions"][0]["tokens"] <= 4


def test_bits_per_byte_by_hand(script, prepared, fully_evaluated, tmp_path):
    (tmp_path / "two.txt").write_text("ab\n\nc\n")
    result = evaluate(script, "--model", fully_evaluated, "--data", tmp_path / "two.txt")
    assert result["bytes"] == 3
    assert result["tokens"] == result["bytes"] + 2  # no merge fits; two documents end
    assert result["bits_per_byte"] == pytest.approx(
        result["loss"] * result["tokens"] / 3 / 0.6931472
    )
    assert result["perplexity"] == pytest.approx(2.718281828 ** result["loss"])


@pytest.mark.parametrize("mesh", [None, "pipeline=2,tensor=2"])
def test_a_batch_is_no_larger_than_the_text(script, fully_evaluated, prepared, monkeypatch, mesh):
    from l1_jax.evaluation import text as module

    sizes, batches = [], module.evaluation_batches

    def watched(stream, length, batch_size, eot_id=None):
        sizes.append((-(-(len(stream) - 1) // length), batch_size))
        return batches(stream, length, batch_size, eot_id)

    monkeypatch.setattr(module, "evaluation_batches", watched)
    args = (
        "--model",
        fully_evaluated,
        "--data",
        prepared / "val.txt",
        *(("--mesh", mesh) if mesh else ()),
    )
    few, many = (evaluate(script, *args, "--batch-size", size) for size in (8, 300_000))
    assert many["loss"] == pytest.approx(few["loss"], rel=1e-5)
    assert (many["tokens"], many["bytes"]) == (few["tokens"], few["bytes"])
    (_, small), (windows, large) = sizes
    assert small == 8 * (2 if mesh else 8)
    assert (
        windows <= large < windows + 64
    )  # what divides over eight devices, or two with microbatches


def log_probs(script, path, *args):
    """The result of an evaluation, and its lines."""
    result = evaluate(script, *args, "--logprobs", path)
    return result, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def masked(prepared, tiny_config, tmp_path_factory):
    """A run whose attention stays inside a document."""
    from l1_jax.config.yaml_file import load_config
    from l1_jax.run.train import train

    path = tmp_path_factory.mktemp("masked")
    keys = [f"data.path={prepared}", f"training.output_dir={path}", "data.document_mask=true"]
    assert train(load_config(tiny_config, [*keys, "training.max_steps=5"])) == 0
    return path


@pytest.mark.parametrize("run", ["fully_evaluated", "masked"])
def test_log_probs_of_each_token(script, run, prepared, tmp_path, request):
    """Of all tokens but the first, in their order; their sum is the loss. The last batch is not
    full."""
    args = ("--model", request.getfixturevalue(run), "--data", prepared / "val.txt")
    plain = evaluate(script, *args)
    result, lines = log_probs(script, tmp_path / "new" / "file.jsonl", *args)
    assert result == pytest.approx(plain, rel=1e-6)

    values = np.array([line["logprob"] for line in lines])
    assert -values.sum() == pytest.approx(result["loss"] * result["tokens"], rel=1e-6)

    stream = np.fromfile(prepared / "tokens/val.bin", np.uint16)
    assert [line["id"] for line in lines] == stream[1:].tolist()
    assert [line["number"] for line in lines] == list(range(1, len(stream)))

    # The bytes are the text, and what is no whole character shows as such.
    text = b"".join(bytes(line["bytes"]) for line in lines)
    documents = (prepared / "val.txt").read_text().splitlines()
    assert text.decode() == "".join(documents)
    for line in lines:
        assert line["text"] == bytes(line["bytes"]).decode(errors="replace")

    # Each decimal is the shortest of its float32.
    written = (tmp_path / "new" / "file.jsonl").read_text().splitlines()
    decimals = [line.rpartition(": ")[2].rstrip("}") for line in written]
    assert decimals == [str(np.float32(decimal)) for decimal in decimals]


def test_a_log_prob_is_that_of_the_models_logits(script, fully_evaluated, tmp_path):
    """Of characters whose bytes are several tokens, too."""
    import jax
    from flax import nnx

    import l1_jax

    (tmp_path / "text.txt").write_text("a\u1234 \u20ac b\n")
    args = ("--model", fully_evaluated, "--data", tmp_path / "text.txt")
    _, lines = log_probs(script, tmp_path / "out.jsonl", *args)
    assert "\ufffd" in "".join(line["text"] for line in lines)

    loaded = l1_jax.load(fully_evaluated)
    ids = [loaded.tokenizer.eot_id, *(line["id"] for line in lines)]
    model = nnx.merge(loaded.graphdef, loaded.params)
    logits = model.logits(model(np.array([ids[:-1]])).hidden)
    wanted = jax.nn.log_softmax(logits)[0, np.arange(len(lines)), ids[1:]]
    np.testing.assert_allclose([line["logprob"] for line in lines], wanted, rtol=1e-4, atol=1e-4)


def test_log_probs_on_any_mesh(script, fully_evaluated, prepared, tmp_path):
    args = ("--model", fully_evaluated, "--data", prepared / "val.txt", "--batch-size", 3)
    _, expected = log_probs(script, tmp_path / "expected.jsonl", *args)

    for mesh in ("tensor=2", "context=4", "pipeline=2,fsdp=2"):
        _, lines = log_probs(script, tmp_path / f"{mesh}.jsonl", *args, "--mesh", mesh)
        assert [line["id"] for line in lines] == [line["id"] for line in expected]
        found, wanted = ([line["logprob"] for line in each] for each in (lines, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_file_of_log_probs_is_not_replaced_unasked(
    script, fully_evaluated, prepared, tmp_path, monkeypatch
):
    """What cannot be written is said before anything is loaded, and nothing is left behind."""
    from l1_jax.evaluation import text as module

    data = tmp_path / "text.txt"
    data.write_text("a few words\n")
    path = tmp_path / "out.jsonl"
    older = '{"number": 1, "id": 7'
    path.write_text(older)
    args = ("--model", fully_evaluated, "--data", data)

    with monkeypatch.context() as patched:
        patched.setattr(module, "load_model", None)
        for flags, message in {
            ("--logprobs", path): f"error: {path} exists. Choose another --logprobs, or replace it",
            ("--logprobs", tmp_path): f"error: --logprobs {tmp_path} is no file. Choose another",
            ("--logprobs", data / "x"): f"--logprobs {data} cannot be written: {data} is not a",
            ("--logprobs", "gs://bucket/x"): "error: --logprobs gs://bucket/x is a URL. Give a",
            ("--logprobs", "/proc/x/y"): "--logprobs /proc/x/y cannot be written: ",
            ("--logprobs", data, "--overwrite"): f"{data} holds no log-probabilities, and is not",
            ("--overwrite",): "error: --overwrite is given without --logprobs. Give the file",
        }.items():
            result = script("evaluate", *args, *flags)
            assert result.code == 2
            assert message in result.error

    # An evaluation that fails leaves the file as it was, and nothing beside it.
    with monkeypatch.context() as patched:
        patched.setattr(module, "fetch_rows", None)
        assert script("evaluate", *args, "--logprobs", path, "--overwrite").code == 1
    assert path.read_text() == older

    # A disk that gets full ends it at the next batch, in all processes, and not at the end.
    from l1_jax.evaluation import log_probs as log_probs_module

    asked = []

    def full(log_prob):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def has_failed(lines):
        asked.append(lines.error is not None)
        return asked[-1]

    with monkeypatch.context() as patched:
        patched.setattr(log_probs_module, "_shortest", full)
        patched.setattr(log_probs_module.LogProbsFile, "has_failed", has_failed)
        longer = ("--model", fully_evaluated, "--data", prepared / "val.txt", "--batch-size", 1)
        result = script("evaluate", *longer, "--logprobs", path, "--overwrite")
        assert f"{path}: No space left on device" in result.error
        assert asked == [False, False, True]
    assert path.read_text() == older
    assert sorted(tmp_path.iterdir()) == [path, data]

    _, lines = log_probs(script, path, *args, "--overwrite")
    assert len(lines) > 3
    assert sorted(tmp_path.iterdir()) == [path, data]
