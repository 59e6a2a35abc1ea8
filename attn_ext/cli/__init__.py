"""The `attn-ext` command."""
