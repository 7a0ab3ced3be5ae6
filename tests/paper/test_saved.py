"""Trained state in a file of its own: what is wrong with it is said, and nothing was changed then."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sptc
from sptc.paper.state import Codebook, DenseNotice, Router, TrainableState, attach


def prepared(width: int = 4, seed: int = 0, books: bool = True) -> nn.Module:
    """Two owners, a router and codebooks each, as `prepare` leaves them."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear(width, width) for name in ("a", "b")})
    notice = DenseNotice()
    for owner in model.values():
        stand_in = (torch.randn(1, width), torch.randn(width, 1), torch.randn(width))
        slots = {"ffn0": Router((torch.randn(2, width), torch.randn(2)), stand_in, "down.weight")}
        attach(owner, TrainableState({**slots, **({"attention0": Codebook(torch.randn(3, 2, 16, 8))} if books else {})}, notice))
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(model: nn.Module, want: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def test_state_goes_from_model_to_model(tmp_path: Path) -> None:
    """In place: an optimizer and a compiled graph keep the tensors that they hold. The model's own weights stay."""
    trained, fresh = prepared(seed=0), prepared(seed=1)
    held = {name: tensor.data_ptr() for name, tensor in fresh.state_dict().items()}
    own = fresh["a"].weight.detach().clone()
    sptc.save_state(trained, tmp_path / "state.safetensors")
    sptc.load_state(fresh, tmp_path / "state.safetensors")
    assert {name: tensor.data_ptr() for name, tensor in fresh.state_dict().items()} == held
    assert torch.equal(fresh["a"].weight, own)
    state = {name: tensor for name, tensor in tensors(trained).items() if ".spt." in name}
    assert state and all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in state.items())
    assert set(load_file(tmp_path / "state.safetensors")) == {name.replace(".spt.", ".") for name in state}


def test_state_of_an_adapted_model_has_the_same_names(tmp_path: Path) -> None:
    """A PeftModel holds the state in a wrapper of its own."""
    from tests.stack.matrix import PAPER
    from tests.stack.models import batch, llama, lora

    model = lora(llama())
    sptc.prepare(model, batch(), PAPER)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".spt." in name:
                p.add_(1)
    assert not equal(twin, tensors(model))
    sptc.save_state(model, tmp_path / "state")
    sptc.load_state(twin, tmp_path / "state")
    active = {name: tensor for name, tensor in tensors(model).items() if "original_module" not in name}
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in active.items())
    assert not any("modules_to_save" in name for name in load_file(tmp_path / "state"))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def pickled(path: Path) -> None:
    torch.save({"a.ffn0.weight": torch.zeros(2, 4)}, path)


def without_schema(path: Path) -> None:
    save_file(load_file(path), path)


def shorter(path: Path) -> None:
    left = load_file(path)
    del left["b.ffn0.bias"]
    save_file(left, path, metadata={"schema": "sptc-state-1"})


@pytest.mark.parametrize(
    "spoil, sentence",
    [(truncated, "cut off"), (pickled, "no safetensors file"), (without_schema, "its schema is None"), (shorter, "it lacks b.ffn0.bias")],
)
def test_a_file_that_is_none_of_ours_changes_nothing(spoil, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    sptc.save_state(prepared(seed=0), path)
    spoil(path)
    model = prepared(seed=1)
    before = tensors(model)
    with pytest.raises(sptc.StateError, match=sentence):
        sptc.load_state(model, path)
    assert equal(model, before)


@pytest.mark.parametrize(
    "other, sentence",
    [
        (lambda: prepared(width=6), r"a.ffn0.weight is \[2, 4\] .* the model's is \[2, 6\]"),
        (lambda: prepared(books=False), "which the model has not"),
        (lambda: prepared().to(torch.bfloat16), "in torch.float32, the model's is .* in torch.bfloat16"),
        (lambda: nn.Linear(4, 4), "holds no trained state"),
    ],
)
def test_another_model_is_not_changed(other, sentence: str, tmp_path: Path) -> None:
    sptc.save_state(prepared(), tmp_path / "state")
    model = other()
    before = tensors(model)
    with pytest.raises(sptc.StateError, match=sentence):
        sptc.load_state(model, tmp_path / "state")
    assert equal(model, before)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    sptc.save_state(prepared(seed=0), path)
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="no space"):
        sptc.save_state(prepared(seed=1), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["state"]
