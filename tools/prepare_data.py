"""`riskpo data prepare` as a script: python tools/prepare_data.py NAME --from FILE... --out FILE."""

import sys

from megatron_riskpo.cli import entry

if __name__ == "__main__":
    entry(["data", "prepare", *sys.argv[1:]])
