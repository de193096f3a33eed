"""Save under one layout, go on under another: the next losses and gradient norms are those of the run that was not
interrupted, the optimizer's state included, with the distributed optimizer, dense and mixture of experts.

Second way to each number: that run, and under the same layout bit for bit. The loss is the mean negative log-prob of
solved examples, about 4.6 nats, so that 1e-6 of it is strict; the second one depends on AdamW's moments. Not tested
here: two ranks and bfloat16 (test_training_state), NCCL.
"""

import pytest

from tests.checkpoint.reshaping_cases import NUM_AFTER, PAIRS, SAVED, run
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow

RELATIVE = 1e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reshaping")
    for seed in (1, 2):
        # 97 entries: tensor parallelism pads the vocabulary. Four layers: two stages of two chunks.
        sizes = {"vocab_size": 97, "num_layers": 4, "hidden_size": 64, "seed": seed}
        make_tiny(folder / f"dense_{seed}", "qwen2", tied=True, **sizes)
        make_tiny(folder / f"moe_{seed}", "qwen3_moe", tied=False, **sizes)
    # Four ranks first: they save what fewer load.
    return [run_on_ranks(f"{run.__module__}:run", n, folder / f"on_{n}", timeout_s=600)[0] for n in (4, 1)]


def merged(results):
    return {key: value for of_launch in results for key, value in of_launch.items()}


@pytest.mark.parametrize(("kind", "layout"), [(kind, layout) for kind, layouts in SAVED.items() for layout in layouts])
def test_same_layout_goes_on_bit_for_bit(results, kind, layout):
    result = merged(results)[kind, layout]
    assert len(result["again"]) == NUM_AFTER
    assert result["again"] == result["expected"]


@pytest.mark.parametrize(
    ("kind", "saved", "loaded"), [(kind, *pair) for kind, pairs in PAIRS.items() for pair in pairs]
)
def test_another_layout_goes_on_with_the_same_losses(results, kind, saved, loaded):
    found, expected = merged(results)[kind, saved, loaded], merged(results)[kind, saved]["expected"]
    assert len(found) == NUM_AFTER
    for step, of_uninterrupted in zip(found, expected, strict=True):
        assert step == pytest.approx(of_uninterrupted, rel=RELATIVE)
    # The steps move the loss by far more than that.
    assert abs(expected[1][0] / expected[0][0] - 1) > 1e-3


def test_there_are_twelve_pairs():
    assert sum(len(pairs) for pairs in PAIRS.values()) >= 12
