// Tensors [b, h, rows, size] of any strides, as attention and selection read and write them.
#pragma once

#include "product.h"

constexpr i64 CHUNK = 64;  // queries at a time: their scores stay in the cache

struct Strides {
    i64 b, h, row;  // of elements; within a row they are adjacent
};

template <typename T>
static T* at(T* x, const Strides& s, i64 b, i64 h, i64 row) {
    return x + b * s.b + h * s.h + row * s.row;
}
