"""Models and layouts whose plans and syncs are looked at."""

from dataclasses import dataclass
from typing import Any

from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout
from megatron_riskpo.resharding.pieces import Model
from megatron_riskpo.resharding.schedule import BridgeLayout

BUCKET_BYTES = 512 * 2**20


def _qwen2(hidden: int, width: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip


def _qwen3_moe(
    hidden: int, width: int, layers: int, heads: int, groups: int, experts: int, vocab: int
) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "hidden_size": hidden, "intermediate_size": 3 * width,
        "moe_intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 128,
        "num_experts": experts, "num_experts_per_tok": 8, "vocab_size": vocab, "tie_word_embeddings": False,
    }  # fmt: skip


QWEN_7B = _qwen2(3584, 18944, 28, 28, 4)
QWEN_32B = _qwen2(5120, 27648, 64, 40, 8)
QWEN_72B = _qwen2(8192, 29568, 80, 64, 8)
QWEN_235B = _qwen3_moe(4096, 1536, 94, 64, 4, 128, 151936)
LIKE_671B = _qwen3_moe(7168, 2048, 61, 128, 16, 256, 129280)
"""As many layers, experts and numbers as DeepSeek-V3, with grouped-query attention in place of its latent one."""


@dataclass(frozen=True)
class Case:
    """A model under two layouts, bfloat16."""

    name: str
    hf_config: dict[str, Any]
    actor: ActorLayout
    rollout: RolloutLayout

    @property
    def layout(self) -> BridgeLayout:
        """With 8 ranks a node."""
        return BridgeLayout(Model.of(self.hf_config), self.actor, self.rollout, 2, BUCKET_BYTES)


_HUGE = ActorLayout(2048, 8, 16, ep=64, first_stage_layers=3, last_stage_layers=2)
_HUGE_NAME = "671B-like MoE, 2,048 ranks, tp 8 pp 16 ep 64 -> tp 16"

PLAN_CASES = (
    (Case("Qwen2.5-32B, 512 ranks, tp 8 pp 4 -> tp 4", QWEN_32B, ActorLayout(512, 8, 4), RolloutLayout(4, 128)), 50),
    (Case(f"{_HUGE_NAME}, experts split", LIKE_671B, _HUGE, RolloutLayout(16, 128)), 500),
    (Case(f"{_HUGE_NAME}, experts dealt out", LIKE_671B, _HUGE, RolloutLayout(16, 128, True)), 500),
)
"""With the goal in milliseconds a rank."""

_SYNCED = (
    ("7B", QWEN_7B, ActorLayout(16, 2), 1, False),
    ("32B", QWEN_32B, ActorLayout(64, 8, 2), 4, False),
    ("72B", QWEN_72B, ActorLayout(128, 8, 4), 8, False),
    ("235B-A22B", QWEN_235B, ActorLayout(256, 4, 8, ep=32, first_stage_layers=11, last_stage_layers=11), 8, True),
)
SYNC_CASES = tuple(
    Case(f"{name}, {where}", config, actor, RolloutLayout(tp, ranks // tp, experts, first))
    for name, config, actor, tp, experts in _SYNCED
    for where, first, ranks in (
        ("same GPUs", 0, actor.world_size),
        ("as many others", actor.world_size, actor.world_size),
    )
)
