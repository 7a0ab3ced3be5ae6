"""The GPU run (`make gpu`) at tiny sizes on this machine: whatever of it needs no GPU."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench.kernels import ahead, attention, check, ffn, gpu, steps, tuning
from bench.kernels.cases import AttentionCase, FfnCase, attention_operands
from bench.kernels.warm import warm
from sptc.codegen.target import KNOWN
from sptc.codegen.tiling import asking

CPU = torch.device("cpu")
CHECKED = (
    AttentionCase("causal", 1, 37, 2, 1, 16, "causal", density=0.5, query_block=16, key_block=8),
    AttentionCase("padding", 2, 33, 2, 2, 16, "padding", density=0.5, query_block=16, key_block=8, dropout=0.2, selector="pooled"),
    FfnCase("LoRA", 9, 16, 32, "u1*silu(u0)", bias=False, lora=4, weights_train=True, blocks=4, active=2),
    FfnCase("Conv1D", 7, 16, 32, "gelu_tanh(u0)", bias=True, conv1d=True, weights_train=True, blocks=4, active=2, dropout=0.2),
)


def plan(**changes):
    small = gpu.Plan(CPU, torch.float32, CHECKED, [attention.small()], [ffn.small()], [ffn.small()], rounds=1, minutes=5.0)
    return replace(small, **changes)


def test_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "results" / "gpu.json"
    results = gpu.execute(plan(), path)
    gpu.print_tables(results)
    printed = capsys.readouterr().out
    assert results.passed, printed
    assert "0 wrong" in printed and "over flash" in printed and "over dense" in printed and "torch.mm TFLOP/s" in printed
    written = json.loads(path.read_text())
    assert written["machine"]["commit"] and written["machine"]["triton"] and written["seconds"] > 0
    tensors = {row["tensor"] for row in written["checks"]}
    assert tensors >= {
        "lists",
        "code_sums",
        "lse",
        "out",
        "q",
        "k",
        "v",
        "y",
        "low_out",
        "x",
        "up0",
        "up1",
        "low1",
        "B0",
        "down",
        "A",
        "scale",
    }
    assert {row["kernel"] for row in written["products"]} == {"ffn_up", "ffn_grad_hidden", "grouped_product", "grouped_outer"}
    assert [path.name for path in path.parent.iterdir()] == ["gpu.json"]


def test_what_goes_wrong_is_reported(tmp_path, capsys, monkeypatch):
    def fails(case, device, dtype):
        if case.name == "LoRA":
            raise RuntimeError("no such kernel")
        return [
            check.Check(case.name, "out", 0.5, 0.1),
            check.Check(case.name, "q", float("nan"), 0.1),
            check.Check(case.name, "k", 0.1, 0.1),
        ]

    monkeypatch.setattr(check, "check", fails)
    results = gpu.execute(plan(attention=(), ffn=(), products=()), tmp_path / "gpu.json")
    assert not results.passed
    gpu.print_tables(results)
    printed = capsys.readouterr().out
    assert "FAILED check: LoRA: RuntimeError: no such kernel" in printed and "6 wrong" in printed
    late = gpu.execute(plan(minutes=-1.0), tmp_path / "gpu.json")
    assert not late.passed and not late.checks and len(late.not_run) == len(CHECKED) + 3


def test_errors_are_found(monkeypatch):
    """A wrong gradient, or lists of other blocks, must not pass."""
    right = steps.attend

    def wrong(case, o, *lists):
        out, lse = right(case, o, *lists)
        return out + 1e-3 * o.v.sum(), lse

    monkeypatch.setattr(steps, "attend", wrong)
    failed = {c.tensor for c in check.check(CHECKED[0], CPU, torch.float32) if not c.passed}
    assert "v" in failed and "out" in failed and "q" not in failed


def test_flex_attention_gets_the_same_lists():
    case = replace(attention.small(), length=96, kv_heads=2, density=0.7)
    o = attention_operands(case, CPU, torch.float32)
    ids, counts, *_ = steps.select(case, o)
    mask = attention.block_mask(case, ids, counts)
    seen = mask.to_dense().repeat_interleave(case.query_block, 2).repeat_interleave(case.key_block, 3).bool()
    causal = torch.ones(case.length, case.length, dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(o.q, o.k, o.v, attn_mask=seen & causal, scale=case.scale)
    torch.testing.assert_close(out, steps.attend(case, o, ids, counts)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(mask.kv_num_blocks + mask.full_kv_num_blocks, counts)
    whole = mask.full_kv_indices[0, 0, -1, : int(mask.full_kv_num_blocks[0, 0, -1])]
    assert len(whole) and (whole + 1).max() * case.key_block <= case.length - case.query_block + 1


@pytest.mark.parametrize("case", [attention.small(), ffn.small()], ids=["attention", "ffn"])
def test_tuning_asks_every_table_of_the_launchers(case, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with asking() as asked:
        tuning.step(case, CPU, torch.float32)()
    templates = {question.table.template for question in asked}
    assert templates >= ({"attention_forward", "attention_backward_q", "attention_backward_kv"} if case is attention.small() else set())
    assert len(templates) >= 3


@pytest.mark.parametrize("case", [ffn.small(), replace(ffn.small(), activation="u1*silu(u0)", bias=False, lora=0, scaled=False)], ids=str)
def test_both_forms_of_the_ffn_compile_whole(case):
    """As they are timed; and with every block active and no scale they are the same function."""
    model = ffn.Model(replace(case, active=case.blocks, scaled=False), CPU, torch.float32)
    forms = [torch.compile(form, backend="aot_eager", fullgraph=True) for form in (model.dense, model.routed)]
    dense, routed = ([y, *torch.autograd.grad(y, model.leaves, model.o.grad_y)] for y in (form() for form in forms))
    torch.testing.assert_close(dense, routed, rtol=1e-4, atol=1e-4)


def test_kernels_are_compiled_beforehand(tmp_path, monkeypatch):
    """In other processes, into the cache that a run looks into; a case that fails there does not stop the others."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wrong = replace(ffn.small(), name="wrong", activation="u0 +")
    errors = warm([wrong, ffn.small()], KNOWN["sm_90"], torch.float16, processes=1)
    assert [type(error).__name__ for error in errors] == ["ExpressionError"]
    templates = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert templates >= {"ffn_up", "grouped_product", "ffn_grad_hidden", "gather_sum"}


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.run(None, "", 1.0) == 2 and tuning.run("") == 2
    assert capsys.readouterr().err.count("torch sees none") == 2


def test_every_template_is_checked_on_the_gpu():
    """The cases of the run reach every kernel that there is."""
    reached = {launch.spec.template for case in check.CASES for launch in ahead.launches(case, KNOWN["sm_90"])}
    assert reached == ahead.templates()
