"""Random inputs that tests of several rooms share."""

import torch


def leaves(seqlen_q=5, seqlen_k=9, device="cpu", dtype=torch.float32):
    shapes = (
        (2, 4, seqlen_q, 8),
        (2, 2, seqlen_k, 8),
        (2, 2, seqlen_k, 6),
        (4, seqlen_q, seqlen_k),
        (4,),
    )
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
