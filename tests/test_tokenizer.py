"""Byte-level BPE: every text comes back, and never as a special token."""

import codecs
import json
import random

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, pre_tokenizers

from l1_jax.data import tokenizer as module
from l1_jax.data.tokenizer import END_OF_TEXT, Tokenizer
from l1_jax.errors import UserError

CORPUS = [
    "the quick brown fox",
    "the lazy dog  jumps\n\nover the moon",
    "naïve 漢字 👩\u200d👩",
] * 4
TEXTS = [
    "",
    " ",
    "\n\n the the\t",
    "é e\u0301 ﬁ \u2028\x00\x1c\x7f\ufeff\U0010ffff",
    "العربية हिन्दी 漢字 👩\u200d👩\u200d👧",
    END_OF_TEXT,
    f"a{END_OF_TEXT}b {END_OF_TEXT}",
    "".join(map(chr, range(0x20, 0x500))),
]


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request):
    return Tokenizer.train(CORPUS, 300) if request.param == "bpe" else Tokenizer.bytes_only()


def test_every_text_comes_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot_id not in ids
        assert loaded.encode(text) == ids
    assert [ids.tolist() for ids in tokenizer.encode_documents(TEXTS)] == [
        tokenizer.encode(text) for text in TEXTS
    ]
    assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("a"), tokenizer.eot_id]) == "a"


def test_the_bytes_of_tokens_stream_exactly(tokenizer):
    for text in TEXTS:
        decoder = codecs.getincrementaldecoder("utf-8")()
        ids = tokenizer.encode(text)
        assert "".join(decoder.decode(tokenizer.token_bytes(i)) for i in ids) == text
        assert all(len(tokenizer.token_bytes(i)) >= 1 for i in ids)
    assert tokenizer.token_bytes(tokenizer.eot_id) == b""
    assert set(module._BYTE_OF) == set(
        pre_tokenizers.ByteLevel.alphabet()
    )  # the library's own table
    assert sorted(module._BYTE_OF.values()) == list(range(256))


def test_sizes():
    assert Tokenizer.bytes_only().vocab_size == 257
    assert len(Tokenizer.bytes_only().encode("é!")) == 3
    trained = Tokenizer.train(CORPUS, 300)
    assert 257 < trained.vocab_size <= 300
    assert len(trained.encode("the")) == 1
    assert trained.sha256 == Tokenizer.train(iter(CORPUS), 300).sha256


def test_cutting_a_long_text_does_not_change_its_tokens(monkeypatch):
    rng = random.Random(0)
    alphabet = [
        "the",
        "_",
        "'s",
        " ",
        " ",
        "\n",
        "\t",
        "\u3000",
        "\x1c",
        "12",
        "!?",
        "é",
        "漢",
        "\uff0c",
        "\u3002",
    ]
    trained = Tokenizer.train(CORPUS, 300)
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        monkeypatch.setattr(module, "_PIECE_CHARS", 100)
        whole = trained.encode(text)
        monkeypatch.setattr(module, "_PIECE_CHARS", rng.randrange(1, 5))
        assert "".join(module._pieces(text)) == text
        assert trained.encode(text) == whole


def test_a_text_without_spaces_is_cut_at_its_own_marks():
    text = "\u6f22\u5b57\u306f\u4e00\u3064\u3002" * 5000
    assert max(map(len, module._pieces(text))) < 2 * module._PIECE_CHARS


def test_documents_longer_than_a_batch(monkeypatch):
    trained = Tokenizer.train(CORPUS, 300)
    documents = ["the dog " * 30, "", "x", "the fox\n" * 50]
    whole = [trained.encode(text) for text in documents]
    monkeypatch.setattr(module, "_BATCH_PIECES", 3)
    monkeypatch.setattr(module, "_PIECE_CHARS", 16)
    assert [ids.tolist() for ids in trained.encode_documents(documents)] == whole


def save_foreign(path, **changes):
    """A tokenizer.json as others make them."""
    Tokenizer.train(CORPUS, 300).save(path)
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def test_a_given_tokenizer(tmp_path):
    path = tmp_path / "given.json"
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    save_foreign(path, truncation=truncation)
    assert HuggingFaceTokenizer.from_file(str(path)).encode("a b c d").ids != Tokenizer.load(
        path
    ).encode("a b c d")
    assert len(Tokenizer.load(path).encode("a b c d")) >= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "does not give every text back"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not give every text back"),
        (
            {
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
            },
            "with the token <|endoftext|>",
        ),
        (
            {"model": {"type": "WordLevel", "vocab": {END_OF_TEXT: 0, "日": 1}, "unk_token": "日"}},
            "is not a tokenizer.json for bytes",
        ),
        ({"model": 1}, "is not a tokenizer.json"),
    ],
)
def test_a_given_tokenizer_that_does_not_do(tmp_path, changes, message):
    save_foreign(tmp_path / "given.json", **changes)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path / "given.json")


def test_a_tokenizer_that_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json does not exist"):
        Tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path / "text.txt")


def test_the_models_package_agrees_on_plain_bytes():
    """A BPE model without merges, built by hand, gives the bytes in order."""
    alphabet = {byte: char for char, byte in module._BYTE_OF.items()}
    plain = HuggingFaceTokenizer(models.BPE(vocab={alphabet[b]: b for b in range(256)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in TEXTS:
        ours = Tokenizer.bytes_only()
        assert (
            plain.encode(text).ids
            == list(b"".join(map(ours.token_bytes, ours.encode(text))))
            == list(text.encode())
        )
