"""Importing this package registers the `sptc::` ops."""

from sptc.codegen.ops import attention, ffn, loss, units  # noqa: F401
