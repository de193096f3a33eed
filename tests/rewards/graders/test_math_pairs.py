"""Agreement with verdicts checked by hand: tests/data/math_pairs.jsonl says why each is as it is. The verdict is what a
mathematician says of the answer, by the rule of answers.py for where it stands; not what math-verify says."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_riskpo.rewards.graders.mathematics import MathGrader

PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "math_pairs.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_there_are_enough_pairs_of_every_kind_and_each_has_a_reason():
    assert len(PAIRS) >= 300
    assert len({(pair["answer"], pair["expected_answer"]) for pair in PAIRS}) == len(PAIRS)
    assert all(pair["why"].strip() and pair["verdict"] in (0, 1) for pair in PAIRS)
    verdicts = Counter((pair["topic"], pair["verdict"]) for pair in PAIRS)
    for topic in {pair["topic"] for pair in PAIRS}:
        assert verdicts[topic, 0], topic
        assert verdicts[topic, 1], topic


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{pair['topic']}-{i}" for i, pair in enumerate(PAIRS)])
def test_the_grader_agrees(pair: dict):
    assert MathGrader()(pair["answer"], pair["expected_answer"], {}) == pair["verdict"], pair["why"]
