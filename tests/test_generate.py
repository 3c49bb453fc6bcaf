"""Generation against the uncached model, against transformers' filters, and against itself in other company."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l1_jax.errors import UserError
from l1_jax.inference.generate import Generator
from l1_jax.inference.sampling import keep_min_p, keep_top_k, keep_top_p, penalise, sample
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
    x, cache = model(tokens[:, :20], positions[:, :20], cache=cache)
    np.testing.assert_allclose(model.logits(x)[..., :300], expected[:, :20, :300], atol=1e-4)
    step = jax.jit(lambda t, p, cache: nnx.merge(loaded.graphdef, loaded.params)(t, p, cache=cache))
    for at in range(20, 32):
        x, cache = step(tokens[:, at : at + 1], positions[:, at : at + 1], cache)
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
        ("The value of", 33 - used, f"Set --max-tokens to {32 - used} or less"),
        ("x " * 60, None, "Shorten the prompt to 31 tokens"),
        ("The", 0, "--max-tokens is 0"),
        ("The", -3, "--max-tokens is -3"),
        ("", 5, "the prompt is empty"),
        ("\udcff", 5, "the prompt is not valid UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            generator([prompt], GREEDY, max_tokens=max_tokens)


def test_filters_are_transformers():
    torch = pytest.importorskip("torch")
    from transformers import generation as hf

    logits = np.random.default_rng(0).normal(size=(3, 60)).astype(np.float32) * 3
    ids = np.random.default_rng(1).integers(0, 60, (3, 9))
    seen = np.zeros((3, 60), bool)
    seen[np.arange(3)[:, None], ids] = True
    for ours, theirs in (
        (keep_top_k(logits, 7), hf.TopKLogitsWarper(7)),
        (keep_top_p(logits, 0.7), hf.TopPLogitsWarper(0.7)),
        (keep_top_p(logits, 1e-6), hf.TopPLogitsWarper(1e-6)),
        (keep_min_p(logits, 0.2), hf.MinPLogitsWarper(0.2)),
        (penalise(logits, seen, 1.7), hf.RepetitionPenaltyLogitsProcessor(1.7)),
    ):
        expected = theirs(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
        np.testing.assert_allclose(np.where(ours < -1e30, -np.inf, ours), expected, rtol=1e-6)


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    keys = jax.random.split(jax.random.key(0), 20000)
    drawn = sample(jnp.tile(logits, (20000, 1)), keys, None, GenerationConfig(temperature=0.5))
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
