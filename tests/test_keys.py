"""config/key.py: what a key may be, on a schema that has one of each."""

import dataclasses
from typing import Any, Literal

import pytest

from l1_jax.config.key import FrozenDict, key, keys_of, to_plain, value_of, values_of, when
from l1_jax.config.schema import Config
from l1_jax.config.values import expected
from l1_jax.config.yaml_file import Reader, config_from_text, load_config

NO_RATES = FrozenDict()


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = key(1, "how deep", resume="free", ge=1)


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = key(8, "of the adapters", resume="fatal", ge=1, le=64)
    from_: str | None = key(None, "a name that Python reserves", resume="free")
    inner: Inner = dataclasses.field(default=Inner())


@dataclasses.dataclass(frozen=True)
class Source:
    name: str = key("", "what it is called", resume="fatal")
    weight: float = key(1.0, "its share", resume="fatal", gt=0.0)


@dataclasses.dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...] = key((), "of a mixture", resume="fatal")
    names: tuple[str, ...] | None = key(None, "a list of texts", resume="free")
    lengths: tuple[int, ...] = key((1, 2), "a list of integers", resume="free", ge=1)
    stages: tuple[tuple[str, float], ...] = key((), "a list of pairs", resume="free", ge=0.0)
    rates: FrozenDict = key(NO_RATES, "a map", resume="free", gt=0.0)  # noqa: RUF009
    kind: Literal["a", "b"] = key("a", "a choice", resume="free")
    of_a: int = key(0, "for a alone", resume="free", used_with=when("data.kind", "a"))
    of_lora: int = key(0, "for lora alone", resume="free", used_with=when("lora.rank"))


@dataclasses.dataclass(frozen=True)
class Schema:
    data: Data = dataclasses.field(default=Data())
    lora: Lora | None = None


def read(text: str, *overrides: str) -> tuple[Schema, list[str]]:
    reader = Reader(Schema)
    reader.read_text(text, "c.yaml")
    reader.read_overrides(overrides)
    config = reader.config()
    unused = reader.unused_keys(config, written_by_run=False)
    return config, [str(error) for error in (*reader.mistakes, *unused)]


@pytest.mark.parametrize(
    ("text", "overrides", "lora"),
    [
        ("", [], None),
        ("lora: null", [], None),
        ("lora:\n  rank: 4\n", [], Lora(rank=4)),
        ("lora: {}", [], Lora()),
        ("", ["lora.rank=4"], Lora(rank=4)),
        ("", ["lora.from=x"], Lora(from_="x")),
        ("lora:\n  from: y\n  inner: {depth: 3}\n", [], Lora(from_="y", inner=Inner(3))),
        ("", ["lora.inner.depth=2"], Lora(inner=Inner(2))),
        ("lora: {rank: 4}", ["lora=null"], None),
        ("lora: {rank: 4}", ["lora=null", "lora.from=z"], Lora(from_="z")),
        ("lora: null", ["lora.rank=4"], Lora(rank=4)),
    ],
)
def test_a_section_may_be_null_and_an_override_opens_it(text, overrides, lora):
    config, mistakes = read(text, *overrides)
    assert not mistakes
    assert config == Schema(lora=lora)


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("names", "[a, b]", ("a", "b")),
        ("names", "null", None),
        ("lengths", "[3]", (3,)),
        ("lengths", "[]", ()),
        ("stages", "[[a, 1], [b, 2.5]]", (("a", 1.0), ("b", 2.5))),
        ("rates", "{x.y: 1, z: 5e-4}", FrozenDict({"x.y": 1.0, "z": 5e-4})),
        (
            "sources",
            "[{name: web, weight: 2}, {name: books}]",
            (Source("web", 2.0), Source("books")),
        ),
    ],
)
def test_lists_and_maps_by_file_and_by_override(name, written, value):
    for config, mistakes in (
        read(f"data:\n  {name}: {written}\n"),
        read("", f"data.{name}={written}"),
    ):
        assert not mistakes
        assert getattr(config.data, name) == value
        assert hash(config) == hash(read("", f"data.{name}={written}")[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data:\n  lengths: [0]\n",
            "c.yaml:2: data.lengths is a list. Give a list of integers >= 1.",
        ),
        ("data:\n  lengths: 3\n", "data.lengths is 3, an integer. Give a list of integers >= 1."),
        ("data:\n  names: [1]\n", "data.names is a list. Give a list of strings or null."),
        ("data:\n  stages: [[a]]\n", "Give a list of [name, number] pairs >= 0.0."),
        ("data:\n  rates: {a: 0}\n", "Give a map of names to numbers > 0.0."),
        ("data:\n  rates: [a]\n", "data.rates is a list. Give a map of names to numbers > 0.0."),
        ("data:\n  sources: [a]\n", "c.yaml:2: an item of data.sources is 'a', a string."),
        (
            "data:\n  sources:\n    - name: web\n      weigth: 2\n",
            "c.yaml:4: unknown key data.sources.weigth; did you mean 'weight'? docs/",
        ),
        (
            "lora:\n  rank: 65\n",
            "c.yaml:2: lora.rank is 65, an integer. Give an integer >= 1 and <= 64.",
        ),
        ("lora:\n  inner:\n    depht: 1\n", "unknown key lora.inner.depht; did you mean 'depth'?"),
        ("lora: 5\n", "c.yaml:1: section lora is 5, an integer. Write it as `name: value` lines."),
    ],
)
def test_mistakes_in_them_are_named(text, message):
    mistakes = read(text)[1]
    assert len(mistakes) == 1, mistakes
    assert message in mistakes[0]


def test_a_section_is_not_overridden_by_a_value():
    (mistake,) = read("", "lora=5")[1]
    assert "override lora=5: lora is a section. Override its keys, as in lora.rank=..." in mistake


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("data: {kind: b, of_a: 1}", [], "c.yaml:1: data.of_a has no effect with data.kind: b."),
        ("data: {kind: b}", ["data.of_a=1"], "override data.of_a=1: data.of_a has no effect"),
        ("data: {of_lora: 1}", [], "no effect with lora.rank: null. Remove it, or set lora.rank."),
        ("data: {kind: b, of_a: 0}", [], None),  # its default
        ("data: {kind: a, of_a: 1}", [], None),
        ("data: {of_lora: 1}\nlora: {}", [], None),
        ("data: {kind: c, of_a: 1}", [], "data.kind is 'c'"),  # not held against a default
    ],
)
def test_a_key_without_effect_is_refused_where_it_was_written(text, overrides, message):
    mistakes = read(text, *overrides)[1]
    assert len(mistakes) == (message is not None), mistakes
    assert message is None or message in mistakes[0]


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("training: {muon_learning_rate: 0.01}", "training.optimizer: muon"),
        (
            "training: {optimizer: adafactor, beta1: 0.5}",
            "training.optimizer: adamw or lion or muon",
        ),
        ("training: {optimizer: adafactor, moment_dtype: bfloat16}", "training.optimizer: adamw"),
        ("training: {optimizer: lion, eps: 1e-6}", "training.optimizer: adamw or muon"),
        ("training: {decay_fraction: 0.5}", "training.schedule: wsd"),
        ("training: {wandb_run_name: x}", "set training.wandb_project."),
        ("model: {rope_theta: 500}", "model.position_embedding: rope"),
        ("parallelism: {pipeline_microbatches: 4}", "set another parallelism.pipeline."),
        (
            "training: {max_skipped_steps: 3, on_spike: warn}",
            "no effect with training.on_nonfinite: stop and training.on_spike: warn. Remove it, "
            "or set training.on_nonfinite: skip or training.on_spike: skip or rewind.",
        ),
    ],
)
def test_keys_of_ours_without_effect(text, needed, tmp_path):
    from l1_jax.errors import UserError

    with pytest.raises(UserError, match="has no effect with") as caught:
        config_from_text(text, "c.yaml")
    assert needed in str(caught.value)

    # What a run wrote is passed over, and what is written on top of it is not.
    for written_by in ("run.json", "checkpoint.json"):
        directory = tmp_path / written_by
        directory.mkdir()
        (directory / "config.yaml").write_text(text)
        (directory / written_by).write_text("{}")
        load_config(directory / "config.yaml")
        with pytest.raises(UserError, match=r"override training\.decay_fraction"):
            load_config(directory / "config.yaml", ["training.decay_fraction=0.3"])


def test_what_the_docs_say_wins_is_not_refused():
    text = (
        "training: {num_epochs: 2, max_steps: 5, batch_size: 4, global_batch_size: 8, fp16: true}"
    )
    one_of_several = "training: {on_spike: rewind, max_skipped_steps: 3}"
    config_from_text(one_of_several, "c.yaml")
    config_from_text(text + "\n", "c.yaml")


def test_a_change_at_a_resume_has_a_meaning_for_every_key():
    meanings = {name: field.metadata["resume"] for name, field in keys_of(Config)}
    assert set(meanings.values()) == {"never", "fatal", "warned", "free"}
    assert meanings["model.n_layers"] == meanings["training.seed"] == "fatal"
    assert meanings["training.learning_rate"] == "warned"
    assert meanings["parallelism.fsdp"] == meanings["training.output_dir"] == "free"


def test_values_by_dotted_names():
    config = Schema(lora=Lora(rank=2))
    assert value_of(config, "lora.inner.depth") == 1
    assert value_of(Schema(), "lora.inner.depth") is None
    assert list(values_of(config)) == list(values_of(Schema())) == [n for n, _ in keys_of(Schema)]
    plain: dict[str, Any] = to_plain(
        Schema(data=Data(rates=FrozenDict({"a": 1.0}), stages=(("a", 1.0),)))
    )
    assert plain["data"]["rates"] == {"a": 1.0}
    assert plain["data"]["stages"] == [["a", 1.0]]
    assert plain["lora"] is None


def test_what_a_key_takes_in_words():
    words = {name: expected(field) for name, field in keys_of(Schema)}
    assert words["data.sources"] == "a list of mappings"
    assert words["data.names"] == "a list of strings or null"
    assert words["data.stages"] == "a list of [name, number] pairs >= 0.0"
    assert words["data.rates"] == "a map of names to numbers > 0.0"
    assert words["data.kind"] == "a or b"
