"""What a rank of a test needs and takes seconds to import; ranks are forked from a process that has it."""

from megatron_riskpo.distributed import cpu_backend

cpu_backend.install()

import megatron_riskpo.actor.actor  # noqa: E402, F401
