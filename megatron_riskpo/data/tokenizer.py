"""Load the tokenizer of a model folder; train one (spm_training.py), convert one (spm_conversion.py)."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_riskpo.data.spm_conversion import sentencepiece_to_hf
from megatron_riskpo.data.spm_training import train_sentencepiece
from megatron_riskpo.errors import UsageError

__all__ = ["carry_tokenizer", "load_tokenizer", "sentencepiece_to_hf", "stop_token_ids", "train_sentencepiece"]

HF_FILES = ("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(model_dir: str | Path, name: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, of a folder with one SentencePiece .model, or of a .model file.
    Nothing is downloaded. pad falls back to eos. `name`: how the user gave the folder.

    Raises UsageError: no tokenizer there, one that cannot be loaded, or one without an end-of-sequence token.
    """
    path = Path(model_dir)
    if not path.exists():
        raise UsageError(f"no tokenizer at {path}: no such file or folder; check {name}")
    if path.is_file():
        return sentencepiece_to_hf(path)
    if any((path / name).is_file() for name in HF_FILES):
        return _load_hf(path)
    found = _sentencepiece_files(path)
    if len(found) != 1:
        raise UsageError(
            f"no tokenizer in {path}: neither {' nor '.join(HF_FILES)}, and {len(found)} SentencePiece .model files; "
            "put exactly one there"
        )
    return sentencepiece_to_hf(found[0])


def carry_tokenizer(tokenizer: PreTrainedTokenizerBase, source_dir: str | Path, target_dir: str | Path) -> None:
    """Put the tokenizer into a model folder, so that AutoTokenizer loads it from there; the SentencePiece model that it
    was made from goes along."""
    tokenizer.save_pretrained(target_dir)
    for file in _sentencepiece_files(Path(source_dir)):
        if not (Path(target_dir) / file.name).exists():
            shutil.copyfile(file, Path(target_dir) / file.name)


def stop_token_ids(model_dir: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's eos, and those that generation_config.json or config.json name."""
    own: Any = tokenizer.eos_token_id
    stops = {own}
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        stops.update(eos if isinstance(eos, list) else [eos])
    return tuple(sorted(stop for stop in stops if stop is not None))


def _sentencepiece_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.model"))


def _load_hf(path: Path) -> PreTrainedTokenizerBase:
    try:
        # What tokenizer.json says is what the model was trained with. AutoTokenizer would rebuild it by the class that
        # transformers has registered for the model type, for some types whatever the files say.
        loader = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
        tokenizer = loader.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the tokenizer in {path} cannot be loaded ({type(error).__name__}): {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer in {path} has no eos_token; set it in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
