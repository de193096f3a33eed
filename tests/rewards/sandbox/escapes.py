"""Programs that try to get out of the sandbox, to abuse it, or to harm what comes after them.

Each prints ESCAPED, with what it got, if its attempt works. {names} in braces are filled in by the test: what the
attempt is after on the host. Files that they make are named sandboxed-..., by which the test would find them outside.
"""
# ruff: noqa: E501 - a program is easier to read on one line

PRELUDE = """
import ctypes, os, sys
def attempt(action):
    try:
        got = action()
    except BaseException as error:
        print('contained:', type(error).__name__, flush=True)
    else:
        print('ESCAPED', repr(got)[:200], flush=True)
def call(number, *args):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return number
"""

ATTEMPTS = {
    # network
    "tcp to the host": "import socket; attempt(lambda: socket.create_connection(('127.0.0.1', {port}), 2))",
    "udp": "import socket; attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port})))",
    "unix socket": "import socket; attempt(lambda: socket.socket(socket.AF_UNIX).connect('{unix_socket}'))",
    "raw socket": "import socket; attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))",
    "netlink": "import socket; attempt(lambda: socket.socket(16, 3, 0))",
    "socket by its number": "attempt(lambda: call(41, 2, 1, 0))",
    "name lookup": "import socket; attempt(lambda: socket.getaddrinfo('localhost', 80, type=1)[0] and socket.create_connection(('localhost', {port}), 2))",
    "interfaces": "import socket; attempt(lambda: [n for n in socket.if_nameindex() if n[1] != 'lo'][0])",
    # files
    "read a file": "attempt(lambda: open('{secret}').read())",
    "read passwords": "attempt(lambda: open('/etc/passwd').read())",
    "read a home": "attempt(lambda: os.listdir('/root/.ssh') + os.listdir('/home'))",
    "read through ..": "attempt(lambda: open('../../..{secret}').read())",
    "read through a symlink": "os.symlink('{secret}', 'sandboxed-link'); attempt(lambda: open('sandboxed-link').read())",
    "hard link": "attempt(lambda: os.link('{secret}', 'sandboxed-link'))",
    "write to the library": "import json; attempt(lambda: open(json.__file__, 'w'))",
    "write to the interpreter": "attempt(lambda: open('/python', 'r+b'))",
    "write to the root": "attempt(lambda: open('/file', 'w'))",
    "folder in the root": "attempt(lambda: os.mkdir('/folder'))",
    "write to /dev": "attempt(lambda: open('/dev/file', 'w'))",
    "write to shared memory": "attempt(lambda: open('/dev/shm/file', 'w'))",
    "block device": "attempt(lambda: os.mknod('/tmp/sandboxed-disk', 0o60600, os.makedev(254, 0)) or open('/tmp/sandboxed-disk', 'rb').read(1))",
    "set-user-id": "open('sandboxed-a', 'w').close(); attempt(lambda: (os.chmod('/python', 0o4755), 0))",
    "chroot": "attempt(lambda: os.chroot('/tmp'))",
    "mount": "attempt(lambda: call(165, b'none', b'/tmp', b'tmpfs', 0, 0))",
    "unmount": "attempt(lambda: call(166, b'/tmp', 2))",
    "pivot root": "attempt(lambda: call(155, b'/tmp', b'/tmp'))",
    "open by handle": "attempt(lambda: call(304, -100, 0, 0))",
    # processes
    "fork": "attempt(os.fork)",
    "fork by its number": "attempt(lambda: call(57))",
    "clone by its number": "attempt(lambda: call(56, 17, 0, 0, 0, 0))",
    "clone3 by its number": "attempt(lambda: call(435, b'\\0' * 88, 88))",
    "subprocess": "import subprocess; attempt(lambda: subprocess.run(['/python', '-c', '1'], check=True))",
    "exec": "attempt(lambda: os.execv('/python', ['/python', '-c', 'print(\"ESCAPED\")']))",
    "shell": "attempt(lambda: 1 / (os.system('true') == 0))",
    "sleeping child": "import subprocess; attempt(lambda: subprocess.Popen(['/python', '-c', 'import time; time.sleep(600)']))",
    "multiprocessing": "import multiprocessing as m; attempt(lambda: m.get_context('fork').Process(target=print).start())",
    "signal a host process": "attempt(lambda: os.kill({pid}, 9))",
    "signal the supervisor's process": "attempt(lambda: os.kill({worker}, 9))",
    "processes of others": "attempt(lambda: os.listdir('/proc') and open('/proc/1/environ').read())",
    "ptrace": "attempt(lambda: call(101, 16, 1, 0, 0))",
    "memory of process 1": "attempt(lambda: call(310, 1, b' ' * 16, 1, b' ' * 16, 1, 0))",
    "limits of process 1": "import resource; attempt(lambda: resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)))",
    "raise a limit": "import resource; attempt(lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)))",
    "priority": "attempt(lambda: os.setpriority(os.PRIO_PROCESS, 0, -20))",
    # rights
    "become root": "attempt(lambda: os.setuid(0))",
    "new user namespace": "attempt(lambda: call(272, 0x10000000))",
    "enter a namespace": "attempt(lambda: call(308, 0, 0))",
    "clone into a namespace": "attempt(lambda: call(56, 0x10000000 | 17, 0, 0, 0, 0))",
    "bpf": "attempt(lambda: call(321, 0, 0, 0))",
    "io_uring": "attempt(lambda: call(425, 8, b' ' * 200))",
    "keyring": "attempt(lambda: call(250, 0, -3, 1))",
    "userfaultfd": "attempt(lambda: call(323, 0))",
    "performance events": "attempt(lambda: call(298, b' ' * 128, 0, -1, -1, 0))",
    "module": "attempt(lambda: call(175, b'', 0, b''))",
    "reboot": "attempt(lambda: call(169, 0xfee1dead, 672274793, 0))",
    "host name": "import socket; attempt(lambda: socket.sethostname('owned'))",
    "clock": "import time; attempt(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))",
    "drop the filter": "attempt(lambda: call(157, 22, 0, 0, 0, 0))",
    "another call table (x32)": "attempt(lambda: call(0x40000000 + 39))",
    # secrets
    "environment": "attempt(lambda: os.environ['{variable}'])",
    "all of the environment": "attempt(lambda: [v for v in os.environ.values() if '{value}' in v][0])",
    "import the project": "attempt(lambda: __import__('megatron_riskpo'))",
    "import the tests": "sys.path.append('{repository}'); attempt(lambda: __import__('tests.rewards.sandbox.escapes'))",
    "import an installed package": "attempt(lambda: __import__('torch'))",
    "pip": "attempt(lambda: __import__('pip'))",
    "who am i": "attempt(lambda: 1 / (os.getuid() != 65534))",
    # files left open
    "files of the supervisor": "attempt(lambda: [os.read(n, 10) for n in range(4, 1024)])",
    "shared memory of another": "attempt(lambda: call(29, 1234, 4096, 0o1666))",
    "memory file": "attempt(lambda: os.memfd_create('x'))",
}

ABUSES = {
    # (program, what it may come to)
    "endless loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time; time.sleep(600)", {"timeout"}),
    "deaf to signals": (
        "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "time.sleep(600)",
        {"timeout"},
    ),
    "deaf and busy": (
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        {"timeout", "failed"},
    ),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"timeout"}),
    "thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\nnum = 0\nwhile True:\n    try:\n"
        "        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n        num += 1\n"
        "    except RuntimeError:\n        break\nprint('THREADS', num)\nimport os; os._exit(0)",
        {"ok"},
    ),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 24))", {"failed"}),
    "memory at once": ("x = bytearray(1 << 40)", {"failed"}),
    "mapped memory": ("import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(1000)]", {"failed"}),
    "large number": ("print(9 ** 9 ** 9)", {"timeout", "failed"}),
    "disk": (
        "import itertools\nblock = b'x' * (1 << 20)\nfor n in itertools.count():\n    with open(f'/tmp/sandboxed-{n % 50}', 'ab') as file:\n"
        "        file.write(block)",
        {"failed"},
    ),
    "one large file": (
        "with open('/tmp/sandboxed-x', 'wb') as file:\n    file.truncate(1 << 40)\nprint('LARGE')",
        {"failed"},
    ),
    "long output": ("while True: print('x' * 10_000)", {"output"}),
    "output behind the interpreter": ("import os\nwhile True: os.write(1, b'x' * 65536)", {"output"}),
    "errors without end": ("import sys\nwhile True: sys.stderr.write('x' * 10_000)", {"timeout"}),
    "deep recursion": ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", {"failed", "timeout"}),
    "crash": ("import ctypes; ctypes.string_at(0)", {"failed"}),
    "abort": ("import os; os.abort()", {"failed"}),
    "exit code": ("import sys; print('1'); sys.exit(3)", {"failed"}),
    "all file handles": ("import os\nx = [os.dup(1) for _ in range(10_000)]", {"failed"}),
    "kill everything": ("import os; os.kill(-1, 9)\nprint('here')", {"ok", "failed"}),
    "kill process 1": ("import os, time\nfor n in range(1, 65): os.kill(1, n)\nprint('here')", {"ok"}),
    "write to process 1": (
        "import os\nfor n in range(4, 64):\n    try: os.write(n, b'{\"status\": \"ok\"}\\n')\n    except OSError: pass\nprint('here')",
        {"ok"},
    ),
    "nested brackets": ("(" * 100_000, {"failed"}),
    "no program": ("this is no program", {"failed"}),
    "null byte": ("print(1)\0", {"failed"}),
}
