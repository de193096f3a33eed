"""From the actor to the rollout engine: push the weights, and on demand prove that they arrived."""

import math
from typing import cast

import torch
import torch.distributed as dist

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.config import PROBE_LENGTH, BridgeConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.types import RolloutEngine, Rollouts, ScoringEngine

PROBE_SEQUENCES = 8
"""At least; as many as divide over the data-parallel ranks."""


class Bridge:
    """Keeps the rollout engine on the actor's weights."""

    def __init__(self, actor: Actor, engine: RolloutEngine, config: BridgeConfig, seed: int) -> None:
        self.actor = actor
        self.engine = engine
        self.config = config
        # Each rank needs a sequence a micro-batch, and interleaved stages pp micro-batches.
        self.probe = _probe(actor.shape.vocab_size, actor.grid.dp.size() * actor.grid.pp.size(), seed)

    def sync(self, version: int) -> dict[str, float]:
        """Bring the engine to the actor's weights and call them `version`. Collective.

        An engine that samples from the actor's own weights has nothing to receive and nothing to verify.
        With `verify` returns bridge/verify_logprob_abs_mean. Raises RunError when the engine reports another
        version, or when the log-probs differ by more than the tolerance.
        """
        if self.engine.shares_weights:
            self.engine.update_weights((), version)
            return {}
        self.engine.update_weights(self.actor.export_weights(), version)
        if self.engine.weight_version != version:
            raise RunError(
                f"weight sync: sent version {version}, the engine reports {self.engine.weight_version}; "
                "the engine is not usable any more, restart the run from its last checkpoint"
            )
        return self._verify(cast(ScoringEngine, self.engine), version) if self.config.verify else {}

    def _verify(self, engine: ScoringEngine, version: int) -> dict[str, float]:
        expected = self.actor.logprobs(self.probe, temperature=1.0)
        found = torch.cat(engine.token_logprobs([s.tolist() for s in self.probe.sequences()]))
        # Infinity in place of NaN: a MAX over ranks may drop a NaN.
        worst = (found - expected).abs().mean().nan_to_num(nan=math.inf).to(self.actor.grid.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.actor.grid.world)
        difference = float(worst)
        if difference > self.config.tolerance:
            raise RunError(
                f"bridge.verify: after sync {version} log-probs of engine and actor differ by {difference:.2e} nats on "
                f"average, tolerance {self.config.tolerance:.1e}; the engine holds wrong weights (or raise "
                "bridge.tolerance for a lower-precision dtype)"
            )
        return {"bridge/verify_logprob_abs_mean": difference}


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
