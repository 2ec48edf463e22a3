// y = x W^T + b for few rows: x [M, K], W [N, K], y [M, N].
//
// A lane of a vector holds one row of x, and a register the sums of LANES rows with one row of W. So every sum runs over K in
// order, whatever the batch is: a row has the same bits in every batch. x is packed so that rows lie side by side.
#include "threads.h"
#include "vectors.h"

constexpr long COLUMNS = 12;  // rows of W at a time: with two vectors of rows 24 sums, of 32 registers
constexpr long STRIP = 4 * COLUMNS;  // columns of y that are written together: stores a power of two apart evict each other

template <class T> struct Packed;
template <> struct Packed<float> {
    typedef float Unit;  // a number of x
    static constexpr long TERMS = 1;
    static Floats add(Floats sum, Floats x, const float* w) { return sum + x * *w; }
    static float pack(const float* x, long k) { return x[k]; }
};
template <> struct Packed<BFloat16> {
    typedef uint32_t Unit;  // two neighbours of x: the processor multiplies and adds pairs
    static constexpr long TERMS = 2;
    static Floats add(Floats sum, Floats x, const BFloat16* w);
    static uint32_t pack(const BFloat16* x, long k) {
        uint32_t pair;
        std::memcpy(&pair, x + 2 * k, 4);
        return pair;
    }
};
#if defined(__AVX512BF16__)
#include <immintrin.h>
inline Floats Packed<BFloat16>::add(Floats sum, Floats x, const BFloat16* w) {
    int32_t pair;
    std::memcpy(&pair, w, 4);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)x, (__m512bh)_mm512_set1_epi32(pair));
}
#else
inline Floats Packed<BFloat16>::add(Floats sum, Floats x, const BFloat16* w) {
    Words pair = (Words)x;
    sum += (Floats)(pair << 16) * to_float(w[0]);
    return sum + (Floats)(pair & 0xffff0000u) * to_float(w[1]);
}
#endif

// Sums of `WIDTH` vectors of rows with `COUNT` rows of W, into to[column][row].
template <class T, long COUNT, long WIDTH>
static inline void multiply(const typename Packed<T>::Unit* packed, const T* w, long K, float* to) {
    Floats sums[COUNT][WIDTH];
    for (long n = 0; n < COUNT; n++)
        for (long v = 0; v < WIDTH; v++) sums[n][v] = Floats{};
    for (long k = 0; k < K / Packed<T>::TERMS; k++) {
        // The rows of W after these: twelve short streams are too many for the processor to foresee.
        __builtin_prefetch((const char*)(w + COUNT * K) + k * COUNT * sizeof(T) * Packed<T>::TERMS);
        Floats x[WIDTH];
        for (long v = 0; v < WIDTH; v++) std::memcpy(&x[v], packed + (k * WIDTH + v) * LANES, sizeof(Floats));
#pragma GCC unroll 12
        for (long n = 0; n < COUNT; n++)
#pragma GCC unroll 2
            for (long v = 0; v < WIDTH; v++) sums[n][v] = Packed<T>::add(sums[n][v], x[v], w + n * K + k * Packed<T>::TERMS);
    }
    for (long n = 0; n < COUNT; n++)
        for (long v = 0; v < WIDTH; v++) store(to + (n * WIDTH + v) * LANES, sums[n][v]);
}

// Columns [first, last) of the results of up to WIDTH vectors of rows.
template <class T, long WIDTH>
static void strip(const typename Packed<T>::Unit* packed, const T* w, const T* bias, T* y, long rows, long N, long K, long first,
                  long last) {
    constexpr long HEIGHT = WIDTH * LANES;
    alignas(64) float sums[STRIP * HEIGHT];
    long n = first;
    for (; n + COLUMNS <= last; n += COLUMNS) multiply<T, COLUMNS, WIDTH>(packed, w + n * K, K, sums + (n - first) * HEIGHT);
    for (; n < last; n++) multiply<T, 1, WIDTH>(packed, w + n * K, K, sums + (n - first) * HEIGHT);
    for (long row = 0; row < rows; row += 4) {
        float lines[4][STRIP];
        for (long column = 0; column < last - first; column += 4)
            transpose(sums + column * HEIGHT + row, sizeof(float) * HEIGHT, &lines[0][column], sizeof lines[0]);
        for (long i = 0; i < 4 && row + i < rows; i++)
            by_vectors(last - first, [&](long at, long count) {
                Floats sum = load_up_to(lines[i] + at, count);
                if (bias) sum += load_up_to(bias + first + at, count);
                store_up_to(y + (row + i) * N + first + at, sum, count);
            });
    }
}

// Packs units [begin, end) of up to `height` rows; rows that are not there are zero.
template <class T>
static void pack(const T* x, long x_stride, long rows, long height, long begin, long end, typename Packed<T>::Unit* to) {
    constexpr long TERMS = Packed<T>::TERMS;
    for (long row = 0; row < height; row += 4) {
        long k = begin;
        for (; k + 4 <= end && row + 4 <= rows; k += 4)
            transpose(x + row * x_stride + k * TERMS, x_stride * sizeof(T), to + k * height + row, sizeof(*to) * height);
        for (; k < end; k++)
            for (long i = row; i < row + 4; i++)
                to[k * height + i] = i < rows ? Packed<T>::pack(x + i * x_stride, k) : typename Packed<T>::Unit{};
    }
}

template <class T>
static void multiply_all(const T* x, const T* w, const T* bias, T* y, long M, long N, long K, long x_stride,
                         typename Packed<T>::Unit* packed, int threads) {
    constexpr long HEIGHT = 2 * LANES;
    const long depth = K / Packed<T>::TERMS, blocks = (M + HEIGHT - 1) / HEIGHT;
    const long tiles = (N + COLUMNS - 1) / COLUMNS;
    // A block of at most LANES rows is packed as one vector; padding is zero.
    by_threads(threads, blocks * 8, [&](long part) {
        const long block = part / 8, begin = depth * (part % 8) / 8, end = depth * (part % 8 + 1) / 8;
        const long rows = M - block * HEIGHT < HEIGHT ? M - block * HEIGHT : HEIGHT;
        pack(x + block * HEIGHT * x_stride, x_stride, rows, rows <= LANES ? LANES : HEIGHT, begin, end,
             packed + block * HEIGHT * depth);
    });
    by_threads(threads, threads, [&](long share) {
        const long begin = tiles * share / threads * COLUMNS, stop = tiles * (share + 1) / threads * COLUMNS;
        const long end = stop < N ? stop : N;
        for (long first = begin; first < end; first += STRIP)
            for (long block = 0; block < blocks; block++) {
                const long last = first + STRIP < end ? first + STRIP : end;
                const long rows = M - block * HEIGHT < HEIGHT ? M - block * HEIGHT : HEIGHT;
                auto run = rows <= LANES ? strip<T, 1> : strip<T, 2>;
                run(packed + block * HEIGHT * depth, w, bias, y + block * HEIGHT * N, rows, N, K, first, last);
            }
    });
}

#define LINEAR(dtype, T)                                                                                                        \
    extern "C" void linear_##dtype(const T* x, const T* w, const T* bias, T* y, long M, long N, long K, long x_stride,           \
                                   void* packed, int threads) {                                                                 \
        multiply_all<T>(x, w, bias, y, M, N, K, x_stride, (typename Packed<T>::Unit*)packed, threads);                           \
    }
LINEAR(float32, float)
LINEAR(bfloat16, BFloat16)
