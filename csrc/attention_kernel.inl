// attention_kernel.inl: tiled causal attention with an online softmax, written once for all
// vectors. Owns: nothing.  Thread-safety: pure functions over the caller's scratch memory.
//
// Included after Vec, kLanes, kAccumulators, Bf16 and the v* operations of one instruction set.
//
// Why a row's result never depends on its neighbours: a K tile is transposed first, so that each
// vector lane belongs to one key and a score is one chain of multiply-adds over head_dim; an output
// element is one chain over the row's own keys, in order, skipping (not multiplying by zero) keys
// it does not see. How many rows share the loads of a pass changes neither chain. A decode step is
// the same code on one position. tests/core/test_attention_cpu.py holds it to that, bit by bit.

#include "attention_math.inl"
#include "attention_tile.inl"

namespace vmalloc {
namespace {

// With more rows than this, computing on a tile takes longer than fetching it.
constexpr std::int64_t kMostRowsThatWait = 4 * kBlockRows;

// What one task works on: its rows are (kv head, position, query head of the group), in that order.
template <typename T>
class TaskRunner {
 public:
  TaskRunner(const AttentionArgs& args, const AttentionTask& task, float* scratch)
      : args_(args),
        task_(task),
        group_(args.num_heads / args.num_kv_heads),
        head_rows_(task.num_positions * group_),
        layout_(scratch_layout(head_rows_ * task.num_kv_heads, args.k_head_dim, args.v_head_dim)),
        scratch_(scratch),
        first_key_(first_key(task.first_position)),
        end_key_(task.first_position + task.num_positions) {}

  void run() {
    load_queries();
    for (std::int64_t tile = first_key_ / kTileKeys * kTileKeys; tile < end_key_;
         tile += kTileKeys) {
      for (std::int64_t head = 0; head < task_.num_kv_heads; ++head) visit_tile(tile, head);
    }
    store_outputs();
  }

 private:
  // Keys [first_key(position), position] are visible to a query at `position`.
  std::int64_t first_key(std::int64_t position) const {
    const bool windowed = args_.window_left >= 0 && position > args_.window_left;
    return windowed ? position - args_.window_left : 0;
  }

  float* at(std::int64_t offset) const { return scratch_ + offset; }

  // The task's row -> its index into query and out, in elements.
  std::int64_t packed_offset(const PackedRows& packed, std::int64_t row) const {
    const std::int64_t kv_head = task_.first_kv_head + row / head_rows_;
    const std::int64_t in_head = row % head_rows_;
    return (task_.first_packed_row + in_head / group_) * packed.token_stride +
           (kv_head * group_ + in_head % group_) * packed.head_stride;
  }

  void load_queries() {
    const std::int64_t rows = head_rows_ * task_.num_kv_heads;
    for (std::int64_t row = 0; row < rows; ++row) {
      const T* in = static_cast<const T*>(args_.query.data) + packed_offset(args_.query, row);
      float* query = at(layout_.query) + row * args_.k_head_dim;
      for (std::int64_t i = 0; i < args_.k_head_dim; ++i) {
        query[i] = to_float(in[i]) * args_.softmax_scale;
      }
      float sink = -kInfinity;
      if (args_.sinks != nullptr) {
        const std::int64_t kv_head = task_.first_kv_head + row / head_rows_;
        sink = args_.sinks[kv_head * group_ + row % group_];
      }
      at(layout_.maximum)[row] = sink;
      at(layout_.total)[row] = sink > -kInfinity ? 1.0F : 0.0F;
      float* out = at(layout_.out) + row * layout_.v_stride;
      for (std::int64_t i = 0; i < layout_.v_stride; ++i) out[i] = 0.0F;
    }
  }

  TileSource<T> source(const AttentionTask& task, const CacheRows& cache, std::int64_t head_dim,
                       std::int64_t tile, std::int64_t head) const {
    const T* row0 = static_cast<const T*>(cache.data) + task.slot * cache.slot_stride +
                    tile * cache.row_stride + (task.first_kv_head + head) * cache.head_stride;
    return {row0, cache.row_stride, head_dim, clamp_to_tile(first_key(task.first_position) - tile),
            clamp_to_tile(task.first_position + task.num_positions - tile)};
  }

  // The rows of the visit after (tile, head): the next head, tile or task. A prefill reads its rows
  // many times, so it does not ask.
  NextRows next_rows(const CacheRows& cache, std::int64_t head_dim, std::int64_t tile,
                     std::int64_t head) const {
    const AttentionTask* task = &task_;
    if (++head == task_.num_kv_heads) {
      head = 0;
      tile += kTileKeys;
      if (tile >= end_key_) {
        task = task_.next;
        if (task != nullptr) tile = first_key(task->first_position) / kTileKeys * kTileKeys;
      }
    }
    if (task == nullptr || head_rows_ > kMostRowsThatWait) return {nullptr, 0, 0, 0};
    const TileSource<T> next = source(*task, cache, head_dim, tile, head);
    constexpr auto kBytes = static_cast<std::int64_t>(sizeof(T));
    return {reinterpret_cast<const char*>(next.row0), next.row_stride * kBytes, head_dim * kBytes,
            next.end};
  }

  void visit_tile(std::int64_t tile, std::int64_t head) {
    const TileSource<T> v = source(task_, args_.v_cache, args_.v_head_dim, tile, head);
    pack_keys(source(task_, args_.k_cache, args_.k_head_dim, tile, head),
              next_rows(args_.k_cache, args_.k_head_dim, tile, head), at(layout_.keys));
    const NextRows next_v = next_rows(args_.v_cache, args_.v_head_dim, tile, head);
    const std::int64_t first_row = head * head_rows_;
    if (head_rows_ <= kBlockRows) {
      const ValueRows<T> values = {v.row0, v.row_stride, v.head_dim, next_v};
      visit_block(tile, first_row, 0, head_rows_, values);
      return;
    }
    pack_values(v, next_v, at(layout_.values), layout_.v_stride);
    const ValueRows<float> values = {
        at(layout_.values), layout_.v_stride, layout_.v_stride, {nullptr, 0, 0, 0}};
    const std::int64_t num_blocks = (head_rows_ + kBlockRows - 1) / kBlockRows;
    for (std::int64_t block = 0; block < num_blocks; ++block) {
      visit_block(tile, first_row, block * head_rows_ / num_blocks,
                  (block + 1) * head_rows_ / num_blocks, values);
    }
  }

  // Rows [begin, end) of one head's rows, which start at `first_row`, against one tile.
  template <typename V>
  void visit_block(std::int64_t tile, std::int64_t first_row, std::int64_t begin, std::int64_t end,
                   const ValueRows<V>& values) {
    int first[kBlockRows];
    int last[kBlockRows];
    // Rows that see nothing of this tile: those before it lead, those whose window is past it
    // trail.
    int num_rows = 0;
    std::int64_t row = begin;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t position = task_.first_position + i / group_;
      const int from = clamp_to_tile(first_key(position) - tile);
      const int to = clamp_to_tile(position + 1 - tile);
      if (from >= to) {
        if (num_rows == 0) row = i + 1;
        continue;
      }
      first[num_rows] = from;
      last[num_rows] = to;
      ++num_rows;
    }
    if (num_rows > 0) attend(first_row + row, num_rows, first, last, values);
  }

  template <typename V>
  void attend(std::int64_t row, int num_rows, const int* first, const int* last,
              const ValueRows<V>& values) {
    float* scores = at(layout_.scores);
    float* out = at(layout_.out) + row * layout_.v_stride;
    // Positions ascend within the block, and so do both bounds.
    const int shared_begin = first[num_rows - 1];
    const int shared_end = last[0];
    score(num_rows, at(layout_.query) + row * args_.k_head_dim,
          (last[num_rows - 1] + kLanes - 1) / kLanes, values.next, scores);
    for (int r = 0; r < num_rows; ++r) {
      const RowSoftmax state = {at(layout_.maximum) + row + r, at(layout_.total) + row + r};
      const float factor =
          soften_row(scores + r * kTileKeys, first[r], last[r], args_.softcap, state);
      if (factor != 1.0F) scale_row(out + r * layout_.v_stride, factor);
    }
    const auto alone = [&](int r, int from, int to) {
      accumulate_block<1>(scores + r * kTileKeys, values, from, to, out + r * layout_.v_stride);
    };
    const bool shares = shared_begin < shared_end;
    for (int r = 0; r < num_rows; ++r) {
      const int to = shares ? shared_begin : last[r];
      if (first[r] < to) alone(r, first[r], to);
    }
    if (!shares) return;
    accumulate(num_rows, scores, values, shared_begin, shared_end, out);
    for (int r = 0; r < num_rows; ++r) {
      if (shared_end < last[r]) alone(r, shared_end, last[r]);
    }
  }

  void scale_row(float* out, float factor) const {
    for (std::int64_t i = 0; i < layout_.v_stride; i += kLanes) {
      vstore(out + i, vmul(vload(out + i), vset(factor)));
    }
  }

  void score(int num_rows, const float* query, int num_vectors, const NextRows& next,
             float* scores) const {
    const float* keys = at(layout_.keys);
    const std::int64_t dim = args_.k_head_dim;
    switch (num_rows) {
      case 1:
        return score_rows<1>(query, dim, keys, num_vectors, next, scores);
      case 2:
        return score_rows<2>(query, dim, keys, num_vectors, next, scores);
      case 3:
        return score_rows<3>(query, dim, keys, num_vectors, next, scores);
      case 4:
        return score_rows<4>(query, dim, keys, num_vectors, next, scores);
      case 5:
        return score_rows<5>(query, dim, keys, num_vectors, next, scores);
      default:
        return score_rows<6>(query, dim, keys, num_vectors, next, scores);
    }
  }

  template <int R, typename V>
  void accumulate_block(const float* weights, const ValueRows<V>& values, int begin, int end,
                        float* out) const {
    accumulate_rows<R, columns_for(R, 8)>(weights, values, 0, begin, end, out, layout_.v_stride);
  }

  template <typename V>
  void accumulate(int num_rows, const float* weights, const ValueRows<V>& values, int begin,
                  int end, float* out) const {
    switch (num_rows) {
      case 1:
        return accumulate_block<1>(weights, values, begin, end, out);
      case 2:
        return accumulate_block<2>(weights, values, begin, end, out);
      case 3:
        return accumulate_block<3>(weights, values, begin, end, out);
      case 4:
        return accumulate_block<4>(weights, values, begin, end, out);
      case 5:
        return accumulate_block<5>(weights, values, begin, end, out);
      default:
        return accumulate_block<6>(weights, values, begin, end, out);
    }
  }

  void store_outputs() {
    const std::int64_t rows = head_rows_ * task_.num_kv_heads;
    for (std::int64_t row = 0; row < rows; ++row) {
      const float* sum = at(layout_.out) + row * layout_.v_stride;
      const float total = at(layout_.total)[row];
      T* out = static_cast<T*>(args_.out.data) + packed_offset(args_.out, row);
      for (std::int64_t i = 0; i < args_.v_head_dim; ++i) from_float(sum[i] / total, out + i);
    }
  }

  const AttentionArgs& args_;
  const AttentionTask& task_;
  const std::int64_t group_;
  const std::int64_t head_rows_;  // rows of one KV head
  const ScratchLayout layout_;
  float* const scratch_;
  const std::int64_t first_key_;  // keys [first_key_, end_key_) are seen by some row
  const std::int64_t end_key_;
};

template <typename T>
void run_task(const AttentionArgs& args, const AttentionTask& task, float* scratch) {
  TaskRunner<T>(args, task, scratch).run();
}

}  // namespace
}  // namespace vmalloc
