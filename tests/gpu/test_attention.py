"""Every attention backend against plain scaled dot products in fp32, dense and packed, with gradients."""

from __future__ import annotations

import pytest
import torch

import train_gpt as t
from bench import gpu_meter as m


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["fa3", "fa3_hub", "fa4", "fa2", "varlen", "sdpa"])
def test_backend(backend, packed, dry, meter, dtype):
    run = t.Run(t.Config.from_env({"COMPUTE_DTYPE": str(dtype).removeprefix("torch."), "ATTENTION": backend}))
    try:
        attend = t.pick_attention(run.config, run)
    except t.Stop as reason:
        pytest.skip(str(reason))
    length, longest = (96, 32) if dry else (4096, 1024)
    rows, heads, groups, size = (1 if packed else 2), 8, 4, 64
    q, k, v = (
        m.random_tensor((rows, length, n, size), i, meter.device, dtype).requires_grad_()
        for i, n in enumerate((heads, groups, groups))
    )
    starts = None
    if packed:
        tokens = m.random_text(m.document_lengths(200, seed=0) // (20 if dry else 2) + 2, 320, seed=1)[
            :length
        ]
        starts = t.segment_starts(tokens, longest).to(meter.device)
        assert len(torch.unique(starts)) > 4
    upstream = m.random_tensor(q.shape, 7, meter.device, dtype)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    ours, wanted = attend(q, k, v, starts, longest), t.attend_sdpa(*wide, starts, longest)
    assert ours.shape == wanted.shape and ours.dtype == dtype
    pairs = zip(
        [ours, *torch.autograd.grad(ours, (q, k, v), upstream)],
        [wanted, *torch.autograd.grad(wanted, wide, upstream.float())],
        strict=True,
    )
    for one, other in pairs:
        assert (one.float() - other).norm() < 2e-2 * other.norm()
