// attention_rows.inl: where a tile's K and V rows lie: in a slot, or in the blocks of a table.
// Owns: nothing.  Thread-safety: plain values.
//
// Included by attention_kernel.inl. The two differ in addresses only: whatever reads a row is one
// template over them, so that a block table never changes a bit of any result.

namespace vmalloc {
namespace {

// Byte offsets of a tile's rows where they lie one stride apart.
struct StridedRows {
  std::int64_t row_bytes;

  // Walks rows one by one. The stride is added up, since GCC spills an accumulator of the AVX2
  // value loop where it computes each row's offset anew.
  struct Cursor {
    const char* at;
    std::int64_t step;

    const char* row() const { return at; }
    void advance() { at += step; }
  };

  std::int64_t offset(int key) const { return key * row_bytes; }
  Cursor cursor(const char* origin, int key) const { return {origin + offset(key), row_bytes}; }
};

// Byte offsets of a tile's rows where they lie anywhere.
struct ListedRows {
  const std::int64_t* offsets;  // [kTileKeys]

  struct Cursor {
    const char* origin;
    const std::int64_t* offset;

    const char* row() const { return origin + *offset; }
    void advance() { ++offset; }
  };

  std::int64_t offset(int key) const { return offsets[key]; }
  Cursor cursor(const char* origin, int key) const { return {origin, offsets + key}; }
};

// Keys of one sequence: rows [begin, end) of the tile that starts at `first_key`.
struct TileSpan {
  std::int64_t first_key;
  int begin;
  int end;
};

// K or V of one tile of a slot, from the task's first head on.
class SlotTile {
 public:
  using Rows = StridedRows;

  void locate(const CacheRows& cache, const VarlenBatch&, const AttentionTask& task,
              const TileSpan& span, std::int64_t element) {
    origin_ = static_cast<const char*>(cache.data) +
              (task.slot * cache.slot_stride + span.first_key * cache.row_stride +
               task.first_kv_head * cache.head_stride) *
                  element;
    rows_ = {cache.row_stride * element};
  }

  const char* origin() const { return origin_; }
  Rows rows() const { return rows_; }

 private:
  const char* origin_;
  StridedRows rows_;
};

// K or V of one tile of a sequence whose blocks a table lists, from the task's first head on. The
// offsets are found once for all heads; table entries outside the span are not read.
class BlockTile {
 public:
  using Rows = ListedRows;

  void locate(const CacheRows& cache, const VarlenBatch& batch, const AttentionTask& task,
              const TileSpan& span, std::int64_t element) {
    origin_ =
        static_cast<const char*>(cache.data) + task.first_kv_head * cache.head_stride * element;
    const std::int64_t block_size = batch.num_rows;
    const std::int64_t row_bytes = cache.row_stride * element;
    const std::int64_t first = span.first_key + span.begin;
    const std::int32_t* block = task.blocks + first / block_size;
    std::int64_t row = first % block_size;
    for (int key = span.begin; key < span.end; ++block, row = 0) {
      std::int64_t offset = *block * cache.slot_stride * element + row * row_bytes;
      for (; key < span.end && row < block_size; ++key, ++row, offset += row_bytes) {
        offsets_[key] = offset;
      }
    }
    // Prefetches do not know where the span begins.
    for (int key = 0; key < span.begin; ++key) offsets_[key] = offsets_[span.begin];
  }

  const char* origin() const { return origin_; }
  Rows rows() const { return {offsets_}; }

 private:
  const char* origin_;
  std::int64_t offsets_[kTileKeys];
};

// One head of K or V over one tile of keys; only rows [begin, end) of the tile may be read.
template <typename T, typename Rows>
struct TileSource {
  const char* origin;
  Rows rows;
  std::int64_t head_dim;
  int begin;
  int end;

  const T* row(int key) const { return reinterpret_cast<const T*>(origin + rows.offset(key)); }
};

// Rows that the next visit will read, fetched while this one computes: a decode step reads every
// row once, from memory, at strides that hardware prefetchers follow badly. The fetches are spread
// over the whole visit, since a burst fills the few slots for outstanding lines and then stalls.
template <typename Rows>
struct NextRows {
  const char* origin;
  Rows rows;
  std::int64_t head_bytes;
  int end;  // 0: nothing to fetch

  // Always inlined: GCC takes a function that only prefetches for one without effect, and drops it.
  __attribute__((always_inline)) void fetch(int key, std::int64_t begin, std::int64_t size) const {
    if (key >= end) return;
    const char* line = origin + rows.offset(key) + begin;
    for (std::int64_t i = 0; i < size; i += 64) __builtin_prefetch(line + i);
  }
};

// Rows of V as a tile's weights meet them: the cache's own or packed ones.
template <typename T, typename Rows>
struct ValueRows {
  const char* origin;
  Rows rows;
  std::int64_t dims;
  NextRows<Rows> next;
};

}  // namespace
}  // namespace vmalloc
