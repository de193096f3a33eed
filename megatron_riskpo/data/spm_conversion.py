"""A SentencePiece .model as a Hugging Face fast tokenizer that gives the same ids."""

# protobuf makes the classes of sentencepiece_model_pb2 at import time, so no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_riskpo.errors import UsageError

SPACE_MARK = "▁"  # SentencePiece's sign for a space inside pieces
# Where conversions are known to go wrong: spaces at every place, newlines, letters that a vocabulary lacks, repeated
# characters, pieces' own names spelled out in the text.
PROBES = (
    "",
    " ",
    "a",
    " a",
    "  a  b   ",
    "State the final answer: 12 + (-34) * 5 / 6 = \\boxed{-12}",
    "line one\nline two\n\n\tindented\r\n",
    "aaaaaaa ===== ------ 1111111 0007 (((((",
    "Größe ≤ π², 数学 🙂🙂 ▁x▁",
    "</s> <s><unk> <pad> <0x41> <|im_end|>",
    "naïve ﬁ \uff11\uff12 e\u0301 \u00a0 \u200b \u3000",
)


def sentencepiece_to_hf(model_file: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model; ids equal SentencePiece's own, text that spells a control piece
    ("</s>") included. No special token is added to a text. pad falls back to eos where the model has none.

    Raises UsageError: no such file, no SentencePiece model, or one that cannot be converted exactly.
    """
    path = Path(model_file)
    model = _read_model(path)
    _check_supported(model, path)
    backend = Tokenizer(_vocabulary(model))
    backend.normalizer = _normalizer(model.normalizer_spec)
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
        # The vocabulary holds the control pieces' names as well; cut at < and >, a text cannot match them.
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("[<>]"), "isolated")
    backend.decoder = _decoder(model.normalizer_spec)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **_special_tokens(model, path),
    )
    _check_same_ids(tokenizer, path)
    return tokenizer


def _read_model(path: Path) -> sentencepiece_model_pb2.ModelProto:
    if not path.is_file():
        raise UsageError(f"no SentencePiece model at {path}; give a .model file")
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} is no SentencePiece model ({path.stat().st_size} bytes): {reason}") from error
    return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())


def _check_supported(model: sentencepiece_model_pb2.ModelProto, path: Path) -> None:
    """Refuse what the tokenizers library does in another way than SentencePiece."""
    spec, unigram = model.normalizer_spec, model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    if not unigram and model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise _not_convertible(path, "its type is neither unigram nor bpe")
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        raise _not_convertible(path, f"it normalises the text ({spec.name}, whitespace removal or no space marks)")
    for piece in model.pieces:
        if piece.type in (piece.USER_DEFINED, piece.UNUSED):
            raise _not_convertible(path, f"it has the user-defined or unused piece {piece.piece!r}")
        if unigram and piece.type == piece.NORMAL and len(piece.piece) > 1 and set(piece.piece) & set("<>"):
            raise _not_convertible(path, f"its piece {piece.piece!r} mixes < or > with other characters")


def _vocabulary(model: sentencepiece_model_pb2.ModelProto) -> models.Model:
    pieces = model.pieces
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scores, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)
    return models.BPE(
        vocab={piece.piece: index for index, piece in enumerate(pieces)},
        merges=_merges(model),
        unk_token=pieces[model.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _merges(model: sentencepiece_model_pb2.ModelProto) -> list[tuple[str, str]]:
    """All ways to split a piece in two pieces, best merged piece first."""
    ranks = {piece.piece: -piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    splits = [
        (rank, (piece[:cut], piece[cut:]))
        for piece, rank in ranks.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    return [pair for _, pair in sorted(splits, key=lambda split: split[0])]


def _normalizer(spec: sentencepiece_model_pb2.NormalizerSpec) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    return normalizers.Sequence(steps)


def _decoder(spec: sentencepiece_model_pb2.NormalizerSpec) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)


def _special_tokens(model: sentencepiece_model_pb2.ModelProto, path: Path) -> dict[str, str]:
    spec = model.trainer_spec
    ids = {"pad_token": spec.pad_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    if spec.eos_id < 0:
        raise UsageError(f"{path} has no end-of-sequence piece; train it with an eos_id")
    if spec.pad_id < 0:
        ids["pad_token"] = spec.eos_id
    return {name: model.pieces[index].piece for name, index in ids.items() if index >= 0}


def _check_same_ids(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in PROBES:
        if tokenizer.encode(text, add_special_tokens=False) != original.encode(text):
            raise _not_convertible(path, f"the ids of {text!r} differ")


def _not_convertible(path: Path, reason: str) -> UsageError:
    return UsageError(f"{path} cannot be converted exactly: {reason}; give a Hugging Face tokenizer folder instead")
