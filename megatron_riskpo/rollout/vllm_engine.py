"""vLLM in the training processes: one engine a `tp` consecutive ranks, token ids in and out."""

import contextlib
import gc
import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.collector import lasting_imports, without_requested_collections
from megatron_riskpo.config import RolloutConfig
from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.resharding.shard_sink import VllmShardSink
from megatron_riskpo.resharding.vllm_sink import drop_cached_prefixes, weight_files
from megatron_riskpo.rollout.prompt_checks import check_prompts
from megatron_riskpo.rollout.replicas import Responses, gather_responses, in_turns, join_prompts, slice_of
from megatron_riskpo.rollout.types import OnFinished, Rollouts, SamplingConfig
from megatron_riskpo.rollout.vllm_arguments import engine_arguments, request_seeds
from megatron_riskpo.rollout.vllm_environment import (
    import_vllm,
    kept_default_group,
    prepare_environment,
    preserved_process_state,
    preserved_rng,
    without_import_noise,
)

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

_USER_ARGUMENTS = ("dtype", "max_model_len", "max_num_seqs", "kv_cache_memory_bytes", "gpu_memory_utilization")
_WEIGHT_SINK = "megatron_riskpo.resharding.vllm_sink.WeightSink"


class VllmEngine:
    """RolloutEngine on vLLM; the default process group has to be there already (vLLM takes it over).

    A fresh engine has no weights until the first `update_shards`, unless `load_checkpoint` is set.
    """

    shares_weights = False

    def __init__(
        self,
        model_dir: str | Path,
        config: RolloutConfig,
        *,
        dtype: str,
        max_model_len: int,
        world_group: ProcessGroup,
        seed: int,
        load_checkpoint: bool = False,
    ) -> None:
        """`max_model_len`: longest prompt + response, in tokens (one more for `token_logprobs`). Collective."""
        if world_group.size() % config.tp:
            raise UsageError(
                f"rollout.tp = {config.tp} does not divide the {world_group.size()} ranks; choose a divisor"
            )
        self._tp = config.tp
        self.expert_parallel = config.expert_parallel
        """Whether each rank of an engine holds experts of its own."""
        self._group = world_group
        self._max_model_len = max_model_len
        self._weight_version = -1
        self._may_sleep, self._is_asleep, self._is_lost = config.sleep, False, False
        self._unusable = "" if load_checkpoint else "has no weights yet; call update_shards first"
        weight_files(model_dir)
        prepare_environment(world_group.rank())
        arguments = engine_arguments(config, dtype, max_model_len, seed, load_checkpoint)
        self._llm = _build(str(model_dir), arguments | _in_process_arguments(world_group, config.sleep))
        self._vocab_size = self._llm.model_config.get_vocab_size()

    @property
    def weight_version(self) -> int:
        """Version of the last complete update; -1 before the first."""
        return self._weight_version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> Rollouts:  # fmt: skip
        """See RolloutEngine. Prompts are dealt to the engines in contiguous slices. The same weights, prompts and
        seeds give the same bits on the same layout; another number of engines changes the batches that vLLM forms,
        so log-probs may differ in the last bits."""
        self._check_usable()
        check_prompts(prompts, sampling.max_response_tokens, self._max_model_len, self._vocab_size)
        num_replicas, replica = self._group.size() // self._tp, self._group.rank() // self._tp
        mine = slice_of(len(prompts), num_replicas, replica)
        tell = in_turns(on_finished, mine.start * sampling.group_size, self._group.rank() % self._tp, self._tp)
        outputs = self._run(prompts[mine], sampling, seeds[mine], tell)
        local = _to_responses(outputs, self._weight_version)
        return join_prompts(
            prompts,
            sampling.group_size,
            gather_responses(local, len(prompts), sampling.group_size, self._tp, self._group),
        )

    def _run(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int], tell: OnFinished
    ) -> "list[RequestOutput]":
        from vllm import SamplingParams

        requests = [{"prompt_token_ids": list(p)} for p in prompts for _ in range(sampling.group_size)]
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                seed=request_seed,
                max_tokens=sampling.max_response_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,  # only stop_token_ids stop
                logprobs=0,  # the sampled token's
                flat_logprobs=True,
                detokenize=False,
            )
            for seed in seeds
            for request_seed in request_seeds(seed, sampling.group_size)
        ]
        return self._complete(requests, params, tell)

    def _complete(
        self, requests: list[dict[str, list[int]]], params: list[Any], tell: OnFinished
    ) -> "list[RequestOutput]":
        """The requests' outputs, in order."""
        if not requests:
            return []
        # Prefixes cached by an earlier call would change how this one is batched, and with it the last bits.
        self._llm.reset_prefix_cache()
        with preserved_rng(), _without_compiler():
            names = self._llm.enqueue(requests, params, use_tqdm=False)
            # Outputs have the number that a name begins with; random characters follow it.
            index_of = {name.partition("-")[0]: index for index, name in enumerate(names)}
            outputs: dict[int, RequestOutput] = {}
            for output in self._finished():
                index = index_of[output.request_id]
                outputs[index] = output
                tell(index, output.outputs[0].token_ids)
        return [outputs[index] for index in range(len(requests))]

    def _finished(self) -> "Iterator[RequestOutput]":
        """As LLM.generate, which hands its outputs over at the end only: each as soon as it is there."""
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            yield from cast("list[RequestOutput]", engine.step())

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Teacher-forced log-probs at temperature 1 by this rank's engine: for each sequence float32
        [len(sequence) - 1], entry i that of token i + 1 given the tokens before it. Every rank of an engine
        passes the same sequences. (vLLM applies no temperature to the tokens of a prompt.)"""
        from vllm import SamplingParams

        self._check_usable()
        check_prompts(sequences, 1, self._max_model_len, self._vocab_size)
        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True
        )
        requests = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs = self._complete(requests, [params] * len(requests), lambda index, tokens: None)
        return [torch.tensor(_flat(output.prompt_logprobs), dtype=torch.float32) for output in outputs]

    @property
    def tp(self) -> int:
        """Ranks of an engine."""
        return self._tp

    def shard_sink(self, expected: dict[str, int]) -> VllmShardSink:
        """Takes slices of this rank's shard, inside `update_shards`; `expected` as VllmShardSink's."""
        return self._llm.collective_rpc("riskpo_shard_sink", args=(expected,))[0]

    def update_shards(
        self, sink: VllmShardSink, move: Callable[[], None], version: int, agree: Callable[[int], None]
    ) -> None:
        """New weights, which `move` copies into the sink; `version` is what `weight_version` says afterwards, cached
        prefixes are dropped. `agree` takes the version that this rank's vLLM holds then, and raises RunError unless
        all ranks hold the same, and the right weights. A push that fails in any way leaves the engine unusable:
        RunError, now and at every later call. Collective."""
        with self._updating(version, agree):
            sink.begin()
            move()
            sink.finish(version)
            drop_cached_prefixes(self._llm)

    @contextlib.contextmanager
    def _updating(self, version: int, agree: Callable[[int], None]) -> Iterator[None]:
        """Around a push: the engine is unusable until all of it has gone well on all ranks."""
        if self._is_lost:
            self._check_usable()
        self._is_lost = True
        self._unusable = f"is half-updated (push of version {version} did not end); restart from the last checkpoint"
        try:
            self._wake("weights")
            yield
        except RunError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise RunError(f"push of version {version} into vLLM failed: {type(error).__name__}: {reason}") from error
        self._wake("kv_cache")
        self._is_asleep = False
        self._check_version(version, agree)
        self._weight_version = version
        self._is_lost, self._unusable = False, ""

    def _check_version(self, version: int, agree: Callable[[int], None]) -> None:
        """RunError on every rank when any worker holds another version."""
        (own,) = self._llm.collective_rpc("riskpo_get_version")
        agree(own)
        if own != version:
            raise RunError(f"weights of version {version} were pushed, but the ranks' vLLM workers hold {own}")

    def refuse_weights(self, version: int) -> None:
        """Those of the last push have turned out to be wrong: RunError at every later call."""
        self._is_lost = True
        self._unusable = f"holds wrong weights (push of version {version}); restart from the last checkpoint"

    def release(self) -> None:
        """With rollout.sleep, give the memory of weights and KV cache back, until the next `update_shards`."""
        if self._may_sleep and not self._is_asleep and not self._is_lost:
            # Level 2: the weights are not kept, new ones come before they are needed.
            self._llm.sleep(level=2)
            self._is_asleep = True
            self._unusable = "sleeps until it gets weights; call update_shards first"

    def _wake(self, what: str) -> None:
        """Part by part: weights and cache together may not fit beside what the export holds."""
        if self._is_asleep:
            self._llm.wake_up(tags=[what])

    def close(self) -> None:
        """Free the engine's memory; the default process group and the trainer's groups stay usable."""
        if self._llm is None:
            return
        _shut_down(self._llm)
        self._llm = None
        self._is_lost, self._unusable = True, "is closed"
        gc.collect()

    def _check_usable(self) -> None:
        if self._unusable:
            raise RunError(f"the vLLM engine {self._unusable}")


def _in_process_arguments(group: ProcessGroup, sleep: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "distributed_executor_backend": "external_launcher",
        "worker_extension_cls": _WEIGHT_SINK,
        "use_tqdm_on_load": False,
        "enable_sleep_mode": sleep,
    }
    if torch.cuda.is_available():
        return arguments
    name = [f"riskpo-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, group=group, group_src=0)
    return arguments | {
        "worker_cls": "megatron_riskpo.rollout.vllm_cpu_worker.IsolatedCpuWorker",
        "additional_config": {"shared_memory_name": name[0]},
    }


def _build(model_dir: str, arguments: dict[str, Any]) -> "LLM":
    with preserved_process_state(), without_import_noise():
        gc.collect()  # or what is garbage now would be set aside, too
        # vLLM asks for five full collections while it starts: more than half of the time where the model is small.
        with lasting_imports():
            make_llm = import_vllm().LLM
        try:
            llm = make_llm(model_dir, **arguments)
        except ValueError as error:  # vLLM's own checks of its arguments, the memory and config.json
            shown = {name: value for name, value in arguments.items() if name in _USER_ARGUMENTS}
            reason = " ".join(str(error).split())
            raise UsageError(f"vLLM does not start on {model_dir} with {shown}, change these: {reason}") from error
    if not torch.cuda.is_available():
        _check_cpu_head_size(llm)
    return llm


def _shut_down(llm: "LLM") -> None:
    # close() collects. On CUDA vLLM's own collections have their place before memory is given back.
    collecting = contextlib.nullcontext() if torch.cuda.is_available() else without_requested_collections()
    with kept_default_group(), collecting:
        llm.llm_engine.engine_core.shutdown()


def _check_cpu_head_size(llm: "LLM") -> None:
    """vLLM itself fails at the first forward pass only."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    head_size, supported = llm.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in supported:
        _shut_down(llm)
        raise UsageError(
            f"the model's head dimension is {head_size}, vLLM on the CPU has {supported}; "
            'change the model or set rollout.engine = "megatron"'
        )


def _without_compiler() -> contextlib.AbstractContextManager[Any]:
    """On the CPU vLLM compiles one line of its sampler (the rank of a token, not used here) at the first call:
    3 to 36 s and a C++ compiler, for nothing."""
    return contextlib.nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager")


def _flat(logprobs: Any) -> list[float]:
    """The numbers of vLLM's FlatLogprobs, which its type hints do not tell from lists of dicts."""
    return logprobs.logprobs


def _to_responses(outputs: "list[RequestOutput]", version: int) -> Responses:
    completions = [output.outputs[0] for output in outputs]
    tokens = list(itertools.chain.from_iterable(c.token_ids for c in completions))
    logprobs = list(itertools.chain.from_iterable(_flat(c.logprobs) for c in completions))
    return Responses(
        lengths=torch.tensor([len(c.token_ids) for c in completions], dtype=torch.int32),
        finished=torch.tensor([c.finish_reason == "stop" for c in completions], dtype=torch.int32),
        tokens=torch.tensor(tokens, dtype=torch.int32),
        logprobs=torch.tensor(logprobs, dtype=torch.float32),
        versions=torch.full((len(tokens),), version, dtype=torch.int32),
    )
