// The CUDA kernel's source on the CPU: in the place of the CPU kernel, for the Python tests; with
// HOST_CUDA_MAIN a program of its own for the sanitizers, against a plain reference.
#include "../csrc/fused_cuda.cu"

namespace fused {

template <typename T>
void run_cpu(const Problem& problem, const Mix<T>& mix) {
  run_cuda<T>(problem, mix, 0);
}
template void run_cpu<float>(const Problem&, const Mix<float>&);
template void run_cpu<double>(const Problem&, const Mix<double>&);

}  // namespace fused

#ifdef HOST_CUDA_MAIN
#include <cmath>
#include <cstdio>
#include <random>

using namespace fused;

// Random bands as the kernels take them, of exactly their size, so that AddressSanitizer sees a
// step beyond: windows of up to 9 taps, some empty, that go up, go down, or lie anywhere.
template <typename T>
struct Axis {
  int64_t in, out, variants, rows;
  std::vector<int32_t> table;
  std::vector<int64_t> index;

  Axis(int64_t n, bool small, std::mt19937& random)
      : in(1 + random() % (small || random() % 4 ? 40 : 300)),
        out(1 + random() % (small          ? 32
                            : random() % 4 ? 40
                                           : 300)),
        variants(1 + random() % 2),
        index(n) {
    const int64_t taps = 1 + random() % std::min<int64_t>(in, random() % 2 ? 3 : 9),
                  way = random() % 3;
    const int64_t groups = (out + kLanes - 1) / kLanes;
    rows = kHeadRows + taps * static_cast<int64_t>(sizeof(T) / sizeof(int32_t));
    table.resize(variants * groups * rows * kLanes);
    for (int64_t& i : index) i = random() % variants;
    for (int64_t g = 0; g < variants * groups; ++g) {
      Group& group = *reinterpret_cast<Group*>(&table[g * rows * kLanes]);
      T* const weights = reinterpret_cast<T*>(&group + 1);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t o = std::min(g % groups * kLanes + lane, out - 1);
        const int64_t count = random() % 5 ? taps : random() % (taps + 1), room = in - count + 1;
        const int64_t up = o * room / out;
        group.first[lane] = static_cast<int32_t>(way == 0   ? up
                                                 : way == 1 ? room - 1 - up
                                                            : random() % room);
        group.count[lane] = static_cast<int32_t>(count);
        for (int64_t t = 0; t < count; ++t) weights[t * kLanes + lane] = T(random() % 64) / 64;
      }
      for (int h = 0; h < 2; ++h) {
        HalfGroup& half = group.halves[h];
        half = {static_cast<int32_t>(in), 0, 0, 0, 0, 0, {}};
        for (int lane = h * kHalf; lane < (h + 1) * kHalf; ++lane) {
          half.low = std::min(half.low, group.first[lane]);
          half.high = std::max(half.high, group.first[lane] + group.count[lane]);
        }
      }
    }
  }

  Bands bands() const {
    const int64_t groups = (out + kLanes - 1) / kLanes;
    const int64_t* const variant = variants > 1 ? index.data() : nullptr;
    return {table.data(), variants, groups, rows, out, in, variant, 1, false};
  }

  double at(int64_t n, int64_t o, int64_t i) const {
    const Group& group = group_of(bands().table(n), rows, o);
    const int64_t lane = o % kLanes, t = i - group.first[lane];
    if (t < 0 || t >= group.count[lane]) return 0;
    return static_cast<double>(weights_of<T>(group)[t * kLanes + lane]);
  }
};

template <typename T, typename In, typename Out>
bool agrees(ScalarType from, ScalarType to, double tolerance, std::mt19937& random) {
  const bool small = random() % 2;  // a warp for each image, several images for a warp; or tiles
  const int64_t n = small ? 8 + random() % 16 : 1 + random() % 3;
  const int64_t in = 1 + random() % 3, out = 1 + random() % 3;
  const Axis<T> rows(n, small, random), columns(n, small, random);
  std::vector<In> source(n * in * rows.in * columns.in);
  std::vector<Out> target(n * out * rows.out * columns.out);
  for (In& x : source) x = static_cast<In>(static_cast<float>(random() % 256));
  const bool last = random() % 3 == 0;
  const auto view = [&](int64_t c, int64_t height, int64_t width) {
    View v{{n}, {c * height * width}, 1, height * width, width, 1};
    if (last) v.channel = 1, v.row = width * c, v.column = c;
    return v;
  };
  Mix<T> mix{};
  mix.in = static_cast<int>(in), mix.out = static_cast<int>(out), mix.clamped = random() % 2;
  const T unit = sizeof(In) == 1 && random() % 2 ? T(1e9) : T(1);  // bytes are summed in a unit
  for (int64_t i = 0; i < in * out; ++i) mix.mix[i] = T(random() % 4) / 4 * unit;  // some are 0
  for (int k = 0; k < out; ++k) mix.bias[k] = T(k), mix.low[k] = T(1), mix.high[k] = T(1e4);
  const Problem p{source.data(),
                  target.data(),
                  from,
                  to,
                  view(in, rows.in, columns.in),
                  view(out, rows.out, columns.out),
                  rows.bands(),
                  columns.bands(),
                  n};
  run_cuda<T>(p, mix, 0);
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < out; ++k) {
      for (int64_t y = 0; y < rows.out; ++y) {
        for (int64_t x = 0; x < columns.out; ++x) {
          double sum = static_cast<double>(mix.bias[k]);
          for (int64_t fy = 0; fy < rows.in; ++fy) {
            const double wy = rows.at(i, y, fy);
            for (int64_t fx = 0; wy != 0 && fx < columns.in; ++fx) {
              const double wx = columns.at(i, x, fx);
              const In* at = source.data() + p.from.image(i) + fy * p.from.row + fx * p.from.column;
              for (int64_t c = 0; wx != 0 && c < in; ++c) {
                sum += wy * wx * static_cast<double>(mix.mix[k * in + c]) *
                       static_cast<double>(at[c * p.from.channel]);
              }
            }
          }
          if (mix.clamped) sum = std::min(std::max(sum, 1.), 1e4);
          if (to == ScalarType::Byte) sum = std::min(sum, 255.);
          const int64_t at = p.to.image(i) + k * p.to.channel + y * p.to.row + x * p.to.column;
          const double error = std::fabs(static_cast<double>(target[at]) - sum);
          const double most = to == ScalarType::Byte ? 0.51 : tolerance * (1 + sum);
          if (!(error / most <= worst)) worst = std::isnan(error) ? INFINITY : error / most;
        }
      }
    }
  }
  if (worst <= 1) return true;
  std::printf("%d -> %d, %ld x (%ld, %ld, %ld) -> (%ld, %ld, %ld): %g times the tolerance\n",
              static_cast<int>(from), static_cast<int>(to), n, in, rows.in, columns.in, out,
              rows.out, columns.out, worst);
  return false;
}

int main(int, char** arguments) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  using S = ScalarType;
  std::mt19937 random(std::atoi(arguments[1]));
  bool right = true;
  for (int i = 0; i < std::atoi(arguments[2]); ++i) {
    right &= agrees<float, uint8_t, float>(S::Byte, S::Float, 1e-5, random);
    right &= agrees<float, float, float>(S::Float, S::Float, 1e-5, random);
    right &= agrees<float, float, uint8_t>(S::Float, S::Byte, 0, random);
    right &= agrees<double, double, double>(S::Double, S::Double, 1e-12, random);
    right &= agrees<float, Half, Half>(S::Half, S::Half, 1e-3, random);
    right &= agrees<float, uint8_t, BFloat16>(S::Byte, S::BFloat16, 8e-3, random);
  }
  return right ? 0 : 1;
}
#endif
