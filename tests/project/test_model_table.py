"""docs/models.md says what the code does: it is made from timm's registry and the code's own families and refusals."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from places import REPOSITORY

from lambda_kernels.blocks.refusals import refused_classes

sys.path.insert(0, str(REPOSITORY / "docs"))

from models_page import Row, Table, page, scan

pytestmark = pytest.mark.models

PAGE = REPOSITORY / "docs" / "models.md"
WRITTEN_FOR = "1.0.31"


@pytest.fixture(scope="module")
def table() -> Table:
    if timm.__version__ != WRITTEN_FOR:
        pytest.skip(f"docs/models.md lists the models of timm {WRITTEN_FOR}; this is {timm.__version__}")
    return scan()


@pytest.mark.slow
def test_the_page_is_current(table):
    wanted = page(table, WRITTEN_FOR)
    assert PAGE.read_text(encoding="utf-8") == wanted, "run: python docs/models_page.py > docs/models.md"


@pytest.mark.slow
def test_every_entry_point_is_somewhere_once(table):
    listed = [name for rows in table.supported.values() for row in rows for name in row.names]
    listed += [name for _, names in table.refused.values() for name in names]
    listed += [name for names in table.others.values() for name in names]
    assert sorted(listed) == sorted(set(timm.list_models()) - set(timm.list_models(module="timm_models")))
    assert {title: sum(len(row.names) for row in rows) for title, rows in table.supported.items()} == {
        "vit": 198, "eva": 64, "beit": 7, "naflex": 14,
    }  # fmt: skip


@pytest.mark.slow
def test_no_class_is_refused_by_name_that_timm_does_not_have(table):
    containers = {name for name in refused_classes() if name.startswith("torch.")}
    # Blocks of models that are refused as a whole, before anybody looks at their blocks.
    inner = {"timm.models.gemma4_vit.Gemma4Block", "timm.models.deepseek_vit.DeepseekVitBlock"}
    assert set(refused_classes()) - containers - inner == set(table.refused)


@pytest.mark.slow
def test_nothing_with_attention_is_refused_by_the_sentence_for_all_others(table):
    with torch.device("meta"):
        for kind, names in table.others.items():
            kinds = {type(module).__name__ for module in timm.create_model(min(names, key=len)).modules()}
            assert not {name for name in kinds if "ttention" in name}, kind


def test_the_page_holds_what_a_table_holds():
    fused = Row("LayerNorm, exact GELU", "fused", ["vit_b_patch16_224", "vit_a"])
    fused.pooling["class token"], fused.notes["a note"] = 2, 1
    slow = Row("RmsNorm, SwiGLU", "mlp is SwiGLU, not Mlp", ["aim"])
    refusal = refused_classes()["timm.models.volo.VOLO"]
    text = page(
        Table({"vit": [fused, slow]}, {"timm.models.volo.VOLO": (refusal, ["volo_d1"])}, {"x": ["a", "b"]}), "9.9"
    )
    assert "By timm 9.9: 3 entry points" in text
    assert "## Plain ViTs: 3 entry points" in text
    assert "| LayerNorm, exact GELU | fused | 2 | `vit_b_patch16_224` | class token (2) | a note (1) |" in text
    assert "| RmsNorm, SwiGLU | PyTorch: mlp is SwiGLU, not Mlp | 1 | `aim` |" in text
    assert "`aim`, `vit_a`, `vit_b_patch16_224`" in text
    assert f"| `volo.VOLO` | 1 | `volo_d1` | {refusal.reason} | {refusal.instead} |" in text
    assert "The other 2 entry points" in text
