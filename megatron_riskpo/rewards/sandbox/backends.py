"""Where programs run: the runner that the options name, and whether it works."""

from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.options import CodeOptions
from megatron_riskpo.rewards.sandbox.bubblewrap import Unavailable
from megatron_riskpo.rewards.sandbox.contract import Case, CodeRunner, SandboxError

PROBE = Case(stdin="20 22\n")
PROBE_PROGRAM = "print(sum(map(int, input().split())))"
REMEDY = (
    "install bubblewrap and libseccomp (Debian, Ubuntu: apt-get install bubblewrap libseccomp2), allow user namespaces "
    "(sysctl user.max_user_namespaces; kernel.apparmor_restrict_unprivileged_userns = 0 on Ubuntu), or set "
    "rewards.sandbox to a server's kind and rewards.sandbox_url to its address"
)


def code_runner(options: CodeOptions) -> CodeRunner:
    """Raises Unavailable where this machine has no sandbox."""
    if options.backend == "bubblewrap":
        from megatron_riskpo.rewards.sandbox.local import Limits, LocalRunner

        return LocalRunner(Limits(cpu_s=options.test_cpu_s, memory_bytes=options.memory_mib << 20))
    from megatron_riskpo.rewards.sandbox.servers import NemoSkillsRunner, SandboxFusionRunner

    kinds = {"sandbox_fusion": SandboxFusionRunner, "nemo_skills": NemoSkillsRunner}
    return kinds[options.backend](options.url, options.test_cpu_s, options.memory_mib)


def working_runner(options: CodeOptions) -> CodeRunner:
    """A runner that has run a program of ours. Raises UsageError that says what to install: without a sandbox no
    program is ever run."""
    try:
        runner = code_runner(options)
        try:
            (result,) = runner.run(PROBE_PROGRAM, [PROBE])
        except BaseException:
            runner.close()
            raise
    except (Unavailable, SandboxError) as error:
        raise UsageError(
            f"programs cannot be graded, no working sandbox ({options.backend}): {error}; {REMEDY}"
        ) from error
    if (result.status, result.output.split()) != ("ok", ["42"]):
        runner.close()
        raise UsageError(
            f"programs cannot be graded: the sandbox ({options.backend}) runs a program that should print 42 to "
            f"{result.status}, output {result.output!r:.60}; {REMEDY}"
        )
    return runner
