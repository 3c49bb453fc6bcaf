"""evaluate.py gives the number that training logged."""

import json

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
