"""Generation against the uncached model, against transformers' filters, and against itself in other company."""

import copy
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l1_jax.errors import UserError
from l1_jax.inference.generate import Generator
from l1_jax.inference.sampling import (
    KEEP_ANY_K,
    KEEP_ANY_P,
    Sampling,
    drop_below,
    penalise,
    sample,
    smallest_of_k_and_p,
    smallest_of_min_p,
    sort_descending,
)
from l1_jax.inference.section import GenerationConfig
from l1_jax.inference.text_stream import TextStream
from l1_jax.loading import load_model
from l1_jax.model.attention import empty_cache

GREEDY, RANDOM = GenerationConfig(temperature=0.0), GenerationConfig(temperature=1.3, top_k=50)


@pytest.fixture(scope="module")
def loaded(trained):
    return load_model(trained, jax.devices()[:1])


@pytest.fixture(scope="module")
def generator(loaded):
    return Generator(loaded)


def test_a_checkpoint_comes_to_other_devices(trained, loaded, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("l1_jax.loading.log.propagate", True)
    there = tmp_path / "of-a-gpu"
    shutil.copytree(trained / "best_model", there)
    config = there / "config.yaml"
    config.write_text(config.read_text().replace("attention: auto", "attention: cudnn"))
    monkeypatch.setattr(
        "l1_jax.loading.check_undamaged", lambda *_: None
    )  # its hash is another one now
    assert load_model(there, jax.devices()[:1]).graphdef == loaded.graphdef
    assert "cudnn cannot run: it is for NVIDIA GPUs; here blocked is used" in caplog.text


def uncached_greedy(model, prompt, count):
    ids = model.tokenizer.encode(prompt)
    forward = jax.jit(
        lambda params, tokens: (m := nnx.merge(model.graphdef, params)).logits(m(tokens)[0])
    )
    start = len(ids)
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(forward(model.params, padded)[0, len(ids) - 1].argmax()))
    return model.tokenizer.decode(ids[start:])


def test_cached_logits_are_uncached_logits(loaded):
    model = nnx.merge(loaded.graphdef, loaded.params)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 32)).astype(np.int32)
    expected = model.logits(model(tokens)[0])
    positions = np.broadcast_to(np.arange(32), (2, 32))
    cache = empty_cache(model.config, 2, 32, jnp.float32)
    x, cache, _, _ = model(tokens[:, :20], positions[:, :20], cache=cache)
    np.testing.assert_allclose(model.logits(x)[..., :300], expected[:, :20, :300], atol=1e-4)
    step = jax.jit(lambda t, p, cache: nnx.merge(loaded.graphdef, loaded.params)(t, p, cache=cache))
    for at in range(20, 32):
        x, cache, _, _ = step(tokens[:, at : at + 1], positions[:, at : at + 1], cache)
        np.testing.assert_allclose(
            model.logits(x)[..., :300], expected[:, at : at + 1, :300], atol=1e-4
        )


def test_greedy_is_the_uncached_argmax_for_prompts_of_any_length(generator, loaded):
    prompts = ["The", "A longer prompt", "a b"]
    completions = generator(prompts, GREEDY, max_tokens=15)
    assert [c.text for c in completions] == [uncached_greedy(loaded, p, 15) for p in prompts]
    assert {(c.tokens, c.finish_reason) for c in completions} == {(15, "length")}


def test_a_text_does_not_depend_on_its_neighbours(generator):
    pair = generator(["The value", "An"], RANDOM, seed=3, max_tokens=12)
    assert generator(["The value"], RANDOM, seed=3, max_tokens=12)[0] == pair[0]
    assert generator(["The value"] * 2, RANDOM, seed=3, max_tokens=12)[0] == pair[0]
    samples = generator(["The value"] * 4, RANDOM, seed=3, max_tokens=12)
    assert len({s.text for s in samples}) > 1
    assert generator(["The value"], RANDOM, seed=4, max_tokens=12)[0] != pair[0]


def test_end_of_text_ends_a_text(loaded):
    """A model that wants nothing but end-of-text."""
    params = dict(loaded.params)
    eot = loaded.tokenizer.eot_id
    params["final_norm"] = {"scale": jnp.zeros(32), "bias": jnp.ones(32)}
    params["token_embedding"] = params["token_embedding"].at[eot].set(10.0)
    ending = Generator(dataclasses.replace(loaded, params=params))
    (completion,) = ending(["The"], GREEDY)
    assert (completion.text, completion.tokens, completion.finish_reason) == ("", 0, "stop")


def test_any_end_of_a_tokenizer_ends_a_text_and_its_beginning_comes_first(loaded):
    """Of a tokenizer with a beginning and two ends: a model that wants nothing but the second."""
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.end_ids = (tokenizer.eot_id, 7)
    tokenizer.beginning_id = 9
    params = dict(loaded.params)
    params["final_norm"] = {"scale": jnp.zeros(32), "bias": jnp.ones(32)}
    params["token_embedding"] = params["token_embedding"].at[7].set(10.0)
    ending = Generator(dataclasses.replace(loaded, params=params, tokenizer=tokenizer))
    (completion,) = ending(["The"], GREEDY)
    assert (completion.text, completion.tokens, completion.finish_reason) == ("", 0, "stop")
    assert ending.encode("The") == [9, *loaded.tokenizer.encode("The")]


def test_stop_strings_and_streaming(generator):
    whole = generator(["The"], GREEDY, max_tokens=25)[0].text
    stop = whole[6:9]
    streamed = []
    (completion,) = generator(
        ["The"], GREEDY, max_tokens=25, stop=[stop], on_text=lambda row, text: streamed.append(text)
    )
    assert completion.text == whole[: whole.index(stop)] == "".join(streamed)
    assert completion.finish_reason == "stop"
    assert completion.tokens < 25


def test_the_context_is_the_limit(generator):
    prompt = "The value of"
    used = len(generator.encode(prompt))
    (completion,) = generator([prompt], GREEDY)
    assert completion.tokens == 32 - used
    assert generator([prompt], GREEDY, max_tokens=32 - used)[0] == completion
    for prompt, max_tokens, message in (
        ("The value of", 33 - used, f"Set `max_tokens` to {32 - used} or less"),
        ("x " * 60, None, "Shorten the prompt to 31 tokens"),
        ("The", 0, "`max_tokens` is 0"),
        ("The", -3, "`max_tokens` is -3"),
        ("", 5, "the prompt is empty"),
        ("\udcff", 5, "the prompt is not valid UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            generator([prompt], GREEDY, max_tokens=max_tokens)


def of_rows(value, logits):
    """One setting for each row."""
    return jnp.full(len(logits), value)


def keep_top_k(logits, k):
    rest = of_rows(KEEP_ANY_P, logits)
    return drop_below(logits, smallest_of_k_and_p(logits, of_rows(k, logits), rest))


def keep_top_p(logits, p):
    rest = of_rows(KEEP_ANY_K, logits)
    return drop_below(logits, smallest_of_k_and_p(logits, rest, of_rows(p, logits)))


def keep_min_p(logits, p):
    return drop_below(logits, smallest_of_min_p(logits, of_rows(np.log(p), logits)))


def test_filters_are_transformers():
    torch = pytest.importorskip("torch")
    from transformers import generation as hf

    logits = np.random.default_rng(0).normal(size=(3, 60)).astype(np.float32) * 3
    ids = np.random.default_rng(1).integers(0, 60, (3, 9))
    seen = np.zeros((3, 60), bool)
    seen[np.arange(3)[:, None], ids] = True
    for ours, theirs in (
        (keep_top_k(logits, 7), hf.TopKLogitsWarper(7)),
        (keep_top_k(logits, 1000), hf.TopKLogitsWarper(1000)),
        (keep_min_p(logits, 1.0), hf.MinPLogitsWarper(1.0)),
        (keep_top_p(logits, 0.7), hf.TopPLogitsWarper(0.7)),
        (keep_top_p(logits, 1e-6), hf.TopPLogitsWarper(1e-6)),
        (keep_min_p(logits, 0.2), hf.MinPLogitsWarper(0.2)),
        (penalise(logits, seen, of_rows(1.7, logits)), hf.RepetitionPenaltyLogitsProcessor(1.7)),
    ):
        expected = theirs(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
        np.testing.assert_allclose(np.where(ours < -1e30, -np.inf, ours), expected, rtol=1e-6)


def test_what_is_as_likely_as_the_last_is_kept_too():
    """As transformers does for top-k: the result does not depend on the order of the vocabulary."""
    torch = pytest.importorskip("torch")
    from transformers import generation as hf

    equal = np.zeros((1, 8), np.float32)
    assert np.isfinite(hf.TopKLogitsWarper(2)(None, torch.from_numpy(equal)).numpy()).all()
    for kept in (keep_top_k(equal, 2), keep_top_p(equal, 0.2), keep_min_p(equal, 1.0)):
        np.testing.assert_array_equal(kept, equal)
    steps = np.array([[3.0, 1, 2, 2, 0]], np.float32)
    np.testing.assert_array_equal(keep_top_k(steps, 2)[0] > -1e30, [True, False, True, True, False])


VOCAB, PADDED, TINIEST = 100, 128, 5e-324  # the last is the smallest number that Python has
MOST, NORMAL = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
EDGES = {
    "temperature": (0.0, TINIEST, 1e-45, 1e-39, 1e-38, NORMAL, 1e-6, 1.0, 9e18, 1e38, 1e39, 1e300),
    "top_k": (1, 2, VOCAB, VOCAB + 1, PADDED, 2**40),
    "top_p": (TINIEST, 1e-45, 1e-39, NORMAL, 1e-9, 0.5, 1 - 1e-9, 1.0),
    "min_p": (0.0, TINIEST, 1e-39, 1e-9, 0.5, 1.0),
    "repetition_penalty": (TINIEST, 1e-39, NORMAL, 1e-6, 0.5, 2.0, 9e18, 1e39, 1e300),
}


def edge_logits():
    """Rows of logits with padding, each of its kind."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(VOCAB) / 10.0, rng.permutation(VOCAB) - VOCAB - 1.0]
    rows += [
        np.linspace(-MOST, MOST, VOCAB),
        np.linspace(MOST, 0, VOCAB),
        -np.linspace(1, MOST, VOCAB),
    ]
    rows += [np.zeros(VOCAB), np.full(VOCAB, 5e37), np.full(VOCAB, -MOST), np.full(VOCAB, -np.inf)]
    rows += [
        np.where(np.arange(VOCAB) == 7, value, other)
        for value, other in ((0, -np.inf), (np.inf, 1), (1, -MOST))
    ]
    rows += [np.arange(VOCAB) * 1e-40, np.where(np.arange(VOCAB) % 2, np.inf, 0)]
    padded = np.full((len(rows), PADDED), -MOST, np.float32)
    padded[:, :VOCAB] = rows
    return padded


def some_settings():
    """Each edge by itself, and some of all combinations."""
    for name, values in EDGES.items():
        yield from (GenerationConfig(**{name: value}) for value in values)
    rng = np.random.default_rng(0)
    for _ in range(40):
        yield GenerationConfig(
            **{name: values[rng.integers(len(values))] for name, values in EDGES.items()}
        )


_sample = jax.jit(sample)


def test_numbers_of_every_kind_are_sorted():
    logits = np.concatenate([edge_logits(), -edge_logits()])
    np.testing.assert_array_equal(sort_descending(logits), -np.sort(-logits, axis=-1))


def draw(logits, how, seen=None):
    """A token of each row, as samples 0, 1, 2, ... of one seed."""
    count = len(logits)
    sampling = Sampling.of([how] * count, [0] * count, range(count))
    seen = np.zeros(logits.shape, bool) if seen is None else seen
    return np.asarray(_sample(logits, seen, sampling, np.zeros(count, np.int32)))


@pytest.mark.parametrize("how", some_settings(), ids=str)
def test_every_setting_gives_a_token_of_the_vocabulary(how):
    logits = edge_logits()
    for seen in (np.zeros(PADDED, bool), np.arange(PADDED) % 3 == 0, np.arange(PADDED) < VOCAB):
        penalised = None if how.repetition_penalty == 1.0 else np.tile(seen, (len(logits), 1))
        tokens = draw(logits, how, penalised)
        assert tokens.min() >= 0
        assert tokens.max() < VOCAB
        assert tokens[9] == 7  # the only one that is not impossible
        if penalised is None:
            break


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p"])
def test_the_limit_of_each_setting_is_greedy(name):
    """Of rows without ties and with differences of more than 1e-3."""
    logits = edge_logits()[:5]
    limits = {"temperature": lambda x: x < 1e-5, "top_p": lambda x: x < 1e-8}.get(
        name, lambda x: x == 1
    )
    for value in filter(limits, EDGES[name]):
        np.testing.assert_array_equal(
            draw(logits, GenerationConfig(**{name: value})), logits.argmax(-1), str(value)
        )


def test_a_high_temperature_draws_all_alike_and_no_padding():
    logits = np.tile(edge_logits()[:1], (20_000, 1))
    for temperature in (1e18, 1e38, 1e300):
        counts = np.bincount(
            draw(logits, GenerationConfig(temperature=temperature)), minlength=VOCAB
        )
        assert len(counts) == VOCAB
        np.testing.assert_allclose(counts, 200, atol=75)  # five deviations


def test_texts_at_the_edge_are_greedy(generator):
    greedy = generator(["The", "A value"], GREEDY, max_tokens=12)
    for edge in (
        {"temperature": 1e-38},
        {"temperature": TINIEST},
        {"top_p": 1e-39},
        {"top_k": 1},
        {"min_p": 1.0},
    ):
        assert generator(["The", "A value"], GenerationConfig(**edge), max_tokens=12) == greedy, (
            edge
        )


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    drawn = draw(jnp.tile(logits, (20000, 1)), GenerationConfig(temperature=0.5))
    expected = np.array([0.25, 0.09, 0.04]) / 0.38  # temperature 0.5 squares them
    np.testing.assert_allclose(np.bincount(drawn) / 20000, expected, atol=0.01)


def test_text_comes_in_whole_characters_and_never_a_part_of_a_stop_string():
    pieces = [bytes([b]) for b in "né €ENDx".encode()]
    stream = TextStream(pieces.__getitem__, ["END", "never"])  # "n" may begin "never", so it waits
    out = [stream.add([i]) for i in range(len(pieces)) if stream.finish_reason is None]
    assert out == ["", "", "né", " ", "", "", "€", "", "", ""]
    assert (stream.text, stream.finish_reason, stream.num_tokens) == (
        "né €",
        "stop",
        len("né €END".encode()),
    )
    partial = TextStream(pieces.__getitem__, ["ENDLESS"])
    assert partial.add(range(len(pieces) - 1)) == "né €"
    assert partial.end("length") == "END"
    broken = TextStream(pieces.__getitem__, [])
    assert broken.add([0, 1]) + broken.end("length") == "n\ufffd"
