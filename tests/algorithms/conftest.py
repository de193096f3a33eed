"""Property tests draw the same examples every time; a loaded machine is no reason to fail one."""

from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
