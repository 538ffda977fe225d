"""Slow ways of computing that several test modules compare with."""

import torch


def slow_entmax(scores, alpha):
    """One vector: τ by halving an interval 200 times; one step more, which autograd sees, gives τ its gradient."""
    if alpha == 1:
        return scores.exp() / scores.exp().sum()
    x = (alpha - 1) * scores
    r = 1 / (alpha - 1)
    high = float(x.detach().max())
    low = high - 1
    for _ in range(200):
        middle = (low + high) / 2
        over = sum(max(v - middle, 0.0) ** r for v in x.tolist()) > 1
        low, high = (middle, high) if over else (low, middle)
    inside = [v > low for v in x.tolist()]
    kept = [v - low for v, is_in in zip(x, inside, strict=True) if is_in]
    excess = sum(t**r for t in kept) - 1
    tau = low + excess / float(sum(r * t.detach() ** (r - 1) for t in kept))
    return torch.stack([(v - tau) ** r if is_in else 0 * v for v, is_in in zip(x, inside, strict=True)])
