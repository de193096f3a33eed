"""A model as servers hold it, asked and never changed: what `riskpo evaluate --server` samples from."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed import ProcessGroup

from megatron_riskpo.config import ServerConfig
from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.rollout.asked import RESPONSES, ask, outcomes
from megatron_riskpo.rollout.attendance import Attendance
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.prompt_checks import check_prompts
from megatron_riskpo.rollout.replicas import gather_responses, join_prompts, slice_of
from megatron_riskpo.rollout.server_client import ModelCard, ServerClient, ServerError
from megatron_riskpo.rollout.server_engine import open_session, to_responses
from megatron_riskpo.rollout.server_pool import NoServersError, ServerPool, responses_to
from megatron_riskpo.rollout.server_watch import watch
from megatron_riskpo.rollout.types import OnFinished, Rollouts, SamplingConfig
from megatron_riskpo.rollout.weight_labels import SERVERS_OWN


class ServedModel:
    """`generate` as RolloutEngine's, on running servers (`riskpo serve MODEL`). Which server answers changes no sample.

    Every rank asks for its share. A server that fails is given up, and its requests go to the others.
    """

    def __init__(
        self, model: Path, urls: Sequence[str], config: ServerConfig, *, max_model_len: int, vocab_size: int,
        world_group: ProcessGroup, timeout_s: float, log: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Every rank asks the servers who they are. `max_model_len`: longest prompt + response, in tokens;
        `timeout_s`: for a rank that is dead or hangs. Raises
        RunError where a server does not answer, UsageError where it holds something else than the weights of `model`,
        or has too few positions."""
        self._group, self._max_model_len, self._vocab_size = world_group, max_model_len, vocab_size
        self._control = Control.of_all(timeout_s, subject="responses", option="run.timeout_s")
        self._attendance = Attendance(self._control)
        with contextlib.ExitStack() as stack:
            self._loop = LoopThread()
            stack.callback(self._loop.close)
            session = self._loop.run(open_session())
            stack.callback(lambda: self._loop.run(session.close()))
            clients = [ServerClient(url, session) for url in urls]
            self.cards = {
                client.url: self._checked_card(client, model, config.health_timeout_s, log) for client in clients
            }
            """What each server says of its model, by address."""
            self._pool = ServerPool(lambda url: ServerClient(url, session, vocab_size=vocab_size), config, log)
            self._loop.run(self._pool.admit(list(self.cards)))
            self._loop.submit(watch(self._pool, config))
            stack.callback(self._loop.cancel_all)
            self._stack = stack.pop_all()

    def _checked_card(
        self, client: ServerClient, model: Path, timeout_s: float, log: Callable[[str], None]
    ) -> ModelCard:
        try:
            label = self._loop.run(client.weight_label(timeout_s))
            card = self._loop.run(client.model_card(timeout_s))
        except (ServerError, RunError) as error:
            raise RunError(f"--server: {error}; start one with riskpo serve {model}") from error
        if label != SERVERS_OWN:
            raise UsageError(f"--server {client.url} holds weights that a run pushed ({label}); start another one")
        if card.max_model_len < self._max_model_len:
            raise UsageError(
                f"--server {client.url} has room for {card.max_model_len} tokens of prompt and response, asked are up "
                f"to {self._max_model_len}; start it with the same --data.max_prompt_tokens and "
                "--rollout.max_response_tokens"
            )
        if not Path(card.path).is_dir():
            log(f"{client.url} says that its model is {card.path}, no folder here: taken for {model}")
        elif not Path(card.path).samefile(model):
            raise UsageError(f"--server {client.url} serves {card.path}, not {model}; name that, or another server")
        return card

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> Rollouts:  # fmt: skip
        """See RolloutEngine. Raises RunError, on every rank, where no server is left."""
        check_prompts(prompts, sampling.max_response_tokens, self._max_model_len, self._vocab_size)
        mine = slice_of(len(prompts), self._group.size(), self._group.rank())
        responses = responses_to(prompts[mine], sampling, seeds[mine], version=-1)
        failure = ""
        asked = ask(self._loop, self._pool, responses, range(len(responses)), sampling)
        for row, error in outcomes(asked, self._attendance):
            if error is not None:
                failure = failure or self._reason(error)
            elif on_finished is not None:
                on_finished(mine.start * sampling.group_size + row, responses[row].tokens)
        self._attendance.until_all_are_done(RESPONSES)
        self._agree_on(failure)
        gathered = gather_responses(to_responses(responses), len(prompts), sampling.group_size, 1, self._group)
        return join_prompts(prompts, sampling.group_size, gathered)

    def _reason(self, error: RunError | NoServersError) -> str:
        if isinstance(error, RunError):
            return str(error)
        return f"no server is left: {'; '.join(self._pool.lost().values())}"

    def _agree_on(self, failure: str) -> None:
        """Raise the first failing rank's failure on every rank; collective."""
        failures = self._control.gather_objects(failure, RESPONSES)
        found = next((own for own in failures if own), "")
        if found:
            raise RunError(f"{found}; the answers of earlier batches are kept, the same command goes on")

    def close(self) -> None:
        """End the requests under way."""
        self._stack.close()
