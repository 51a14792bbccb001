"""Documents side by side in a row are read as if each stood alone."""

import pytest
import torch
import torch.nn.functional as F

from components.model.attention import attend
from components.model.gpt import GPT, GPTConfig
from components.model.segments import attend_each, segments

LENGTHS = [[5, 1, 9, 17], [32], [3, 3, 20, 6], [1, 1, 30]]


def test_rows_of_documents_count_from_zero_and_come_back() -> None:
    where = segments([[2, 3, 1], [6]], 6)
    assert where.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert [rows.tolist() for rows in where.rows] == [[[6, 7, 8, 9, 10, 11]], [[2, 3, 4], [0, 1, 1]], [[5]]]
    assert where.back.tolist() == [9, 10, 6, 7, 8, 12, 0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"documents of \[2, 3\] tokens do not fill a row of 6"):
        segments([[2, 3]], 6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_attention_is_that_under_a_mask_of_blocks(kv_heads: int, window: int | None) -> None:
    q, k, v = (torch.randn(4, heads, 32, 8) for heads in (4, kv_heads, kv_heads))
    mask = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for n in lengths:
            for t in range(start, start + n):
                mask[row, 0, t, max(start, t + 1 - (window or 32)) : t + 1] = True
            start += n
    got = attend_each(q, k, v, segments(LENGTHS, 32), window)
    torch.testing.assert_close(got, attend(q, k, v, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny", "modern"])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_gradients_of_packed_and_of_single_documents_are_equal(
    kind: str, precision: torch.dtype, request: pytest.FixtureRequest
) -> None:
    config: GPTConfig = request.getfixturevalue(kind)
    model = GPT(config).to(precision)
    if model.smear is not None:
        torch.nn.init.normal_(model.smear)
    documents = [[torch.randint(0, 40, (n + 1,)) for n in row] for row in LENGTHS]

    ids = torch.stack([torch.cat([d[:-1] for d in row]) for row in documents])
    targets = torch.stack([torch.cat([d[1:] for d in row]) for row in documents])
    packed = model(ids, mask=segments(LENGTHS, 32), targets=targets)
    packed.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    alone = [[F.cross_entropy(model(d[None, :-1])[0], d[1:], reduction="none") for d in row] for row in documents]
    sum(nats.sum() for row in alone for nats in row).backward()
    torch.testing.assert_close(
        packed, torch.stack([torch.cat(row) for row in alone]).to(packed.dtype), rtol=1e-5, atol=1e-5
    )
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
