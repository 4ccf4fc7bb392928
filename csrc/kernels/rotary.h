// The parts of bias + rotary positions that one thread does; megatron_plm/kernels/rotary.py has the formulae.
//
// A thread takes kSize neighbouring pairs (i, i + H/2) of one head's query, key or value, at some rows. Pairs are counted
// as the joint map [N, 3, H] has them: pair p is of head p / (3 · H/2).
#pragma once

#include "activation.h"

namespace megatron_plm {

struct Place {
  int64_t head;
  int part;  // 0 query, 1 key, 2 value
  int64_t index;
  int64_t half;  // H/2

  HOST_DEVICE Place(int64_t pair, int64_t head_size) : half(head_size / 2) {
    head = pair / (3 * half);
    part = static_cast<int>(pair / half % 3);
    index = pair % half;
  }

  // Of the pair's first value in a row of [N, 3, H], and in one of [N, H].
  HOST_DEVICE int64_t joint() const { return (head * 3 + part) * 2 * half + index; }
  HOST_DEVICE int64_t own() const { return head * 2 * half + index; }
};

// The four coefficients of kSize pairs at one row.
template <int kSize>
struct Angles {
  float cos_a[kSize], sin_a[kSize], cos_b[kSize], sin_b[kSize];

  template <typename T>
  HOST_DEVICE void read(const T* cos, const T* sin, int64_t row, const Place& place) {
    const int64_t at = row * 2 * place.half + place.index;
    load<kSize>(cos + at, cos_a);
    load<kSize>(sin + at, sin_a);
    load<kSize>(cos + at + place.half, cos_b);
    load<kSize>(sin + at + place.half, sin_b);
  }
};

template <int kSize, typename T>
HOST_DEVICE void turn(const T* qkv, const T* bias, const T* cos, const T* sin, T* const (&out)[3], int64_t heads,
                      int64_t head_size, int64_t pair, Rows rows) {
  const Place place(pair, head_size);
  float shift_a[kSize], shift_b[kSize], a[kSize], b[kSize];
  load_bias<kSize>(bias, place.joint(), shift_a);
  load_bias<kSize>(bias, place.joint() + place.half, shift_b);
  T* const to = place.part == 0 ? out[0] : place.part == 1 ? out[1] : out[2];
  for (int64_t row = rows.row; row < rows.end; row += rows.step) {
    const T* const from = qkv + row * 3 * heads * head_size + place.joint();
    load<kSize>(from, a);
    load<kSize>(from + place.half, b);
    for (int i = 0; i < kSize; ++i) {
      a[i] += shift_a[i];
      b[i] += shift_b[i];
    }
    if (place.part < 2) {
      Angles<kSize> angles;
      angles.read(cos, sin, row, place);
      for (int i = 0; i < kSize; ++i) {
        const float first = a[i] * angles.cos_a[i] - b[i] * angles.sin_a[i];
        b[i] = b[i] * angles.cos_b[i] + a[i] * angles.sin_b[i];
        a[i] = first;
      }
    }
    store<kSize>(to + row * heads * head_size + place.own(), a);
    store<kSize>(to + row * heads * head_size + place.own() + place.half, b);
  }
}

// Adds the gradient of what the bias was added to, over the rows, to the sums of both values of the pairs.
template <int kSize, typename T>
HOST_DEVICE void turn_back(const T* const (&grads)[3], const T* cos, const T* sin, T* dqkv, float (&sums_a)[kSize],
                           float (&sums_b)[kSize], int64_t heads, int64_t head_size, int64_t pair, Rows rows) {
  const Place place(pair, head_size);
  float a[kSize], b[kSize];
  const T* const from = place.part == 0 ? grads[0] : place.part == 1 ? grads[1] : grads[2];
  for (int64_t row = rows.row; row < rows.end; row += rows.step) {
    load<kSize>(from + row * heads * head_size + place.own(), a);
    load<kSize>(from + row * heads * head_size + place.own() + place.half, b);
    if (place.part < 2) {
      Angles<kSize> angles;
      angles.read(cos, sin, row, place);
      for (int i = 0; i < kSize; ++i) {
        const float first = a[i] * angles.cos_a[i] + b[i] * angles.sin_b[i];
        b[i] = b[i] * angles.cos_b[i] - a[i] * angles.sin_a[i];
        a[i] = first;
      }
    }
    for (int i = 0; i < kSize; ++i) {
      sums_a[i] += a[i];
      sums_b[i] += b[i];
    }
    T* const to = dqkv + row * 3 * heads * head_size + place.joint();
    store<kSize>(to, a);
    store<kSize>(to + place.half, b);
  }
}

}  // namespace megatron_plm
