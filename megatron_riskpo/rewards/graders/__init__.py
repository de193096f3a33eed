"""Graders by name. Each is imported only where it is used: a worker starts with what it needs."""

from megatron_riskpo.rewards.graders.contract import Grader
from megatron_riskpo.rewards.options import GraderOptions

__all__ = ["Grader", "load_grader"]


def load_grader(name: str, options: GraderOptions) -> Grader:
    """The grader that `name` stands for (see reference.Reference.grader). Raises whatever loading it raises."""
    if name.startswith(("http://", "https://")):
        from megatron_riskpo.rewards.graders.remote import RemoteGrader

        return RemoteGrader(name, options.timeout_s)
    if ":" in name:
        from megatron_riskpo.rewards.graders.function import user_grader

        return user_grader(name)
    return _built_in(name, options)


def _built_in(name: str, options: GraderOptions) -> Grader:
    from megatron_riskpo.rewards.graders import choice, text

    if name == "math":
        from megatron_riskpo.rewards.graders.mathematics import MathGrader

        return MathGrader(options.answer_form)
    if name == "numeric":
        from megatron_riskpo.rewards.graders.numeric import NumericGrader

        return NumericGrader(options.answer_form, options.tolerance)
    if name == "reasoning_gym":
        from megatron_riskpo.rewards.graders.gym import GymGrader

        return GymGrader(options.answer_form)
    if name == "code":
        from megatron_riskpo.rewards.graders.code import CodeGrader

        return CodeGrader(options.code)
    by_text = {"choice": choice.ChoiceGrader, "exact": text.ExactGrader, "regex": text.RegexGrader,
               "json": text.JsonGrader}  # fmt: skip
    return by_text[name](options.answer_form)
