"""The exported tokenizer: AutoTokenizer, beside a qwen2 config.json, gives SentencePiece's own ids."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model
from megatron_riskpo.data.tokenizer import carry_tokenizer, load_tokenizer, train_sentencepiece
from megatron_riskpo.errors import UsageError

TEXTS = ["7 + 1 - (5 * 4) = -12", "\\boxed{-38}\n", "Question: 9 % 6?\t~"]


def test_exported_folder_gives_sentencepiece_ids(tmp_path: Path):
    model_file, folder = tmp_path / "tokenizer.model", tmp_path / "hf"
    train_character_model(TEXTS, model_file)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    carry_tokenizer(qwen2_tokenizer(model_file), tmp_path, folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    characters = sorted(set("".join(TEXTS)) - {"\t"})
    rng = random.Random(0)
    loaded = [AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)]
    for _ in range(500):
        text = "".join(rng.choices(characters, k=rng.randint(0, 30)))
        expected = processor.EncodeAsIds(text)
        for tokenizer in loaded:
            assert tokenizer.encode(text) == expected, text
            assert tokenizer.decode(expected) == text
    for tokenizer in loaded:
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert len(tokenizer) == processor.GetPieceSize()


def test_other_models_and_texts_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="outside ASCII"):
        train_character_model(["naïve"], tmp_path / "a.model")
    train_sentencepiece(["the other brother gathers leather"] * 50, tmp_path / "b.model", 40)
    with pytest.raises(UsageError, match="not character-level"):
        qwen2_tokenizer(tmp_path / "b.model")
