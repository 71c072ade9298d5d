// The arithmetic of the CPU: vectors of W floats by the compiler's vector extension, and plain double.
// Included once for every instruction set, inside GKD_ISA's namespace: see rows.inc. No standard library function is
// called on floats here: an inline one compiled for AVX-512 could be the copy that the linker keeps for everybody.
#if GKD_FLOATS == 16
#include <immintrin.h>
#endif

// Hides from the compiler where a register's value comes from.
#if defined(__aarch64__)
#define GKD_OPAQUE(x) asm("" : "+w"(x))
#elif GKD_FLOATS == 16
#define GKD_OPAQUE(x) asm("" : "+v"(x))
#else
#define GKD_OPAQUE(x) asm("" : "+x"(x))
#endif

namespace gkd::GKD_ISA {

struct FloatMath {
  static constexpr int W = GKD_FLOATS;
  using S = float;
  typedef float F __attribute__((vector_size(4 * GKD_FLOATS)));
  typedef int32_t I __attribute__((vector_size(4 * GKD_FLOATS)));
  typedef uint32_t U __attribute__((vector_size(4 * GKD_FLOATS)));
  typedef uint16_t H __attribute__((vector_size(2 * GKD_FLOATS)));

  template <class To, class From>
  static GKD_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
  }
  static GKD_INLINE F load(const float* from) {
    F x;
    __builtin_memcpy(&x, from, sizeof(x));
    return x;
  }
  static GKD_INLINE void store(float* to, F x) { __builtin_memcpy(to, &x, sizeof(x)); }

  // Over the lanes by halves: a chain of W steps would be what a short loop waits for.
  template <class V, class Join>
  static GKD_INLINE float over_lanes(V x, Join join) {
    constexpr int half = sizeof(V) / 8;
    if constexpr (half == 1) {
      return join(x[0], x[1]);
    } else {
      typedef float Half __attribute__((vector_size(4 * half)));
      Half parts[2];
      __builtin_memcpy(parts, &x, sizeof(x));
      return over_lanes(join(parts[0], parts[1]), join);
    }
  }
  static GKD_INLINE float sum(F x) {
    return over_lanes(x, [](auto a, auto b) { return a + b; });
  }
  static GKD_INLINE float max(F x) {
    return over_lanes(x, [](auto a, auto b) { return a > b ? a : b; });
  }

  // x = n ln 2 + r: adding 1.5 * 2^23 leaves the nearest integer n in the low bits of the sum.
  struct Reduced {
    F power;  // 2^n
    F tail;   // e^r - 1
  };
  static GKD_INLINE Reduced reduce(F x) {
    const float magic = 12582912.0f;
    F shifted = x * 1.44269504f + magic;
    F n = shifted - magic;
    F r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    F power = bits<F>((bits<U>(shifted) << 23) + 0x3f800000u);
    return {power, r + r * r * series::expm1_tail(r)};
  }
  static GKD_INLINE F abs(F x) { return bits<F>(bits<U>(x) & 0x7fffffffu); }

  static GKD_INLINE F product(F a, S b) {
    F rounded = a * b;
    GKD_OPAQUE(rounded);
    return rounded;
  }

  // 2^(x scale) for x <= 0; 0 where that is below the smallest normal float.
  static GKD_INLINE F exp2_nonpositive(F x, float scale) {
    const float magic = 12582912.0f;
#if GKD_FLOATS == 16  // one instruction scales and underflows to 0
    const F low = F{} - 200.0f / scale;
    x = low > x ? low : x;  // -inf would turn into NaN below; NaN stays
    F n = (x * scale + magic) - magic;
    return F(_mm512_scalef_ps(__m512(series::exp2_fraction(x * scale - n)), __m512(n)));
#else
    F shifted = x * scale + magic;
    F power = bits<F>((bits<U>(shifted) << 23) + 0x3f800000u);
    F y = power * series::exp2_fraction(x * scale - (shifted - magic));
    return x < -126.0f / scale ? F{} : y;
#endif
  }
  static GKD_INLINE F expm1(F x) {
    Reduced e = reduce(x);
    return x < -87.0f ? F{} - 1.0f : (e.power - 1.0f) + e.power * e.tail;
  }
  // 1 + y = 2^e (1 + f), |f| <= 1/3, f without the rounding of 1 + y.
  static GKD_INLINE F log1p(F y) {
    I e = bits<I>(1.0f + y) - 0x3f2aaaab;
    e = e & I(bits<I>(U{} + 0xff800000u));
    F scale = bits<F>(0x3f800000 - e);
    F f = y * scale + (scale - 1.0f);
    F exponent = __builtin_convertvector(e >> 23, F);
    return exponent * 0.693147181f + (f + f * f * (f * series::log1p_tail(f) - 0.5f));
  }
  static GKD_INLINE F kl_curve(F x) { return x * x * series::kl_curve_over_square(x); }
  static GKD_INLINE F xlogx_curve(F y) { return series::xlogx_curve(y); }
  static GKD_INLINE float log(float x) { return float(__builtin_log(double(x))); }

#if GKD_FLOATS == 16  // the compiler would widen and narrow in two halves and join them
  static GKD_INLINE U widen(H x) { return U(_mm512_cvtepu16_epi32(__m256i(x))); }
  static GKD_INLINE H narrow(U x) { return H(_mm512_cvtepi32_epi16(__m512i(x))); }
#else
  static GKD_INLINE U widen(H x) { return __builtin_convertvector(x, U); }
  static GKD_INLINE H narrow(U x) { return __builtin_convertvector(x, H); }
#endif
  static GKD_INLINE F from_bfloat16(H x) { return bits<F>(widen(x) << 16); }
  // To nearest even; the carry of some NaNs would run into the sign. AVX-512 has an instruction for it, which loses
  // what is below the smallest normal float and gains no time that could be measured.
  static GKD_INLINE H to_bfloat16(F x) {
    U u = bits<U>(x);
    U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return narrow(x == x ? rounded : U{} + 0x7fc0u);
  }
#if GKD_FLOATS == 16
  static GKD_INLINE F from_float16(H x) { return F(_mm512_cvtph_ps(__m256i(x))); }
  static GKD_INLINE H to_float16(F x) {
    return H(_mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static GKD_INLINE F from_float16(H x) {
    U u = widen(x);
    F magnitude = bits<F>((u & 0x7fffu) << 13) * 5.19229686e33f;  // 2^112: the exponents' biases differ by that
    U special = (u & 0x7c00u) == 0x7c00u ? U{} + 0x7f800000u : U{};
    return bits<F>(bits<U>(magnitude) | special | ((u & 0x8000u) << 16));
  }
  static GKD_INLINE H to_float16(F x) {
    U u = bits<U>(x), sign = (u >> 16) & 0x8000u;
    F magnitude = bits<F>(u & 0x7fffffffu);
    U scaled = bits<U>(magnitude * 1.92592994e-34f);  // 2^-112; the smallest halves become denormal floats
    U rounded = (scaled + 0xfffu + ((scaled >> 13) & 1u)) >> 13;
    rounded = magnitude >= 65520.0f ? U{} + 0x7c00u : rounded;
    rounded = x == x ? rounded : U{} + 0x7e00u;
    return narrow(rounded | sign);
  }
#endif
};

struct DoubleMath {
  static constexpr int W = 1;
  using S = double;
  using F = double;
  static GKD_INLINE F load(const double* from) { return *from; }
  static GKD_INLINE void store(double* to, F x) { *to = x; }
  static GKD_INLINE double sum(F x) { return x; }
  static GKD_INLINE double max(F x) { return x; }
  static GKD_INLINE F abs(F x) { return __builtin_fabs(x); }
  static GKD_INLINE F product(F a, S b) {
    F rounded = a * b;
    GKD_OPAQUE(rounded);
    return rounded;
  }
  static GKD_INLINE F exp2_nonpositive(F x, double scale) { return __builtin_exp2(x * scale); }
  static GKD_INLINE F expm1(F x) { return __builtin_expm1(x); }
  static GKD_INLINE F log1p(F y) { return __builtin_log1p(y); }
  static GKD_INLINE F kl_curve(F x) { return x + __builtin_expm1(-x); }
  static GKD_INLINE F xlogx_curve(F y) {  // the definition loses 1e-16 / y, which is more than 1e-6 below 1e-10
    return (y < 0 ? -y : y) < 1e-4 ? 0.5 - y / 6 + y * y / 12 : ((1 + y) * __builtin_log1p(y) - y) / (y * y);
  }
  static GKD_INLINE double log(double x) { return __builtin_log(x); }
};

}  // namespace gkd::GKD_ISA
