"""What servers call their weights. vLLM keeps a label with them, and says it with every token that they sampled.

Ours are RUN-VERSION: two runs that push to one server do not take each other's weights for their own.
"""

import re
import secrets
from dataclasses import dataclass

SERVERS_OWN = "default"
"""vLLM's, of the weights that a server loaded itself."""
_HALF_UPDATED = "towards-"
"""Begins the label of weights that are being replaced."""
_OF_A_RUN = re.compile(rf"(?P<half>{_HALF_UPDATED})?(?P<run>[0-9a-f]{{8}})-(?P<version>\d+)")


def new_run() -> str:
    """A name that no other run has."""
    return secrets.token_hex(4)


def is_half_updated(label: str) -> bool:
    """Whether a push, of any run, is under way or broke off."""
    return label.startswith(_HALF_UPDATED)


@dataclass(frozen=True)
class WeightLabels:
    """Of one run."""

    run: str = ""
    """As of `new_run`; empty: weights are not pushed."""

    def of(self, version: int) -> str:
        """Of complete weights."""
        return f"{self.run}-{version}"

    def towards(self, version: int) -> str:
        """Of weights that are being replaced by this version."""
        return f"{_HALF_UPDATED}{self.of(version)}"

    def version(self, label: str) -> int:
        """-1: the server's own weights; -2: none that this run can ask for."""
        if label == SERVERS_OWN:
            return -1
        found = _OF_A_RUN.fullmatch(label)
        return int(found["version"]) if found and not found["half"] and found["run"] == self.run else -2

    def is_of_another_run(self, label: str) -> bool:
        """Also of weights that it is replacing."""
        found = _OF_A_RUN.fullmatch(label)
        return found is not None and found["run"] != self.run

    def cause(self, label: str) -> str:
        """How a server may have come to weights of this name that it should not have."""
        if self.is_of_another_run(label):
            return "another run pushes to it; give each run servers of its own, or end the other run"
        if self.version(label) >= 0:
            return "it missed a push"
        return "it was started anew" if label == SERVERS_OWN else "this run did not push them"
