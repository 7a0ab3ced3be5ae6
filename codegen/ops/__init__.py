"""Importing this package registers the `sptc::` ops."""

from sptc.codegen.ops import attention, ffn, units  # noqa: F401
