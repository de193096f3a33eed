"""What a rank of a test needs and takes seconds to import; ranks are forked from a process that has it."""

from megatron_riskpo.collector import lasting_imports
from megatron_riskpo.distributed import cpu_backend

cpu_backend.install()
with lasting_imports():
    import megatron_riskpo.actor.actor  # noqa: F401
