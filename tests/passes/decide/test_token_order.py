"""FFNs whose rows are as many as the padding mask's tokens, in another order: none of the tokens that it shows is left out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sptc.passes.find import returned as find_returned
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor
from tests.passes.decide.padded import rows
from tests.passes.ffns import CLASSES, D, Gated

Turn = Callable[[Tensor, Tensor], Tensor]  # of [batch, tokens, ...], given an order of the batch by length
Order = tuple[Turn, Turn | None]  # there, and back again; None: labels and logits are in that order as well


def _unsorted(x: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(x).index_copy(0, order, x)


def _rewritten(x: Tensor, _: Tensor) -> Tensor:
    x = x.clone()
    first = x[0].clone()
    x[0] = x[2]
    x[2] = first
    return x


ORDERS: dict[str, tuple[Order, str]] = {  # and the rows that the FFN computes
    "as they are": ((lambda x, _: x, lambda y, _: y), "visible"),
    "flat": ((lambda x, _: x.flatten(0, 1), lambda y, _: y.view(-1, 6, D)), "visible"),
    "there and back": ((lambda x, _: x.transpose(0, 1).transpose(0, 1), lambda y, _: y), "visible"),
    "tokens first": ((lambda x, _: x.transpose(0, 1), lambda y, _: y.transpose(0, 1)), "all"),
    "tokens first, flat": ((lambda x, _: x.transpose(0, 1).reshape(-1, D), lambda y, _: y.view(6, -1, D).transpose(0, 1)), "all"),
    "windows": (
        (
            lambda x, _: x.view(-1, 3, 2, D).transpose(1, 2).reshape(-1, D),
            lambda y, _: y.view(-1, 2, 3, D).transpose(1, 2).reshape(-1, 6, D),
        ),
        "all",
    ),
    "turned around": ((lambda x, _: x.flip(1), lambda y, _: y.flip(1)), "all"),
    "rolled": ((lambda x, _: x.roll(1, 1), lambda y, _: y.roll(-1, 1)), "all"),
    "sorted by length": ((lambda x, order: x[order], _unsorted), "all"),
    "written in another order, and labels": ((_rewritten, None), "all"),
    "of a dtype told by another": ((lambda x, _: x * torch.ones(D).type_as(x), lambda y, _: y), "visible"),
    "turned around, and labels": ((lambda x, _: x.flip(1), None), "all"),
    "sorted by length, and labels": ((lambda x, order: x[order], None), "all"),
}  # fmt: skip

EMBEDDED: dict[str, tuple[Callable[[nn.Embedding, Tensor, Tensor], Tensor], str]] = {
    "ids": (lambda e, ids, _: e(ids), "visible"),
    "ids that are clamped": (lambda e, ids, _: e(ids.clamp(max=17)), "visible"),
    "ids and their positions": (lambda e, ids, _: e(ids) + e((ids != 0).long().cumsum(1) % 20), "visible"),
    "ids and positions that the mask tells": (lambda e, ids, mask: e(ids) + e(mask.cumsum(1)), "visible"),
    "ids and a table of types": (lambda e, ids, _: e(ids) + e(torch.arange(20)[None].expand(6, -1).gather(1, ids)), "visible"),
    "ids without a lookup": (lambda e, ids, _: F.one_hot(ids, 20).to(e.weight.dtype) @ e.weight, "all"),
    "ids turned around, beside positions": (lambda e, ids, _: e(ids.flip(1)) + e(ids), "all"),
    "ids in an order of their own": (lambda e, ids, _: e(ids.gather(1, ids.argsort(1))), "all"),
    "ids turned, that are square": (lambda e, ids, _: e(ids.t()), "all"),
}


class Ordered(nn.Module):
    """Attention that hides padding, an FFN in some order, and logits that are returned beside the loss."""

    def __init__(self, order: Order, embed: Callable[[nn.Embedding, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.norm, self.ffn, self.head = nn.Embedding(20, D), nn.LayerNorm(D), Gated(), nn.Linear(D, CLASSES)
        self.there, self.back = order
        self.embed = embed

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(self.table, ids, mask)
        q = x[:, None]
        x = x + F.scaled_dot_product_attention(q, q, q, attn_mask=mask[:, None, None].bool())[:, 0]
        order = mask.sum(1).argsort()
        x = self.there(x, order)
        x = x + self.ffn(self.norm(x))
        if self.back is None:
            labels = self.there(labels, order)
        else:
            x = self.back(x, order)
        logits = self.head(x)
        return F.cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1)), logits


def assert_visible_as_dense(model: Ordered, want: str) -> None:
    """The batch is a square, so that no size tells tokens from sequences."""
    torch.manual_seed(0)
    ids, mask = torch.randint(1, 18, (6, 6)), torch.ones(6, 6, dtype=torch.long)
    for sequence, length in enumerate((6, 2, 5, 3, 6, 1)):
        mask[sequence, length:] = 0
    labels = torch.randint(CLASSES, (6, 6)).masked_fill((mask == 0) | (torch.rand(6, 6) < 0.5), -100)
    reference = copy.deepcopy(model).double()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    found = []
    for call in (compiled, reference):
        loss, logits = call(ids, mask, labels)
        seen = logits[(model.there(mask, mask.sum(1).argsort()) if model.back is None else mask).bool()]
        found.append((seen, gradients(compiled if call is compiled else reference, loss + seen.square().mean())))
    assert rows(compiled) == [want]
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=1e-5, atol=1e-5)
    assert_gradients_close(*({name.removeprefix("_orig_mod."): g for name, g in each.items()} for _, each in found))


@pytest.fixture(autouse=True)
def small_logits_are_returned_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_returned, "_LEAST", 0)


@pytest.mark.parametrize("name", ORDERS)
def test_rows_in_another_order_than_the_masks(name: str) -> None:
    torch.manual_seed(0)
    order, want = ORDERS[name]
    assert_visible_as_dense(Ordered(order, EMBEDDED["ids"][0]), want)


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_tokens_are_embedded_by(name: str) -> None:
    torch.manual_seed(0)
    embed, want = EMBEDDED[name]
    assert_visible_as_dense(Ordered(ORDERS["as they are"][0], embed), want)
