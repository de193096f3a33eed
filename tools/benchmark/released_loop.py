"""What RiskPO's released code does to a step's rewards, the way it does it: a bundle, a paper, a response at a time.

Written from a description of that code, apart from `riskpo_reference`: the test oracle of that estimator, and the speed
that all vectorised estimators are compared with. 40,960 answers take about a second or more.
"""

from collections import defaultdict

import torch
from torch import Tensor


def released_advantages(
    rewards: Tensor,
    alpha: float,
    beta: float,
    bundle_size: int,
    mix_weight: float,
    natural_baseline: bool,
    credit: str,
) -> Tensor:
    """Advantages [num_prompts, group_size] of rewards of that shape; credit: uniform, score, std or sum_mean."""
    questions_of_bundle = defaultdict(list)
    rewards_of_question = {}
    for question in range(rewards.shape[0]):
        questions_of_bundle[question // bundle_size].append(question)
        rewards_of_question[question] = [rewards[question, response] for response in range(rewards.shape[1])]

    advantages = torch.zeros_like(rewards)
    for questions in questions_of_bundle.values():
        papers = defaultdict(list)
        for question in questions:
            for response, reward in enumerate(rewards_of_question[question]):
                papers[response].append((question, reward))
        paper_scores = torch.stack([torch.stack([reward for _, reward in paper]).sum() for paper in papers.values()])
        of_papers = _advantages_of_papers(paper_scores, alpha, beta, mix_weight, natural_baseline)
        means = {question: torch.stack(rewards_of_question[question]).mean() for question in questions}
        stds = {question: _std_of_question(rewards_of_question[question]) for question in questions}

        for (response, paper), advantage in zip(papers.items(), of_papers, strict=True):
            total = sum(reward - means[question] for question, reward in paper)
            for question, reward in paper:
                if credit == "uniform":
                    value = advantage
                elif credit == "score":
                    value = advantage * (0.5 if reward > 0 else 1.5)
                elif credit == "std":
                    value = advantage / (stds[question] + 1e-6)
                elif credit == "sum_mean" and abs(total) > 1e-6:
                    value = advantage * (reward - means[question]) / total
                elif credit == "sum_mean":
                    value = advantage / len(paper)
                else:
                    raise ValueError(f"credit = {credit}: choose from uniform, score, std, sum_mean")
                advantages[question, response] = value
    return advantages


def _advantages_of_papers(
    scores: Tensor, alpha: float, beta: float, mix_weight: float, natural_baseline: bool
) -> list[Tensor]:
    if len(scores) > 1:
        q_alpha, q_beta, std = torch.quantile(scores, alpha), torch.quantile(scores, beta), torch.std(scores)
    else:
        q_alpha, q_beta, std = scores[0], scores[0], torch.ones_like(scores[0])
    result = []
    for score in scores:
        lower = -torch.clamp(q_alpha - score, min=0) / (alpha + 1e-6)
        middle = torch.clamp(score - q_alpha, min=0) - torch.clamp(score - q_beta, min=0)
        if natural_baseline:
            middle = middle + q_alpha - q_beta
        middle = middle / (beta - alpha + 1e-6)
        result.append((mix_weight * lower + middle) / (mix_weight + 1) / (std + 1e-6))
    return result


def _std_of_question(rewards: list[Tensor]) -> Tensor:
    std = torch.std(torch.stack(rewards)) if len(rewards) > 1 else torch.ones_like(rewards[0])
    return std if std > 1e-3 else torch.ones_like(std)
