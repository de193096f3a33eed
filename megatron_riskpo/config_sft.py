"""The configuration of `riskpo sft`."""

from dataclasses import dataclass, field

from megatron_riskpo.config import ActorConfig, ModelConfig, OptimizerConfig, RunConfig, Scalar


@dataclass(frozen=True)
class ModelShapeConfig:
    """A small Qwen2-architecture model made from nothing, with a character-level SentencePiece tokenizer."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 128
    """Width."""
    num_attention_heads: int = 4
    """Query heads; the head dimension is hidden_size / num_attention_heads."""
    num_key_value_heads: int = 2
    """Key-value heads."""
    intermediate_size: int = 384
    """Width inside the MLP."""
    tied_embeddings: bool = True
    """Share the input embedding with the output layer."""
    initializer_range: float = 0.05
    """Standard deviation of the initial weights (0.02, usual for large models, is slow to leave at small widths)."""
    max_position_embeddings: int = 512
    """Longest sequence, in tokens."""


@dataclass(frozen=True)
class SftDataConfig:
    """Solved examples."""

    train: str = "reasoning_gym:chain_sum"
    """reasoning_gym:NAME, or a JSONL file with `problem`, `expected_answer` and optionally `solution`."""
    options: dict[str, Scalar] = field(default_factory=dict)
    """Options of the reasoning-gym task."""
    train_size: int = 20000
    """Number of examples generated (reasoning_gym only)."""
    strip_prefix: str = ""
    """Text taken off the start of every problem that has it. Use the same as the RL run."""
    prompt_template: str = "{problem}"
    """Prompt text; {problem} is replaced by the question. Use the same as the RL run."""
    response_templates: tuple[str, ...] = ("\\boxed{{{answer}}}",)
    """Response texts of examples that bring no solution, one drawn for each; {answer} is replaced ({{ and }} are
    braces). Several forms make a base model that knows the answer better than the form that RL will check."""


@dataclass(frozen=True)
class SftStepConfig:
    """The supervised steps."""

    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 64
    """Examples a step over all ranks."""


@dataclass(frozen=True)
class SftConfig:
    """`riskpo sft`: warm-start a model on solved examples; from model.path, or from nothing with `shape`."""

    run: RunConfig = RunConfig(name="base")
    model: ModelConfig = ModelConfig()
    shape: ModelShapeConfig = ModelShapeConfig()
    data: SftDataConfig = SftDataConfig()
    sft: SftStepConfig = SftStepConfig()
    actor: ActorConfig = ActorConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, warmup_steps=20, schedule="cosine")
