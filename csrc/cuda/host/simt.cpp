#include "cuda/host/simt.h"

#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

// Saves the callee's registers and the stack of one fiber and goes on with another (x86-64): a
// switch takes nanoseconds, where swapcontext asks the system for the signal mask twice.
extern "C" void tml_simt_switch(void** from_stack, void* to_stack);
asm(R"(
.text
.p2align 4
.type tml_simt_switch, @function
tml_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tml_simt_switch, . - tml_simt_switch
)");

namespace tml::simt {

Dim threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr std::size_t kStackBytes = 256 << 10;
// Behind shared memory and at the far end of a stack: a write there is an error of the kernel.
constexpr std::size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xff;
// Rounds over all fibers without anything happening before they count as stuck.
constexpr int kStuckRounds = 64;

struct Work {
  std::function<void()> run;
  int group;
};

struct Fiber {
  void* top = nullptr;  // of the stack, where the fiber left off
  std::unique_ptr<unsigned char[]> stack;
  unsigned thread = 0;
  bool is_done = false;
  std::deque<Work> work[2];
  int group[2] = {0, 0};
};

struct Warp {
  std::uint64_t words[2][32];
  unsigned arrived = 0;
  unsigned generation = 0;
};

struct Gate {
  unsigned arrived = 0;
  unsigned generation = 0;
};

struct Block {
  unsigned id;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  std::size_t shared_bytes;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<int, Gate> gates;
  std::deque<std::function<void()>> later;
  unsigned num_done = 0;
};

void* g_scheduler = nullptr;
Block* g_block = nullptr;
Fiber* g_fiber = nullptr;
const std::function<void()>* g_body = nullptr;
std::uint64_t g_progress = 0;

void run_fiber() {
  (*g_body)();
  g_fiber->is_done = true;
  ++g_block->num_done;
  ++g_progress;
  tml_simt_switch(&g_fiber->top, g_scheduler);
}

std::unique_ptr<Block> make_block(unsigned id, unsigned threads, std::size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->id = id;
  // What nobody wrote is NaN in fp32 and in bf16.
  block->memory.assign(shared_bytes + 1024 + kGuardBytes, kGuard);
  block->shared_bytes = shared_bytes;
  const auto base = reinterpret_cast<std::uintptr_t>(block->memory.data());
  block->shared = block->memory.data() + ((base + 1023) / 1024 * 1024 - base);
  block->fibers.resize(threads);
  block->warps.resize((threads + 31) / 32);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block->fibers[t];
    fiber.thread = t;
    fiber.stack.reset(new unsigned char[kStackBytes]);
    std::memset(fiber.stack.get(), kGuard, kGuardBytes);
    // Six registers, the entry point, and an empty return address that keeps the stack aligned.
    const auto end = reinterpret_cast<std::uintptr_t>(fiber.stack.get() + kStackBytes) / 16 * 16;
    auto* const top = reinterpret_cast<std::uintptr_t*>(end) - 8;
    for (int i = 0; i < 8; ++i) top[i] = 0;
    top[6] = reinterpret_cast<std::uintptr_t>(&run_fiber);
    fiber.top = top;
  }
  return block;
}

bool is_whole(const unsigned char* guard) {
  for (std::size_t i = 0; i < kGuardBytes; ++i)
    if (guard[i] != kGuard) return false;
  return true;
}

void check_guards(const Block& block) {
  const std::string name = "simt: block " + std::to_string(block.id);
  if (!is_whole(block.shared + block.shared_bytes))
    throw std::runtime_error(name + " wrote behind its shared memory");
  for (const Fiber& fiber : block.fibers)
    if (!is_whole(fiber.stack.get()))
      throw std::runtime_error(name + " overflowed the stack of a thread");
}

void resume(Block& block, Fiber& fiber) {
  g_block = &block;
  g_fiber = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = block.id;
  tml_simt_switch(&g_scheduler, fiber.top);
}

}  // namespace

void launch(unsigned grid, unsigned threads, std::size_t shared_bytes,
            const std::function<void()>& body, unsigned resident) {
  g_body = &body;
  gridDim.x = grid;
  blockDim.x = threads;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned next = 0;
  int idle_rounds = 0;
  while (next < grid || !blocks.empty()) {
    while (next < grid && blocks.size() < resident)
      blocks.push_back(make_block(next++, threads, shared_bytes));
    const std::uint64_t before = g_progress;
    for (auto& block : blocks) {
      for (Fiber& fiber : block->fibers)
        if (!fiber.is_done) resume(*block, fiber);
      if (!block->later.empty()) {
        g_block = block.get();
        const std::function<void()> work = std::move(block->later.front());
        block->later.pop_front();
        work();
        ++g_progress;
      }
    }
    for (std::size_t i = 0; i < blocks.size();) {
      if (blocks[i]->num_done == threads && blocks[i]->later.empty()) {
        check_guards(*blocks[i]);
        blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
    }
    idle_rounds = g_progress == before ? idle_rounds + 1 : 0;
    if (idle_rounds > kStuckRounds)
      throw std::runtime_error("simt: block " + std::to_string(blocks.front()->id) +
                               " is stuck: a barrier that not all threads reach?");
  }
}

void yield() { tml_simt_switch(&g_fiber->top, g_scheduler); }
void progress() { ++g_progress; }
unsigned char* shared() { return g_block->shared; }

void barrier(int id, unsigned count) {
  Gate& gate = g_block->gates[id];
  if (++gate.arrived == count) {
    gate.arrived = 0;
    ++gate.generation;
    ++g_progress;
    return;
  }
  const unsigned generation = gate.generation;
  while (gate.generation == generation) yield();
}

const std::uint64_t* exchange(std::uint64_t value) {
  Warp& warp = g_block->warps[threadIdx.x / 32];
  const unsigned generation = warp.generation;
  std::uint64_t* words = warp.words[generation % 2];  // the last exchange may still be read
  words[threadIdx.x % 32] = value;
  const unsigned first = threadIdx.x / 32 * 32;
  const unsigned lanes = blockDim.x - first < 32 ? blockDim.x - first : 32;
  if (++warp.arrived == lanes) {
    warp.arrived = 0;
    ++warp.generation;
    ++g_progress;
  }
  while (warp.generation == generation) yield();
  return words;
}

void issue(Async kind, std::function<void()> work) {
  Fiber& fiber = *g_fiber;
  const int k = static_cast<int>(kind);
  fiber.work[k].push_back({std::move(work), fiber.group[k]});
}

void commit(Async kind) { ++g_fiber->group[static_cast<int>(kind)]; }

void wait(Async kind, int groups_left) {
  const int k = static_cast<int>(kind);
  Fiber& fiber = *g_fiber;
  while (!fiber.work[k].empty() && fiber.work[k].front().group < fiber.group[k] - groups_left) {
    fiber.work[k].front().run();
    fiber.work[k].pop_front();
  }
}

void later(std::function<void()> work) { g_block->later.push_back(std::move(work)); }

void after_copies(std::function<void()> arrive) {
  Fiber* fiber = g_fiber;
  auto copies = std::make_shared<std::deque<Work>>();
  copies->swap(fiber->work[static_cast<int>(Async::kCopy)]);
  later([copies, arrive = std::move(arrive)] {
    for (const Work& work : *copies) work.run();
    arrive();
  });
}

}  // namespace tml::simt
