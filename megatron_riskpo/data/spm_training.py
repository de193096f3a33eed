"""Train a small SentencePiece model whose conversion to a Hugging Face tokenizer is exact."""

# protobuf makes the classes of sentencepiece_model_pb2 at import time, so no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import io
import os
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_riskpo.errors import UsageError

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
NUM_SPECIAL_PIECES = 4
NUM_BYTE_PIECES = 256
# Below this the 256 byte pieces would crowd out the text's own pieces.
SMALLEST_BYTE_FALLBACK_VOCAB = 512
# Scores are rounded to multiples of this power of two: then sums of scores are exact both in SentencePiece's float32
# (up to 2**20, a text of about 100,000 pieces) and in tokenizers' float64, and both break ties alike.
SCORE_STEP = 1 / 16
# Characters that always have a piece of their own: the newline, and the delimiters of control pieces' names.
REQUIRED_CHARS = "\n<>"


def train_sentencepiece(texts: Iterable[str], path: str | Path, vocab_size: int) -> int:
    """Train a unigram model on `texts`, write it to `path` (.model) and return its number of pieces.

    The text is taken as it is (no normalisation, no dummy prefix, spaces and newlines kept), every digit is a piece of
    its own, every character of `texts` is covered. Pieces 0..3 are <pad>, <s>, </s>, <unk>. `vocab_size` is an upper
    limit. From 512 pieces on, characters that `texts` lacks become bytes; below that they become <unk>.

    Raises UsageError: no text, or vocab_size too small for the characters of the text.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise UsageError("no text to train a tokenizer on: the task gave 0 non-empty examples")
    characters = set().union(*texts, REQUIRED_CHARS, " ")
    byte_fallback = vocab_size >= SMALLEST_BYTE_FALLBACK_VOCAB
    smallest = NUM_SPECIAL_PIECES + NUM_BYTE_PIECES * byte_fallback + len(characters)
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size {vocab_size} is too small: the text's {len(characters)} characters and the special pieces "
            f"need {smallest}; raise it"
        )
    model = sentencepiece_model_pb2.ModelProto.FromString(_train(texts, characters, vocab_size, byte_fallback))
    _make_exactly_convertible(model)
    _write_atomically(Path(path), model.SerializeToString())
    return len(model.pieces)


def _train(texts: list[str], characters: set[str], vocab_size: int, byte_fallback: bool) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text.replace("\t", " ") for text in texts),  # the trainer skips a text with a tab
        model_writer=written,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars="".join(sorted(characters - {" "})),
        split_digits=True,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 24,  # bytes; the default drops longer texts
        num_threads=1,  # the same model whatever the number of cores
        pad_id=PAD_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        minloglevel=2,
    )
    return written.getvalue()


def _make_exactly_convertible(model: sentencepiece_model_pb2.ModelProto) -> None:
    """Round the scores, and drop longer pieces with < or >, so that text may be cut there without changing its ids."""
    kept = [piece for piece in model.pieces if piece.type != piece.NORMAL or _keeps(piece.piece)]
    for piece in kept:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    pieces = [type(piece).FromString(piece.SerializeToString()) for piece in kept]
    del model.pieces[:]
    model.pieces.extend(pieces)
    model.trainer_spec.vocab_size = len(pieces)


def _keeps(piece: str) -> bool:
    return len(piece) == 1 or not set(piece) & set("<>")


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
