"""Kept tokens are taken out of a forward and put back where they were."""

from __future__ import annotations

import pytest
import torch

from router_tuning.execution.places import Places

MASKS = {
    "some": [[True, False, True], [False, True, True]],
    "one row": [[False, True, True]],
    "none": [[False, False, False]],
    "all": [[True, True, True], [True, True, True]],
}


@pytest.mark.parametrize("name", MASKS)
def test_what_is_picked_is_what_stands_there(name: str) -> None:
    mask_BT = torch.tensor(MASKS[name])
    places = Places.where(mask_BT, torch.device("cpu"))
    x_BTHD = torch.randn(*mask_BT.shape, 2, 4)
    assert torch.equal(places.pick(x_BTHD), x_BTHD[mask_BT])
    assert torch.equal(places.flat(x_BTHD), x_BTHD[mask_BT][None])
    shared_1TD = torch.randn(1, mask_BT.shape[1], 4)  # of all rows
    wanted = shared_1TD.expand(len(mask_BT), -1, -1)[mask_BT]
    assert torch.equal(places.pick(shared_1TD), wanted)
    transposed = torch.randn(mask_BT.shape[1], mask_BT.shape[0], 4).transpose(0, 1)
    assert torch.equal(places.pick(transposed), transposed[mask_BT])


@pytest.mark.parametrize("name", MASKS)
def test_what_is_put_back_has_zeros_elsewhere(name: str) -> None:
    mask_BT = torch.tensor(MASKS[name])
    places = Places.where(mask_BT, torch.device("cpu"))
    x_BTD = torch.randn(*mask_BT.shape, 4)
    assert torch.equal(places.put(places.pick(x_BTD)), x_BTD * mask_BT[..., None])


def test_gradients_go_to_their_tokens() -> None:
    mask_BT = torch.tensor(MASKS["some"])
    places = Places.where(mask_BT, torch.device("cpu"))
    x_BTD = torch.randn(2, 3, 4, requires_grad=True)
    places.put(places.pick(x_BTD)).sum().backward()
    assert x_BTD.grad is not None
    assert torch.equal(x_BTD.grad, mask_BT[..., None].float().expand(2, 3, 4))
