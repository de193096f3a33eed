"""How a command's process ends."""

import atexit
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with that exit code: exit functions run, output is flushed, the interpreter is not torn down.

    Gloo's threads may still hold the tensors of the last collective when a rank is done. One that drops them after
    the interpreter has begun to go ends the process by SIGABRT: a run that was done, or one line on what is wrong,
    would look like a crash. (torch 2.13: `AsyncAllgatherWork` in `ProcessGroupGloo::runLoop` waits for the GIL.)
    """
    # Not only weakref.finalize and multiprocessing hang on it: vLLM's and Megatron's clean-up do.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            # `riskpo report | head`: nobody reads what is left.
            code = code or 1
        except OSError as error:
            os.write(2, f"error: the output could not be written: {error.strerror}\n".encode())
            code = code or 1
    os._exit(code)
