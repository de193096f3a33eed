"""`riskpo convert` as a script: python tools/convert_checkpoint.py megatron-to-hf RUN OUT."""

import sys

from megatron_riskpo.cli import entry

if __name__ == "__main__":
    entry(["convert", *sys.argv[1:]])
