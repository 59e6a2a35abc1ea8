"""The version of the package, as its metadata have it."""

from importlib import metadata

try:
    __version__ = metadata.version("attn_ext")
except metadata.PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+uninstalled"
