// What csrc/core/team.h promises: every thread once, lined up, inside and outside of a scope.
#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/team.h"
#include "tests/check.h"

namespace tml::tests {
namespace {

constexpr int kRounds = 2000;

struct Rounds {
  std::vector<int> counts;  // of one thread each, read by the others after a barrier
  std::atomic<int> num_wrong{0};
  explicit Rounds(int num_threads) : counts(static_cast<std::size_t>(num_threads), 0) {}
};

void count_in_step(const void* context, int thread, int num_threads) {
  auto& rounds = *static_cast<Rounds*>(const_cast<void*>(context));
  for (int round = 1; round <= kRounds; ++round) {
    rounds.counts[static_cast<std::size_t>(thread)] = round;
    team_barrier();
    for (int other = 0; other < num_threads; ++other)
      if (rounds.counts[static_cast<std::size_t>(other)] != round) ++rounds.num_wrong;
    team_barrier();
  }
}

TML_TEST(team_barrier_lines_threads_up) {
  for (int num_threads : {1, 2, 3, 5}) {  // more than this machine may have
    Rounds rounds(num_threads);
    team_parallel(num_threads, count_in_step, &rounds);
    TML_CHECK_EQUAL(rounds.num_wrong.load(), 0);
    TML_CHECK_EQUAL(rounds.counts[0], kRounds);
  }
}

struct Sums {
  std::atomic<int> num_calls{0}, num_nested{0};
};

void call_and_nest(const void* context, int, int) {
  auto& sums = *static_cast<Sums*>(const_cast<void*>(context));
  ++sums.num_calls;
  const TeamBody inner = [](const void* inner_context, int, int num_threads) {
    team_barrier();
    auto& inner_sums = *static_cast<Sums*>(const_cast<void*>(inner_context));
    if (num_threads == 1) ++inner_sums.num_nested;
  };
  team_parallel(4, inner, context);
}

TML_TEST(team_scope_serves_call_after_call) {
  Sums sums;
  const auto run = [](const void* context) {
    for (int round = 0; round < kRounds; ++round) {
      team_parallel(1, call_and_nest, context);
      team_parallel(2, call_and_nest, context);
      team_parallel(3, call_and_nest, context);
      team_parallel(7, call_and_nest, context);  // no more than the scope has
    }
  };
  with_team(3, run, &sums);
  TML_CHECK_EQUAL(sums.num_calls.load(), kRounds * (1 + 2 + 3 + 3));
  TML_CHECK_EQUAL(sums.num_nested.load(), sums.num_calls.load());
}

TML_TEST(team_scope_lines_threads_up_whoever_takes_part) {
  Rounds two(2), three(3);
  const Rounds* both[] = {&two, &three};
  const auto run = [](const void* context) {
    const auto* rounds = static_cast<const Rounds* const*>(context);
    team_parallel(2, count_in_step, rounds[0]);
    team_parallel(3, count_in_step, rounds[1]);
    team_parallel(2, count_in_step, rounds[0]);
  };
  with_team(3, run, both);
  TML_CHECK_EQUAL(two.num_wrong.load() + three.num_wrong.load(), 0);
}

TML_TEST(team_scope_lets_an_error_through) {
  bool caught = false;
  const auto run = [](const void*) { throw std::runtime_error("from the scope"); };
  try {
    with_team(3, run, nullptr);
  } catch (const std::runtime_error&) {
    caught = true;
  }
  TML_CHECK(caught);
  Rounds after(3);
  team_parallel(3, count_in_step, &after);
  TML_CHECK_EQUAL(after.num_wrong.load(), 0);
}

TML_TEST(teams_of_several_threads_do_not_meet) {
  std::vector<Sums> sums(4);
  std::vector<std::thread> threads;
  for (Sums& own : sums)
    threads.emplace_back([&own] {
      const auto run = [](const void* context) {
        for (int round = 0; round < kRounds / 10; ++round) team_parallel(2, call_and_nest, context);
      };
      with_team(2, run, &own);
    });
  for (std::thread& thread : threads) thread.join();
  for (Sums& own : sums) TML_CHECK_EQUAL(own.num_calls.load(), 2 * (kRounds / 10));
}

}  // namespace
}  // namespace tml::tests
