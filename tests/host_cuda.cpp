// The CUDA kernel's source on the CPU: in the place of the CPU kernel, for the Python tests; with
// HOST_CUDA_MAIN a program of its own for the sanitizers, against a plain reference.
#include "../csrc/fused_cuda.cu"

namespace fused {

template <bool backward>
void run_cpu(const Problem& problem, ScalarType type) {
  run_cuda<backward>(problem, type, 0);
}
template void run_cpu<false>(const Problem&, ScalarType);
template void run_cpu<true>(const Problem&, ScalarType);

}  // namespace fused

#ifdef HOST_CUDA_MAIN
#include <cmath>
#include <cstdio>
#include <random>

using namespace fused;

// (out, in) weights of one axis; T decides the windows.
template <typename T>
std::vector<double> matrix(int64_t in, int64_t out, bool flip) {
  const Axis<T> axis(in, out);
  std::vector<double> result(in * out);
  for (int64_t o = 0; o < out; ++o) {
    const Window<T> seen = window(axis, o);
    double sum = 0;
    for (int64_t j = 0; j < seen.count; ++j) sum += weight(axis, seen, j);
    for (int64_t j = 0; j < seen.count; ++j) {
      result[(flip ? out - 1 - o : o) * in + seen.first + j] = weight(axis, seen, j) / sum;
    }
  }
  return result;
}

// The vectors have the exact size, so that AddressSanitizer sees a step beyond.
template <bool backward, typename In, typename Out>
bool agrees(ScalarType type, int64_t n, int64_t h, int64_t w, int64_t oh, int64_t ow, bool last,
            std::mt19937& random) {
  using T = std::conditional_t<std::is_same<In, double>::value, double, float>;
  const int64_t from_channels = backward ? 1 : 3, to_channels = backward ? 3 : 1;
  const int64_t fh = backward ? oh : h, fw = backward ? ow : w;
  const int64_t th = backward ? h : oh, tw = backward ? w : ow;
  std::vector<In> source(n * from_channels * fh * fw);
  std::vector<Out> target(n * to_channels * th * tw, static_cast<Out>(NAN));
  const double unit = std::is_same<In, uint8_t>::value ? 255 : 1;
  for (In& x : source) x = static_cast<In>(static_cast<float>(random() % 256 / 255. * unit));
  std::unique_ptr<bool[]> flips(new bool[2 * n]);
  for (int64_t i = 0; i < 2 * n; ++i) flips[i] = random() % 2;
  const auto view = [&](int64_t c, int64_t height, int64_t width) {
    View v{{n}, {c * height * width}, 1, height * width, width, 1};
    if (last) v.channel = 1, v.row = width * c, v.column = c;
    return v;
  };
  const Problem p{source.data(),
                  target.data(),
                  view(from_channels, fh, fw),
                  view(to_channels, th, tw),
                  {false, flips.get(), 2},
                  {false, flips.get() + 1, 2},
                  n,
                  h,
                  w,
                  oh,
                  ow};
  run_cuda<backward>(p, type, 0);
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    const std::vector<double> rows = matrix<T>(h, oh, flips[2 * i + 1]);
    const std::vector<double> columns = matrix<T>(w, ow, flips[2 * i]);
    for (int64_t c = 0; c < to_channels; ++c) {
      for (int64_t y = 0; y < th; ++y) {
        for (int64_t x = 0; x < tw; ++x) {
          double sum = 0;
          for (int64_t fy = 0; fy < fh; ++fy) {
            const double wy = backward ? rows[fy * h + y] : rows[y * h + fy];
            if (wy == 0) continue;
            for (int64_t fx = 0; fx < fw; ++fx) {
              const double wx = backward ? columns[fx * w + x] : columns[x * w + fx];
              const In* at = source.data() + p.from.image(i) + fy * p.from.row + fx * p.from.column;
              for (int64_t k = 0; k < from_channels; ++k) {
                sum += wy * wx * gray_weight(backward ? c : k) / unit *
                       static_cast<double>(at[k * p.from.channel]);
              }
            }
          }
          const int64_t at = p.to.image(i) + c * p.to.channel + y * p.to.row + x * p.to.column;
          const double error = std::fabs(static_cast<double>(target[at]) - sum) / (1 + sum);
          if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
        }
      }
    }
  }
  const double tolerance = type == ScalarType::Half       ? 1e-2
                           : type == ScalarType::BFloat16 ? 5e-2
                                                          : 1e-5;
  if (worst <= tolerance) return true;
  std::printf("%s %d (%ld, 3, %ld, %ld) -> (%ld, %ld): off by %g\n",
              backward ? "backward" : "forward", static_cast<int>(type), n, h, w, oh, ow, worst);
  return false;
}

int main(int, char** arguments) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  std::mt19937 random(std::atoi(arguments[1]));
  bool right = true;
  for (int i = 0; i < std::atoi(arguments[2]); ++i) {
    int64_t s[4] = {32, 32, 28, 28};
    for (int64_t& x : s) x = i == 0 ? x : 1 + random() % (random() % 4 ? 40 : 300);
    const int64_t n = 1 + random() % 3;
    const bool last = random() % 3 == 0;
    right &=
        agrees<false, uint8_t, float>(ScalarType::Byte, n, s[0], s[1], s[2], s[3], last, random);
    right &=
        agrees<false, float, float>(ScalarType::Float, n, s[0], s[1], s[2], s[3], last, random);
    right &= agrees<true, float, float>(ScalarType::Float, n, s[0], s[1], s[2], s[3], last, random);
    right &=
        agrees<false, double, double>(ScalarType::Double, n, s[0], s[1], s[2], s[3], last, random);
    right &= agrees<true, Half, Half>(ScalarType::Half, n, s[0], s[1], s[2], s[3], last, random);
    right &= agrees<false, BFloat16, BFloat16>(ScalarType::BFloat16, n, s[0], s[1], s[2], s[3],
                                               last, random);
  }
  return right ? 0 : 1;
}
#endif
