import math
from pathlib import Path

from megatron_riskpo.observability.samples import FIELDS, read_samples, sample_steps, write_samples


def test_any_text_comes_back_as_it_was(tmp_path: Path) -> None:
    texts = ["line\nbreak", "sep\u2028arator \x85", "\udc80 lone surrogate", "</script>", '"quoted" \\boxed{1}', "数"]
    rows = [dict(zip(FIELDS, ("p", "1", text, 1.0, True, -0.5), strict=True)) for text in texts]
    write_samples(tmp_path, 10, rows)
    assert read_samples(tmp_path, 10) == [{"step": 10, **row} for row in rows]


def test_steps_sort_as_numbers_and_nan_is_null(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        write_samples(tmp_path, step, [dict(zip(FIELDS, ("p", "1", "r", math.nan, True, 0.0), strict=True))])
    assert sample_steps(tmp_path) == [3, 20, 100]
    assert read_samples(tmp_path, 3)[0]["reward"] is None


def test_no_samples(tmp_path: Path) -> None:
    assert sample_steps(tmp_path) == []


def test_a_shaped_reward_is_written_where_it_is_another(tmp_path: Path) -> None:
    plain = dict(zip(FIELDS, ("p", "1", "r", 1.0, True, 0.0), strict=True))
    write_samples(tmp_path, 1, [plain | {"shaped_reward": 1.0}, plain | {"shaped_reward": 0.5}])
    assert ["shaped_reward" in row for row in read_samples(tmp_path, 1)] == [False, True]
