// Attention of one query token a row over the paged cache. A row's heads are computed alone, so its bits depend on no other row.
//
//     scores of all heads of a kv head, key by key -> softmax -> sum of values        keys [pages, page_size, kv_heads, K]
#include <vector>

#include "threads.h"
#include "vectors.h"

constexpr long AT_ONCE = 4;  // keys whose products are added up together

// Products of a query with all keys, times `scale`. The last ones are repeated up to a multiple of AT_ONCE.
template <class T>
static inline void score(const T* q, const T* const* keys, float* scores, long length, long head_dim, float scale) {
    for (long token = 0; token < length; token += AT_ONCE) {
        Floats products[AT_ONCE] = {};
        by_vectors(head_dim, [&](long at, long count) {
            Floats query = load_up_to(q + at, count);
            for (long i = 0; i < AT_ONCE; i++) products[i] += query * load_up_to(keys[token + i] + at, count);
        });
        Four sums = sums_of(products[0], products[1], products[2], products[3]) * scale;
        std::memcpy(scores + token, &sums, sizeof sums);
    }
}

// Turns scores into weights, zero from `length` up to a multiple of LANES; returns their sum.
static inline float soften(float* scores, long length) {
    const long padded = (length + LANES - 1) / LANES * LANES;
    for (long token = length; token < padded; token++) scores[token] = -INFINITY;
    Floats largest = splat(-INFINITY), total = {};
    for (long at = 0; at < padded; at += LANES) {
        Floats part = load(scores + at);
        largest = part > largest ? part : largest;
    }
    const float maximum = max_of(largest);
    for (long at = 0; at < padded; at += LANES) {
        Floats weights = exp_of(load(scores + at) - maximum);
        total += weights;
        store(scores + at, weights);
    }
    return sum_of(total);
}

// Sum of all values times their weights; four sums run side by side.
template <class T>
static inline void add_up(const float* weights, const T* const* values, T* to, long length, long head_dim, float total) {
    by_vectors(head_dim, [&](long at, long count) {
        Floats sums[AT_ONCE] = {};
        for (long token = 0; token < length; token += AT_ONCE)
            for (long i = 0; i < AT_ONCE; i++) sums[i] += weights[token + i] * load_up_to(values[token + i] + at, count);
        store_up_to(to + at, ((sums[0] + sums[1]) + (sums[2] + sums[3])) / total, count);
    });
}

// What a thread needs for one row.
template <class T> struct Workspace {
    std::vector<const T*> keys, values;
    std::vector<float> scores;
};

template <class T>
static void attend(const T* q, const T* keys, const T* values, const int32_t* table, T* to, long length, long page_size,
                   long kv_heads, long group, long head_dim, Workspace<T>& work) {
    const long padded = length + LANES;
    work.keys.resize(padded);
    work.values.resize(padded);
    work.scores.resize(padded);
    for (long page = 0; page * page_size < length; page++)
        for (long token = page * page_size; token < length && token < (page + 1) * page_size; token++) {
            const long slot = (table[page] * page_size + token - page * page_size) * kv_heads * head_dim;
            work.keys[token] = keys + slot;
            work.values[token] = values + slot;
        }
    for (long token = length; token < length + AT_ONCE; token++) {
        work.keys[token] = work.keys[length - 1];
        work.values[token] = work.values[length - 1];
    }
    for (long head = 0; head < group; head++) {
        score(q + head * head_dim, work.keys.data(), work.scores.data(), length, head_dim, 1.0f / std::sqrt(float(head_dim)));
        const float total = soften(work.scores.data(), length);
        add_up(work.scores.data(), work.values.data(), to + head * head_dim, length, head_dim, total);
    }
}

template <class T>
static void paged_decode(const T* q, const T* keys, const T* values, const int32_t* tables, const int32_t* positions, T* to,
                         long rows, long table_width, long page_size, long kv_heads, long group, long head_dim, int threads) {
    in_threads(threads, [&](long thread, long number) {
        Workspace<T> work;
        for (long share = thread; share < rows * kv_heads; share += number) {
            const long row = share / kv_heads, head = share % kv_heads, first = (row * kv_heads + head) * group * head_dim;
            attend(q + first, keys + head * head_dim, values + head * head_dim, tables + row * table_width, to + first,
                   positions[row] + 1, page_size, kv_heads, group, head_dim, work);
        }
    });
}

#define PAGED_DECODE(dtype, T)                                                                                                   \
    extern "C" void paged_decode_##dtype(const T* q, const T* keys, const T* values, const int32_t* tables,                      \
                                         const int32_t* positions, T* to, long rows, long table_width, long page_size,           \
                                         long kv_heads, long group, long head_dim, int threads) {                                \
        paged_decode<T>(q, keys, values, tables, positions, to, rows, table_width, page_size, kv_heads, group, head_dim, threads); \
    }
PAGED_DECODE(float32, float)
PAGED_DECODE(bfloat16, BFloat16)
