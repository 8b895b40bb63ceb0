// copy_pages: whole pages from one place to another, byte for byte: within a pool (fork, a shared
// tail), from a pool into a row of pages (snapshot) or back (restore). Of the last page only the
// first last_len positions, and zeros: what stands behind them is other work's.
#pragma once

#include <cstdint>

namespace tml {

struct CopyPagesParams {
  const void* source;              // pages of page_bytes each
  void* target;                    // no page of it is read
  const std::int32_t* source_ids;  // [num_pages], or null: 0, 1, 2, ...
  const std::int32_t* target_ids;  // the same
  std::int64_t num_pages;
  std::int64_t page_bytes;  // a multiple of 256 head_dim: K and V blocks, bf16
  std::int32_t head_dim;
  std::int32_t last_len;  // 1 to 128
};

}  // namespace tml
