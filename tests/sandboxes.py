"""Programs need bubblewrap, which is no Python package: CI installs it, elsewhere their tests may be left out."""

import os
import shutil

import pytest

needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None and not os.environ.get("CI"),
    reason="bubblewrap is not installed (apt-get install bubblewrap libseccomp2)",
)
