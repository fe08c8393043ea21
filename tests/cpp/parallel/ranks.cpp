#include "parallel/ranks.h"

#include <algorithm>
#include <cmath>

namespace flexcore::test {

Block Block::part(Share r, Share f) const {
  Block out(r.size(), f.size());
  for (std::int64_t i = 0; i < r.size(); ++i)
    for (std::int64_t j = 0; j < f.size(); ++j) out.at(i, j) = at(r.begin + i, f.begin + j);
  return out;
}

void Block::put(const Block& part, std::int64_t row, std::int64_t feature) {
  for (std::int64_t i = 0; i < part.rows; ++i)
    for (std::int64_t j = 0; j < part.features; ++j) at(row + i, feature + j) = part.at(i, j);
}

void Block::add(const Block& other) {
  require<Error>(rows == other.rows && features == other.features, "add: ", rows, " x ", features, " and ", other.rows,
                 " x ", other.features);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] += other.data[i];
}

Block Block::random(std::int64_t rows, std::int64_t features, std::mt19937& rng, float scale) {
  Block out(rows, features);
  std::normal_distribution<float> normal(0.0f, scale);
  for (auto& value : out.data) value = normal(rng);
  return out;
}

double dot(const Block& a, const Block& b) {
  require<Error>(a.rows == b.rows && a.features == b.features, "dot: shapes differ");
  double sum = 0;
  for (std::size_t i = 0; i < a.data.size(); ++i) sum += static_cast<double>(a.data[i]) * b.data[i];
  return sum;
}

double relative_error(const Block& got, const Block& want) {
  require<Error>(got.rows == want.rows && got.features == want.features, "compare: shapes differ");
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < got.data.size(); ++i) {
    error += std::pow(static_cast<double>(got.data[i]) - want.data[i], 2);
    norm += std::pow(static_cast<double>(want.data[i]), 2);
  }
  return std::isfinite(error) ? std::sqrt(error / std::max(norm, 1e-30)) : 1e30;
}

Sharded Ranks::zeros(ParallelState state, std::int64_t rows, std::int64_t features) const {
  Sharded out{state, rows, features, {}};
  for (int r = 0; r < count_; ++r) {
    const LocalShape shape = local_shape(state, rows, features, r, count_);
    out.local.emplace_back(shape.rows.size(), shape.features.size());
  }
  return out;
}

Sharded Ranks::scatter(const Block& whole, ParallelState state, std::mt19937& rng) const {
  Sharded out = zeros(state, whole.rows, whole.features);
  for (int r = 0; r < count_; ++r) {
    const LocalShape shape = local_shape(state, whole.rows, whole.features, r, count_);
    auto& local = out.local[static_cast<std::size_t>(r)];
    if (state != kPending) {
      local = whole.part(shape.rows, shape.features);
    } else if (r + 1 < count_) {
      local = Block::random(whole.rows, whole.features, rng);
    } else {
      local = whole;
      for (int other = 0; other < r; ++other)
        for (std::size_t i = 0; i < local.data.size(); ++i)
          local.data[i] -= out.local[static_cast<std::size_t>(other)].data[i];
    }
  }
  return out;
}

Block Ranks::value(const Sharded& x) const {
  if (x.state == kAlone) return x.local[0];
  if (x.state == kReplicated) {
    for (const auto& local : x.local) require<Error>(local.data == x.local[0].data, "copies on two ranks differ");
    return x.local[0];
  }
  Block out(x.rows, x.features);
  for (int r = 0; r < count_; ++r) {
    const auto& local = x.local[static_cast<std::size_t>(r)];
    const LocalShape shape = local_shape(x.state, x.rows, x.features, r, count_);
    if (x.state == kPending)
      out.add(local);
    else
      out.put(local, shape.rows.begin, shape.features.begin);
  }
  return out;
}

Block Ranks::message(int from, int to, const Block& block, std::int64_t element_bytes) {
  require<Error>(from != to, "rank ", from, " sends to itself");
  sent[static_cast<std::size_t>(from)] += block.rows * block.features * element_bytes;
  return block;
}

std::vector<std::vector<Block>> Ranks::gather_round(const std::vector<Block>& chunks, std::int64_t element_bytes) {
  const int n = count_;
  std::vector<std::vector<Block>> have(static_cast<std::size_t>(n), std::vector<Block>(static_cast<std::size_t>(n)));
  for (int r = 0; r < n; ++r)
    have[static_cast<std::size_t>(r)][static_cast<std::size_t>(r)] = chunks[static_cast<std::size_t>(r)];
  for (int step = 0; step + 1 < n; ++step)
    for (int r = 0; r < n; ++r) {
      const auto chunk = static_cast<std::size_t>((r - step + n) % n);
      const int next = (r + 1) % n;
      have[static_cast<std::size_t>(next)][chunk] =
          message(r, next, have[static_cast<std::size_t>(r)][chunk], element_bytes);
    }
  return have;
}

std::vector<Block> Ranks::reduce_round(std::vector<std::vector<Block>> summands, std::int64_t element_bytes) {
  const int n = count_;
  for (int step = 0; step + 1 < n; ++step)
    for (int r = 0; r < n; ++r) {
      const auto chunk = static_cast<std::size_t>((r - 1 - step + 2 * n) % n);
      const int next = (r + 1) % n;
      Block& at_home = summands[static_cast<std::size_t>(next)][chunk];
      const Block arrived = message(r, next, summands[static_cast<std::size_t>(r)][chunk], element_bytes);
      if (largest_)
        for (std::size_t i = 0; i < arrived.data.size(); ++i)
          at_home.data[i] = std::max(at_home.data[i], arrived.data[i]);
      else
        at_home.add(arrived);
    }
  std::vector<Block> out;
  for (std::size_t r = 0; r < summands.size(); ++r) out.push_back(summands[r][r]);
  return out;
}

// As one long row, so that the chunks are as even as they can be.
Sharded Ranks::all_reduce(const Sharded& x, std::int64_t element_bytes) {
  const std::int64_t all = x.rows * x.features;
  std::vector<std::vector<Block>> summands;
  for (const auto& local : x.local) {
    Block row = local;
    row.rows = 1, row.features = all;
    summands.emplace_back();
    for (int c = 0; c < count_; ++c) summands.back().push_back(row.part({0, 1}, share_of(all, c, count_)));
  }
  const auto have = gather_round(reduce_round(std::move(summands), element_bytes), element_bytes);
  Sharded out = zeros(kReplicated, x.rows, x.features);
  for (std::size_t r = 0; r < have.size(); ++r) {
    out.local[r].data.clear();
    for (const auto& chunk : have[r])
      out.local[r].data.insert(out.local[r].data.end(), chunk.data.begin(), chunk.data.end());
  }
  return out;
}

Sharded Ranks::largest(const Sharded& x) {
  if (count_ > 1) ++collectives;
  largest_ = true;
  Sharded out = all_reduce(x, 4);
  largest_ = false;
  return out;
}

Sharded Ranks::move(const Sharded& x, ParallelState to, std::int64_t element_bytes) {
  const Transition transition{x.state, to};
  const int n = count_;
  const auto shape = [&](ParallelState state, int rank) { return local_shape(state, x.rows, x.features, rank, n); };
  Sharded out = zeros(to, x.rows, x.features);
  if (transition.collective() && n > 1) ++collectives;
  const auto each = [&](const std::function<void(int, Block&)>& fill) {
    for (int r = 0; r < n; ++r) fill(r, out.local[static_cast<std::size_t>(r)]);
  };
  const auto local = [&](int r) -> const Block& { return x.local[static_cast<std::size_t>(r)]; };
  const auto parts = [&](const Block& whole, ParallelState state) {
    std::vector<Block> chunks;
    for (int r = 0; r < n; ++r) chunks.push_back(whole.part(shape(state, r).rows, shape(state, r).features));
    return chunks;
  };
  switch (transition.kind()) {
    using enum TransitionKind;
    case kNone:
      return x;
    case kSlice:
    case kTake:
      each([&](int r, Block& b) {
        if (to != kAlone || r == 0) b = local(r).part(shape(to, r).rows, shape(to, r).features);
      });
      break;
    case kKeepOne:
    case kPlace:
      out.local[0] = local(0);
      break;
    case kPad:
      each([&](int r, Block& b) { b.put(local(r), shape(x.state, r).rows.begin, shape(x.state, r).features.begin); });
      break;
    case kAllGather: {
      const auto have = gather_round(x.local, element_bytes);
      each([&](int r, Block& b) {
        for (int c = 0; c < n; ++c)
          b.put(have[static_cast<std::size_t>(r)][static_cast<std::size_t>(c)], shape(x.state, c).rows.begin,
                shape(x.state, c).features.begin);
      });
      break;
    }
    case kReduceScatter: {
      std::vector<std::vector<Block>> summands;
      for (int r = 0; r < n; ++r) summands.push_back(parts(local(r), to));
      out.local = reduce_round(std::move(summands), element_bytes);
      break;
    }
    case kAllReduce:
      return all_reduce(x, element_bytes);
    case kAllToAll:
      for (int r = 0; r < n; ++r)
        for (int s = 0; s < n; ++s) {
          const auto mine = shape(x.state, r), then = shape(to, s);
          const bool by_rows = x.state == kRowSplit;
          const Block tile = by_rows ? local(r).part({0, mine.rows.size()}, then.features)
                                     : local(r).part(then.rows, {0, mine.features.size()});
          out.local[static_cast<std::size_t>(s)].put(r == s ? tile : message(r, s, tile, element_bytes),
                                                     by_rows ? mine.rows.begin : 0, by_rows ? 0 : mine.features.begin);
        }
      break;
    case kGather:
      for (int r = 0; r < n; ++r)
        out.local[0].put(r == 0 ? local(0) : message(r, 0, local(r), element_bytes), shape(x.state, r).rows.begin,
                         shape(x.state, r).features.begin);
      break;
    case kScatter: {
      const auto chunks = parts(local(0), to);
      each([&](int r, Block& b) {
        const auto& chunk = chunks[static_cast<std::size_t>(r)];
        b = r == 0 ? chunk : message(0, r, chunk, element_bytes);
      });
      break;
    }
    case kReduce: {
      Block sum = local(n > 1 ? 1 : 0);
      for (int r = 1; r < n; ++r) {
        const int next = (r + 1) % n;
        Block arrived = message(r, next, sum, element_bytes);
        arrived.add(local(next));
        sum = std::move(arrived);
      }
      out.local[0] = sum;
      break;
    }
    case kBroadcast:
      out.local[0] = local(0);
      for (int r = 0; r + 1 < n; ++r)
        out.local[static_cast<std::size_t>(r) + 1] =
            message(r, r + 1, out.local[static_cast<std::size_t>(r)], element_bytes);
      break;
  }
  return out;
}

}  // namespace flexcore::test
