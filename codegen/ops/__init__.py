"""Importing this package registers the `sptc::` ops."""

from sptc.codegen.ops import attention, block_products, gradients, loss, route, units  # noqa: F401
