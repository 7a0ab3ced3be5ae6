"""Importing this package registers the `sptc::` ops."""

from sptc.codegen.ops import attention, block_products, loss, route, units  # noqa: F401
