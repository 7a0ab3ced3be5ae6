"""Importing this package registers the `sptc::` ops."""

from sptc.codegen.ops import attention, ffn  # noqa: F401
