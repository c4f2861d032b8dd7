"""Training, with a progress bar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from cryptonets.data import Digits, jiggle

BATCH = 64
PEAK_RATE = 3e-3


def train(network: nn.Sequential, digits: Digits, *, epochs: int, console: Console) -> None:
    """Trains `network` in place and leaves it in eval mode.

    Two squares make the logits a polynomial of degree four in the pixels, so one bad step could
    throw the weights far off. Three things keep training calm: a rate that warms up and dies out,
    clipped gradients, and smoothed labels, which leave no reason to drive the logits up.
    """
    batches = -(-len(digits.train_labels) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * batches)

    network.train()
    columns = (
        TextColumn("Training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, loss {task.fields[loss]:.3f},"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=epochs, loss=float("nan"))
        for _ in range(epochs):
            losses = []
            for batch in torch.randperm(len(digits.train_labels)).split(BATCH):
                logits = network(jiggle(digits.train_images[batch]))
                loss = F.cross_entropy(logits, digits.train_labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), max_norm=1.0)
                optimizer.step()
                rate.step()
                losses.append(loss.item())
            progress.update(bar, advance=1, loss=sum(losses) / len(losses))
    network.eval()
