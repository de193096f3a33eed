"""reasoning-gym tasks as question files, at a level of their curriculum."""

from collections.abc import Mapping
from itertools import islice

from megatron_riskpo.config import Scalar
from megatron_riskpo.data.gym import gym_problems
from megatron_riskpo.data.prepare.recipe import Entry
from megatron_riskpo.data.questions import is_held_out
from megatron_riskpo.errors import UsageError


def gym_entries(
    name: str, size: int, seed: int, level: int | None, options: Mapping[str, Scalar], held_out: bool
) -> list[Entry]:
    """`size` questions of the task, of those that runs never train on (held_out) or of the others.

    `level` of the task's curriculum sets its options, `options` win. Raises UsageError: see gym_problems; a level that
    the task does not have, or too few different questions.
    """
    chosen = {**(level_options(name, level) if level is not None else {}), **options}
    problems = gym_problems(name, chosen, seed)
    found: dict[str, Entry] = {}
    # A tenth of all questions is held out; a task that has only few repeats them.
    for problem, answer, fields in islice(problems, 100 * size):
        if is_held_out(problem) == held_out:
            found.setdefault(problem, {"problem": problem, "expected_answer": answer, "source": name, **fields})
        if len(found) == size:
            return list(found.values())
    kind = "held-out " if held_out else ""
    raise UsageError(
        f"reasoning_gym task {name} gave only {len(found)} different {kind}questions in {100 * size} draws, --size is "
        f"{size}; lower it, or choose a harder --level"
    )


def level_options(name: str, level: int) -> dict[str, Scalar]:
    """What a level of the task's curriculum, 0 the easiest, sets: every attribute at that level, or at its last one.

    Raises UsageError: a task without a curriculum, or a level below 0 or above all attributes' last.
    """
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if not has_curriculum(name):
        raise UsageError(f"reasoning_gym task {name} has no curriculum; leave --level out and set --options")
    curriculum = create_curriculum(name)
    last = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
    if not 0 <= level <= last:
        raise UsageError(f"reasoning_gym task {name} has levels 0 to {last}; --level {level} is none of them")
    names = []
    for attribute in curriculum.attributes.values():
        curriculum.set_attr_level(attribute.name, min(level, len(attribute.levels) - 1))
        own = ("field_name", "lower_field_name", "upper_field_name")
        names += [value for value in (getattr(attribute, field, None) for field in own) if value]
    config = curriculum.generate_configuration()
    return {name: getattr(config, name) for name in names}
