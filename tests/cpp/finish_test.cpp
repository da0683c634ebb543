// csrc/common/finish.h for tests/ops/test_common_headers.py, evaluated by one thread or by a team
// of some.
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../../csrc/common/finish.h"

namespace {

using namespace dicekernels;

// Members of a team that wait for each other, and the numbers that they bring.
class Meeting {
 public:
  explicit Meeting(int64_t members) : members_(members), values_(members) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t turn = turn_;
    if (++arrived_ == members_) {
      arrived_ = 0;
      ++turn_;
      gone_on_.notify_all();
    } else {
      gone_on_.wait(lock, [&] { return turn_ != turn; });
    }
  }

  // F over the numbers of all members, in their order.
  template <class F>
  double combine(int64_t member, double x, F combined) {
    wait();  // the numbers of the last time have been read
    values_[member] = x;
    wait();
    double total = values_[0];
    for (int64_t at = 1; at < members_; ++at) total = combined(total, values_[at]);
    return total;
  }

 private:
  const int64_t members_;
  std::mutex mutex_;
  std::condition_variable gone_on_;
  int64_t arrived_ = 0, turn_ = 0;
  std::vector<double> values_;
};

struct Part {
  Meeting& meeting;
  int64_t rank_, size_;

  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }
  double sum(double x) const {
    return meeting.combine(rank_, x, [](double a, double b) { return a + b; });
  }
  double max(double x) const {
    return meeting.combine(rank_, x, [](double a, double b) { return b > a ? b : a; });
  }
};

struct Team {
  Meeting& meeting;
  Part part_;
  int64_t rank_, size_, parts_;

  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }
  const Part& part() const { return part_; }
  int64_t part_rank() const { return rank_ / part_.size(); }
  int64_t parts() const { return parts_; }
  void sync() const { meeting.wait(); }
  double sum(double x) const {
    return meeting.combine(rank_, x, [](double a, double b) { return a + b; });
  }
  double load(const double* value) const { return *value; }
  void add_samples(const double* totals, int64_t samples, int64_t columns, double* sums) const {
    for (int64_t at = rank_; at < columns; at += size_) {
      sums[at] = 0;
      for (int64_t b = 0; b < samples; ++b) sums[at] += totals[b * columns + at];
    }
  }
};

template <class Store>
void finish_by_team(const FinishSpec& spec, const FinishData& data, int64_t parts,
                    int64_t part_size, Store store) {
  Meeting all(parts * part_size);
  std::vector<std::unique_ptr<Meeting>> of_part;
  for (int64_t at = 0; at < parts; ++at) of_part.push_back(std::make_unique<Meeting>(part_size));
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < parts * part_size; ++rank) {
    const Part part{*of_part[rank / part_size], rank % part_size, part_size};
    threads.emplace_back([&, team = Team{all, part, rank, parts * part_size, parts}] {
      finish(spec, data, team, store);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

// The arguments of the op `finish` (dicekernels/ops.py), and the team: `parts` of `part_size`
// threads, or one thread where there are none. Null weights are ones. Returns how many losses were
// stored.
extern "C" int64_t finish_test(int64_t parts, int64_t part_size, int64_t samples, int64_t classes,
                               const double* totals, const double* class_weight,
                               const double* pos_weight, const double* neg_weight,
                               double region_lambda,
                               double voxel_lambda DK_FINISH_NUMBERS(DK_PARAMETER), double* loss,
                               double* coef) {
  const FinishSpec spec{DK_FINISH_NUMBERS(DK_VALUE)};
  std::vector<double> batch_sums(classes * row_count(rows), NAN);
  const FinishData data{samples,      classes,    places_of(rows), totals,        batch_sums.data(),
                        class_weight, pos_weight, neg_weight,      region_lambda, voxel_lambda,
                        coef};
  std::mutex mutex;
  int64_t stored = 0;
  const auto store = [&](int64_t at, double value) {
    const std::lock_guard<std::mutex> lock(mutex);
    loss[at] = value;
    ++stored;
  };
  if (parts > 0)
    finish_by_team(spec, data, parts, part_size, store);
  else
    finish(spec, data, OneThread{}, store);
  return stored;
}
