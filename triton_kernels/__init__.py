"""Triton kernels.  They import as `attn_ext.triton_kernels` only: OpenAI's Triton ships a
`triton_kernels` of its own."""

if __name__ != "attn_ext.triton_kernels":
    raise ImportError(
        f"this folder must be imported as attn_ext.triton_kernels, not as {__name__!r}; "
        "install the project (pip install -e .) and import attn_ext"
    )
