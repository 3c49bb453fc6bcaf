"""Each mistake is one line that says how to mend it, exit code 2, and nothing half-written."""

import argparse
import io
import json
import shutil
import sys

import pytest

NO_RUN = "training.output_dir={tmp}/run"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train", "the following arguments are required: --config"),
        ("train --config {tmp}/absent.yaml", "absent.yaml"),
        (
            "train --config {config} training.lerning_rate=1 " + NO_RUN,
            "did you mean 'learning_rate'",
        ),
        (
            "train --config {config} model.n_heads=3 " + NO_RUN,
            "model.n_embd 32 is not divisible by model.n_heads 3",
        ),
        ("train --config {config} data.path={tmp} " + NO_RUN, "not a prepared directory"),
        (
            "train --config {config} data.path={data} model.vocab_size=100 " + NO_RUN,
            "the tokenizer has 300 tokens",
        ),
        (
            "train --config {config} data.path={data} parallelism.data=3 " + NO_RUN,
            "needs 3 devices, and there are 8",
        ),
        (
            "train --config {config} data.path={data} parallelism.tensor=4 " + NO_RUN,
            "model.n_heads 2 is not divisible",
        ),
        (
            "train --config {config} data.path={data} model.max_seq_length=9999999 " + NO_RUN,
            "shorter than one sequence",
        ),
        (
            "train --config {config} data.path={data} training.device=tpu " + NO_RUN,
            "the device 'tpu' is asked for",
        ),
        (
            "train --config {config} data.path={data} training.warmup_steps=50 training.max_steps=50 "
            + NO_RUN,
            "warmup_steps 50",
        ),
        (
            "train --config {config} data.path={data} training.global_batch_size=9 " + NO_RUN,
            "does not divide over 8",
        ),
        (
            "train --config {config} data.path={data} --resume {tmp}/absent " + NO_RUN,
            "there is no checkpoint",
        ),
        ("train --config {config} data.path={data} training.output_dir={pt}", "cannot be written"),
        (
            "train --config {config} data.path={data} training.output_dir={gone}/run",
            "cannot be written",
        ),
        ("train --config {config} training.seed=4294967296", "training.seed is 4294967296"),
        (
            "prepare_data --input {long} --output {tmp}/out",
            "File name too long. Check the path and its permissions",
        ),
        (
            "train --config {config} data.path={data} training.output_dir={pt}/run --overwrite",
            "cannot be written",
        ),
        (
            "train --config {config} data.path={data} training.output_dir={run} --resume {tmp}/absent",
            "no checkpoint",
        ),
        (
            "train --config {config} data.path={data} --resume {pt} " + NO_RUN,
            "perhaps a PyTorch one",
        ),
        (
            "train --config {config} data.path={data} --resume --overwrite " + NO_RUN,
            "contradict each other",
        ),
        (
            "train --config {config} data.path={data} --local-rank 0 " + NO_RUN,
            "Run python scripts/train.py --config",
        ),
        ("train --config {config} data.path={data} max_steps=5 " + NO_RUN, "is no override"),
        ("prepare_data --input {blank} --output {tmp}/out", "no text"),
        ("prepare_data --input {tmp}/absent.txt --output {tmp}/out", "does not exist"),
        ("prepare_data --input {text} --output {pt}/out", "cannot be written"),
        (
            "prepare_data --input {text} --output {tmp}/out --train-ratio 0.9 --val-ratio 0.2",
            "do not divide the text",
        ),
        (
            "prepare_data --input {text} --output {tmp}/out --vocab-size 100",
            "--vocab-size is 100. Give a number from 257",
        ),
        ("prepare_data --input {text} --output {data}", "is in the way"),
        ("prepare_data --input {blank} --output {tmp}/new/parents/out", "no text"),
        ("evaluate --model {tmp}/absent --data {data}", "there is no checkpoint"),
        ("evaluate --model {pt} --data {data}", "perhaps a PyTorch one"),
        ("evaluate --model {run} --data {tmp}/absent.txt", "absent.txt does not exist"),
        ("evaluate --model {run} --data {empty}", "is empty"),
        ("evaluate --model {run} --data {blank}", "holds no text"),
        ("evaluate --model {run} --data {data} --batch-size 0", "--batch-size is 0"),
        ("generate --model {run} --prompt A --max-tokens 0", "--max-tokens is 0"),
        ("generate --model {run} --prompt A --max-tokens -1", "--max-tokens is -1"),
        ("generate --model {run} --prompt A --max-tokens x", "--max-tokens: invalid int value"),
        ("generate --model {run} --prompt A --max-tokens 500", "exceed the context of 32"),
        (
            "generate --model {run} --prompt A --temperature -1",
            "--temperature is -1.0, a float. Give",
        ),
        ("generate --model {run} --prompt A --top-p 1.5", "--top-p is 1.5, a float. Give"),
        ("generate --modle {run} --prompt A", "--modle is no flag; did you mean '--model'"),
        (
            "train --training.max_steps=3 --config x",
            "Write training.max_steps=3, without the dashes",
        ),
        ("train --config x --resume=", "--resume= is empty"),
        ("generate --model {run} --prompt A --num-samples 0", "--num-samples is 0"),
        ("generate --model {run} --prompt A --seed -1", "--seed is -1"),
        ("generate --model {run} --prompt A --stop=", "--stop is empty"),
        ("generate --model {run} --prompt A --greedy --temperature 0.8", "contradict each other"),
        ("generate --model {run}", "required: --prompt"),
    ],
)
def test_bad_input(script, command, message, tmp_path, tiny_config, prepared, trained, corpus):
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "gone").symlink_to(tmp_path / "purged")
    before = sorted(tmp_path.rglob("*"))
    places = {
        "tmp": tmp_path, "config": tiny_config, "data": prepared, "run": trained, "pt": tmp_path / "model.pt",
        "empty": tmp_path / "empty.txt", "blank": tmp_path / "blank.txt", "text": corpus,
        "gone": tmp_path / "gone", "long": "x" * 300,
    }  # fmt: skip
    name, *args = command.split()
    result = script(name, *(arg.format(**places) for arg in args))
    assert result.code == 2, result.err
    assert result.error.startswith("error: ")
    assert result.error.endswith(".")
    assert message in result.error
    assert "Traceback" not in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_prompt(script, trained):
    assert "the prompt is empty" in script("generate", "--model", trained, "--prompt", "").error


@pytest.mark.parametrize(
    "name", ["prepare_data", "train", "evaluate", "generate", "make_demo_corpus"]
)
def test_help_explains_every_flag(script, name, monkeypatch):
    parsers = []
    add = argparse.ArgumentParser.add_argument
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "add_argument",
        lambda self, *a, **k: parsers.append(self) or add(self, *a, **k),
    )
    assert script(name, "--help").code == 0
    flags = [action for action in parsers[-1]._actions if action.option_strings]
    assert len(flags) >= 3
    for flag in flags:
        assert flag.help, flag.option_strings


def test_generate_prints_one_json_line(script, trained):
    prompt = ("--model", trained, "--prompt", "The", "--max-tokens", 5)
    result = script("generate", *prompt, "--num-samples", 2, "--json")
    assert result.code == 0
    assert result.out.count("\n") == 1
    parsed = json.loads(result.out)
    assert parsed["prompt"] == "The"
    assert [(c["tokens"], c["finish_reason"]) for c in parsed["completions"]] == [(5, "length")] * 2
    again = script("generate", *prompt, "--num-samples", 2, "--json")
    assert again.out == result.out
    streamed = script("generate", *prompt)
    assert streamed.out == "The" + parsed["completions"][0]["text"] + "\n"


def test_what_stdout_cannot_take_is_escaped(script, trained, tmp_path, monkeypatch):
    def run(encoding, *args):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        result = script(*args)
        assert result.code == 0, result.err
        return sys.stdout.buffer.getvalue()

    printed = run("ascii", "generate", "--model", trained, "--prompt", "é漢", "--max-tokens", 1)
    assert printed.startswith(rb"\xe9\u6f22")
    shutil.copytree(trained / "best_model", tmp_path / "\udcff")  # no UTF-8
    assert run("utf-8", "verify", tmp_path / "\udcff") == b"\\udcff: ok\n"


def test_a_closed_stdout_ends_no_command(script, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    result = script("verify", trained / "best_model")
    assert (result.code, result.err) == (0, "")
