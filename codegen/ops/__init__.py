"""Importing this package registers the `sptc::` ops."""

from sptc.codegen.ops import attention, block_products, chunks, gradients, loss, returned, route, units  # noqa: F401
