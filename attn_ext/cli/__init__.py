"""The `attn-ext` command.  `attn_ext.cli.main.main(argv)` runs it and returns the exit code."""
