"""Megatron-Core is imported by many tests, so the CPU backend has to be in place before any of them."""

from megatron_riskpo.distributed import cpu_backend

cpu_backend.install()
