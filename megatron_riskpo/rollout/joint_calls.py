"""The leading rank's side of a push in which servers and ranks have to do with each other: calls that run while the
ranks do their part, what the servers answer, and whose fault a failure is."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports.meeting import LOST_PEER
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.server_client import ServerError
from megatron_riskpo.rollout.server_pool import Server
from megatron_riskpo.rollout.server_push import ServerUpdate


class PushLead:
    """Of one push. A server is begun (it has stopped, and has no version), then complete, or it has failed."""

    def __init__(self, loop: LoopThread, update: ServerUpdate) -> None:
        self.update = update
        self._loop = loop
        self._begun: set[str] = set()
        self._complete: set[str] = set()
        self._calls: dict[str, asyncio.Task[str]] = {}
        self._has_tried_again = False

    def waiting(self) -> list[Server]:
        """Those that still need the weights."""
        return [server for server in self.update.alive if server.client.url not in self._complete]

    def begin(self) -> bool:
        """Stop those that have not been stopped; whether all could be."""
        servers = [server for server in self.waiting() if server.client.url not in self._begun]
        num_failed = len(self.update.failed)
        self._loop.run(self.update.begin(servers))
        self._begun |= {server.client.url for server in servers}
        return len(self.update.failed) == num_failed

    def ask(self, path: str, bodies: Sequence[dict[str, Any]], on_failure: Callable[[str], None]) -> None:
        """A call on each server that is waiting; does not wait for answers. `on_failure` is told of errors as they
        come: nobody need wait for that server."""

        async def ask_all() -> None:
            self._calls = {
                server.client.url: asyncio.ensure_future(_answer(server, path, body, on_failure))
                for server, body in zip(self.waiting(), bodies, strict=True)
            }

        self._loop.run(ask_all())

    def settle(self, timeout_s: float, lost: str) -> dict[str, str]:
        """By address what each server says was wrong, or nothing; called once the ranks are done, from when on the
        servers have so long. `lost`: the address of the one that a rank lost first, if any. Who is at fault has failed
        then; where it is only links, nobody has the first time."""
        answers = self._loop.run(_collect(self._calls, timeout_s))
        is_links = all(LOST_PEER in answer for answer in answers.values() if answer)
        if not (is_links and any(answers.values()) and self.try_again()):
            for url, reason in at_fault(answers, lost).items():
                self.update.fail(url, reason)
        return answers

    def try_again(self) -> bool:
        """Whether what broke off, and is no server's fault, is to be tried with the same servers: once a push."""
        is_first, self._has_tried_again = not self._has_tried_again, True
        return is_first

    def note_updates(self, answers: Mapping[str, str]) -> None:
        """What `settle` gave of the updates themselves: one that broke off has to be begun again."""
        self._complete |= {url for url, answer in answers.items() if not answer}
        self._begun -= {url for url, answer in answers.items() if answer}

    def finish(self) -> None:
        """Put the weights in use."""
        self._loop.run(self.update.finish())


async def _answer(server: Server, path: str, body: dict[str, Any], on_failure: Callable[[str], None]) -> str:
    """What went wrong."""
    try:
        # How long it may take is the ranks' affair, which wait for it bucket by bucket.
        await server.call(server.client.post(path, None, body))
    except (ServerError, RunError) as error:
        on_failure(str(error))
        return str(error)
    return ""


async def _collect(calls: Mapping[str, asyncio.Task[str]], timeout_s: float) -> dict[str, str]:
    done, late = await asyncio.wait(calls.values(), timeout=timeout_s)
    for task in late:
        task.cancel()
    silent = f"did not answer within {timeout_s:g} s"
    return {url: task.result() if task in done else f"{url} {silent}" for url, task in calls.items()}


def at_fault(answers: Mapping[str, str], lost: str) -> dict[str, str]:
    """Of what went wrong by address, the servers to give up: those that do not answer or name an error of their own;
    else the one that a rank `lost` first; else all that have lost a peer, since the ranks are well. At least one where
    any went wrong, so that trying again with the others comes to an end."""
    wrong = {url: answer for url, answer in answers.items() if answer}
    own = {url: answer for url, answer in wrong.items() if LOST_PEER not in answer}
    return own or ({lost: wrong[lost]} if lost in wrong else wrong)
