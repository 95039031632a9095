// The CPU kernel, included by fused_cpu.cpp once for each instruction set, inside a namespace and
// a target of its own. Output rows go kRows at a time: gray rows into a ring, the vertical pass
// into the rows of `v`, the horizontal pass into the target.
template <typename In, typename T>
inline void gray(const In* red, int64_t channel, int64_t column, int64_t n, T unit,
                 T* __restrict out) {
  const T r = T(gray_weight(0)) * unit, g = T(gray_weight(1)) * unit, b = T(gray_weight(2)) * unit;
  const In *green = red + channel, *blue = green + channel;
#define FUSED_GRAY(i, j) out[i] = T(red[j]) * r + T(green[j]) * g + T(blue[j]) * b
  if (column == 1) {
    for (int64_t i = 0; i < n; ++i) FUSED_GRAY(i, i);
  } else if (column == 3 && channel == 1) {
    green = red + 1, blue = red + 2;
    for (int64_t i = 0; i < n; ++i) FUSED_GRAY(i, 3 * i);
  } else {
    for (int64_t i = 0; i < n; ++i) FUSED_GRAY(i, i * column);
  }
#undef FUSED_GRAY
}

// Asks for memory before its turn: the processor's own prefetching stops at the end of a page,
// which for a small image is the end of a channel.
template <bool write>
inline void fetch(const void* begin, int64_t bytes) {
  const char* p = static_cast<const char*>(begin);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, write, write ? 3 : 2);
}

// v = the sum of N weighted rows (and v, where `add`), in the order of the taps.
template <int N, bool add, typename T>
inline void weigh(const T* ring, int64_t mask, int64_t pitch, int64_t first, const T* w, T* v) {
  typedef T Vector __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
  const T* rows[N];
  for (int t = 0; t < N; ++t) rows[t] = ring + ((first + t) & mask) * pitch;
  for (int64_t x = 0; x < pitch; x += 64 / sizeof(T)) {
    Vector sum = *reinterpret_cast<const Vector*>(rows[0] + x) * w[0];
    if (add) sum += *reinterpret_cast<const Vector*>(v + x);
    for (int t = 1; t < N; ++t) sum += *reinterpret_cast<const Vector*>(rows[t] + x) * w[t];
    *reinterpret_cast<Vector*>(v + x) = sum;
  }
}

template <typename T>
inline void vertical(const T* ring, int64_t mask, int64_t pitch, int64_t first, int64_t count,
                     const T* w, T* v) {
  if (count == 3) return weigh<3, false>(ring, mask, pitch, first, w, v);
  if (count == 2) return weigh<2, false>(ring, mask, pitch, first, w, v);
  if (count == 1) return weigh<1, false>(ring, mask, pitch, first, w, v);
  if (count == 0) return void(std::memset(v, 0, pitch * sizeof(T)));
  weigh<4, false>(ring, mask, pitch, first, w, v);
  int64_t t = 4;
  for (; t + 4 <= count; t += 4) weigh<4, true>(ring, mask, pitch, first + t, w + t, v);
  for (; t < count; ++t) weigh<1, true>(ring, mask, pitch, first + t, w + t, v);
}

template <typename T>
inline void horizontal(const Bands<T>& bands, const T* v, int64_t pitch, int rows, T* const* out) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < bands.rows; ++o) {
      const T *w = &bands.weight[o * bands.width], *in = v + r * pitch + bands.first[o];
      T sum = 0;
      for (int32_t t = 0; t < bands.count[o]; ++t) sum += in[t] * w[t];
      out[r][o] = sum;
    }
  }
}

#ifdef FUSED_AVX512
// Sixteen outputs at a time. Where their taps lie within 32 pixels, which two registers hold, a
// tap is a permutation of these; elsewhere it is a gather. A lane whose window has ended takes
// no part: its zero weight would make a NaN of an infinity.
inline void horizontal(const Bands<float>& bands, const float* v, int64_t pitch, int rows,
                       float* const* out) {
  for (int64_t o = 0; o < bands.rows; o += kLanes) {
    const float* w = &bands.lane_weight[o * bands.width];
    __m512i index = _mm512_loadu_si512(&bands.first[o]);
    const __m512i count = _mm512_loadu_si512(&bands.count[o]), one = _mm512_set1_epi32(1);
    const int64_t base = bands.base[o / kLanes];
    __m512 sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = _mm512_setzero_ps();
    if (base >= 0) {
      __m512 low[kRows], high[kRows];
      for (int r = 0; r < kRows; ++r) {
        low[r] = _mm512_loadu_ps(v + r * pitch + base);
        high[r] = _mm512_loadu_ps(v + r * pitch + base + kLanes);
      }
      index = _mm512_sub_epi32(index, _mm512_set1_epi32(static_cast<int>(base)));
      for (int t = 0; t < bands.width; ++t, index = _mm512_add_epi32(index, one)) {
        const __mmask16 live = _mm512_cmpgt_epi32_mask(count, _mm512_set1_epi32(t));
        const __m512 weights = _mm512_loadu_ps(w + t * kLanes);
        for (int r = 0; r < kRows; ++r) {
          const __m512 x = _mm512_maskz_permutex2var_ps(live, low[r], index, high[r]);
          sum[r] = _mm512_fmadd_ps(x, weights, sum[r]);
        }
      }
    } else {
      for (int t = 0; t < bands.width; ++t, index = _mm512_add_epi32(index, one)) {
        const __mmask16 live = _mm512_cmpgt_epi32_mask(count, _mm512_set1_epi32(t));
        const __m512 weights = _mm512_loadu_ps(w + t * kLanes), zero = _mm512_setzero_ps();
        for (int r = 0; r < kRows; ++r) {
          const __m512 x = _mm512_mask_i32gather_ps(zero, live, index, v + r * pitch, 4);
          sum[r] = _mm512_fmadd_ps(x, weights, sum[r]);
        }
      }
    }
    const int64_t left = bands.rows - o;
    const __mmask16 kept = left < kLanes ? (1u << left) - 1 : 0xffff;
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) _mm512_mask_storeu_ps(out[r] + o, kept, sum[r]);
    }
  }
}
#endif

// The target rows [begin, end) of image n (before a flip of the target's rows), by way of `stage`
// where that is given, which holds a whole result.
template <bool backward, typename In, typename Out, typename T>
void run(const Problem& p, const Plan<T>& plan, int64_t n, int64_t begin, int64_t end, T* scratch,
         T* stage) {
  const bool hflip = p.hflip(n), vflip = p.vflip(n);
  const Bands<T>&rows = plan.rows, &columns = plan.columns[hflip];
  const int64_t width = columns.columns, pitch = plan.pitch, mask = plan.ring - 1;
  T *ring = scratch, *v = ring + plan.ring * pitch, *spare = v + plan.v;
  const In* source = static_cast<const In*>(p.source) + p.from.image(n);
  Out* target = static_cast<Out*>(p.target) + p.to.image(n);
  int64_t from_row = p.from.row, to_row = p.to.row;
  if (vflip && backward) source += (rows.columns - 1) * from_row, from_row = -from_row;
  if (vflip && !backward) target += (rows.rows - 1) * to_row, to_row = -to_row;
  // rows that lie end to end in the source and in the ring are one long row
  const bool joined = from_row == width * p.from.column && pitch == width;
  const T unit = std::is_same<In, uint8_t>::value ? T(1) / T(255) : T(1);
  const bool direct = !backward && std::is_same<Out, T>::value && p.to.column == 1;

  // the next image, or the next page of a large one
  const int64_t next = n + 1 < p.images ? n + 1 : n, page = 4096 / sizeof(In);
  const bool small = rows.columns * width <= 4 * page;
  const int64_t ahead = small ? p.from.image(next) - p.from.image(n) : page;
  const int64_t to_ahead = p.to.image(next) - p.to.image(n);
  int64_t have = rows.first[begin];
  for (int64_t o = begin; o < end; o += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, end - o));
    const int64_t need = rows.first[o + count - 1] + rows.count[o + count - 1];
    have = std::max<int64_t>(have, rows.first[o]);
    while (have < need) {
      int64_t more = joined ? std::min(need - have, plan.ring - (have & mask)) : 1;
      T* to = ring + (have & mask) * pitch;
      const In* from = source + have * from_row;
      if (backward) {
        for (int64_t i = 0; i < more * width; ++i) to[i] = T(from[i * p.from.column]);
      } else {
        gray(from, p.from.channel, p.from.column, more * width, unit, to);
      }
      for (int c = 0; c < (backward ? 1 : 3) && p.from.column == 1; ++c) {
        fetch<false>(from + c * p.from.channel + ahead, more * width * sizeof(In));
      }
      have += more;
    }
    const Out* low = target + (to_row < 0 ? o + count - 1 : o) * to_row;
    if (direct && !stage) fetch<true>(low + to_ahead, count * columns.rows * sizeof(Out));
    T* out[kRows];
    for (int r = 0; r < count; ++r) {
      const T* w = &rows.weight[(o + r) * rows.width];
      vertical(ring, mask, pitch, rows.first[o + r], rows.count[o + r], w, v + r * pitch);
      const int64_t staged = vflip ? rows.rows - 1 - o - r : o + r;
      out[r] = stage    ? stage + staged * columns.rows
               : direct ? reinterpret_cast<T*>(target + (o + r) * to_row)
                        : spare + r * plan.spare;
    }
    horizontal(columns, v, pitch, count, out);
    for (int r = 0; r < count && !direct; ++r) {
      for (int c = 0; c < (backward ? 3 : 1); ++c) {
        Out* to = target + (o + r) * to_row + c * p.to.channel;
        const T scale = backward ? T(gray_weight(c)) : T(1);
        for (int64_t i = 0; i < columns.rows; ++i) {
          to[i * p.to.column] = static_cast<Out>(out[r][i] * scale);
        }
      }
    }
  }
#ifdef FUSED_AVX512
  if (stage) {
    Out* const to = static_cast<Out*>(p.target) + p.to.image(n);
    const int64_t step = 64 / sizeof(T);
    for (int64_t i = 0; i < rows.rows * columns.rows; i += step) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(stage + i));
    }
  }
#endif
}
