"""metrics.jsonl: valid JSON always, no step twice whatever killed the process before; TensorBoard says the same."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_riskpo.errors import UsageError
from megatron_riskpo.observability.metrics import FILE_NAME, MetricsWriter, read_metrics


def write_steps(
    run_dir: Path, steps: range, start_step: int = 0, shift: float = 0.0, tensorboard: bool = False
) -> None:
    with MetricsWriter(run_dir, tensorboard, start_step) as writer:
        for step in steps:
            writer.write(step, {"reward/mean": step / 10 + shift})


def strict_lines(run_dir: Path) -> list[dict]:
    """Parsed by a reader that knows no NaN."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / FILE_NAME).read_text().splitlines()]


def test_values_survive_and_non_finite_becomes_null(tmp_path: Path) -> None:
    values = {"a": 0.1, "b": math.nan, "c": -math.inf, "d": 3, "e": torch.tensor(0.25)}
    with MetricsWriter(tmp_path, False) as writer:
        writer.write(1, values)
        # Flushed: another process sees it before the writer closes.
        assert strict_lines(tmp_path) == [{"step": 1, "a": 0.1, "b": None, "c": None, "d": 3, "e": 0.25}]
    assert (tmp_path / FILE_NAME).read_text().startswith('{"step": 1, ')


def test_resume_equals_one_go(tmp_path: Path) -> None:
    write_steps(tmp_path / "once", range(11))
    write_steps(tmp_path / "twice", range(8), shift=0.0)
    write_steps(tmp_path / "twice", range(6, 11), start_step=5)
    assert (tmp_path / "twice" / FILE_NAME).read_bytes() == (tmp_path / "once" / FILE_NAME).read_bytes()


def test_resume_drops_later_steps_of_the_killed_process(tmp_path: Path) -> None:
    write_steps(tmp_path, range(8), shift=100.0)
    write_steps(tmp_path, range(4, 6), start_step=3)
    assert [(row["step"], row["reward/mean"] >= 100) for row in read_metrics(tmp_path)] == [
        (0, True),
        (1, True),
        (2, True),
        (3, True),
        (4, False),
        (5, False),
    ]


def test_start_from_nothing_forgets_an_earlier_run(tmp_path: Path) -> None:
    write_steps(tmp_path, range(3))
    write_steps(tmp_path, range(2), shift=1.0)
    assert [row["reward/mean"] for row in read_metrics(tmp_path)] == [1.0, 1.1]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_written_last_line(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, range(4))
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    write_steps(tmp_path, range(3, 5), start_step=2)
    assert [row["step"] for row in strict_lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_the_same_step_again_joins_its_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, False) as writer:
        writer.write(1, {"a": 1.0})
        writer.write(2, {"a": 2.0})
        writer.write(2, {"eval/heldout/pass@1": 0.5})
        writer.write(3, {"a": 3.0})
    with MetricsWriter(tmp_path, False, start_step=3) as writer:
        writer.write(3, {"b": 4.0})
        with pytest.raises(ValueError, match="step 2 come after those of step 3"):
            writer.write(2, {})
    assert strict_lines(tmp_path) == [
        {"step": 1, "a": 1.0},
        {"step": 2, "a": 2.0, "eval/heldout/pass@1": 0.5},
        {"step": 3, "a": 3.0, "b": 4.0},
    ]


def test_a_kill_while_a_line_grows_leaves_it(tmp_path: Path) -> None:
    """At every call on the file the line is there, whole: as it was, or with what was added."""
    with MetricsWriter(tmp_path, False) as writer:
        writer.write(1, {"a": 1})
        seen, file = [], writer._file

        class Watched:
            def __getattr__(self, name: str) -> object:
                def call(*arguments: object) -> object:
                    result = getattr(file, name)(*arguments)
                    seen.append(read_metrics(tmp_path))
                    return result

                return call

        writer._file = Watched()
        writer.write(1, {"b": 2})
    assert seen
    assert all(rows in ([{"step": 1, "a": 1}], [{"step": 1, "a": 1, "b": 2}]) for rows in seen)


def test_reading_nothing_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"st')
    with pytest.raises(UsageError, match="no whole line"):
        read_metrics(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"step": 1}\n[1]\n{"step": 2}\n')
    with pytest.raises(UsageError, match="line 2 is no metrics object"):
        read_metrics(tmp_path)


def test_tensorboard_holds_what_the_file_holds(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6), shift=100.0, tensorboard=True)
    write_steps(tmp_path, range(4, 7), start_step=3, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    rows = read_metrics(tmp_path)
    assert [event.step for event in events] == [row["step"] for row in rows]
    assert [event.value for event in events] == pytest.approx([row["reward/mean"] for row in rows])
