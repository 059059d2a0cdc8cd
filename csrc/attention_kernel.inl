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
#include "attention_rows.inl"
#include "attention_tile.inl"

namespace vmalloc {
namespace {

// With more rows than this, computing on a tile takes longer than fetching it.
constexpr std::int64_t kMostRowsThatWait = 4 * kBlockRows;

// What one task works on: its rows are (kv head, position, query head of the group), in that order.
// `Tile` finds K and V rows: SlotTile or BlockTile.
template <typename T, typename Tile>
class TaskRunner {
 public:
  TaskRunner(const AttentionArgs& args, const AttentionTask& task, float* scratch)
      : args_(args),
        task_(task),
        group_(args.num_heads / args.num_kv_heads),
        head_rows_(task.num_positions * group_),
        layout_(scratch_layout(head_rows_ * task.num_kv_heads, args.k_head_dim, args.v_head_dim)),
        scratch_(scratch),
        end_key_(task.first_position + task.num_positions) {}

  void run() {
    load_queries();
    locate(task_, first_tile(task_), here_);
    for (std::int64_t tile = first_tile(task_); tile < end_key_; tile += kTileKeys) {
      locate_next(tile);
      for (std::int64_t head = 0; head < task_.num_kv_heads; ++head) visit_tile(tile, head);
      LocatedTile* const visited = here_;
      here_ = next_;
      next_ = visited;
    }
    store_outputs();
  }

 private:
  using Rows = typename Tile::Rows;

  // A tile of some task's sequence; span.end is 0 where there is none.
  struct LocatedTile {
    TileSpan span;
    Tile k;
    Tile v;
  };

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

  std::int64_t first_tile(const AttentionTask& task) const {
    return first_key(task.first_position) / kTileKeys * kTileKeys;
  }

  void locate(const AttentionTask& task, std::int64_t tile, LocatedTile* located) const {
    located->span = {tile, clamp_to_tile(first_key(task.first_position) - tile),
                     clamp_to_tile(task.first_position + task.num_positions - tile)};
    located->k.locate(args_.k_cache, args_.batch, task, located->span, kElement);
    located->v.locate(args_.v_cache, args_.batch, task, located->span, kElement);
  }

  // What the last visit of this tile may fetch: the next tile, or the first of the next task. A
  // prefill reads its rows many times, so it does not fetch.
  void locate_next(std::int64_t tile) {
    next_->span.end = 0;
    if (tile + kTileKeys < end_key_) {
      locate(task_, tile + kTileKeys, next_);
    } else if (task_.next != nullptr && head_rows_ <= kMostRowsThatWait) {
      locate(*task_.next, first_tile(*task_.next), next_);
    }
  }

  TileSource<T, Rows> source(const Tile& tile, const CacheRows& cache, std::int64_t head_dim,
                             std::int64_t head) const {
    return {tile.origin() + head * cache.head_stride * kElement, tile.rows(), head_dim,
            here_->span.begin, here_->span.end};
  }

  // The rows of the visit after this one: of the next head, tile or task.
  NextRows<Rows> next_rows(Tile LocatedTile::* part, const CacheRows& cache, std::int64_t head_dim,
                           std::int64_t head) const {
    if (head_rows_ > kMostRowsThatWait) return {nullptr, {}, 0, 0};
    const bool same_tile = ++head < task_.num_kv_heads;
    const LocatedTile& located = same_tile ? *here_ : *next_;
    const Tile& tile = located.*part;
    if (located.span.end == 0) return {nullptr, {}, 0, 0};
    const std::int64_t head_offset = same_tile ? head * cache.head_stride * kElement : 0;
    return {tile.origin() + head_offset, tile.rows(), head_dim * kElement, located.span.end};
  }

  void visit_tile(std::int64_t tile, std::int64_t head) {
    const TileSource<T, Rows> v = source(here_->v, args_.v_cache, args_.v_head_dim, head);
    pack_keys(source(here_->k, args_.k_cache, args_.k_head_dim, head),
              next_rows(&LocatedTile::k, args_.k_cache, args_.k_head_dim, head), at(layout_.keys));
    const NextRows<Rows> next_v = next_rows(&LocatedTile::v, args_.v_cache, args_.v_head_dim, head);
    const std::int64_t first_row = head * head_rows_;
    if (head_rows_ <= kBlockRows) {
      const ValueRows<T, Rows> values = {v.origin, v.rows, v.head_dim, next_v};
      visit_block(tile, first_row, 0, head_rows_, values);
      return;
    }
    pack_values(v, next_v, at(layout_.values), layout_.v_stride);
    const ValueRows<float, StridedRows> values = {
        reinterpret_cast<const char*>(at(layout_.values)),
        {layout_.v_stride * static_cast<std::int64_t>(sizeof(float))},
        layout_.v_stride,
        {nullptr, {}, 0, 0}};
    const std::int64_t num_blocks = (head_rows_ + kBlockRows - 1) / kBlockRows;
    for (std::int64_t block = 0; block < num_blocks; ++block) {
      visit_block(tile, first_row, block * head_rows_ / num_blocks,
                  (block + 1) * head_rows_ / num_blocks, values);
    }
  }

  // Rows [begin, end) of one head's rows, which start at `first_row`, against one tile.
  template <typename Values>
  void visit_block(std::int64_t tile, std::int64_t first_row, std::int64_t begin, std::int64_t end,
                   const Values& values) {
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

  template <typename Values>
  void attend(std::int64_t row, int num_rows, const int* first, const int* last,
              const Values& values) {
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

  template <typename Next>
  void score(int num_rows, const float* query, int num_vectors, const Next& next,
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

  template <int R, typename Values>
  void accumulate_block(const float* weights, const Values& values, int begin, int end,
                        float* out) const {
    accumulate_rows<R, columns_for(R, 8)>(weights, values, 0, begin, end, out, layout_.v_stride);
  }

  template <typename Values>
  void accumulate(int num_rows, const float* weights, const Values& values, int begin, int end,
                  float* out) const {
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

  static constexpr auto kElement = static_cast<std::int64_t>(sizeof(T));

  const AttentionArgs& args_;
  const AttentionTask& task_;
  const std::int64_t group_;
  const std::int64_t head_rows_;  // rows of one KV head
  const ScratchLayout layout_;
  float* const scratch_;
  const std::int64_t end_key_;  // no row sees this key, nor a later one
  LocatedTile located_[2];
  LocatedTile* here_ = &located_[0];
  LocatedTile* next_ = &located_[1];
};

template <typename T, typename Tile>
void run_task(const AttentionArgs& args, const AttentionTask& task, float* scratch) {
  TaskRunner<T, Tile>(args, task, scratch).run();
}

constexpr AttentionKernel::Runs kContiguousRuns = {&run_task<float, SlotTile>,
                                                   &run_task<Bf16, SlotTile>};
constexpr AttentionKernel::Runs kBlockTableRuns = {&run_task<float, BlockTile>,
                                                   &run_task<Bf16, BlockTile>};

}  // namespace
}  // namespace vmalloc
