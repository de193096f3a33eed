"""What the graders of a run have in common; travels to the worker processes as JSON."""

from dataclasses import dataclass, field

from megatron_riskpo.rewards.reference import AnswerForm

CODE_GRACE_S = 10.0
"""What the code grader gets beside the time of the program: starting sandboxes, comparing outputs."""


@dataclass(frozen=True)
class CodeOptions:
    """How programs are run and judged."""

    backend: str = "bubblewrap"
    """bubblewrap, sandbox_fusion or nemo_skills."""
    url: str = ""
    """Address of the server, for the last two."""
    test_cpu_s: float = 4.0
    """CPU time of one test, in seconds."""
    program_timeout_s: float = 30.0
    """Wall-clock time of all tests of a program, in seconds."""
    memory_mib: int = 512
    """Address space of a test's process, in MiB."""
    partial_credit: bool = False
    """The score is the share of passed tests; else 1 or 0."""


@dataclass(frozen=True)
class GraderOptions:
    """Options of the graders, and the limits of each grading."""

    answer_form: AnswerForm = "any"
    """Where the answer stands in the response: see answers.py."""
    tolerance: float = 0.01
    """Relative difference that the grader numeric accepts."""
    timeout_s: float = 5.0
    """Wall-clock limit of one grading, in seconds."""
    cpu_s: float = 10.0
    """CPU limit of one grading, over all threads, in seconds (rounded up)."""
    memory_gib: float = 4.0
    """Address space of a worker, in GiB: an answer such as 9**9**9 ends in a MemoryError, not in the OOM killer."""
    code: CodeOptions = field(default_factory=CodeOptions)

    def wall_limit_s(self, grader: str) -> float:
        """Wall-clock limit of one grading by `grader`, in seconds. A program's own time is the code grader's to judge:
        too slow is wrong, and no error."""
        return self.code.program_timeout_s + CODE_GRACE_S if grader == "code" else self.timeout_s
