"""Risk-based post-training of language models on Megatron-Core (RiskPO, arXiv 2510.00911)."""

__version__ = "0.1.0"
