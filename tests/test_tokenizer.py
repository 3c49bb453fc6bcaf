"""Byte-level BPE: every text comes back, and never as a special token."""

import codecs
import json
import random
import re

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from l1_jax.data import byte_level, tokenizer_kinds
from l1_jax.data import tokenizer as module
from l1_jax.data.byte_level import END_OF_TEXT, ByteLevel
from l1_jax.data.store import tokenize_documents
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.data.tokenizer_kinds import open_tokenizer
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
    return ByteLevel.train(CORPUS, 300) if request.param == "bpe" else ByteLevel.bytes_only()


def test_every_text_comes_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = open_tokenizer(tmp_path / "tokenizer.json")
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
    assert set(byte_level._BYTE_OF) == set(
        pre_tokenizers.ByteLevel.alphabet()
    )  # the library's own table
    assert sorted(byte_level._BYTE_OF.values()) == list(range(256))


def test_sizes():
    assert ByteLevel.bytes_only().vocab_size == 257
    assert len(ByteLevel.bytes_only().encode("é!")) == 3
    trained = ByteLevel.train(CORPUS, 300)
    assert 257 < trained.vocab_size <= 300
    assert len(trained.encode("the")) == 1
    assert trained.sha256 == ByteLevel.train(iter(CORPUS), 300).sha256


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
    trained = ByteLevel.train(CORPUS, 300)
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        monkeypatch.setattr(module, "PIECE_CHARS", 100)
        whole = trained.encode(text)
        monkeypatch.setattr(module, "PIECE_CHARS", rng.randrange(1, 5))
        assert "".join(module.cut_text(text)) == text
        assert trained.encode(text) == whole


def test_a_text_without_spaces_is_cut_at_its_own_marks():
    text = "\u6f22\u5b57\u306f\u4e00\u3064\u3002" * 5000
    assert max(map(len, module.cut_text(text))) < 2 * module.PIECE_CHARS


def test_documents_longer_than_a_batch(monkeypatch):
    trained = ByteLevel.train(CORPUS, 300)
    documents = ["the dog " * 30, "", "x", "the fox\n" * 50]
    whole = [trained.encode(text) for text in documents]
    monkeypatch.setattr(module, "_BATCH_PIECES", 3)
    monkeypatch.setattr(module, "PIECE_CHARS", 16)
    assert [ids.tolist() for ids in trained.encode_documents(documents)] == whole


def save_foreign(path, **changes):
    """A tokenizer.json as others make them."""
    ByteLevel.train(CORPUS, 300).save(path)
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def test_a_given_tokenizer(tmp_path):
    path = tmp_path / "given.json"
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    save_foreign(path, truncation=truncation)
    assert HuggingFaceTokenizer.from_file(str(path)).encode("a b c d").ids != open_tokenizer(
        path
    ).encode("a b c d")
    assert len(open_tokenizer(path).encode("a b c d")) >= 4


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
        open_tokenizer(tmp_path / "given.json")


def test_a_tokenizer_that_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json does not exist"):
        open_tokenizer(tmp_path / "absent.json")
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UserError, match="is not a tokenizer"):
        open_tokenizer(tmp_path / "text.txt")


def test_the_models_package_agrees_on_plain_bytes():
    """A BPE model without merges, built by hand, gives the bytes in order."""
    alphabet = {byte: char for char, byte in byte_level._BYTE_OF.items()}
    plain = HuggingFaceTokenizer(models.BPE(vocab={alphabet[b]: b for b in range(256)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in TEXTS:
        ours = ByteLevel.bytes_only()
        assert (
            plain.encode(text).ids
            == list(b"".join(map(ours.token_bytes, ours.encode(text))))
            == list(text.encode())
        )


class ByteFallback(Tokenizer):
    """A second kind: characters, and the bytes of those that are in no vocabulary."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, ends=("</s>", "<turn>"), beginning="<s>")

    @classmethod
    def fits(cls, tokenizer):
        return tokenizer.model.byte_fallback

    def bytes_of(self, spelling):
        if re.fullmatch("<0x[0-9A-F]{2}>", spelling):
            return bytes.fromhex(spelling[3:5])
        return spelling.replace("\u2581", " ").encode()


def test_a_second_kind_of_tokenizer(tmp_path, monkeypatch):
    """A file and a line in the table; what is common to all kinds it has for nothing."""
    spellings = ["<s>", "</s>", "<turn>", "\u2581", "a", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {spelling: number for number, spelling in enumerate(spellings)}
    foreign = HuggingFaceTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    foreign.add_special_tokens(["<s>", "</s>", "<turn>"])
    foreign.normalizer = normalizers.Replace(" ", "\u2581")
    foreign.save(str(tmp_path / "tokenizer.json"))

    with pytest.raises(UserError, match="no part of it makes bytes of text"):
        open_tokenizer(tmp_path / "tokenizer.json")

    monkeypatch.setattr(tokenizer_kinds, "KINDS", [*tokenizer_kinds.KINDS, ByteFallback])
    opened = open_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(opened, ByteFallback)
    assert (opened.beginning_id, opened.end_ids, opened.eot_id) == (0, (1, 2), 1)
    assert opened.special_ids == (0, 1, 2)
    assert opened.encode("a é") == [4, 3, 5 + 0xC3, 5 + 0xA9]

    monkeypatch.setattr(module, "PIECE_CHARS", 5)
    for text in [*TEXTS, "a<s></s> <turn>a a a a"]:
        ids = opened.encode(text)
        assert b"".join(map(opened.token_bytes, ids)).decode() == text
        assert not set(ids) & set(opened.special_ids)

    # A stream is separated by the end of text; the beginning is only where it is asked for.
    assert tokenize_documents(["a", "a"], opened).tolist() == [1, 4, 1, 4, 1]


def test_ends_and_a_beginning_that_a_file_has_not():
    assert ByteLevel.bytes_only().end_ids == (ByteLevel.bytes_only().eot_id,)
    assert ByteLevel.bytes_only().beginning_id is None
    plain = HuggingFaceTokenizer(models.BPE(vocab={END_OF_TEXT: 0}, merges=[]))
    with pytest.raises(LookupError, match="<s>"):
        ByteLevel(plain, beginning="<s>")
