"""Models, batches and matrices drawn at random, and how far apart two tensors are."""

from __future__ import annotations

import torch
from torch import Tensor

import train_gpt as t


def perturbed(model: t.GPT, scale: float) -> t.GPT:
    """`model` itself, with normal noise of that scale added to every parameter: none is neutral any more."""
    for parameter in model.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return model


def tokens(config: t.Config, rows: int = 2, length: int = 32, seed: int = 0) -> t.Batch:
    """Random ids without BOS."""
    ids = torch.randint(
        4, config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(seed)
    )
    return t.Batch(ids[:, :-1], ids[:, 1:])


def random_matrix(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight matrix and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over that of the second."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
