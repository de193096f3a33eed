"""Responses under way go into a file and come back the same, number for number."""

import io

import pytest
import torch

from megatron_riskpo.rollout.carried import go_on_from, packed
from megatron_riskpo.rollout.server_pool import Response

RESPONSES = [
    Response([1, 2], 7, 3),
    Response([1, 2], 8, 3, [5, 2**31 - 1], [-0.1, -1 / 3], [3, 4]),
    Response([9], 9, 3, [6], [-2.5e-9], [2], "length"),
]


def through_a_file(responses):
    file = io.BytesIO()
    torch.save({"5": packed(responses)}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["5"]


def test_what_has_come_is_kept_to_the_last_bit():
    new = [Response(response.prompt, response.seed, 4) for response in RESPONSES]
    assert go_on_from(through_a_file(RESPONSES), new) == 3
    for one, other in zip(new, RESPONSES, strict=True):
        assert (one.tokens, one.logprobs, one.versions) == (other.tokens, other.logprobs, other.versions)
        assert (one.prompt, one.seed, one.reason) == (other.prompt, other.seed, other.reason)
    assert [response.oldest_version for response in new] == [4, 3, 2]


def test_no_response_at_all():
    assert go_on_from(through_a_file([]), []) == 0


@pytest.mark.parametrize(("prompt", "seed"), [([1, 3], 8), ([1, 2], 9), ([1], 8)])
def test_what_was_asked_otherwise_begins_anew(prompt, seed):
    """Whatever its place: by position the tokens would stand behind another question."""
    new = [Response([9], 9, 4), Response(prompt, seed, 4)]
    assert go_on_from(through_a_file(RESPONSES), new) == 1
    assert (new[0].tokens, new[1].tokens, new[1].reason, new[1].oldest_version) == ([6], [], "", 4)
