"""Graders that misbehave on request; named module:function by test_pool.py."""

import hashlib
import os
import signal
import sys
import threading
import time


def by_request(response: str, answer: str) -> float:
    """Do what the response says; otherwise 1.0 if it equals the answer."""
    if response == "hang":
        # SIGTERM would not end this
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)
    if response == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "exit":
        sys.exit(3)
    if response == "raise":
        raise ValueError("two\nlines")
    if response == "nan":
        return float("nan")
    if response == "eat memory":
        return float(len(bytearray(64 << 30)))
    if response == "burn":
        threads = [threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 10**9)) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    if response == "print":
        print('{"score": 0.25}', flush=True)
    return float(response == answer)


def always_raises(response: str, answer: str) -> float:
    raise ValueError("broken grader")


def slow(response: str, answer: str) -> float:
    time.sleep(0.2)
    return 1.0


def pid(response: str, answer: str) -> float:
    return float(os.getpid())


def imported_heavy_modules(response: str, answer: str) -> float:
    return float(sum(name in sys.modules for name in ("torch", "transformers", "vllm", "tests.rewards.test_pool")))


def third_parameter(response: str, answer: str, fields: dict) -> float:
    return float(fields["worth"])


def marks_its_place(response: str, answer: str) -> float:
    """Writes its process id into the file that the answer names, then takes its time; the response says its score."""
    with open(answer, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.05)
    return float(response)


def burns_a_little(response: str, answer: str) -> float:
    """A third of a second of CPU time; which process took it."""
    start = time.process_time()
    while time.process_time() - start < 0.33:
        pass
    return float(os.getpid())
