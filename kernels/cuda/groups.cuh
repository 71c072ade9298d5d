// How a row lies in memory, seen as groups of kGroup neighbouring columns: what a thread moves and computes at a time.
//
// Groups start where the student's row is aligned for the widest copies, so the first and the last of a row may be
// partly outside of it; there the logits count as -inf. 16 bytes are 8 half-precision columns or 4 float columns:
// kGroup is 8 where both sides are half precision, else 4, and 4 in
// the kernels that do more, which would run out of registers.
#pragma once

#include <type_traits>

#include "../shared/job.h"
#include "device.cuh"

namespace gkd {

GKD_DEVICE int size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

GKD_DEVICE char* row_of(const Matrix& matrix, int64_t row, Dtype dtype) {
  return matrix.data + row * matrix.row_stride * size_of(dtype);
}
GKD_DEVICE char* row_of(const Matrix& matrix, int64_t row) { return row_of(matrix, row, matrix.dtype); }

template <int kGroup>
struct Geometry {
  int columns, shift;
  int first, end;              // groups of this block
  int inner_first, inner_end;  // those of the row that lie wholly inside of it

  // The share of block `rank` of `ranks`, in slices of `slice` groups.
  GKD_DEVICE Geometry(const char* student_row, int student_size, int columns_, int rank, int slice)
      : columns(columns_) {
    shift = int(reinterpret_cast<uintptr_t>(student_row) / uintptr_t(student_size)) & (kGroup - 1);
    const int groups = (columns + shift + kGroup - 1) / kGroup;
    first = rank * slice;
    end = first + slice < groups ? first + slice : groups;
    inner_first = shift > 0 ? 1 : 0;
    inner_end = (columns + shift) / kGroup;
  }

  GKD_DEVICE int column(int group) const { return group * kGroup - shift; }
  GKD_DEVICE bool whole(int group) const { return group >= inner_first && group < inner_end; }
  // Whether whole groups of that row can be moved by the widest accesses.
  GKD_DEVICE bool fits(const char* row, int size) const {
    const int wide = 16 / size < kGroup ? 16 / size : kGroup;
    const int phase = int(reinterpret_cast<uintptr_t>(row) / uintptr_t(size));
    return ((phase - shift) & (wide - 1)) == 0;
  }
};

// The bits of a group of logits: 4 words, or 2 where half precision lies beside float.
template <int kGroup>
struct Group {
  uint32_t word[4];

  GKD_DEVICE static bool is_float(Dtype dtype) { return kGroup == 4 && dtype == Dtype::float32; }
  GKD_DEVICE static int bytes(Dtype dtype) { return kGroup == 4 && dtype != Dtype::float32 ? 8 : 16; }

  GKD_DEVICE void load(const char* from, Dtype dtype) {
    if (bytes(dtype) == 16) {
      const device::Words4 x = device::load<device::Words4>(from);
      for (int i = 0; i < 4; ++i) word[i] = x.word[i];
    } else {
      const device::Words2 x = device::load<device::Words2>(from);
      for (int i = 0; i < 2; ++i) word[i] = x.word[i];
    }
  }

  GKD_DEVICE void store(char* to, Dtype dtype) const {
    if (bytes(dtype) == 16) {
      device::store(to, device::Words4{{word[0], word[1], word[2], word[3]}});
    } else {
      device::store(to, device::Words2{{word[0], word[1]}});
    }
  }

  // Column by column from global memory, -inf outside of the row; `from` is where its first column is or would be.
  GKD_DEVICE void gather(const char* from, Dtype dtype, const Geometry<kGroup>& geometry, int group) {
    const int start = geometry.column(group);
    const auto inside = [&](int i) { return start + i >= 0 && start + i < geometry.columns; };
    if (is_float(dtype)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word[i] = inside(i) ? device::load<uint32_t>(from + 4 * i) : 0xff800000u;
      }
      return;
    }
    const uint32_t outside = dtype == Dtype::bfloat16 ? 0xff80u : 0xfc00u;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t x = inside(i) ? device::load<uint16_t>(from + 2 * i) : outside;
      word[i / 2] = i % 2 ? word[i / 2] | (x << 16) : x;
    }
  }

  GKD_DEVICE void unpack(float (&x)[kGroup], Dtype dtype) const {
    if (is_float(dtype)) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = device::float_of(word[i & 3]);
    } else if (dtype == Dtype::bfloat16) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        x[i] = device::float_of(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = device::from_float16(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffffu);
    }
  }
};

// The largest logit of a group in half precision; as fmaxf, it passes over NaN.
template <Dtype kDtype, int kGroup>
GKD_DEVICE float largest(const Group<kGroup>& bits) {
  constexpr bool kBfloat16 = kDtype == Dtype::bfloat16;
  uint32_t most = bits.word[0];
#pragma unroll
  for (int i = 1; i < kGroup / 2; ++i) {
    most = kBfloat16 ? device::max_bfloat16x2(most, bits.word[i]) : device::max_float16x2(most, bits.word[i]);
  }
  if (kBfloat16) return fmaxf(device::float_of(most << 16), device::float_of(most & 0xffff0000u));
  return fmaxf(device::from_float16(most & 0xffffu), device::from_float16(most >> 16));
}

GKD_DEVICE uint32_t pack(float low, float high, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? device::pack_bfloat16(low, high) : device::pack_float16(low, high);
}

// A group of the gradient to global memory, column by column; `to` is where its first column is or would be.
template <int kGroup>
GKD_DEVICE void scatter(char* to, Dtype dtype, const float (&x)[kGroup], const Geometry<kGroup>& geometry, int group) {
  const int start = geometry.column(group);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (start + i < 0 || start + i >= geometry.columns) continue;
    if (dtype == Dtype::float32) {
      device::store(to + 4 * i, x[i]);
    } else {
      device::store(to + 2 * i, uint16_t(pack(x[i], 0.0f, dtype)));
    }
  }
}

// A group of the gradient to global memory; `to` is aligned.
template <int kGroup>
GKD_DEVICE void store_group(char* to, Dtype dtype, const float (&x)[kGroup]) {
  using device::bits_of;
  if (dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < kGroup; i += 4) {
      const device::Words4 bits{{bits_of(x[i]), bits_of(x[i + 1]), bits_of(x[i + 2]), bits_of(x[i + 3])}};
      device::store_streaming(to + 4 * i, bits);
    }
    return;
  }
  std::conditional_t<kGroup == 8, device::Words4, device::Words2> bits;
  if (dtype == Dtype::bfloat16) {
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) bits.word[i / 2] = device::pack_bfloat16(x[i], x[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) bits.word[i / 2] = device::pack_float16(x[i], x[i + 1]);
  }
  device::store_streaming(to, bits);
}

// Zeros, by `workers` threads of which this is number `worker`.
GKD_DEVICE void fill_zero(char* begin, char* end, int64_t worker, int64_t workers) {
  const auto up = [](char* p) { return p + (-reinterpret_cast<intptr_t>(p) & 15); };
  char* body = up(begin) < end ? up(begin) : end;
  char* tail = body + (end - body) / 16 * 16;
  for (char* p = begin + 2 * worker; p < body; p += 2 * workers) device::store(p, uint16_t(0));
  for (char* p = body + 16 * worker; p < tail; p += 16 * workers) device::store_streaming(p, device::Words4{});
  for (char* p = tail + 2 * worker; p < end; p += 2 * workers) device::store(p, uint16_t(0));
}

}  // namespace gkd
