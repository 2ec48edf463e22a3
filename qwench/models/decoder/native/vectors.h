// Vectors of float, loads and stores of float and bfloat16 rows, exp. GCC's and Clang's vector extensions: any instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr long LANES = 16;
#else
constexpr long LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

inline Floats splat(float value) { return Floats{} + value; }

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// Rounds to nearest even; a NaN stays one.
inline Words bfloat16_bits(Floats x) {
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x == x ? rounded : (Words{} + 0x7fc0);
}

inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline Floats load(const BFloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline void store(BFloat16* to, Floats x) {
    Halves halves = __builtin_convertvector(bfloat16_bits(x), Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` < LANES elements, with zeros after them.
template <class T> inline Floats load_some(const T* from, long count) {
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}
template <class T> inline void store_some(T* to, Floats x, long count) {
    T padded[LANES];
    store(padded, x);
    std::memcpy(to, padded, count * sizeof(T));
}

// What is left of x in the dtype T.
template <class T> inline Floats rounded(Floats x);
template <> inline Floats rounded<float>(Floats x) { return x; }
template <> inline Floats rounded<BFloat16>(Floats x) { return (Floats)(bfloat16_bits(x) << 16); }

// Calls work(offset, number of lanes) over [0, size).
template <class Work> inline void by_vectors(long size, Work work) {
    long at = 0;
    for (; at + LANES <= size; at += LANES) work(at, LANES);
    if (at < size) work(at, size - at);
}
template <class T> inline Floats load_up_to(const T* from, long count) {
    return count == LANES ? load(from) : load_some(from, count);
}
template <class T> inline void store_up_to(T* to, Floats x, long count) {
    if (count == LANES) store(to, x);
    else store_some(to, x, count);
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

// Entries of both vectors, of which b's are numbered from 4; GCC before 12 lacks Clang's name for it.
template <int I, int J, int K, int L> inline Four pick(Four a, Four b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I, J, K, L);
#else
    return __builtin_shuffle(a, b, FourInts{I, J, K, L});
#endif
}

// Sums of four vectors, side by side.
inline Four folded(Floats x) {
    Four parts[LANES / 4];
    std::memcpy(parts, &x, sizeof x);
    Four sum = parts[0] + parts[1];
    for (long part = 2; part < LANES / 4; part += 2) sum += parts[part] + parts[part + 1];
    return sum;
}
inline Four sums_of(Floats a, Floats b, Floats c, Floats d) {
    Four p = folded(a), q = folded(b), r = folded(c), s = folded(d);
    Four pq = pick<0, 4, 1, 5>(p, q) + pick<2, 6, 3, 7>(p, q);
    Four rs = pick<0, 4, 1, 5>(r, s) + pick<2, 6, 3, 7>(r, s);
    return pick<0, 1, 4, 5>(pq, rs) + pick<2, 3, 6, 7>(pq, rs);
}
// Turns rows into columns.
inline void transpose(Four& a, Four& b, Four& c, Four& d) {
    Four p = pick<0, 4, 1, 5>(a, b), q = pick<2, 6, 3, 7>(a, b);
    Four r = pick<0, 4, 1, 5>(c, d), s = pick<2, 6, 3, 7>(c, d);
    a = pick<0, 1, 4, 5>(p, r);
    b = pick<2, 3, 6, 7>(p, r);
    c = pick<0, 1, 4, 5>(q, s);
    d = pick<2, 3, 6, 7>(q, s);
}
// Copies a square of 4 x 4 numbers, or of pairs of bfloat16, transposed.
inline void transpose(const void* from, long from_bytes, void* to, long to_bytes) {
    Four rows[4];
    for (long i = 0; i < 4; i++) std::memcpy(&rows[i], (const char*)from + i * from_bytes, sizeof(Four));
    transpose(rows[0], rows[1], rows[2], rows[3]);
    for (long i = 0; i < 4; i++) std::memcpy((char*)to + i * to_bytes, &rows[i], sizeof(Four));
}
inline float sum_of(Floats x) {
    Four sum = folded(x);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
inline float max_of(Floats x) {
    float largest = x[0];
    for (long lane = 1; lane < LANES; lane++) largest = x[lane] > largest ? x[lane] : largest;
    return largest;
}

// exp(x), error below 2 units in the last place; 0 below -87.3, infinity above 88.7. Source: Cephes' expf.
inline Floats exp_of(Floats x) {
    Floats clamped = x > 88.8f ? splat(88.8f) : x;
    clamped = clamped < -88.0f ? splat(-88.0f) : clamped;
    Floats shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum is an integer in its low bits
    Floats power = shifted - 12582912.0f;
    Floats rest = clamped - power * 0.693359375f + power * 2.12194440e-4f;
    Floats y = splat(1.9875691500e-4f);
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    Ints exponent = __builtin_convertvector(power, Ints);
    // In two steps: 2^128 is no float.
    Ints half = exponent >> 1;
    Floats result = y * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
    result = x < -87.3f ? splat(0.0f) : result;
    return x == x ? result : x;
}
