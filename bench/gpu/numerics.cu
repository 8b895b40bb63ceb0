// What the tensor cores of this device do with bf16, as JSON on standard output: are all forms of
// the product one and the same function of a row, a column and an accumulator, and is it the
// function of csrc/core/tensor_core.h? The kernels' bits rest on the answers (docs/cuda.md).
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -I csrc bench/gpu/numerics.cu
//   g++ -std=c++17 -O2 -x c++ -I csrc bench/gpu/numerics.cu csrc/cuda/host/simt.cpp   (emulated)
//
// Usage: numerics [trials]. Exits 0 when every form agrees and one model explains them.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/tensor_core.h"
#include "cuda/launch.h"
#include "cuda/math.h"
#include "cuda/wgmma.h"

namespace tml::cuda {
namespace {

constexpr int kDepth = 256;  // of a product: sixteen k16 steps
constexpr int kRows = 64;
constexpr int kColumns = 256;

// One trial: a [64, kDepth], b [256, kDepth], c [64, 256]; d = c + a b^T in one chain.
struct Probe {
  const std::uint16_t* a;
  const std::uint16_t* b;
  const float* c;
  float* d;
};

enum class Form { kChained, kWaited, kZeroScale, kFromRegisters, kMmaSync, kSwapped, kCoreTiles };

#if defined(__CUDACC__)
// A from registers, N = 8.
TML_DEVICE void wgmma_from_registers(float (&d)[4], const std::uint32_t (&a)[4], std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "%8, 1, 1, 1, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#else
inline void wgmma_from_registers(float (&d)[4], const std::uint32_t (&a)[4], std::uint64_t b) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  std::uint32_t pair[2];
  for (int i = 0; i < 2; ++i)
    std::memcpy(pair + i, simt::shared() + descriptor_byte(b, lane / 4, i * 8 + lane % 4 * 2), 4);
  mma(d, a, pair[0], pair[1]);
}
#endif

// Rows [first, first + num_rows) of m, 64 of its k, into a swizzled tile.
TML_DEVICE void load_tile(unsigned char* tile, const std::uint16_t* m, int num_rows, int k) {
  for (int i = static_cast<int>(threadIdx.x); i < num_rows * 8; i += 128)
    *reinterpret_cast<uint4*>(tile + swizzled_bytes(i / 8, i % 8)) =
        *reinterpret_cast<const uint4*>(m + i / 8 * kDepth + k + i % 8 * 8);
}

// The same as core tiles, as packed weights lie.
TML_DEVICE void load_core_tiles(unsigned char* tile, const std::uint16_t* m, int k) {
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 8; i += 128)
    *reinterpret_cast<uint4*>(tile + 2 * weight_offset(i / 8, i % 8 * 8, 1)) =
        *reinterpret_cast<const uint4*>(m + i / 8 * kDepth + k + i % 8 * 8);
}

// One block of a warpgroup a trial. kN: columns of b taken together; the others loop.
template <int kN, Form kForm>
TML_KERNEL(128, 1)
probe_kernel(const TML_GRID_CONSTANT Probe p) {
  constexpr bool kIsSwapped = kForm == Form::kSwapped;
  grid_wait();
  const std::int64_t trial = blockIdx.x;
  const std::uint16_t* const a = p.a + trial * kRows * kDepth;
  const std::uint16_t* const b = p.b + trial * kColumns * kDepth;
  const float* const c = p.c + trial * kRows * kColumns;
  float* const out = p.d + trial * kRows * kColumns;
  unsigned char* const left = shared_memory();
  unsigned char* const right = left + 64 * 128;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int column = 0; column < kColumns; column += kIsSwapped ? 64 : kN) {
    float d[kN / 2];
    const auto at = [&](int i) {
      const int row = warp * 16 + fragment_row(lane, i), col = fragment_column(lane, i);
      return kIsSwapped ? col * kColumns + column + row : row * kColumns + column + col;
    };
    for (int i = 0; i < kN / 2; ++i) d[i] = c[at(i)];
    for (int k = 0; k < kDepth; k += 64) {
      __syncthreads();
      if constexpr (kForm == Form::kCoreTiles)
        load_core_tiles(left, a, k);
      else
        load_tile(left, kIsSwapped ? b + column * kDepth : a, 64, k);
      load_tile(right, kIsSwapped ? a : b + column * kDepth, kN, k);
      proxy_fence();
      __syncthreads();
      const std::uint32_t la = shared_address(left), ra = shared_address(right);
      wgmma_hold(d);
      wgmma_fence();
      for (int step = 0; step < 4; ++step) {
        if constexpr (kForm == Form::kMmaSync || kForm == Form::kFromRegisters) {
          std::uint32_t x[4];
          for (int i = 0; i < 4; ++i) {
            const int row = warp * 16 + lane / 4 + i % 2 * 8, chunk = step * 2 + i / 2;
            x[i] = *reinterpret_cast<const std::uint32_t*>(left + swizzled_bytes(row, chunk) +
                                                           lane % 4 * 4);
          }
          if constexpr (kForm == Form::kFromRegisters) {
            wgmma_fence();
            wgmma_from_registers(*reinterpret_cast<float (*)[4]>(d), x, token_descriptor(ra, step));
            wgmma_commit();
            wgmma_wait<0>();
          } else {
            for (int j = 0; j < kN / 8; ++j) {
              std::uint32_t y[2];
              for (int i = 0; i < 2; ++i)
                y[i] = *reinterpret_cast<const std::uint32_t*>(
                    right + swizzled_bytes(j * 8 + lane / 4, step * 2 + i) + lane % 4 * 4);
              mma(*reinterpret_cast<float (*)[4]>(d + 4 * j), x, y[0], y[1]);
            }
          }
        } else {
          // kZeroScale: the first step does not read d (only where c is zero is that the same).
          const int accumulate = kForm == Form::kZeroScale && (k | step) == 0 ? 0 : 1;
          const std::uint64_t lhs =
              kForm == Form::kCoreTiles ? weight_descriptor(la, step) : token_descriptor(la, step);
          Wgmma<kN>::mma(d, lhs, token_descriptor(ra, step), accumulate);
          if constexpr (kForm == Form::kWaited) {
            wgmma_commit();
            wgmma_hold(d);
            wgmma_wait<0>();
            wgmma_hold(d);
            wgmma_fence();
          }
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_hold(d);
    }
    for (int i = 0; i < kN / 2; ++i) out[at(i)] = d[i];
  }
}

// Memory the device reads, and the copies.
template <class T>
struct Buffer {
  T* data = nullptr;
  std::size_t count;
  explicit Buffer(const std::vector<T>& from) : count(from.size()) {
#if defined(__CUDACC__)
    check_cuda("numerics", cudaMalloc(&data, count * sizeof(T)));
    check_cuda("numerics", cudaMemcpy(data, from.data(), count * sizeof(T), cudaMemcpyDefault));
#else
    data = new T[count];
    std::memcpy(data, from.data(), count * sizeof(T));
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(__CUDACC__)
    cudaFree(data);
#else
    delete[] data;
#endif
  }
  std::vector<T> read() const {
    std::vector<T> out(count);
#if defined(__CUDACC__)
    check_cuda("numerics", cudaDeviceSynchronize());
    check_cuda("numerics", cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDefault));
#else
    std::memcpy(out.data(), data, count * sizeof(T));
#endif
    return out;
  }
};

std::string device_name() {
#if defined(__CUDACC__)
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return "";
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return "";
  if (properties.major != 9) return "";
  return properties.name;
#else
  return "emulated";
#endif
}

// ---- data ----

std::uint64_t g_state = 88172645463325252u;
std::uint32_t random_bits() {
  g_state ^= g_state << 13;
  g_state ^= g_state >> 7;
  g_state ^= g_state << 17;
  return static_cast<std::uint32_t>(g_state >> 16);
}
float random_normal() {
  float sum = 0.0f;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(random_bits()) * 0x1p-32f;
  return sum - 6.0f;
}
std::uint16_t bf16_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

struct Data {
  const char* name;
  bool has_c;
  std::vector<std::uint16_t> a, b;
  std::vector<float> c;
};

// kind: 0 normal numbers, 1 exponents spread over 2^40, 2 cancelling pairs, 3 denormals and the
// ends of the range, 4 zeros of both signs, infinities, NaN, 5 normal with a tail of zero padding,
// 6 sums below fp32's normals, 7 denormal a beside large b, 8 zero a beside large b, the rest
// small.
Data make_data(const char* name, int kind, bool has_c, int trials) {
  Data data{name, has_c, {}, {}, {}};
  const auto value = [kind](int k, bool is_a) -> std::uint16_t {
    const std::uint32_t draw = random_bits();
    switch (kind) {
      case 1:
        return bf16_of(std::ldexp(random_normal(), static_cast<int>(draw % 41) - 20));
      case 2:
        return bf16_of((draw & 1u ? 1.0f : -1.0f) *
                       (1.0f + static_cast<float>(draw >> 8 & 3u) / 64));
      case 3:
        return draw % 3 == 0 ? static_cast<std::uint16_t>(draw >> 8 & 0x80ffu)
               : draw % 3 == 1
                   ? bf16_of(std::ldexp(random_normal(), -60 - static_cast<int>(draw >> 8 & 15u)))
                   : bf16_of(std::ldexp(random_normal(), 50 + static_cast<int>(draw >> 8 & 15u)));
      case 4:
        return draw % 64 == 0   ? std::uint16_t{0x7f80}
               : draw % 64 == 1 ? std::uint16_t{0xff80}
               : draw % 64 == 2 ? std::uint16_t{0x7fc1}
               : draw % 4 == 0  ? static_cast<std::uint16_t>(draw >> 16 & 0x8000u)
                                : bf16_of(random_normal());
      case 5:
        return k >= 200 ? std::uint16_t{0} : bf16_of(random_normal());
      case 6:
        return bf16_of(std::ldexp(random_normal(), -68));
      case 7:
        return is_a ? static_cast<std::uint16_t>(draw & 0x807fu)
                    : bf16_of(std::ldexp(random_normal(), 100));
      case 8:
        if (k % 16 == 0) return is_a ? std::uint16_t{0} : bf16_of(0x1p100f);
        return bf16_of(std::ldexp(random_normal(), -15));
      default:
        return bf16_of(random_normal());
    }
  };
  // Rows with special values are few, so that most outputs stay numbers.
  const auto fill = [&](std::vector<std::uint16_t>* out, int rows, bool is_a) {
    for (int trial = 0; trial < trials; ++trial)
      for (int row = 0; row < rows; ++row)
        for (int k = 0; k < kDepth; ++k)
          out->push_back(kind == 4 && row % 4 != 0 ? bf16_of(random_normal()) : value(k, is_a));
  };
  fill(&data.a, kRows, true);
  fill(&data.b, kColumns, false);
  for (int i = 0; i < trials * kRows * kColumns; ++i)
    data.c.push_back(has_c ? std::ldexp(random_normal(), static_cast<int>(random_bits() % 21) - 10)
                           : 0.0f);
  return data;
}

template <int kN, Form kForm>
std::vector<float> run(const Data& data, int trials) {
  const Buffer<std::uint16_t> a(data.a), b(data.b);
  const Buffer<float> c(data.c), d(std::vector<float>(data.c.size(), 0.0f));
  const Launch launch{nullptr, nullptr, 0, 1};
  launch_kernel("numerics", launch, probe_kernel<kN, kForm>, static_cast<unsigned>(trials), 128,
                64 * 128 + kN * 128, Probe{a.data, b.data, c.data, d.data});
  return d.read();
}

std::int64_t differences(const std::vector<float>& x, const std::vector<float>& y) {
  std::int64_t count = 0;
  for (std::size_t i = 0; i < x.size(); ++i) count += std::memcmp(&x[i], &y[i], 4) != 0 ? 1 : 0;
  return count;
}

std::uint64_t digest(const std::vector<float>& x) {
  std::uint64_t hash = 1469598103934665603u;
  for (const float value : x) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    hash = (hash ^ bits) * 1099511628211u;
  }
  return hash;
}

// Outputs of the first eight columns that the model does not give.
std::int64_t model_misses(const Data& data, const std::vector<float>& d, int trials,
                          const MmaModel& model) {
  std::int64_t count = 0;
  for (int trial = 0; trial < trials; ++trial)
    for (int row = 0; row < kRows; ++row)
      for (int col = 0; col < 8; ++col) {
        const std::size_t at = (static_cast<std::size_t>(trial) * kRows + row) * kColumns + col;
        const std::uint16_t* x = data.a.data() + (trial * kRows + row) * kDepth;
        const std::uint16_t* y = data.b.data() + (trial * kColumns + col) * kDepth;
        float acc = data.c[at];
        for (int k = 0; k < kDepth; k += kMmaDepth) acc = mma_step(x + k, y + k, acc, model);
        count += std::memcmp(&acc, &d[at], 4) != 0 ? 1 : 0;
      }
  return count;
}

bool report(const char* data, const char* form, std::int64_t count, bool* first) {
  std::printf("%s\n    {\"data\": \"%s\", \"form\": \"%s\", \"differences\": %lld}",
              *first ? "" : ",", data, form, static_cast<long long>(count));
  *first = false;
  return count == 0;
}

int run_all(int trials) {
  const std::string device = device_name();
  if (device.empty()) {
    std::fprintf(stderr, "numerics: needs an sm_90 device (H100, H200)\n");
    return 3;
  }
  std::vector<Data> sets;
  sets.push_back(make_data("normal", 0, false, trials));
  sets.push_back(make_data("normal onto c", 0, true, trials));
  sets.push_back(make_data("spread exponents", 1, true, trials));
  sets.push_back(make_data("cancelling", 2, false, trials));
  sets.push_back(make_data("denormals and large", 3, false, trials));
  sets.push_back(make_data("zeros, infinities, NaN", 4, false, trials));
  sets.push_back(make_data("zero-padded k", 5, false, trials));
  sets.push_back(make_data("denormal sums", 6, false, trials));
  sets.push_back(make_data("denormal operands", 7, false, trials));
  sets.push_back(make_data("large partners of zeros", 8, false, trials));
  bool all_equal = true, first = true;
  std::printf("{\n  \"device\": \"%s\",\n  \"trials\": %d,\n  \"forms\": [", device.c_str(),
              trials);
  std::vector<std::vector<float>> bases;
  for (const Data& data : sets) {
    const std::vector<float> base = run<8, Form::kChained>(data, trials);
    const auto against = [&](const char* form, const std::vector<float>& d) {
      all_equal = report(data.name, form, differences(base, d), &first) && all_equal;
    };
    against("wgmma n16", run<16, Form::kChained>(data, trials));
    against("wgmma n32", run<32, Form::kChained>(data, trials));
    against("wgmma n64", run<64, Form::kChained>(data, trials));
    against("wgmma n128", run<128, Form::kChained>(data, trials));
    against("wgmma n256", run<256, Form::kChained>(data, trials));
    against("wgmma n8, waited after each step", run<8, Form::kWaited>(data, trials));
    if (!data.has_c)
      against("wgmma n8, first step without d", run<8, Form::kZeroScale>(data, trials));
    against("wgmma n8, a from registers", run<8, Form::kFromRegisters>(data, trials));
    against("wgmma n8, a as core tiles", run<8, Form::kCoreTiles>(data, trials));
    against("mma.sync m16n8k16", run<8, Form::kMmaSync>(data, trials));
    against("wgmma n64, operands swapped", run<64, Form::kSwapped>(data, trials));
    bases.push_back(base);
  }
  // Order inside a k16 group: reversed there, the same groups.
  {
    Data reversed = sets[1];
    for (auto* m : {&reversed.a, &reversed.b})
      for (std::size_t k = 0; k < m->size(); k += 16)
        for (std::size_t i = 0; i < 8; ++i) std::swap((*m)[k + i], (*m)[k + 15 - i]);
    all_equal = report("normal onto c", "k reversed inside each k16",
                       differences(bases[1], run<8, Form::kChained>(reversed, trials)), &first) &&
                all_equal;
  }
  std::printf("\n  ],\n  \"models\": [");
  bool is_explained = false;
  first = true;
  // The default, each fact changed alone, and other windows.
  for (int variant = 0; variant < 9; ++variant) {
    MmaModel model;
    model.flushes_inputs = variant == 1;
    model.flushes_output = variant == 2;
    model.zero_products_align = variant == 3;
    model.overflows_to_infinity = variant != 4;
    if (variant > 4) model.fraction_bits = variant + 18 + (variant > 6 ? 1 : 0);
    std::printf(
        "%s\n    {\"fraction_bits\": %d, \"flushes_inputs\": %s, \"flushes_output\": %s, "
        "\"zero_products_align\": %s, \"overflows_to_infinity\": %s, \"misses\": {",
        first ? "" : ",", model.fraction_bits, model.flushes_inputs ? "true" : "false",
        model.flushes_output ? "true" : "false", model.zero_products_align ? "true" : "false",
        model.overflows_to_infinity ? "true" : "false");
    first = false;
    std::int64_t total = 0;
    for (std::size_t i = 0; i < sets.size(); ++i) {
      const std::int64_t misses = model_misses(sets[i], bases[i], trials, model);
      std::printf("%s\"%s\": %lld", i == 0 ? "" : ", ", sets[i].name,
                  static_cast<long long>(misses));
      total += misses;
    }
    std::printf("}}");
    if (variant == 0) is_explained = total == 0;
  }
  std::printf("\n  ],\n  \"digests\": {");
  for (std::size_t i = 0; i < sets.size(); ++i)
    std::printf("%s\"%s\": \"%016llx\"", i == 0 ? "" : ", ", sets[i].name,
                static_cast<unsigned long long>(digest(bases[i])));
  std::printf("},\n  \"all_forms_equal\": %s,\n  \"default_model_holds\": %s\n}\n",
              all_equal ? "true" : "false", is_explained ? "true" : "false");
  return all_equal && is_explained ? 0 : 1;
}

}  // namespace
}  // namespace tml::cuda

int main(int argc, char** argv) {
  const int trials = argc > 1 ? std::atoi(argv[1]) : 64;
  if (trials < 1 || argc > 2) {
    std::fprintf(stderr, "usage: %s [trials]\n", argv[0]);
    return 2;
  }
  return tml::cuda::run_all(trials);
}
