"""config.py and config_file.py: YAML and overrides in, a checked Config or every mistake at once out."""

import pwd
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from l1_jax.commands.flags import Parser
from l1_jax.config.key import keys_of, to_plain, value_of, values_of
from l1_jax.config.resolve import Facts, resolve, rows_of_stream
from l1_jax.config.schema import Config, contradictions
from l1_jax.config.values import expected
from l1_jax.config.yaml_file import ORIGINAL_KEYS, config_from_text, dump_config, load_config
from l1_jax.errors import UserError

QUICK_TESTING = """\
model:
  n_layers: 2
  n_heads: 4
  n_embd: 128
training:
  batch_size: 4
  num_epochs: 1
  max_steps: 100
"""
PRODUCTION = """\
model:
  n_layers: 12
  n_heads: 12
  n_embd: 768
training:
  batch_size: 16
  num_epochs: 3
  gradient_checkpointing: true
  fp16: true
"""
# The keys of the original's files (shared names beside foreign ones), written for this test.
ORIGINAL_L1 = """\
model:
  n_inner: 3072
  layer_norm_epsilon: 1e-5
  use_cache: true
  pad_token_id: 50256
  eos_token_id: 50256
  bos_token_id: 50256
training:
  eval_batch_size: 8
  learning_rate: 5e-4
  optimizer_type: "adamw"
  eps: 1e-8
  scheduler_type: "cosine"
  lr_scheduler: "linear"
  warmup_ratio: null
  max_seq_length: 1024
  dataloader_num_workers: 4
  dataloader_pin_memory: true
  load_best_model_at_end: true
  eval_strategy: "steps"
  metric_for_best_model: "eval_loss"
  greater_is_better: false
  report_to: ["tensorboard"]
  checkpoint_every_steps: 1000
  max_checkpoints_to_keep: 5
  mixed_precision: true
data:
  train_data_path: "./data/train.txt"
  val_data_path: null
  test_data_path: null
  val_split: 0.1
  test_split: 0.1
  tokenizer_type: "bpe"
  tokenizer_path: null
  vocab_size: 50257
  max_length: 1024
  stride: 512
generation:
  max_new_tokens: 50
  temperature: 0.8
  do_sample: true
performance:
  compile_model: false
"""


def error_of(text: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        config_from_text(text, "c.yaml", overrides)
    return caught.value


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of the user's, the variable SCRATCH, no variable NONE, and an empty working directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NONE", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


PATHS = [("data", "path"), ("training", "output_dir")]


def test_the_keys_that_are_paths_are_known():
    of_schema = [name for name, field in keys_of(Config) if field.metadata["is_path"]]
    assert of_schema == [*(".".join(path) for path in PATHS), "transfer.from"]


@pytest.mark.parametrize(("section", "key"), PATHS)
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("~/x", "{home}/x"),
        ("~root/x", "{root}/x"),
        ("./~/x", "./~/x"),
        ("a~/~x", "a~/~x"),
        ("cost$/$5", "cost$/$5"),  # no variable's name
        ("s3://b/~/$SCRATCH", "s3://b/~/$SCRATCH"),
        ("there$NONE/~x", "there$NONE/~x"),  # made below
    ],
)
def test_a_path_is_read_as_a_shell_would(home, section, key, written, read):
    Path("there$NONE", "~x").mkdir(parents=True)
    wanted = read.format(home=home, root=pwd.getpwnam("root").pw_dir)
    by_file = config_from_text(f"{section}:\n  {key}: {written}\n", "c.yaml")
    by_override = config_from_text("", "c.yaml", [f"{section}.{key}={written}"])
    assert getattr(getattr(by_file, section), key) == wanted
    assert by_override == by_file == config_from_text(dump_config(by_file), "c.yaml")


@pytest.mark.parametrize(("section", "key"), PATHS)
@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("$SCRATCH/x", "$SCRATCH in it is not expanded"),
        ("/a/${SCRATCH}", "${SCRATCH} in it is not expanded"),
        ("~/$NONE", "$NONE in it is not expanded"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name is no user's home"),
    ],
)
def test_a_path_that_only_a_shell_would_know_is_refused(home, section, key, written, message):
    """All of them, each with its line; also where such a directory was made before."""
    Path("$SCRATCH", "x").mkdir(parents=True)
    error = error_of(f"{section}:\n  {key}: {written}\n", "model.n_layers=no")
    assert (
        f"c.yaml:2: {section}.{key} is {written!r}, and {message}. Write the path out"
        in error.details[0]
    )
    assert len(error.details) == 2
    # What a run once read is not looked at again: a checkpoint is taken to other machines.
    text = f"{section}: {{{key}: '{written}'}}"
    assert (
        getattr(getattr(config_from_text(text, "c.yaml", of_a_run=True), section), key) == written
    )


@pytest.mark.parametrize(
    ("command", "before", "flag"),
    [
        ("train", (), "--config"),
        ("train", ("--config", "absent.yaml"), "--resume"),
        ("plan", (), "--config"),
        ("evaluate", ("--data", "x"), "--model"),
        ("evaluate", ("--model", "x"), "--data"),
        ("generate", ("--prompt", "A"), "--model"),
        ("verify", (), None),
        ("prepare_data", (), "--input"),
        ("prepare_data", ("--input", "text.txt"), "--output"),
        ("prepare_data", ("--input", "text.txt"), "--tokenizer"),
        ("make_demo_corpus", (), "--output"),
    ],
)
def test_every_flag_that_is_a_path(home, script, command, before, flag):
    Path("text.txt").write_text("a text\n")
    given = [*before, flag] if flag else [*before]
    refused = script(command, *given, "$SCRATCH/x")
    wanted = f"error: {flag or 'PATH'} is '$SCRATCH/x', and $SCRATCH in it is not expanded. Write the path out, or let"
    assert (refused.code, refused.error[: len(wanted)]) == (2, wanted)

    if flag == "--output":  # whose file is in the way then
        home.mkdir()
        (home / "x").write_text("mine")
    if flag not in ("--data", "--resume"):  # another mistake is found first
        expanded = script(command, *given, "~/x")
        assert (expanded.code, f"{home}/x" in expanded.error) == (2, True)
    assert [path.name for path in Path().iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "null", "training:\n", "{}", "\ufefftraining:\n"]
)
def test_an_empty_file_is_the_defaults(text):
    config = config_from_text(text, "c.yaml")
    assert config == Config()
    assert dump_config(config) == dump_config(Config())


def test_the_guides_examples_load():
    quick, production = config_from_text(QUICK_TESTING, "q"), config_from_text(PRODUCTION, "p")
    assert (quick.model.n_layers, quick.model.n_heads, quick.model.n_embd) == (2, 4, 128)
    assert (quick.training.batch_size, quick.training.num_epochs, quick.training.max_steps) == (
        4,
        1.0,
        100,
    )
    assert production.training.gradient_checkpointing is True
    assert production.training.fp16 is True
    assert production.training.learning_rate == Config().training.learning_rate


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5e-4", 5e-4),
        ("1E-3", 1e-3),
        (".5", 0.5),
        ("5.e-4", 5e-4),
        ("1e+0", 1.0),
        ("+2.5e-1", 0.25),
        ("1_0", 10.0),
    ],
)
def test_a_number_may_be_written_in_any_way(written, value):
    for rate in (
        config_from_text(
            f"training:\n  learning_rate: {written}\n", "c.yaml"
        ).training.learning_rate,
        config_from_text(
            "", "c.yaml", [f"training.learning_rate={written}"]
        ).training.learning_rate,
    ):
        assert rate == value
        assert type(rate) is float


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("model.n_inner", "~", None),
        ("training.batch_size", "1_6", 16),
        ("training.fp16", "on", True),
        ("training.warmup_steps", "auto", "auto"),
        ("training.warmup_steps", "0", 0),
        ("training.min_learning_rate", "0", 0.0),
        ("training.gradient_checkpointing", "dots", "dots"),
        ("training.gradient_checkpointing", "no", False),
        ("training.wandb_project", "'123'", "123"),
        ("training.wandb_project", "a text", "a text"),
    ],
)
def test_values_that_a_file_may_hold(key, written, value):
    section, name = key.split(".")
    read = getattr(
        getattr(config_from_text(f"{section}:\n  {name}: {written}\n", "c.yaml"), section), name
    )
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # names
        (
            "training:\n  lerning_rate: 1\n",
            "c.yaml:2: unknown key training.lerning_rate; did you mean 'learning_rate'?",
        ),
        (
            "model:\n  batch_size: 1\n",
            "c.yaml:2: unknown key model.batch_size; did you mean 'training.batch_size'?",
        ),
        ("model:\n  zzz: 1\n", "c.yaml:2: unknown key model.zzz. docs/configuration.md"),
        ("\ntrainig:\n  seed: 1\n", "c.yaml:2: unknown section trainig; did you mean 'training'?"),
        (
            "batch_size: 1\n",
            "c.yaml:1: unknown section batch_size; did you mean 'training.batch_size'?",
        ),
        ("data:\n  [path]: x\n", "c.yaml:2: unknown key data.a list."),
        ("data:\n  <<: {path: x}\n", "c.yaml:2: unknown key data.<<."),
        ('data:\n  "a\\nb": x\n', r"c.yaml:2: unknown key data.a\nb."),
        # twice
        (
            "model:\n  n_heads: 4\n  n_heads: 4\n",
            "c.yaml:3: model.n_heads is on line 2 already. Keep one",
        ),
        (
            "model: {n_heads: 4, n_heads: 4}\n",
            "c.yaml:1: model.n_heads is on line 1 already. Keep one",
        ),
        (
            "model:\n  n_heads: 4\nmodel:\n  n_layers: 4\n",
            "c.yaml:3: model is on line 1 already. Keep one",
        ),
        # types
        (
            "training:\n  batch_size: true\n",
            "c.yaml:2: training.batch_size is true, a boolean. Give an integer >= 1 and <= 4194304, auto or null.",
        ),
        (
            "training:\n  eval_steps: 1.0\n",
            "c.yaml:2: training.eval_steps is 1.0, a float. Give an integer >= 1.",
        ),
        (
            "training:\n  eval_steps: 1e3\n",
            "c.yaml:2: training.eval_steps is 1e3, a float. Give an integer >= 1.",
        ),
        (
            "training:\n  eval_steps: '4'\n",
            "c.yaml:2: training.eval_steps is '4', a string. Give an integer >= 1.",
        ),
        (
            "training:\n  eval_steps:\n",
            "c.yaml:2: training.eval_steps is null. Give an integer >= 1.",
        ),
        (
            "training:\n  eval_steps: [4]\n",
            "c.yaml:2: training.eval_steps is a list. Give an integer >= 1.",
        ),
        (
            "training:\n  eval_steps:\n    a: 4\n",
            "c.yaml:2: training.eval_steps is a mapping. Give an integer >= 1.",
        ),
        (
            f"training:\n  eval_steps: {2**63}\n",
            "c.yaml:2: training.eval_steps is 9223372036854775808, which no key can take.",
        ),
        (
            "training:\n  eval_steps: " + "9" * 5000,
            f"c.yaml:2: training.eval_steps is {'9' * 57}..., which no key can take.",
        ),
        (
            "training:\n  eval_steps: !!int x\n",
            "c.yaml:2: training.eval_steps is x, which no key can take.",
        ),
        (
            "training:\n  eval_steps: !!python/name:os.system 3\n",
            "c.yaml:2: training.eval_steps is 3, which no key can",
        ),
        ("training:\n  fp16: 1\n", "c.yaml:2: training.fp16 is 1, an integer. Give true or false."),
        (
            "training:\n  fp16: 'yes'\n",
            "c.yaml:2: training.fp16 is 'yes', a string. Give true or false.",
        ),
        (
            "training:\n  learning_rate: true\n",
            "c.yaml:2: training.learning_rate is true, a boolean. Give a number > 0.0.",
        ),
        (
            "training:\n  learning_rate: .nan\n",
            "c.yaml:2: training.learning_rate is .nan, which no key can take.",
        ),
        (
            "training:\n  learning_rate: 1e999\n",
            "c.yaml:2: training.learning_rate is 1e999, which no key can take.",
        ),
        (
            "training:\n  wandb_project: 12\n",
            "wandb_project is 12, an integer. Give a string or null; quotes make it a string: '12'.",
        ),
        (
            "training:\n  wandb_project: no\n",
            "wandb_project is no, a boolean. Give a string or null; quotes make it a string: 'no'.",
        ),
        (
            "data:\n  path: 2024-01-31\n",
            "data.path is 2024-01-31, which no key can take. Give a string; quotes make it a",
        ),
        ("data:\n  path:\n", "c.yaml:2: data.path is null. Give a string."),
        # limits and choices
        (
            "training:\n  batch_size: 0\n",
            "c.yaml:2: training.batch_size is 0, an integer. Give an integer >= 1 and <= 4194304, auto or null.",
        ),
        (
            "model:\n  dropout: 1\n",
            "c.yaml:2: model.dropout is 1, an integer. Give a number >= 0.0 and < 1.0.",
        ),
        (
            "model:\n  layer_norm_epsilon: 0.0\n",
            "c.yaml:2: model.layer_norm_epsilon is 0.0, a float. Give a number > 0.0.",
        ),
        (
            "generation:\n  top_p: 1.1\n",
            "c.yaml:2: generation.top_p is 1.1, a float. Give a number > 0.0 and <= 1.0 or null.",
        ),
        (
            "training:\n  device: gpus\n",
            "training.device is 'gpus', a string; did you mean 'gpu'? Give auto, cpu, gpu, cuda or tpu.",
        ),
        (
            "training:\n  warmup_steps: atuo\n",
            "did you mean 'auto'? Give an integer >= 0 and <= 2147483647 or auto.",
        ),
        # shape and syntax
        ("- model\n", "c.yaml:1: the file is a list."),
        ("\nword\n", "c.yaml:2: the file is 'word', a string."),
        ("model: 5\n", "c.yaml:1: section model is 5, an integer."),
        ("data:\n\nmodel:\n  - n_heads\n", "c.yaml:4: section model is a list."),
        (
            "model:\n  n_heads: [4\n\n",
            "c.yaml:4: while parsing a flow sequence, expected ',' or ']'",
        ),
        (
            "model:\n\tn_heads: 4\n",
            "c.yaml:2: while scanning for the next token, found character '\\t'",
        ),
        ("model: {}\n---\nmodel: {}\n", "c.yaml:2: expected a single document"),
        (
            "model: &m {n_heads: 4}\ndata: *m\n",
            "c.yaml:2: aliases (*name, <<: *name) are not read.",
        ),
        ("model:\n  n_heads: 4\x07\n", "c.yaml:2: the control character U+0007."),
        ("[" * 5000, "c.yaml:1: nested more than 16 deep."),
        ("training: {" + "seed: 1, " * 500 + "}", "c.yaml:1: more than 1000 names and values."),
        (
            "training:\n  seed: 010\n",
            "c.yaml:2: training.seed is 010, which no key can take.",
        ),  # YAML's 8
        (
            "training:\n  seed: 1:30\n",
            "c.yaml:2: training.seed is 1:30, which no key can take.",
        ),  # YAML's 90
        (
            "training:\n  learning_rate: " + "9:" * 400 + "9.5",
            f"learning_rate is {'9:' * 28}9..., which no key can take.",
        ),
        ("training:\n  seed: !!int [1]\n", "c.yaml:2: training.seed is a list."),
        (
            'data:\n  path: "a\\0b"\n',
            "c.yaml: data.path is 'a\\x00b', which no file can be called.",
        ),
        (
            'training:\n  output_dir: "\\ud800"\n',
            "c.yaml: training.output_dir is '\\ud800', which no file can be called",
        ),
        # keys against each other
        (
            "model:\n  n_embd: x\n  n_heads: 7\n",
            "c.yaml:2: model.n_embd is 'x'",
        ),  # 7 is not held against a default
        (
            "model:\n  n_embd: 100\n  n_heads: 3\n",
            "c.yaml: model.n_embd 100 is not divisible by model.n_heads 3. Set model.n_heads to 2,",
        ),
    ],
)
def test_a_mistake_names_place_finding_and_remedy(text, message):
    error = error_of(text)
    assert message in str(error)
    assert str(error).startswith("c.yaml:")
    assert str(error).endswith(".")
    assert "\n" not in str(error)
    assert not error.details


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batchsize=4", "unknown key training.batchsize; did you mean 'batch_size'?"),
        ("trainng.batch_size=4", "unknown section trainng; did you mean 'training'?"),
        (
            "training.batch_size=four",
            "training.batch_size is 'four', a string. Give an integer >= 1 and <= 4194304, auto or null.",
        ),
        (
            "training.batch_size=0",
            "training.batch_size is 0, an integer. Give an integer >= 1 and <= 4194304, auto or null.",
        ),
        (
            "training.batch_size=[",
            "training.batch_size is '[', a string. Give an integer >= 1 and <= 4194304, auto or null.",
        ),
        ("training.eval_steps=", "training.eval_steps is null. Give an integer >= 1."),
        ("data.path=", "data.path is null. Give a string."),
        (
            "training.eval_batch_size=4",
            "training.eval_batch_size is the original L1's, not known here. Remove it:",
        ),
        ("batch_size=4", "this is not section.key=value."),
        ("training.batch_size", "this is not section.key=value."),
    ],
)
def test_a_wrong_override_is_named(override, message):
    error = str(error_of(QUICK_TESTING, override))
    assert f"override {override}: " in error
    assert message in error


def test_all_mistakes_are_shown_at_once_in_the_order_of_the_file():
    text = (
        "model:\n  n_layer: 2\n  dropout: 2.0\ntrain:\n  x: 1\ntraining:\n  seed: -1\n  seed: 1\n"
    )
    error = error_of(text, "training.seed=7", "training.fp16=1")
    places = [line.split(": ")[0] for line in error.details]
    assert places == [
        "c.yaml:2",
        "c.yaml:3",
        "c.yaml:4",
        "c.yaml:7",
        "c.yaml:8",
        "override training.fp16=1",
    ]
    assert str(error).startswith("c.yaml with its overrides has 6 mistakes. Mend them")
    assert "has 2 mistakes" in str(
        error_of("parallelism:\n  fsdp: 0\ntraining:\n  fp16: true\n  precision: float32\n")
    )
    unreadable = error_of("model: [\n", "training.seed=x")
    assert len(unreadable.details) == 2


def test_overrides_win_and_the_last_one_most():
    overrides = [
        "training.batch_size=2",
        "training.seed=7",
        "training.batch_size=3",
        "model.n_inner=512",
    ]
    config = config_from_text(QUICK_TESTING, "c.yaml", overrides)
    assert (config.training.batch_size, config.training.seed, config.model.n_inner) == (3, 7, 512)
    assert (config.training.max_steps, config.model.n_embd) == (100, 128)
    assert (
        config_from_text(QUICK_TESTING, "c.yaml", ["training.max_steps="]).training.max_steps
        is None
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("123", "123"),
        ("true", "true"),
        ("a: [b", "a: [b"),
        ("a=b", "a=b"),
        ("", None),
        ("null", None),
        ("~", None),
    ],
)
def test_an_override_of_a_text_is_taken_as_it_is(text, value):
    config = config_from_text("", "c.yaml", [f"training.wandb_project={text}"])
    assert config.training.wandb_project == value


@pytest.mark.parametrize("written", ["None", "none", "NONE", "nil", "Nil", "undefined", "nULL"])
def test_what_others_call_null_is_refused_where_null_and_a_string_may_stand(written):
    """Of every such key; in quotes, or as a part of a string, or where a run has read it once, it is the string."""
    names = [
        name
        for name, field in keys_of(Config)
        if {"a string", "null"} <= set(expected(field).split(" or "))
    ]
    assert names == ["training.wandb_project", "training.wandb_run_name", "transfer.from"]
    for section, name in (name.split(".") for name in names):
        wanted = f"{section}.{name} is {written!r}, a string and not null. Write null, or where the string is meant"
        assert f"c.yaml:2: {wanted}" in str(error_of(f"{section}:\n  {name}: {written}\n"))
        assert wanted in str(error_of("", f"{section}.{name}={written}"))

        # A name of a run has an effect beside a project alone.
        more = "  wandb_project: x\n" if name == "wandb_run_name" else ""
        dotted = f"{section}.{name}"

        for quote in "'\"":
            text = f"{section}:\n  {name}: {quote}{written}{quote}\n{more}"
            meant = config_from_text(text, "c.yaml")
            assert value_of(meant, dotted) == written
            assert config_from_text(dump_config(meant), "dumped") == meant

        text = f"{section}:\n  {name}: {written}\n{more}"
        assert config_from_text(text, "c.yaml", of_a_run=True) == meant
        longer = config_from_text(
            f"{section}:\n{more}" if more else "", "c.yaml", [f"{dotted}={written} of it"]
        )
        assert value_of(longer, dotted) == f"{written} of it"


@pytest.mark.parametrize(
    "text",
    [
        "5e-4",
        "1e5",
        "null",
        "123",
        "yes",
        "",
        " a: #b ",
        "*x",
        "ü\u2028\x85\x07\n\tx",
        "\udce9",
        "w " * 99,
        "2024-01-31",
    ],
)
def test_a_dumped_config_reads_back_equal(text):
    config = Config().replace(
        "training", wandb_project=text, wandb_run_name=text, learning_rate=1e-7 / 3, max_steps=5
    )
    dumped = dump_config(config)
    assert config_from_text(dumped, "dumped") == config


def test_a_dump_holds_every_key_in_the_schemas_order():
    keys = re.findall(r"^ *(\w+):", dump_config(Config()), re.MULTILINE)
    assert keys == [
        key for section, values in to_plain(Config()).items() for key in (section, *(values or ()))
    ]


def test_an_original_l1_file_is_told_all_its_foreign_keys():
    named = {
        line.split(" is the original L1's")[0].split()[-1]: line
        for line in error_of(ORIGINAL_L1).details
    }
    assert set(named) == set(yaml.safe_load(ORIGINAL_KEYS.read_text("utf-8")))
    assert len(named) == len(
        error_of(ORIGINAL_L1).details
    )  # so every other key of that file was accepted
    assert "c.yaml:16: key training.max_seq_length" in named["training.max_seq_length"]
    assert "Use model.max_seq_length." in named["training.max_seq_length"]


def test_advice_for_the_originals_keys_names_keys_that_exist():
    known = {name for name, _ in keys_of(Config)}
    original = yaml.safe_load(ORIGINAL_KEYS.read_text("utf-8"))
    assert not known & set(original)
    for remedy in original.values():
        assert (
            set(re.findall(r"\b(?:model|data|training|parallelism|generation)\.\w+", remedy))
            <= known
        )


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "base.yaml").write_bytes(b"data:\n  path: caf\xe9\n")
    (tmp_path / "long.yaml").write_bytes(b"#" * (2**17 + 1))
    for path, message in [
        (tmp_path / "bse.yaml", "bse.yaml: No such file or directory; did you mean 'base.yaml'?"),
        (tmp_path, f"cannot read {tmp_path}: Is a directory."),
        (
            tmp_path / "base.yaml",
            "base.yaml:2: not UTF-8 text (byte 0xe9). Save the file as UTF-8.",
        ),
        (tmp_path / "long.yaml", "long.yaml is longer than 131,072 bytes."),
        (Path("/dev/zero"), "/dev/zero is longer than 131,072 bytes."),
    ]:
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert message in str(caught.value)


def test_a_file_loads_by_path_as_its_text_does(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_bytes(QUICK_TESTING.replace("\n", "\r\n").encode())
    assert load_config(str(path), ["data.path=ä"]) == config_from_text(QUICK_TESTING, "q").replace(
        "data", path="ä"
    )


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"n_embd": 100, "n_heads": 3}),
        ("model", {"n_kv_heads": 5}),
        ("model", {"n_kv_heads": 24}),
        ("model", {"n_embd": 36, "position_embedding": "rope"}),
        ("training", {"fp16": True, "precision": "bfloat16"}),
        ("training", {"min_learning_rate": 1.0}),
        ("training", {"output_dir": ""}),
        ("data", {"path": ""}),
        ("parallelism", {"fsdp": 0}),
        ("parallelism", {"data": -1, "fsdp": -1}),
    ],
)
def test_keys_that_contradict_each_other(section, values):
    assert not list(contradictions(Config()))
    (error,) = contradictions(Config().replace(section, **values))
    assert section in str(error)


@pytest.mark.parametrize(
    ("line", "overrides", "rest"),
    [
        (
            "--config a.lr=3e-4.yaml training.max_steps=5",
            ["training.max_steps=5"],
            ("a.lr=3e-4.yaml", None),
        ),
        ("--config=a.lr=3e-4.yaml a.lr=3e-4.yaml", ["a.lr=3e-4.yaml"], ("a.lr=3e-4.yaml", None)),
        ("training.output_dir=a=b.c --config c", ["training.output_dir=a=b.c"], ("c", None)),
        ("--resume training.max_steps=5 --config c", ["training.max_steps=5"], ("c", True)),
        (
            "--config c --resume trainnig.max_steps=5",
            ["trainnig.max_steps=5"],
            ("c", True),
        ),  # a mistake that is named
        ("--resume run.bs=8/r --config c run.bs=8/r", ["run.bs=8/r"], ("c", "run.bs=8/r")),
        ("--resume=run.bs=9 --config c", [], ("c", "run.bs=9")),
        ("--overwrite training.max_steps=5 --config c", ["training.max_steps=5"], ("c", None)),
    ],
)
def test_the_value_of_a_flag_is_no_override(line, overrides, rest, tmp_path, monkeypatch):
    (tmp_path / "run.bs=8" / "r").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    parser = Parser("")
    parser.add_argument("--config")
    parser.add_argument("--resume", nargs="?", const=True)
    parser.add_argument("--overwrite", action="store_true")
    found, args = parser.parse_overrides(line.split())
    assert (found, (args.config, args.resume)) == (overrides, rest)


@pytest.mark.parametrize("mesh", [{"data": 2}, {"pipeline": 2}])
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_what_a_run_wrote_is_a_config_anywhere(path, mesh, tmp_path):
    """A copy of a run's config.yaml, which has what was left open filled in."""
    shape = dict.fromkeys(("pipeline", "data", "fsdp", "context", "tensor"), 1) | mesh
    config = load_config(path).replace("training", global_batch_size=8, batch_size=4)
    config = config.replace("parallelism", **shape)
    resolved = resolve(config, Facts(300, rows_of_stream(10**9), shape, "cpu"))
    copy = tmp_path / "mine.yaml"
    copy.write_text(dump_config(resolved))
    assert values_of(load_config(copy)) == values_of(resolved)
