"""metrics.json as nemo-skills' summarizer writes it: percentages 0 to 100, statistics 0 to 1, for every k up to n."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_riskpo.config_io import write_json
from megatron_riskpo.evaluation.outputs import RESULTS_FOLDER
from megatron_riskpo.evaluation.passk import question_pass_at_k
from megatron_riskpo.evaluation.results import Results

METRICS_FILE = "metrics.json"


def metrics_path(folder: Path) -> Path:
    """Where the summarizer writes it: in folder/eval-results/ or, without one, in `folder`."""
    return (folder / RESULTS_FOLDER if (folder / RESULTS_FOLDER).is_dir() else folder) / METRICS_FILE


def write_metrics(folder: Path, all_results: Sequence[Results]) -> Path:
    """Write metrics.json."""
    return write_json(metrics_path(folder), {r.name: nemo_metrics(r) for r in all_results})


def nemo_metrics(results: Results) -> dict[str, dict[str, Any]]:
    """{mode: {num_entries, avg_tokens, gen_seconds, symbolic_correct, no_answer, ...}}; modes: pass@k, pass@1[avg-of-k]
    and, from k = 2 on, majority@k."""
    ks = range(1, results.num_samples + 1)
    common = _common(results)
    no_answer = np.array([[answer is None for answer in answers] for answers in results.predicted])
    passed = question_pass_at_k(results.correct, ks)
    votes = question_majority_at_k(results.correct, results.predicted)
    modes: dict[str, dict[str, Any]] = {}
    for k in ks:
        none = no_answer[:, :k]
        modes[f"pass@{k}"] = common | _percentages(passed[:, k - 1], none.all(axis=1))
        average = common | _percentages(results.correct[:, :k].mean(axis=1), none.mean(axis=1))
        if k > 1:
            average["symbolic_correct_statistics"] = _statistics(results.correct[:, :k].astype(float))
        modes[f"pass@1[avg-of-{k}]"] = average
    for k in ks[1:]:
        modes[f"majority@{k}"] = common | _percentages(votes[:, k - 1], no_answer[:, :k].all(axis=1))
    return modes


def question_majority_at_k(
    correct: NDArray[np.bool_], predicted: Sequence[Sequence[str | None]]
) -> NDArray[np.float64]:
    """[Q, n], column k - 1: the score of the answer that most of the first k samples give; of several, their mean.

    As in nemo-skills: equal are answers of the same text and verdict; no answer has no vote; none at all scores 0.
    """
    scores = np.zeros(correct.shape)
    for row, (verdicts, answers) in enumerate(zip(correct.tolist(), predicted, strict=True)):
        votes: Counter[tuple[str, bool]] = Counter()
        for column, vote in enumerate(zip(answers, verdicts, strict=True)):
            if vote[0] is not None:
                votes[vote] += 1
            most = max(votes.values(), default=0)
            winners = [verdict for (_, verdict), count in votes.items() if count == most]
            scores[row, column] = sum(winners) / len(winners) if winners else 0.0
    return scores


def _common(results: Results) -> dict[str, int]:
    common = {"num_entries": results.num_questions}
    if results.lengths is not None and results.lengths.any():
        common["avg_tokens"] = int(results.lengths.mean(axis=1).sum() / results.num_questions)
    if results.seconds is not None:
        common["gen_seconds"] = int(results.seconds)
    return common


def _percentages(scores: NDArray[Any], no_answer: NDArray[Any]) -> dict[str, float]:
    return {"symbolic_correct": 100.0 * float(scores.mean()), "no_answer": 100.0 * float(no_answer.mean())}


def _statistics(scores: NDArray[np.float64]) -> dict[str, float]:
    """Of [Q, k] scores: a run is a column. Deviations are those of a sample (divided by k - 1)."""
    across_runs = float(scores.mean(axis=0).std(ddof=1))
    return {
        "avg": float(scores.mean()),
        "std_dev_across_runs": across_runs,
        "avg_sample_std_dev": float(scores.std(axis=1, ddof=1).mean()),
        "std_err_across_runs": across_runs / float(np.sqrt(scores.shape[1])),
    }
