"""The engine against a plain loop over whole forward passes, and against itself in other company."""

import json
import logging
import types

import jax
import numpy as np
import pytest
from flax import nnx

from l1_jax.errors import UserError
from l1_jax.inference.engine import CHUNK_TOKENS, Engine
from l1_jax.inference.generate import Generator
from l1_jax.inference.sampling import Sampling
from l1_jax.inference.section import GenerationConfig
from l1_jax.loading import load_model
from l1_jax.parallel.section import ParallelismConfig

SLOTS = 32
GREEDY = GenerationConfig(temperature=0.0)

# A row of each kind of setting, with prompts of many lengths.
SETTINGS = [
    GREEDY,
    GenerationConfig(),
    GenerationConfig(temperature=1.4, top_k=5),
    GenerationConfig(top_p=0.6),
    GenerationConfig(min_p=0.3),
    GenerationConfig(temperature=0.0, repetition_penalty=1.9),
    GenerationConfig(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=0.7),
]
PROMPTS = [[70], [65, 66, 67], list(range(60, 80)), [9] * 5, [200, 70], [40, 41, 40], [33] * 8]
SEEDS = [0, 7, 2**32 - 1, 3, 3, 5, 1]
NUMBERS = [0, 0, 4, 1, 2, 3, 9]


@pytest.fixture(scope="module")
def loaded(trained):
    return load_model(trained, jax.devices()[:1])


def make_engine(model, end_ids=(), exact=False):
    return Engine(model.graphdef, model.params, model.mesh, end_ids=end_ids, exact=exact)


@pytest.fixture(scope="module")
def engine(loaded):
    return make_engine(loaded)


@pytest.fixture(scope="module")
def exact_engine(loaded):
    return make_engine(loaded, exact=True)


def sampling_of(rows, settings=SETTINGS, total=None):
    """Of these rows of the tables above, and of greedy ones that fill up a state."""
    spare = (total or len(rows)) - len(rows)
    return Sampling.of(
        [settings[row] for row in rows] + [GREEDY] * spare,
        [SEEDS[row] for row in rows] + [0] * spare,
        [NUMBERS[row] for row in rows] + [0] * spare,
    )


def decode(engine, rows, count):
    """The tokens that follow the prompts of these rows."""
    state = engine.begin([PROMPTS[row] for row in rows], SLOTS)
    total = len(state.lengths)
    active = np.arange(total) < len(rows)
    sampling = sampling_of(rows, total=total)
    tokens = []
    while count > 0:
        state, decoded = engine.decode(state, active, sampling, min(count, 8))
        tokens.append(np.asarray(decoded.steps.tokens)[:, : min(count, 8)])
        count -= 8
    return np.concatenate(tokens, axis=1)[: len(rows)].tolist()


@pytest.fixture(scope="module")
def next_logits(loaded):
    """The logits after a text, by a whole forward pass."""

    @jax.jit
    def forward(params, tokens):
        model = nnx.merge(loaded.graphdef, params)
        return model.logits(model(tokens).hidden)

    def run(text):
        padded = np.zeros((1, SLOTS), np.int32)
        padded[0, : len(text)] = text
        return np.asarray(forward(loaded.params, padded))[0, len(text) - 1, :300]

    return run


def plain_draw(logits, text, how, seed, number):
    """The next token, in numpy; only the noise is jax's."""
    logits = logits.astype(np.float64)
    for token in set(text):
        value = logits[token]
        logits[token] = (
            value / how.repetition_penalty if value > 0 else value * how.repetition_penalty
        )
    if how.temperature == 0:
        return int(logits.argmax())

    logits /= how.temperature
    if how.top_k:
        logits[logits < np.sort(logits)[-how.top_k]] = -np.inf
    if how.top_p:
        order = np.argsort(-logits)
        shares = np.exp(logits[order]) / np.exp(logits).sum()
        kept = int((np.cumsum(shares) < how.top_p).sum()) + 1
        logits[order[kept:]] = -np.inf
    if how.min_p:
        logits[logits < logits.max() + np.log(how.min_p)] = -np.inf

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), len(text) - 1)
    # As many numbers as the padded vocabulary has, for they depend on how many there are.
    return int((logits + np.asarray(jax.random.gumbel(key, (384,)))[:300]).argmax())


def test_it_draws_what_a_plain_loop_draws(engine, next_logits):
    expected = []
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for _ in range(10):
            logits = next_logits(text)
            text.append(plain_draw(logits, text, SETTINGS[row], SEEDS[row], NUMBERS[row]))
        expected.append(text[len(prompt) :])
    assert decode(engine, range(len(PROMPTS)), 10) == expected


def test_a_row_depends_on_itself_alone(engine, trained):
    together = decode(engine, range(len(PROMPTS)), 6)
    for row in range(len(PROMPTS)):
        assert decode(engine, [row], 6) == [together[row]]

    # And not on how a mesh divides rows, heads and the vocabulary.
    divided = load_model(trained, jax.devices()[:4], ParallelismConfig(data=2, tensor=2))
    assert decode(make_engine(divided), range(len(PROMPTS)), 6) == together


def test_other_settings_compile_nothing(loaded, caplog):
    generator = Generator(loaded)

    def compiled(how, **options):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
            generator(["The value"], how, max_tokens=9, **options)
        return [text for text in caplog.messages if text.startswith("Finished XLA compilation")]

    assert compiled(GREEDY)
    for how in [*SETTINGS, GenerationConfig(temperature=0.3, top_k=9, top_p=0.2, min_p=0.5)]:
        assert not compiled(how, seed=5, stop=["x"])


def test_log_probabilities_are_the_models_own(engine, next_logits):
    """Before penalty, temperature, filters and mask."""
    rows = range(len(PROMPTS))
    state = engine.begin(PROMPTS, SLOTS)
    mask = np.ones((len(rows), 384), bool)
    mask[:, 50:200] = False
    state, output = engine.step(state, np.ones(len(rows), bool), sampling_of(rows), mask, num_top=4)

    for row in rows:
        expected = np.asarray(jax.nn.log_softmax(next_logits(PROMPTS[row])))
        token = int(output.tokens[row])
        assert not 50 <= token < 200
        assert token < 300
        assert output.logprobs[row] == pytest.approx(expected[token], abs=1e-4)
        np.testing.assert_allclose(output.top_logprobs[row], np.sort(expected)[:-5:-1], atol=1e-4)
        np.testing.assert_allclose(
            expected[output.top_tokens[row]], output.top_logprobs[row], atol=1e-4
        )


def test_a_masked_token_is_never_drawn(engine):
    rows = range(len(PROMPTS))
    active = np.ones(len(rows), bool)
    for allowed in ([7], [3, 250], [299]):
        mask = np.zeros((len(rows), 384), bool)
        mask[:, allowed] = True
        state = engine.begin(PROMPTS, SLOTS)
        for _ in range(3):
            state, output = engine.step(state, active, sampling_of(rows), mask)
            assert set(np.asarray(output.tokens).tolist()) <= set(allowed)
            assert output.logprobs is None


def test_any_of_several_ends_ends_a_row(engine, loaded):
    rows = range(len(PROMPTS))
    free = decode(engine, rows, 8)
    ends = (free[1][2], free[3][0], free[6][4])
    ending = make_engine(loaded, end_ids=ends)

    state = ending.begin(PROMPTS, SLOTS)
    state, decoded = ending.decode(state, np.ones(len(rows), bool), sampling_of(rows), 8)
    for row in (1, 2, 3, 4):  # a penalty, of the others, does not count ends
        tokens = np.asarray(decoded.steps.tokens[row])
        first = next((at for at, token in enumerate(free[row]) if token in ends), None)
        expected = free[row] if first is None else free[row][: first + 1]
        assert tokens[: decoded.counts[row]].tolist() == expected
        assert bool(decoded.ended[row]) == (first is not None)
    assert not np.asarray(state.seen)[:, list(ends)].any()


def rows_of(state, row):
    """What a row is: its tokens, those seen, and what of it is in the cache."""
    length = int(state.lengths[row])
    cached = [np.asarray(leaf[row, :, : length - 1]) for leaf in jax.tree.leaves(state.cache)]
    return [np.asarray(state.tokens[row, :length]), np.asarray(state.seen[row]), *cached]


def int32(*values):
    return np.array(values, np.int32)


def test_parts_copies_and_cuts_make_the_row_that_is_begun_whole(engine):
    """And a row that is not spoken of stays as it is, also while others step."""
    text = list(range(40, 52))
    other = [7, 8, 9]
    whole = engine.begin([text, other], SLOTS)

    state = engine.begin([text[:1], other], SLOTS)
    for first in (1, 3, 8):
        part = text[first : {1: 3, 3: 8, 8: 12}[first]]
        padded = np.zeros((1, 6), np.int32)
        padded[0, : len(part)] = part
        state = engine.prefill(state, padded, int32(len(part)), int32(0))

        # Another row goes on between the parts.
        state, _ = engine.step(state, np.array([False, True]), sampling_of([1, 1]))
    for found, expected in zip(rows_of(state, 0), rows_of(whole, 0), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)

    # A shared beginning: the row in another place, cut back and continued in another way.
    state = engine.copy_rows(state, int32(0), int32(1))
    state = engine.cut(state, int32(1), int32(4))
    state = engine.prefill(state, int32([90, 91]), int32(2), int32(1))
    expected = engine.begin([text, [*text[:4], 90, 91]], SLOTS)
    for row in (0, 1):
        for found, wanted in zip(rows_of(state, row), rows_of(expected, row), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)

    # A freed row is as good as new.
    state = engine.cut(state, int32(0), int32(0))
    state = engine.prefill(state, int32(other, [0, 0, 0]), int32(3, 0))
    for found, wanted in zip(rows_of(state, 0), rows_of(whole, 1), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def exact_bits(engine, row, others, place, slots, part_tokens=CHUNK_TOKENS):
    """Log-probabilities of a row's 8 next tokens, as bits, with others before and behind it."""
    rows = [*others[:place], row, *others[place:]]
    num_rows = engine.most_rows
    state = engine.empty(num_rows, slots)
    for number, of_table in enumerate(rows):
        text = PROMPTS[of_table]
        for first in range(0, len(text), part_tokens):
            part = text[first : first + part_tokens]
            padded = np.zeros((1, CHUNK_TOKENS), np.int32)
            padded[0, : len(part)] = part
            state = engine.prefill(state, padded, int32(len(part)), int32(number))

    active = np.arange(num_rows) < len(rows)
    sampling = sampling_of(rows, total=num_rows)
    state, decoded = engine.decode(state, active, sampling, 8, num_top=2)
    bits = [decoded.steps.logprobs, decoded.steps.top_logprobs]
    return [np.asarray(leaf[place]).view(np.uint32).tolist() for leaf in bits]


def test_exact_bits_are_a_rows_own(exact_engine):
    """Whatever its neighbours, its place, the slots, and the parts in which its prompt came."""
    alone = exact_bits(exact_engine, 2, [], place=0, slots=64)
    others = [0, 1, 3, 4, 5, 6, 1]
    assert exact_bits(exact_engine, 2, others, place=0, slots=64) == alone
    assert exact_bits(exact_engine, 2, others, place=6, slots=64) == alone
    assert exact_bits(exact_engine, 2, others[:2], place=1, slots=192) == alone
    assert exact_bits(exact_engine, 2, others[:1], place=1, slots=64, part_tokens=7) == alone


def test_exact_bits_on_two_devices(trained):
    """Each has eight rows of a state; a row's bits do not depend on which of them has it."""
    devices = jax.devices()[:2]
    divided = make_engine(load_model(trained, devices, ParallelismConfig(data=2)), exact=True)
    assert divided.most_rows == 16
    alone = exact_bits(divided, 2, [], place=0, slots=64)
    assert exact_bits(divided, 2, [0, 1, 3], place=2, slots=64) == alone
    assert exact_bits(divided, 2, [0, 1, 3, 4, 5, 6, 1, 0, 3, 4], place=9, slots=64) == alone


def test_the_command_decodes_exactly(script, trained):
    """A sample is the same beside eight others."""

    def samples(count):
        flags = ("--prompt", "The", "--max-tokens", 6, "--seed", 3, "--json", "--exact")
        result = script("generate", "--model", trained, "--num-samples", count, *flags)
        assert result.code == 0, result.err
        return json.loads(result.out)["completions"]

    assert samples(9)[:1] == samples(1)


def test_an_exact_text_is_the_same_in_any_number(loaded):
    """Eleven rows are two states, of eight rows each; what is there already is copied."""
    generator = Generator(loaded, exact=True)
    prompts = ["The value"] * 9 + ["A", "The"]
    how = GenerationConfig(temperature=1.2)
    shown = {}

    def show(row, text):
        shown[row] = shown.get(row, "") + text

    completions = generator(prompts, how, max_tokens=8, seed=2, on_text=show)
    assert [completion.text for completion in completions] == list(shown.values())
    assert list(shown) == list(range(11))
    assert len({completion.text for completion in completions[:9]}) > 5
    assert generator(prompts[:3], how, max_tokens=8, seed=2) == completions[:3]
    assert Generator(loaded)(prompts, how, max_tokens=8, seed=2) == completions


def test_exact_is_refused_where_it_is_not_kept(loaded):
    gpu = types.SimpleNamespace(platform="gpu")
    devices = types.SimpleNamespace(flat=[gpu])
    mesh = types.SimpleNamespace(shape=loaded.mesh.shape, devices=devices)
    with pytest.raises(UserError, match="`exact` is kept on CPU alone, and the model is on gpu"):
        Engine(loaded.graphdef, loaded.params, mesh, end_ids=(), exact=True)
