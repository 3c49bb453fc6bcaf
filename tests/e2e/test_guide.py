"""The guide's commands and YAML snippets, word for word, on small data."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_config import PRODUCTION, QUICK_TESTING

ROOT = Path(__file__).parents[2]

# The guide says: edit configs/base_config.yaml. This is such an edit, to a size that does 1000 steps in seconds.
BASE_CONFIG = """
model: {max_seq_length: 128, n_layers: 1, n_heads: 2, n_embd: 16, dropout: 0.1}
training: {batch_size: 1, max_steps: 1010, eval_steps: 500, eval_batches: 1}
"""


@pytest.fixture
def shell(tmp_path):
    """A checkout with a user's own data and config, and a shell in it."""
    for name in ("scripts", "l1_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs").mkdir()
    # one device, and a compiler that takes its time, as on a laptop
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XLA_FLAGS": "",
    }

    def run(command, code=0):
        argv = shlex.split(command.replace("\\\n", " "))
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    run.path = tmp_path
    return run


PREPARE = """python scripts/prepare_data.py \\
    --input data/raw/your_text.txt \\
    --output data/processed/ \\
    --vocab-size 50257 \\
    --train-ratio 0.8 \\
    --val-ratio 0.1 \\
    --seed 42
"""


def lay_out(shell, corpus, config, size):
    (shell.path / "data/raw").mkdir(parents=True)
    (shell.path / "data/raw/your_text.txt").write_text(corpus.read_text()[:size])
    (shell.path / "configs/base_config.yaml").write_text(config)


def test_the_snippets_are_the_guides(shared):
    guide = (shared / "GUIDE.md").read_text()
    for snippet in (QUICK_TESTING, PRODUCTION, PREPARE):
        assert snippet.strip() in guide


@pytest.mark.slow
def test_the_guides_commands(shell, corpus):
    lay_out(shell, corpus, BASE_CONFIG, 60_000)
    shell(PREPARE)
    assert {"train.txt", "val.txt", "test.txt", "tokenizer.json", "manifest.json"} <= {
        p.name for p in (shell.path / "data/processed").iterdir()
    }
    shell("python scripts/train.py --config configs/base_config.yaml")
    resumed = shell("""python scripts/train.py \\
    --config configs/base_config.yaml \\
    --resume checkpoints/checkpoint-1000.pt
""")
    assert "checkpoint-1000.pt does not exist: using checkpoints/checkpoint-1000" in resumed.stderr
    assert "steps 1001 to 1010" in resumed.stderr
    evaluated = shell("""python scripts/evaluate.py \\
    --model checkpoints/best_model.pt \\
    --data data/processed/test.txt
""")
    assert "perplexity" in evaluated.stdout
    generated = shell("""python scripts/generate.py \\
    --model checkpoints/best_model.pt \\
    --prompt "The future of AI is" \\
    --max-tokens 100
""")
    assert generated.stdout.startswith("The future of AI is")
    refused = shell(
        """python -m torch.distributed.launch \\
    --nproc_per_node=2 \\
    scripts/train.py \\
    --config configs/base_config.yaml
""",
        code=1,  # the launcher's own, when its children have refused
    )
    assert "Run python scripts/train.py --config configs/base_config.yaml" in refused.stderr


@pytest.mark.slow
def test_quick_testing(shell, corpus):
    """The snippet as it stands; only sequences and validation are cut short."""
    lay_out(shell, corpus, QUICK_TESTING, 40_000)
    shell(PREPARE)
    shell(
        "python scripts/train.py --config configs/base_config.yaml model.max_seq_length=128 training.eval_batches=1"
    )
    first, *_, last = map(
        json.loads, (shell.path / "checkpoints/metrics.jsonl").read_text().splitlines()
    )
    assert last["step"] == 100
    assert last["val/loss"] < first["train/loss"] - 0.5


@pytest.mark.slow
def test_production_training(shell, corpus):
    """The snippet as it stands; one step on 16 sequences of 32 tokens is what a CPU does in reasonable time."""
    lay_out(shell, corpus, PRODUCTION, 20_000)
    shell(PREPARE)
    overrides = "training.max_steps=1 model.max_seq_length=32 training.eval_batches=1"
    done = shell(f"python scripts/train.py --config configs/base_config.yaml {overrides}")
    assert "float16" in done.stderr
    config = (shell.path / "checkpoints/config.yaml").read_text()
    assert "precision: float16" in config
    assert "gradient_checkpointing: true" in config


def test_the_guides_three_lines(shell):
    (shell.path / "three.txt").write_text(
        "The quick brown fox jumps over the lazy dog.\n"
        "Artificial intelligence is transforming the world.\n"
        "Large language models demonstrate emergent capabilities.\n"
    )
    (shell.path / "tiny.yaml").write_text(
        "model: {n_layers: 1, n_heads: 1, n_embd: 8, max_seq_length: 8}"
    )
    assert (
        "warning"
        in shell("python scripts/prepare_data.py --input three.txt --output data/processed").stderr
    )
    train = "python scripts/train.py --config tiny.yaml training.max_steps=2"
    assert "no validation" in shell(train).stderr
    assert {p.name for p in (shell.path / "checkpoints").glob("*2*")} == {"checkpoint-2"}
    too_long = shell(f"{train} training.output_dir=other model.max_seq_length=4096", code=2)
    assert "the training split is shorter than one sequence of 4096 tokens" in too_long.stderr
    assert not (shell.path / "other").exists()
