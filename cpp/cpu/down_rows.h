// The down projection in decode for integer formats: y += h[i] row[i] over batches of rows.
#pragma once

#if defined(__AVX512VNNI__)
#include "cpu/down_rows_avx512.h"
#else
#include "cpu/down_rows_portable.h"
#endif

namespace tda {
namespace {

template <bool kExact, class Row, int kRows>
void add_down_batch(const Rows& w, const Batch& batch, const float* h, float* y) {
  // Only whole rows, both planes, are read without gaps.
  if (kExact && batch.is_stream_ahead())
    add_down_batch<kExact, Row, kRows>(w, batch, DownStreamsAhead<Row>(w, batch), h, y);
  else
    add_down_batch<kExact, Row, kRows>(w, batch, DownRowsAhead<Row, kRows>(w, batch), h, y);
}

}  // namespace
}  // namespace tda
