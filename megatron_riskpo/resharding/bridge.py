"""From the actor to the rollout engine: push the weights, and on demand prove that they arrived."""

import math
import time
from typing import TYPE_CHECKING, cast

import torch

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.config import PROBE_LENGTH, BridgeConfig
from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.push import PushReport
from megatron_riskpo.rollout.joint_work import JointWork
from megatron_riskpo.rollout.types import RolloutEngine, Rollouts, ScoringEngine, WholeWeightsEngine

if TYPE_CHECKING:
    from megatron_riskpo.resharding.in_process import InProcessPush

PROBE_SEQUENCES = 8
"""At least; as many as divide over the data-parallel ranks."""


class Bridge:
    """Keeps the rollout engine on the actor's weights."""

    def __init__(
        self, actor: Actor, engine: RolloutEngine, config: BridgeConfig, seed: int, timeout_s: float = 600.0
    ) -> None:
        """`timeout_s`: run.timeout_s, how long a rank may take for verify = "probe"."""
        self.actor = actor
        self.engine = engine
        self.config = config
        # Each rank needs a sequence a micro-batch, and interleaved stages pp micro-batches.
        self.probe = _probe(actor.shape.vocab_size, actor.grid.dp.size() * actor.grid.pp.size(), seed)
        self._in_process = _in_process(actor, engine, config)
        self._joint = JointWork(Control.of_all(config.timeout_s), timeout_s) if config.verify == "probe" else None

    def sync(self, version: int) -> dict[str, float]:
        """Bring the engine to the actor's weights and call them `version`. Collective.

        An engine that samples from the actor's own weights has nothing to receive and nothing to verify.
        Returns perf/push_s, and of vLLM in the training processes bridge/* and perf/pack_s. Raises RunError when the
        engine reports another version, or holds other weights.
        """
        if self.engine.shares_weights:
            cast(WholeWeightsEngine, self.engine).update_weights((), version)
            return {}
        metrics = self._push(version)
        check_version(self.engine.weight_version, version)
        if self._joint is not None:
            metrics |= self._probed(self._joint, version)
        return metrics

    def _probed(self, joint: JointWork, version: int) -> dict[str, float]:
        try:
            return self._verify(joint, cast(ScoringEngine, self.engine), version)
        except RunError:
            if self._in_process is not None:
                self._in_process.give_up(version)
            raise

    def _push(self, version: int) -> dict[str, float]:
        if self._in_process is None:
            start = time.perf_counter()
            engine = cast(WholeWeightsEngine, self.engine)
            measured = engine.update_weights(self.actor.export_weights(), version)
            return measured | {"perf/push_s": time.perf_counter() - start}
        metrics: dict[str, float] = {}
        if self.config.verify == "golden":
            metrics["bridge/golden_numbers"] = float(self._in_process.run_golden(version))
        else:
            self._in_process.run(version)
        metrics["perf/pack_s"] = self._in_process.sink.pack_seconds
        metrics["bridge/shared_memory"] = float(self._in_process.in_shared_memory)
        return metrics | push_metrics(self._in_process.report)

    def _verify(self, joint: JointWork, engine: ScoringEngine, version: int) -> dict[str, float]:
        expected = self.actor.logprobs(self.probe, temperature=1.0)

        def difference_here() -> float:
            found = torch.cat(engine.token_logprobs([s.tolist() for s in self.probe.sequences()]))
            # Infinity in place of NaN, which would get lost among others.
            return float((found - expected).abs().mean().nan_to_num(nan=math.inf))

        difference = max(joint.of_all(difference_here, f"the probe of version {version}"))
        if difference > self.config.tolerance:
            raise RunError(
                f"bridge.verify: after sync {version} log-probs of engine and actor differ by {difference:.2e} nats on "
                f"average, tolerance {self.config.tolerance:.1e}; the engine holds wrong weights (or raise "
                "bridge.tolerance for a lower-precision dtype)"
            )
        return {"bridge/verify_logprob_abs_mean": difference}


def _in_process(actor: Actor, engine: RolloutEngine, config: BridgeConfig) -> "InProcessPush | None":
    """For vLLM in the training processes. UsageError where verification is asked for that another engine has not."""
    from megatron_riskpo.rollout.vllm_engine import VllmEngine

    if not isinstance(engine, VllmEngine):
        if config.verify == "golden" and not engine.shares_weights:
            raise UsageError(
                'bridge.verify = "golden" needs vLLM in the training processes; set it to "probe" or "none"'
            )
        return None
    from megatron_riskpo.resharding.in_process import InProcessPush

    return InProcessPush(actor, engine, config)


def check_version(found: int, expected: int) -> None:
    """RunError unless weights, or what was sampled from them, are of the version that the step needs."""
    if found != expected:
        raise RunError(
            f"weight sync: the step needs weights of version {expected}, the engine reports {found}; "
            "the engine is not usable any more, restart the run from its last checkpoint"
        )


def push_metrics(report: PushReport | None) -> dict[str, float]:
    """Of a push on this rank: its seconds, vLLM's packing included, what came from other ranks, and the memory of the
    buckets and of vLLM's modules that were not packed yet."""
    if report is None:
        return {}
    return {
        "perf/push_s": report.seconds,
        "bridge/received_mib": report.bytes_received / 2**20,
        "bridge/peak_extra_mib": report.peak_extra_bytes / 2**20,
        "bridge/peak_open_mib": report.peak_open_bytes / 2**20,
    }


def _probe(vocab_size: int, multiple_of: int, seed: int) -> Rollouts:
    """Random token sequences: they reach every embedding row sooner or later, unlike the task's own text."""
    generator = torch.Generator().manual_seed(seed)
    num_sequences = -(-PROBE_SEQUENCES // multiple_of) * multiple_of
    ones = torch.ones(num_sequences, dtype=torch.long)
    return Rollouts(
        tokens=torch.randint(0, vocab_size, (num_sequences * PROBE_LENGTH,), generator=generator),
        prompt_lengths=ones,
        response_lengths=ones * (PROBE_LENGTH - 1),
        rollout_logprobs=torch.zeros(num_sequences * (PROBE_LENGTH - 1)),
        finished=ones.bool(),
    )
