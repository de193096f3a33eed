"""A character-level SentencePiece model in the form that transformers insists on for Qwen2 models.

For a folder whose config.json says qwen2, AutoTokenizer (transformers 5.19) takes only the vocabulary and the merges
of tokenizer.json and rebuilds the rest as Qwen2's byte-level BPE, whatever tokenizer_config.json says: any other
tokenizer then gives other ids, silently. A byte-level BPE without merges is a character-level tokenizer of ASCII text,
so a character-level SentencePiece model survives this exactly.
"""

from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizerBase

from megatron_riskpo.data.spm_training import NUM_SPECIAL_PIECES, REQUIRED_CHARS, train_sentencepiece
from megatron_riskpo.errors import UsageError

SPACE = "▁"  # SentencePiece's letter for a space


def train_character_model(texts: Iterable[str], path: str | Path) -> None:
    """Train a SentencePiece model with one piece a character of `texts`.

    Raises UsageError for characters outside ASCII, which take several bytes.
    """
    texts = list(texts)
    characters = set().union(*texts, REQUIRED_CHARS, " ")
    foreign = sorted(character for character in characters if not character.isascii())
    if foreign:
        raise UsageError(
            f"the task's text has {len(foreign)} characters outside ASCII (first: {foreign[0]!r}), which a model made "
            "from nothing does not support; start from an existing model with model.path"
        )
    train_sentencepiece(texts, path, NUM_SPECIAL_PIECES + len(characters))


def qwen2_tokenizer(model_file: str | Path) -> PreTrainedTokenizerBase:
    """The Qwen2 tokenizer with the same ids as a character-level SentencePiece model, on text of its characters.

    Other characters are <unk> to SentencePiece, and left out here. Raises UsageError for longer pieces.
    """
    from transformers import Qwen2Tokenizer

    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
    long = [
        piece for i, piece in enumerate(pieces) if len(piece) > 1 and not model.IsControl(i) and i != model.unk_id()
    ]
    if long:
        raise UsageError(f"{model_file} is not character-level: it has pieces such as {long[0]!r}")
    return Qwen2Tokenizer(
        vocab={_byte_symbol(piece): i for i, piece in enumerate(pieces)},
        merges=[],
        pad_token=model.IdToPiece(model.pad_id()),
        bos_token=model.IdToPiece(model.bos_id()),
        eos_token=model.IdToPiece(model.eos_id()),
        unk_token=model.IdToPiece(model.unk_id()),
    )


def _byte_symbol(piece: str) -> str:
    """How byte-level BPE writes a piece: the visible stand-in of its byte (GPT-2's table); specials as they are."""
    if len(piece) != 1:
        return piece
    byte = ord(" " if piece == SPACE else piece)
    return chr(byte) if 33 <= byte <= 126 else chr(256 + byte if byte <= 32 else 256 + 33 + byte - 127)
