"""The configuration: what a run is, as typed data. Read from TOML and the command line by config_io.py,
checked across fields by config_checks.py."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_riskpo.algorithms.config import AlgorithmConfig, MismatchConfig, PolicyLossConfig
from megatron_riskpo.checkpoint.retention import Retention
from megatron_riskpo.rewards.reference import AnswerForm

Scalar = int | float | bool | str

PROBE_LENGTH = 32
"""Tokens of each sequence on which `bridge.verify` compares the engine with the actor."""


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how it is started."""

    name: str = "run"
    """The run's folder is dir/name."""
    dir: str = "runs"
    """Parent of all run folders."""
    seed: int = 1234
    """Seeds data order, sampling, bundles and initial weights; the same seed gives the same run."""
    ranks: int = 0
    """Processes that a bare `riskpo` starts on this machine; 0: actor.tp * actor.cp * actor.pp. Not used under
    torchrun or srun."""
    timeout_s: float = 600.0
    """A collective that waits longer than this, in seconds, ends the run (a peer is dead or hung); so does a
    checkpoint whose writing in the background takes longer."""
    stall_limit_s: float = 1800.0
    """A rank that stays in one phase of a step (rollout, update, ...) longer than this, in seconds, ends the run on all
    ranks, with everybody's stacks in the run folder and the names of the ranks that lag; 0: no watchdog. Until the
    first step is done, run.timeout_s counts where it is longer."""


@dataclass(frozen=True)
class TrainRunConfig(RunConfig):
    """... how long an RL run is, and whether it goes on from a checkpoint."""

    steps: int = 100
    """Number of RL steps (rollout, reward, update)."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest complete checkpoint of the run folder; never: refuse a folder that has one."""
    accept_changes: tuple[str, ...] = ()
    """Options that may differ from those that the checkpoint was made under, for example optimizer.lr; all: any. What
    a changed option makes meaningless (data position, quantile tracker) starts anew."""


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    path: str = ""
    """Hugging Face model folder: config.json, *.safetensors, tokenizer (or a SentencePiece tokenizer.model)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of parameters and activations; bfloat16 keeps float32 main weights in the optimizer."""


@dataclass(frozen=True)
class PromptConfig:
    """How a question becomes a prompt."""

    strip_prefix: str = ""
    """Text taken off the start of every problem that has it (a task's boilerplate that a small model need not read)."""
    prompt_template: str = "{problem}"
    """Prompt text; {problem} is replaced by the question."""
    prompt_config: str = ""
    """A prompt in nemo-skills' form instead of prompt_template: a YAML file with `user`, and perhaps `system` and
    `few_shot_examples`; the question's fields are filled into `user`."""
    chat_template: bool = False
    """Send the prompt text as a user message through the tokenizer's chat template."""
    max_prompt_tokens: int = 256
    """Questions with a longer prompt, in tokens, are left out (counted and said aloud)."""


@dataclass(frozen=True)
class DataConfig(PromptConfig):
    """The questions."""

    train: str = "reasoning_gym:chain_sum"
    """Training questions: reasoning_gym:NAME, or a JSONL file with `problem` and `expected_answer`."""
    sources: dict[str, float] = field(default_factory=dict)
    """Training questions of several sources, in place of `train`: source = weight. Every step has its share of each."""
    evaluation: str = ""
    """Held-out questions, same forms; empty: drawn from `train`'s source, none of them a training question."""
    evaluation_sets: dict[str, str] = field(default_factory=dict)
    """Further held-out questions by the name that their metrics get, eval/NAME/...: NAME = JSONL file (all its
    questions)."""
    options: dict[str, Scalar] = field(default_factory=dict)
    """Options of the reasoning-gym task, for example max_terms = 3."""
    train_size: int = 4096
    """Number of training questions generated (reasoning_gym only)."""
    evaluation_size: int = 200
    """Number of held-out questions."""
    prompts_per_step: int = 32
    """P: questions a step over all ranks."""


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    engine: Literal["vllm", "megatron"] = "vllm"
    """vllm: real vLLM, where `placement` says; megatron: built-in KV-cache sampler on the actor itself."""
    placement: Literal["colocated", "server"] = "colocated"
    """Of vLLM. colocated: in the training processes, which wait while it samples; server: processes of its own, reached
    over HTTP."""
    servers: int = 1
    """Server processes that the run starts on this machine (placement = "server" without server_urls)."""
    server_urls: tuple[str, ...] = ()
    """Addresses of running servers (`riskpo serve`), http://HOST:PORT; the run then starts none."""
    max_staleness: int = 0
    """RL steps (of actor.mini_batches optimizer steps each) that the weights may be behind which a token was sampled
    with. 0: on-policy, servers idle while the step trains; k: the responses of the next k steps are sampled meanwhile
    (placement = "server")."""
    group_size: int = 8
    """G: responses a question."""
    max_response_tokens: int = 64
    """A response is cut after so many tokens."""
    temperature: float = 1.0
    """Softmax temperature of sampling, > 0; the trainer's log-probs use the same."""
    dynamic_sampling: bool = False
    """DAPO (arXiv 2503.14476): draw further questions until the step has data.prompts_per_step of them whose rewards
    differ; those whose responses are all right or all wrong are left out."""
    max_refills: int = 3
    """Further draws a step, of data.prompts_per_step questions each, at most (dynamic_sampling); what is missing then
    is filled up with questions of equal rewards."""
    tp: int = 1
    """Ranks a vLLM engine (tensor parallel); the world is split into world_size / tp engines."""
    expert_parallel: bool = False
    """Deal a mixture's experts out over the `tp` ranks of an engine, each whole; else every expert is split over them
    (vLLM's enable_expert_parallel)."""
    max_num_seqs: int = 256
    """Sequences decoded at a time by one vLLM engine."""
    kv_cache_gib: float = 0.25
    """KV cache of one vLLM rank on the CPU, in GiB."""
    gpu_memory_utilization: float = 0.4
    """Share of the GPU's memory that vLLM may take (CUDA only)."""
    sleep: bool = False
    """Colocated vLLM gives its memory (weights and KV cache) back while the step trains (CUDA only)."""


@dataclass(frozen=True)
class ServerConfig:
    """How the run deals with rollout servers (rollout.placement = "server")."""

    max_concurrent: int = 256
    """Requests that a rank has under way at a time."""
    health_timeout_s: float = 30.0
    """A server that does not answer a health check for so long, in seconds, is given up."""
    request_timeout_s: float = 600.0
    """A response that takes longer, in seconds, is asked for again."""
    push_timeout_s: float = 120.0
    """A server that takes longer, in seconds, over a part of a weight push (to get ready, to load a bucket, to put the
    weights in use) is given up; so is one whose engine does not answer for so long at any other time."""
    start_timeout_s: float = 300.0
    """A server has to be healthy within so many seconds of its start: one of `riskpo serve` ends else, one that the run
    starts is ended."""
    max_retries: int = 3
    """A server that fails more often than this in a row is given up; a request that fails more often than this and
    the number of servers together ends the run."""
    max_restarts: int = 3
    """Times that the run starts each of its servers again."""
    transport: Literal["auto", "file", "network", "shared_memory"] = "auto"
    """How weights reach the servers. file: whole tensors, which rank 0 writes to a folder that the servers see;
    network: each worker gets its shard from all ranks at once, over a process group of ranks and workers;
    shared_memory: each worker reads its shard where the ranks of its machine have it (on GPUs by CUDA IPC). auto: file
    where transfer_dir is given, else network for rollout.server_urls, else shared_memory on CPUs where it can be, or
    file."""
    transfer_dir: str = ""
    """The folder of transport = "file", which the servers must see under the same name; empty: memory of this machine
    (/dev/shm, where there is one). On another file system each file is on it (fsync) before servers are told of it."""


@dataclass(frozen=True)
class ActorConfig:
    """How the Megatron actor is laid out and how it updates."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size; the data-parallel size is world_size / (tp * cp * pp)."""
    vp: int = 1
    """Virtual pipeline stages a rank: the interleaved schedule, with smaller bubbles and more messages (needs
    pp > 1)."""
    first_stage_layers: int = 0
    """Layers of the first pipeline stage, which has the embedding too; 0: as many as the others."""
    last_stage_layers: int = 0
    """Layers of the last pipeline stage, which has the output layer too; 0: as many as the others."""
    cp: int = 1
    """Context-parallel size: ranks that split each sequence (its length is filled up to a multiple of 2 * cp)."""
    ep: int = 1
    """Expert-parallel size (mixture of experts): ranks that deal the experts out. It takes no ranks of its own, but
    those of tp, cp and data parallelism together."""
    etp: int = 1
    """Expert tensor-parallel size: ranks that split each expert, in place of tp. It takes the same ranks: ep * etp of
    them, next to each other in a pipeline stage, hold all experts of a layer once."""
    sequence_parallel: bool = False
    """Split activations along the sequence outside the tensor-parallel regions (needs tp > 1)."""
    mini_batches: int = 1
    """Optimizer steps an RL step; the responses are split evenly, whole groups together."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """The log-probs under the loss's ratio. recompute: the trainer's own (a forward pass where mini_batches > 1, or
    loss or mismatch need them before the update); rollout: those that the rollout engine sampled with, which cost no
    pass but bring its mismatch into the ratio."""
    micro_batch_tokens: int = 8192
    """Packed tokens that a micro-batch puts on a rank at most (one longer sequence still goes alone); with context
    parallelism the micro-batch holds cp times as many."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none; the core attention's; or all but the input of each
    layer."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    offload_optimizer: bool = False
    """Keep the optimizer's state (main weights and moments) in host memory but during its step."""
    offload_gradients: bool = False
    """Give the gradients' memory back but during an optimizer step: rollouts need none."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-6
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine down to 0 at the last optimizer step."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    max_skipped_steps: int = 3
    """Optimizer steps in a row that may be skipped, on all ranks alike, because their gradients are not finite; one
    more ends the run. 0: the first does."""


@dataclass(frozen=True)
class BridgeConfig:
    """How actor weights reach the rollout engine."""

    bucket_mib: float = 512.0
    """Weights travel in buckets of at most this size a rank, sent and received together, in MiB; two are under way at a
    time, and a larger tensor is cut. Beside them a push takes the memory of one module of vLLM's, the largest. Not so
    with server.transport = "file": every rank gathers tensors whole, a file has as many as fit, and a larger tensor
    goes alone."""
    timeout_s: float = 120.0
    """Longest wait of a rank for a bucket or for the other ranks in a sync, in seconds. What takes longer ends the run;
    over the network to servers, where it is a server that does not come, it costs that server."""
    verify: Literal["none", "probe", "checksum", "golden"] = "none"
    """After each sync: nothing; compare the engine's log-probs with the actor's on a probe batch; compare a checksum of
    every slice with the sender's; or compare every number with tensors gathered whole (slow, and takes memory for a
    second copy of a rank's shard). The last two need rollout.engine = "vllm"; on servers checksum needs
    server.transport = "network" or "shared_memory", and golden is refused."""
    tolerance: float = 1e-4
    """Largest mean absolute log-prob difference that the probe accepts, in nats (bfloat16: use about 5e-2)."""


@dataclass(frozen=True)
class RewardConfig:
    """How responses are graded."""

    grader: str = "math"
    """Grades questions for which neither their own field `grader` nor `graders` says otherwise: math, choice, exact,
    regex, json, numeric, reasoning_gym, code, module:function, FILE.py:function, or http://HOST:PORT/PATH."""
    graders: dict[str, str] = field(default_factory=dict)
    """Graders by data source (the field `source`, else the name of the file or task), for example primes = "code"."""
    answer_form: AnswerForm = "any"
    """Where the answer stands. any: the last \\boxed{}, else the final answer as the text states it; boxed, hash, tag:
    only in a \\boxed{}, behind ####, in <answer></answer>. Programs have a form of their own."""
    tolerance: float = 0.01
    """Relative difference that the grader numeric accepts; a question's field `tolerance` wins."""
    partial_credit: bool = False
    """A program earns the share of its tests that it passes; else 1 or 0."""
    sandbox: Literal["bubblewrap", "sandbox_fusion", "nemo_skills"] = "bubblewrap"
    """Where programs run: in bubblewrap on this machine, or on a server."""
    sandbox_url: str = ""
    """Address of the SandboxFusion or nemo-skills server."""
    test_cpu_s: float = 4.0
    """CPU time of one test of a program, in seconds; beyond it the test fails."""
    test_memory_mib: int = 512
    """Address space of one test of a program, in MiB."""
    program_timeout_s: float = 30.0
    """Wall-clock time of all tests of one program, in seconds; tests not done by then fail."""
    format_bonus: float = 0.0
    """Added to the shaped reward of a response that has the answer form, right or wrong (not with any)."""
    overlong_buffer_tokens: int = 0
    """Lc (arXiv 2503.14476): the reward falls linearly over the last Lc tokens before rollout.max_response_tokens;
    0: off."""
    overlong_penalty: float = 1.0
    """What a response of rollout.max_response_tokens loses, in units of reward."""
    timeout_s: float = 5.0
    """Wall-clock limit of grading one response, in seconds; beyond it the grade is an error, not a wrong answer."""
    cpu_s: float = 10.0
    """CPU limit of grading one response, over all threads of the worker, in seconds (rounded up)."""
    memory_gib: float = 4.0
    """Address space of a worker, in GiB."""
    workers: int = 1
    """Grader processes a rank."""
    max_error_share: float = 0.25
    """A batch of which a larger share could not be graded ends the run."""
    gold_checks: int = 64
    """Questions whose expected answer, in the form that the prompt asks for, must grade 1 before the run starts; 0:
    none."""


@dataclass(frozen=True)
class EvaluationConfig:
    """pass@k on the held-out questions: before the first step, every so often, and at the end."""

    every: int = 0
    """Evaluate every n steps as well; 0: only before and after."""
    num_samples: int = 8
    """n: responses a question."""
    ks: tuple[int, ...] = (1, 8)
    """The k of pass@k, each <= num_samples."""
    temperature: float = 1.0
    """Softmax temperature of the evaluation's samples."""


@dataclass(frozen=True)
class CheckpointConfig(Retention):
    """Training checkpoints."""

    every: int = 50
    """Save every n steps (and at the end, and when a signal ends the run)."""
    asynchronous: bool = True
    """Write in the background while the next steps go on, from a copy of weights and optimizer state in host memory;
    false: training waits for the write."""


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes down."""

    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    samples: int = 4
    """Questions whose responses are saved in rollouts/step_N.jsonl each time."""
    samples_every: int = 10
    """Save samples every n steps; 0: never."""


@dataclass(frozen=True)
class TrainConfig:
    """`riskpo train`."""

    run: TrainRunConfig = TrainRunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    server: ServerConfig = ServerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    loss: PolicyLossConfig = PolicyLossConfig()
    mismatch: MismatchConfig = MismatchConfig()
    actor: ActorConfig = ActorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    bridge: BridgeConfig = BridgeConfig()
    rewards: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
