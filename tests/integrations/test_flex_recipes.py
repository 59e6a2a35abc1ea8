"""The table of flex_attention recipes in docs/guide/migrate.md: each row, both sides.

Values against flex_attention itself, which has no backward on the CPU; gradients against the same
mods applied to the whole score matrix.
"""

import re
from pathlib import Path

import pytest
import torch
from closeness import FLOAT32, assert_close
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_ext

TEXT = (Path(__file__).parents[2] / "docs" / "guide" / "migrate.md").read_text()
TABLE = TEXT[TEXT.index("## flex_attention recipes") :]
B, H, S, D = 2, 4, 12, 8


def rows_of(table: str) -> dict:
    """recipe -> (mask_mod, score_mod, arguments), code or ""."""
    rows = {}
    for line in table.splitlines():
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0] not in ("recipe", "---"):
            rows[cells[0]] = [c.strip("`").replace("\\|", "|") for c in cells[1:]]
    return rows


RECIPES = rows_of(TABLE)


def test_the_table_is_read():
    """A changed table that leaves the test below without cases."""
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_recipe(recipe):
    """A recipe that says something else than flex_attention does."""
    mask_code, score_code, arguments = RECIPES[recipe]
    if torch.__version__ < (2, 7) and "bias[" in score_code:
        pytest.skip("flex_attention of torch 2.6 cannot trace a bias of four dimensions")
    few = "Sk - Sq" in mask_code or "Sq unlike Sk" in recipe
    names = dict(
        torch=torch, Sk=S, Sq=5 if few else S, lengths=torch.tensor([5, 12]),
        doc=torch.tensor([0] * 4 + [1] * 7 + [2]), bias=torch.randn(B, H, S, S),
        table=torch.randn(H, 2 * S), slopes=torch.rand(H),
    )  # fmt: skip
    names |= dict(rows=torch.arange(names["Sq"])[:, None], cols=torch.arange(S))
    q, k, v = (torch.randn(B, H, n, D, requires_grad=True) for n in (names["Sq"], S, S))
    make = lambda parameters, code: eval(f"lambda {parameters}: {code}", names)  # noqa: E731
    mask = make("b, h, i, j", mask_code) if mask_code else None
    score = make("s, b, h, i, j", score_code) if score_code else None
    block = mask and create_block_mask(mask, B, H, names["Sq"], S, device="cpu")
    theirs = flex_attention(q.detach(), k.detach(), v.detach(), score_mod=score, block_mask=block)
    given = eval(f"dict({arguments})", names | dict(q=q))
    ours = attn_ext.attention(given.pop("q", q), k, v, **given)
    assert_close(ours, theirs, FLOAT32)

    grid = torch.meshgrid(*map(torch.arange, (B, H, names["Sq"], S)), indexing="ij")
    s = q @ k.transpose(-1, -2) * D**-0.5
    s = score(s, *grid) if score else s
    s = s.masked_fill(~mask(*grid), -torch.inf) if mask else s
    whole = torch.softmax(s, dim=-1) @ v
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((whole * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert_close(a, b, FLOAT32)
