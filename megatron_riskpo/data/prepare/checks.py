"""What is taken out of prepared questions, each with a count."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from megatron_riskpo.data.overlap import normalised
from megatron_riskpo.data.prepare.recipe import Entry


class Tally:
    """Counts what was taken out, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def drop(self, reason: str) -> None:
        self.counts[reason] += 1

    def lines(self) -> list[str]:
        """`12 left out: duplicate`, most first."""
        return [f"{count} left out: {reason}" for reason, count in self.counts.most_common()]


def complete(entries: Iterable[Entry], tally: Tally) -> Iterator[Entry]:
    """Those with a problem and, unless tests stand for it, an answer."""
    for entry in entries:
        if not str(entry.get("problem") or "").strip():
            tally.drop("empty problem")
        elif not str(entry.get("expected_answer") or "").strip() and not entry.get("tests"):
            tally.drop("empty answer")
        else:
            yield {**entry, "problem": str(entry["problem"]).strip()}


def distinct(entries: Iterable[Entry], tally: Tally) -> list[Entry]:
    """The first of those that are one question but for typesetting; none of them where their answers differ."""
    firsts: dict[str, Entry] = {}
    answers: dict[str, str] = {}
    disputed: Counter[str] = Counter()
    for entry in entries:
        problem, answer = normalised(entry["problem"]), normalised(str(entry["expected_answer"]))
        if problem not in firsts:
            firsts[problem], answers[problem] = entry, answer
        elif answers[problem] == answer:
            tally.drop("duplicate")
        else:
            disputed[problem] += 1
    if disputed:
        tally.counts["one question with different answers"] += len(disputed) + disputed.total()
    return [entry for problem, entry in firsts.items() if problem not in disputed]


def apart_from(entries: Iterable[Entry], others: Iterable[str], tally: Tally) -> list[Entry]:
    """Those whose problem is none of `others` (problems of evaluation files)."""
    known = {normalised(problem) for problem in others}
    kept = []
    for entry in entries:
        if normalised(entry["problem"]) in known:
            tally.drop("in a file of --exclude")
        else:
            kept.append(entry)
    return kept


def short_enough(entries: Sequence[Entry], prompts: Sequence[Sequence[int]], limit: int, tally: Tally) -> list[Entry]:
    """Those whose prompt, token ids, has at most `limit` of them."""
    kept = []
    for entry, ids in zip(entries, prompts, strict=True):
        if len(ids) > limit:
            tally.drop(f"prompt over {limit} tokens")
        else:
            kept.append(entry)
    return kept
