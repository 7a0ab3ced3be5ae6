"""Tokens that count in the loss get more blocks: what the pass reads of the loss, and what the routes are then given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss

import sptc
from sptc.ir.region import Counted
from sptc.passes.find.counted import find_counted
from tests.capture import capture
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor
from tests.models.zoo import CASES, VOCABULARY

DEFAULT = {"attention.enabled": False, "decline": "never", "ffn.selector": "router"}
OPTIONS = {**DEFAULT, "ffn.keep": "loss"}  # given, so that the report says what can't be read
Routes = list[tuple[Tensor | None, list[int]]]


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Routes:
    """Of each route that runs: the mask it is given, and how many blocks it gives each token."""
    from sptc.codegen.ops import route

    seen: Routes = []
    choose = route._chosen_pairs

    def watched(scores: Tensor, active: int, keep: Tensor | None) -> Tensor:
        pairs = choose(scores, active, keep)
        assert pairs.sum() == len(scores) * active
        seen.append((keep, pairs.sum(0).tolist()))
        return pairs

    monkeypatch.setattr(route, "_chosen_pairs", watched)
    return seen


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """With labels at few positions, other ones in each row."""
    model, inputs = CASES["llama-sdpa"].make()
    labels = inputs["labels"]
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[0, :3] = keep[0, -1] = keep[1, 5] = True
    return model, {**inputs, "labels": labels.masked_fill(~keep, -100)}


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.loss(self.model(input_ids=input_ids).logits, labels)


def shifted(labels: Tensor) -> Tensor:
    return torch.cat([labels[:, 1:] != -100, torch.zeros_like(labels[:, :1], dtype=torch.bool)], 1).flatten()


def plain(labels: Tensor) -> Tensor:
    return (labels != -100).flatten()


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "cut off": (lambda y, t: cross_entropy(y[:, :-1].flatten(0, 1), t[:, 1:].flatten(), reduction="sum"), shifted),
    "classes second": (lambda y, t: cross_entropy(y[:, :-1].transpose(1, 2), t[:, 1:]), shifted),
    "scaled, then cut off": (lambda y, t: cross_entropy((y / 2.0)[..., :-1, :].reshape(-1, VOCABULARY), t[:, 1:].flatten()), shifted),
    "nll": (lambda y, t: nll_loss(log_softmax(y[:, :-1].flatten(0, 1), -1), t[:, 1:].reshape(-1)), shifted),
    "no shift": (lambda y, t: cross_entropy(y.flatten(0, 1), t.flatten()), plain),
    "ignored by another number": (lambda y, t: cross_entropy(y.flatten(0, 1), t.masked_fill(t == -100, 7).flatten(), ignore_index=7),
                                  lambda t: ((t != -100) & (t != 7)).flatten()),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_mask_of_a_loss(name: str, dynamic: bool, routes: Routes) -> None:
    loss, mask = LOSSES[name]
    model, inputs = llama()
    inputs = {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}
    compiled = torch.compile(WithLoss(model, loss), backend=without_inductor(**OPTIONS), dynamic=dynamic)
    for short in (0, 4) if dynamic else (0,):
        routes.clear()
        cut = {key: value[:, short:] for key, value in inputs.items()}
        compiled(**cut).backward()
        wanted = mask(cut["labels"])
        assert len(routes) == 2 and not sptc.report(compiled).notes[1:]
        for keep, amounts in routes:
            assert keep is not None and torch.equal(keep, wanted)
            kept = [n for n, flag in zip(amounts, wanted.tolist(), strict=True) if flag]
            others = [n for n, flag in zip(amounts, wanted.tolist(), strict=True) if not flag]
            assert set(kept) == {16} and 4 <= min(others) <= max(others) <= 8


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_hugging_faces_loss(checkpointed: bool, dynamic: bool, routes: Routes) -> None:
    model, inputs = llama()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    compiled = torch.compile(model, backend=without_inductor(**OPTIONS), dynamic=dynamic)
    compiled(**inputs).loss.backward()
    assert len(routes) == 2  # a checkpoint keeps what was chosen
    assert all(keep is not None and torch.equal(keep, shifted(inputs["labels"])) for keep, _ in routes)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_at_density_one_it_is_dense() -> None:
    model, inputs = llama()
    want = gradients(model, model(**inputs).loss)
    compiled = torch.compile(model, backend=without_inductor(**FULL, **{"ffn.selector": "router", "ffn.keep": "loss"}))
    assert_gradients_close(gradients(model, compiled(**inputs).loss), want)


def test_a_prepared_model(routes: Routes) -> None:
    model, inputs = llama()
    sptc.prepare(model, inputs, options=DEFAULT)
    compiled = torch.compile(model, backend=without_inductor(**OPTIONS))
    routes.clear()
    compiled(**inputs).loss.backward()
    assert routes and all(keep is not None and torch.equal(keep, shifted(inputs["labels"])) for keep, _ in routes)


def in_place(y: Tensor, t: Tensor) -> Tensor:
    t = t.clone()
    t[:, 0] = -100
    return cross_entropy(y.flatten(0, 1), t.flatten())


REFUSED = {
    "2 cross entropies": lambda y, t: cross_entropy(y.flatten(0, 1), t.flatten()) + cross_entropy(y[:, 0], t[:, 0]),
    "in place": in_place,
    "probabilities": lambda y, t: cross_entropy(y.flatten(0, 1), y.detach().softmax(-1).flatten(0, 1)),
    "the model's parameters or buffers": lambda y, t: cross_entropy(y.flatten(0, 1), y.argmax(-1).flatten()),
    "not a constant": lambda y, t: cross_entropy(y[:, ::2].flatten(0, 1), t[:, ::2].flatten()),
    "not those of the loss": lambda y, t: cross_entropy(y[:, 0], t[:, 0]),  # one label a sequence
    "no cross entropy": lambda y, t: y,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_known_is_said(reason: str, routes: Routes, caplog: pytest.LogCaptureFixture) -> None:
    torch._logging.warning_once.cache_clear()
    model, inputs = llama()
    compiled = torch.compile(WithLoss(model, REFUSED[reason]), backend=without_inductor(**OPTIONS))
    with caplog.at_level(logging.WARNING, "sptc"):
        compiled(inputs["input_ids"], inputs["labels"])
    assert [keep for keep, _ in routes] == [None, None]
    (note,) = (note for note in sptc.report(compiled).notes if "ffn.keep" in note)
    assert reason in note and "2 FFN regions route all tokens alike" in note
    assert [r.getMessage() for r in caplog.records].count(note) == 1


def test_it_is_the_default_and_can_be_turned_off(routes: Routes) -> None:
    model, inputs = llama()
    for options, masks in ((DEFAULT, [shifted(inputs["labels"])] * 2), ({**OPTIONS, "ffn.keep": None}, [None, None])):
        torch.compile(model, backend=without_inductor(**options))(**inputs)
        torch.testing.assert_close([keep for keep, _ in routes], masks)
        routes.clear()
        torch.compiler.reset()


def test_by_default_a_loss_that_cannot_be_read_is_no_news(routes: Routes) -> None:
    model, inputs = llama()
    compiled = torch.compile(WithLoss(model, REFUSED["2 cross entropies"]), backend=without_inductor(**DEFAULT))
    compiled(inputs["input_ids"], inputs["labels"])
    assert [keep for keep, _ in routes] == [None, None]
    assert not any("ffn.keep" in note for note in sptc.report(compiled).notes)


def test_evaluation_has_nothing_to_say_and_labels_have_no_say(routes: Routes) -> None:
    model, inputs = llama()
    options = {**OPTIONS, "inference": "sparse"}
    for loss in (lambda y, t: y, lambda y, t: cross_entropy(y[:, :-1].flatten(0, 1), t[:, 1:].flatten())):
        compiled = torch.compile(WithLoss(model.eval(), loss), backend=without_inductor(**options))
        with torch.no_grad():
            compiled(inputs["input_ids"], inputs["labels"])
        assert [keep for keep, _ in routes] == [None, None]
        assert not any("ffn.keep" in note for note in sptc.report(compiled).notes)
        routes.clear()


def test_reading_changes_nothing() -> None:
    model, inputs = llama()
    (captured,) = capture(model, inputs)
    before = [node.format_node() for node in captured.gm.graph.nodes]
    counted = find_counted(captured.gm)
    assert isinstance(counted, Counted) and isinstance(captured.gm, fx.GraphModule)
    assert [node.format_node() for node in captured.gm.graph.nodes] == before
