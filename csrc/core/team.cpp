#include "core/team.h"

#include <linux/futex.h>
#include <omp.h>
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <exception>

namespace tml {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// About 0.2 ms: longer than any one-threaded stretch of a step. OpenMP's word for a machine with
// other work to do counts.
int max_spins() {
  static const int count = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy != nullptr && strcasecmp(policy, "passive") == 0 ? 0 : 10'000;
  }();
  return count;
}

constexpr int kMinSpins = 100;

// Spinning that ended in sleep was in vain: with more busy threads than cores it soon is short.
thread_local int t_num_spins = kMinSpins;

// A counter that threads wait for: spinning at first, then asleep.
class Signal {
 public:
  std::uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void raise() {
    value_.fetch_add(1);
    if (num_asleep_.load() > 0) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  void await_change(std::uint32_t seen) {
    const int most = max_spins();
    for (int spin = std::min(t_num_spins, most); spin > 0; --spin) {
      if (value() != seen) {
        t_num_spins = std::min(2 * t_num_spins, most);
        return;
      }
      relax();
    }
    t_num_spins = std::max(t_num_spins / 2, kMinSpins);
    num_asleep_.fetch_add(1);
    while (value_.load() == seen) futex(FUTEX_WAIT_PRIVATE, seen);
    num_asleep_.fetch_sub(1);
  }

 private:
  void futex(int operation, std::uint32_t value) {
    static_assert(sizeof(value_) == sizeof(std::uint32_t));
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&value_), operation, value, nullptr);
  }

  std::atomic<std::uint32_t> value_{0};
  std::atomic<std::int32_t> num_asleep_{0};
};

class Team {
 public:
  // Of the num_threads threads that run one body.
  void barrier(int num_threads) {
    const std::uint32_t round = lined_up_.value();
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
      num_arrived_.store(0, std::memory_order_relaxed);
      lined_up_.raise();
    } else {
      lined_up_.await_change(round);
    }
  }

  // Thread 0: a body for the first num_threads of size threads.
  void run(int num_threads, int size, TeamBody body, const void* context);
  // The others: one body after the other until `dismiss`.
  void serve(int thread);

  void dismiss(int size) { post(0, size, nullptr, nullptr); }

 private:
  void post(int num_threads, int size, TeamBody body, const void* context) {
    body_ = body;
    context_ = context;
    num_threads_ = num_threads;
    num_busy_.store(size - 1, std::memory_order_relaxed);
    posted_.raise();
  }

  alignas(64) Signal posted_;
  TeamBody body_ = nullptr;
  const void* context_ = nullptr;
  int num_threads_ = 0;
  alignas(64) Signal finished_;
  std::atomic<int> num_busy_{0};
  alignas(64) Signal lined_up_;
  std::atomic<int> num_arrived_{0};
};

struct Place {
  Team* team = nullptr;  // of the body that runs, or of the scope
  int num_threads = 0;   // of the body that runs; 0 outside of one
  int num_at_hand = 0;   // threads of the scope; 0 without one
};

thread_local Place t_place;

void run_body(Team* team, TeamBody body, const void* context, int thread, int num_threads) {
  const Place before = t_place;
  t_place = {team, num_threads, 0};
  body(context, thread, num_threads);
  t_place = before;
}

void Team::run(int num_threads, int size, TeamBody body, const void* context) {
  const std::uint32_t seen = finished_.value();
  post(num_threads, size, body, context);
  run_body(this, body, context, 0, num_threads);
  finished_.await_change(seen);
}

void Team::serve(int thread) {
  for (std::uint32_t seen = 0;; ++seen) {
    posted_.await_change(seen);
    const TeamBody body = body_;
    if (body == nullptr) return;
    if (thread < num_threads_) run_body(this, body, context_, thread, num_threads_);
    if (num_busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) finished_.raise();
  }
}

}  // namespace

void team_parallel(int num_threads, TeamBody body, const void* context) {
  const Place place = t_place;
  if (num_threads <= 1 || place.num_threads > 0) return run_body(nullptr, body, context, 0, 1);
  if (place.num_at_hand > 0)
    return place.team->run(std::min(num_threads, place.num_at_hand), place.num_at_hand, body,
                           context);
  Team team;
#pragma omp parallel num_threads(num_threads)
  {
    const int size = omp_get_num_threads();
    run_body(&team, body, context, omp_get_thread_num(), size);
    if (size > 1) team.barrier(size);  // so that nobody sleeps at the region's own end
  }
}

void team_barrier() {
  if (t_place.num_threads > 1) t_place.team->barrier(t_place.num_threads);
}

void with_team(int num_threads, void (*run)(const void*), const void* context) {
  if (num_threads <= 1 || t_place.num_threads > 0 || t_place.num_at_hand > 0) return run(context);
  Team team;
  std::exception_ptr error;
#pragma omp parallel num_threads(num_threads)
  {
    const int size = omp_get_num_threads();
    if (omp_get_thread_num() > 0) {
      team.serve(omp_get_thread_num());
    } else if (size == 1) {
      // Inside somebody else's region, which has no thread to spare.
      t_place = {nullptr, 1, 0};
    } else {
      t_place = {&team, 0, size};
    }
    if (omp_get_thread_num() == 0) {
      try {
        run(context);
      } catch (...) {
        error = std::current_exception();
      }
      t_place = {};
      if (size > 1) team.dismiss(size);
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace tml
