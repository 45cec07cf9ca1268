"""Our training step behind the interface that `bench/gpu.py --against FILE` times; FILE is such a module:

    build(config_environment: dict[str, str], device: torch.device) -> step
    step(inputs: Tensor, targets: Tensor) -> Tensor

`config_environment` are settings as train_gpt.py reads them, the defaults are not in it. A step is one
forward and backward on int64 token ids (rows, length) on the device, clipping, and one update of all weights,
optimiser state and weight average; it returns the mean loss in nats. Rates are those of half the run, so the
loops are on if ENABLE_LOOPING_AT <= 0.5. Document starts are no argument: with LOADER=packed, attention stays
within documents, which begin at token 1 and are cut every TRAIN_SEQ_LEN tokens. They may be remembered from
one call to the next with the same `inputs`, because in training the loader's thread finds them.
"""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor

import train_gpt as t

PROGRESS = 0.5


class TrainStep:
    """The trainer's own objects for these settings, and one step of its training loop."""

    def __init__(self, environment: dict[str, str], device: torch.device):
        self.config = c = t.Config.from_env(environment)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.run = t.Run(c)
            self.built = t.build(self.run)
        if self.run.device.type != device.type:
            raise RuntimeError(f"the trainer runs on {self.run.device}, not on {device}")
        self.said = said.getvalue().splitlines()  # which attention, kernels and compilation, and why
        self.model, self.forward, compiled = self.built
        self.model.looped = c.num_loops > 0 and c.enable_looping_at <= PROGRESS
        self.optimizers = t.Optimizers(self.run, self.model, compiled)
        self.average = {
            name: weight.detach().float().clone() for name, weight in self.model.named_parameters()
        }
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def batch(self, inputs: Tensor, targets: Tensor) -> t.Batch:
        """The micro-batch with its document starts, if the loader packs."""
        c = self.config
        if c.loader != "packed":
            return t.Batch(inputs, targets)
        if id(inputs) not in self.known:
            starts = t.segment_starts(inputs.flatten().cpu().numpy(), c.train_seq_len)
            self.known[id(inputs)] = (
                inputs,
                starts.to(inputs.device),
            )  # it keeps `inputs`, so that the id stays its own
        return t.Batch(inputs, targets, self.known[id(inputs)][1], c.train_seq_len)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One step; the mean loss, on the device."""
        momentum_is_final = self.config.muon_momentum_warmup_steps
        batches = [self.batch(inputs, targets)]
        loss = t.train_step(self.run, self.forward, self.optimizers, batches, PROGRESS, momentum_is_final)
        t.update_ema(self.average, self.model, self.config.ema_decay)
        return loss


def build(config_environment: dict[str, str], device: torch.device) -> TrainStep:
    """Our step for these settings on this device."""
    return TrainStep(config_environment, device)
