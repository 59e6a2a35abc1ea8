"""Attention of other libraries, served by attn_ext: torch's SDPA, flash-attn, xformers,
transformers, diffusers.

Each module maps another library's arguments onto `attn_ext.attention`, `attention_varlen` or
`attention_decode` and imports that library only inside functions.
"""
