"""Fresh routers keep everything, and each of their parameters can learn."""

from __future__ import annotations

import pytest
import torch

from router_tuning.config import ROUTERS, RoutingConfig
from router_tuning.routers import make_router

HIDDEN = 12
every_router = pytest.mark.parametrize("kind", ROUTERS)


def router(kind: str) -> torch.nn.Module:
    return make_router(RoutingConfig(router=kind, router_hidden=5, init_bias=0.7), HIDDEN)


@every_router
def test_a_fresh_router_gives_one_positive_logit_everywhere(kind: str) -> None:
    logits = router(kind)(torch.randn(2, 7, HIDDEN))
    assert torch.equal(logits, torch.full((2, 7), 0.7))


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_fp32_whatever_the_model_computes_in(kind: str, dtype: torch.dtype) -> None:
    fresh = router(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fresh(torch.randn(2, 7, HIDDEN).to(dtype)).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in fresh.parameters())


@every_router
def test_every_parameter_learns(kind: str) -> None:
    one = router(kind)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, HIDDEN, generator=generator)
    optimizer = torch.optim.Adam(one.parameters(), lr=0.1)
    before = [p.detach().clone() for p in one.parameters()]
    for _ in range(3):  # a bottleneck's first layer learns once its last has left zero
        optimizer.zero_grad()
        (one(x) * torch.randn(2, 7, generator=generator)).sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(one.parameters(), before, strict=True))


def test_a_bias_router_does_not_see_its_input() -> None:
    one = router("bias")
    assert sum(p.numel() for p in one.parameters()) == 1
    assert torch.equal(one(torch.randn(1, 3, HIDDEN)), one(torch.zeros(1, 3, HIDDEN)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_token_alone_has_the_logit_that_it_has_among_others(dtype: torch.dtype) -> None:
    one = router("linear")
    torch.nn.init.normal_(next(one.parameters()), generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    alone = torch.cat([one(x[:, i : i + 1]) for i in range(7)], dim=1)
    assert alone.dtype == torch.float32
    torch.testing.assert_close(alone, one(x), rtol=0, atol=1e-5)
