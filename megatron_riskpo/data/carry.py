"""What travels with a model's weights: its tokenizer, and the tokens that end a response."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("merges.txt", "added_tokens.json", "chat_template.jinja"),
)
GENERATION_CONFIG = "generation_config.json"


def carry_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str | Path, target: Path) -> None:
    """Put into `target` a tokenizer that transformers' AutoTokenizer loads, and the generation settings.

    A Hugging Face folder's files are copied as they are; a SentencePiece model is written in Hugging Face form.
    """
    source = Path(source)
    if (source / "tokenizer_config.json").is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy2(source / name, target / name)
    else:
        tokenizer.save_pretrained(target)
    if (source / GENERATION_CONFIG).is_file():
        shutil.copy2(source / GENERATION_CONFIG, target / GENERATION_CONFIG)


def stop_token_ids(model_dir: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's end-of-sequence token, and those of generation_config.json (chat models end turns by another)."""
    ids = {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]
    path = Path(model_dir) / GENERATION_CONFIG
    if path.is_file():
        more = json.loads(path.read_text()).get("eos_token_id") or []
        ids.update(more if isinstance(more, list) else [more])
    return tuple(sorted(ids))
