"""Memory of vLLM's modules between their first slice and their last, when vLLM packs them.

The plan's rounds, and the order in which a round's slices are taken, bring one module after the other.
"""

from megatron_riskpo.errors import RunError


class OpenModules:
    """Of one rank in one push."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self.peak_bytes = 0
        """Most that they took at a time."""

    def begin(self, module: str, num_bytes: int) -> None:
        """It takes so much memory from now on."""
        self._sizes[module] = num_bytes
        self.peak_bytes = max(self.peak_bytes, sum(self._sizes.values()))

    def end(self, module: str) -> None:
        """It is packed."""
        del self._sizes[module]

    def check(self) -> None:
        """RunError where more than one is under way."""
        if len(self._sizes) > 1:
            first, *_, last = self._sizes
            raise RunError(
                f"weight push: slices of vLLM's module {last} ({self._sizes[last]} bytes) came before {first} "
                f"({self._sizes[first]} bytes) was complete; the plan brings one module after the other"
            )
