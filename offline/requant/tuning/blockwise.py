"""One block at a time: its roundings are trained until its output on quantized inputs matches the original's.

The idea of AutoRound (arXiv 2309.05516) and BRECQ (arXiv 2102.05426): the error that counts is that of the block.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import mse_loss

from requant.quantizers.learned import LearnedRounding
from requant.settings import Training


def train_block(
    run: Callable[[torch.Tensor], torch.Tensor],
    roundings: Sequence[LearnedRounding],
    samples: Sequence[tuple[torch.Tensor, torch.Tensor]],
    training: Training,
    seed: int = 0,
) -> list[float]:
    """Trains ``roundings`` so that ``run`` (the block that computes with them) maps the first of each of ``samples`` to
    the second, both [1, T, C]; returns the mean squared error at every step."""
    groups = [
        {"params": [parameter], "full_rate": training.rate * (rounding.mean_step if kind == "values" else 1.0)}
        for rounding in roundings
        for kind, parameter in rounding.named_parameters()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * (1 - step / training.steps)
        chosen = torch.randperm(len(samples), generator=generator)[: training.batch].tolist()
        inputs, targets = (torch.cat([samples[i][side] for i in chosen]) for side in (0, 1))
        loss = mse_loss(run(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for rounding in roundings:
            rounding.project()
        losses.append(float(loss.detach()))
    return losses
