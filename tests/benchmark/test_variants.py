"""What is compared, and mistakes in saying so."""

from __future__ import annotations

import pytest
import torch

from sptc.benchmark.variants import BenchError, Variant, chosen, default_variants, fast_products, kind_variants, own_variants, parse_options
from sptc.config import Config, ConfigError

CPU = torch.device("cpu")


def test_a_variant_on_the_command_line():
    assert parse_options('half={"ffn.density": 0.5}', "spt") == ("half", {"ffn.density": 0.5})
    assert parse_options(' a = {"exclude": ["x=y"]}', "spt") == ("a", {"exclude": ["x=y"]}), "only the first equals sign parts"


@pytest.mark.parametrize(
    "text, says",
    [
        ("half", "has no name: write NAME="),
        ('={"ffn.density": 0.5}', "has no name"),
        ("half={ffn.density: 0.5}", "is no JSON"),
        ("half=0.5", "are a JSON object, not '0.5'"),
    ],
)
def test_a_malformed_variant(text, says):
    with pytest.raises(BenchError, match=says):
        parse_options(text, "spt")


def test_options_are_checked_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean 'ffn\.density'"):
        own_variants("spt", {"half": {"ffn.densty": 0.5}}, "highest")
    with pytest.raises(ConfigError, match="cannot read"):
        own_variants("spt", {"planned": {"plan": str(tmp_path / "none.json")}}, "highest")
    with pytest.raises(ConfigError, match="cannot read"):
        default_variants(CPU, "fp32", str(tmp_path / "none.json"))
    with pytest.raises(BenchError, match="no option 'epilog_fusion'; did you mean 'epilogue_fusion'"):
        own_variants("inductor", {"plain": {"epilog_fusion": False}}, "highest")
    (variant,) = own_variants("inductor", {"plain": {"epilogue_fusion": False}}, "medium")
    assert variant == Variant("plain", "inductor", {"epilogue_fusion": False}, precision="medium") and variant.dense and variant.exact


def test_which_are_run():
    variants = default_variants(CPU, "bf16")
    assert [v.name for v in variants] == ["eager", "inductor", "spt-density-1", "spt"], "products in bf16 are oneDNN's already"
    assert [v.exact for v in variants] == [True, True, True, False]
    assert chosen(variants, None) == variants
    assert [v.name for v in chosen(variants, ["spt", "eager"])] == ["eager", "spt"]
    with pytest.raises(BenchError, match="no variant 'spt-density1'; did you mean 'spt-density-1'"):
        chosen(variants, ["spt-density1", "eager"])
    with pytest.raises(BenchError, match="no dense variant"):
        chosen(variants, ["spt"])
    with pytest.raises(BenchError, match="two variants are called 'spt'"):
        chosen([*variants, Variant("spt", "spt")], None)


def test_fp32_by_onednn_is_taken_only_where_it_stays_fp32(monkeypatch):
    before = torch.get_float32_matmul_precision()
    assert fast_products(CPU, "bf16") == "highest"
    exact = fast_products(CPU, "fp32")
    assert torch.get_float32_matmul_precision() == before
    names = [v.name for v in default_variants(CPU, "fp32")]
    assert ("inductor-best" in names) == (exact == "medium")
    cut = torch.Tensor.__matmul__

    def as_with_amx(a, b):
        narrow = a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        return cut(a.bfloat16(), b.bfloat16()).float() if narrow else cut(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", as_with_amx)
    assert fast_products(CPU, "fp32") == "highest"


def test_what_a_gpu_is_compared_with():
    best = {v.name: v for v in default_variants(torch.device("cuda"), "bf16")}["inductor-best"]
    assert best.mode == "max-autotune-no-cudagraphs" and best.precision == "high"


def test_each_kind_of_region_has_a_variant_that_rewrites_it_alone():
    enabled = {
        variant.name: [kind for kind in ("attention", "ffn", "loss") if getattr(Config.from_options(variant.options), f"{kind}_enabled")]
        for variant in kind_variants("highest")
    }
    assert enabled == {"spt-attention": ["attention"], "spt-ffn": ["ffn"], "spt-loss": ["loss"]}
