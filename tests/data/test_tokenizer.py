"""The converted tokenizer against SentencePiece itself, on random and on adverse text."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_riskpo.data.tokenizer import (
    carry_tokenizer,
    load_tokenizer,
    sentencepiece_to_hf,
    stop_token_ids,
    train_sentencepiece,
)
from megatron_riskpo.errors import UsageError

ADVERSE = [
    "", " ", "   leading", "trailing   ", "a  b   c", "\n", "a\n\n b\n", "\\boxed{-12}", "\\boxed{ -12 }\n",
    "12 + 34 - 5 =", "</s>", "a<s>b</s> <pad><unk>", "<0x41>", "1" * 50, "aaaaaaaaa", "éßπ數🙂🙂", "tab\there", "▁ ▁▁",
]  # fmt: skip
ALPHABET = "ab tTh<>/s▁ \n\t0195+-={}\\éπ🙂\u00a0\u0301pad"


def arithmetic_texts() -> list[str]:
    rng = random.Random(0)
    sums = [[rng.randint(0, 99) for _ in range(3)] for _ in range(300)]
    return [f"State the final answer to: {a} + {b} - {c} =\\boxed{{{a + b - c}}}" for a, b, c in sums]


def prose_texts() -> list[str]:
    """This repository's own Python: long words, runs of blanks, brackets, a few non-ASCII characters."""
    package = Path(sentencepiece_to_hf.__code__.co_filename).parent.parent
    return [part for path in sorted(package.rglob("*.py")) for part in path.read_text("utf-8").split("\n\n")]


def random_texts(corpus: list[str], num: int) -> list[str]:
    rng = random.Random(1)
    noise = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 40))) for _ in range(num)]
    cuts = [text[rng.randint(0, len(text)) :][: rng.randint(0, 80)] for text in rng.choices(corpus, k=num)]
    return noise + cuts + [a + b for a, b in zip(noise, cuts, strict=True)]


@pytest.fixture(scope="module", params=["arithmetic", "prose"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(model file, its training texts): 64 pieces without byte fallback, 1000 pieces with."""
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    texts, vocab_size = (arithmetic_texts(), 64) if request.param == "arithmetic" else (prose_texts(), 1000)
    assert train_sentencepiece(texts, path, vocab_size) <= vocab_size
    return path, texts


@pytest.fixture
def saved(trained: tuple[Path, list[str]], tmp_path: Path) -> PreTrainedTokenizerBase:
    """The converted tokenizer as AutoTokenizer loads it from a model folder."""
    carry_tokenizer(load_tokenizer(trained[0]), trained[0], tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == trained[0].read_bytes()
    return AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)


def test_ids_equal_sentencepieces_own(trained: tuple[Path, list[str]], saved: PreTrainedTokenizerBase):
    original = sentencepiece.SentencePieceProcessor(model_file=str(trained[0]))
    for text in ADVERSE + random_texts(trained[1], 1500):
        assert saved.encode(text) == original.encode(text), text
    assert len(saved) == original.get_piece_size()


def test_text_survives_the_round_trip(trained: tuple[Path, list[str]], saved: PreTrainedTokenizerBase):
    texts = trained[1] + ADVERSE + random_texts(trained[1], 500)
    known = [text for text in texts if saved.unk_token_id not in saved.encode(text) and "▁" not in text]
    assert len(known) > len(trained[1]) / 2
    for text in known:
        assert saved.decode(saved.encode(text), skip_special_tokens=True) == text


def test_special_ids_and_digits(trained: tuple[Path, list[str]], saved: PreTrainedTokenizerBase):
    assert (saved.pad_token_id, saved.bos_token_id, saved.eos_token_id, saved.unk_token_id) == (0, 1, 2, 3)
    assert saved.decode([*saved.encode("1 + 2"), saved.eos_token_id], skip_special_tokens=True) == "1 + 2"
    digit_pieces = [piece for piece in saved.get_vocab() if any(c.isdigit() for c in piece) and "<0x" not in piece]
    assert all(len(piece) == 1 for piece in digit_pieces)


@pytest.mark.parametrize("vocab_size", [32, 40, 64, 300])
def test_near_character_vocabularies(tmp_path: Path, vocab_size: int):
    texts = [text.split(": ")[1] for text in arithmetic_texts()]
    num_pieces = train_sentencepiece(texts, tmp_path / "t.model", vocab_size)
    assert num_pieces <= vocab_size
    tokenizer = load_tokenizer(tmp_path)
    assert all(tokenizer.unk_token_id not in tokenizer.encode(text) for text in texts)


def test_training_is_reproducible_and_covers_every_character(tmp_path: Path):
    texts = ["a\tb", "\n", "ü only once", *arithmetic_texts()]
    for name in ("1.model", "2.model"):
        train_sentencepiece(texts, tmp_path / name, 80)
    assert (tmp_path / "1.model").read_bytes() == (tmp_path / "2.model").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "1.model")
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


def test_unknown_characters_become_bytes_only_in_a_large_vocabulary(tmp_path: Path):
    train_sentencepiece(prose_texts(), tmp_path / "large.model", 600)
    large = load_tokenizer(tmp_path / "large.model")
    assert large.decode(large.encode("\u4e2d🙂")) == "\u4e2d🙂"
    train_sentencepiece(arithmetic_texts(), tmp_path / "small.model", 64)
    small = load_tokenizer(tmp_path / "small.model")
    assert small.encode("\u4e2d🙂") == [small.unk_token_id]


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": True}, {"byte_fallback": True, "split_digits": True}])
def test_bpe_models_of_others_convert_exactly(tmp_path: Path, options: dict):
    corpus = prose_texts()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "m"), model_type="bpe", vocab_size=800,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        **{"add_dummy_prefix": False, **options},
    )  # fmt: skip
    tokenizer = sentencepiece_to_hf(tmp_path / "m.model")
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    for text in ADVERSE + random_texts(corpus, 500):
        assert tokenizer.encode(text) == original.encode(text), text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "normalises the text"),
        ({"model_type": "char", "normalization_rule_name": "identity"}, "neither unigram nor bpe"),
        ({"model_type": "bpe", "user_defined_symbols": ["<tool>"]}, "normalises|user-defined"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused(tmp_path: Path, options: dict, reason: str):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(arithmetic_texts()), model_prefix=str(tmp_path / "m"), vocab_size=60,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    with pytest.raises(UsageError, match=reason):
        load_tokenizer(tmp_path)


def test_wrong_input_is_a_usage_error(tmp_path: Path):
    with pytest.raises(UsageError, match="no such file or folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"0 SentencePiece \.model files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"no SentencePiece model \(8 bytes\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match=r"vocab_size 10 is too small: .* need \d+"):
        train_sentencepiece(arithmetic_texts(), tmp_path / "t.model", 10)
    with pytest.raises(UsageError, match="0 non-empty"):
        train_sentencepiece([""], tmp_path / "t.model", 64)


def test_stop_tokens_are_those_of_tokenizer_and_model(trained: tuple[Path, list[str]], tmp_path: Path):
    tokenizer = load_tokenizer(trained[0])
    assert stop_token_ids(tmp_path, tokenizer) == (2,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert stop_token_ids(tmp_path, tokenizer) == (2, 5, 7)
