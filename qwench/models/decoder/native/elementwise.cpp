// The element-wise parts of a decoder layer; see `elementwise.py` for what they compute. Arithmetic is float32 and rounds to the
// tensors' dtype where the reference rounds. A row is computed alone.
#include "threads.h"
#include "vectors.h"

// Root of the mean square of a row, inverted.
template <class T> static inline float inverse_rms(const T* x, long size, float eps) {
    Floats squares = {};
    by_vectors(size, [&](long at, long count) {
        Floats part = load_up_to(x + at, count);
        squares += part * part;
    });
    return 1.0f / std::sqrt(sum_of(squares) / size + eps);
}

template <class T>
static void add_rms_norm(const T* x, const T* delta, const T* weight, T* summed, T* normed, long rows, long size, long x_stride,
                         long delta_stride, float eps, int threads) {
    by_threads(threads, rows, [&](long row) {
        const T* source = x + row * x_stride;
        if (delta) {
            T* sum = summed + row * size;
            by_vectors(size, [&](long at, long count) {
                store_up_to(sum + at, load_up_to(source + at, count) + load_up_to(delta + row * delta_stride + at, count), count);
            });
            source = sum;
        }
        const float scale = inverse_rms(source, size, eps);
        by_vectors(size, [&](long at, long count) {
            Floats scaled = load_up_to(source + at, count) * scale * load_up_to(weight + at, count);
            store_up_to(normed + row * size + at, scaled, count);
        });
    });
}

// Norms (with a weight) and rotates one head of 2 * half numbers.
template <class T>
static inline void norm_and_rotate(const T* x, const T* weight, const T* rope, T* to, long half, float eps) {
    const float scale = weight ? inverse_rms(x, 2 * half, eps) : 1.0f;
    by_vectors(half, [&](long at, long count) {
        Floats first = load_up_to(x + at, count), second = load_up_to(x + half + at, count);
        if (weight) {
            first = rounded<T>(first * scale * load_up_to(weight + at, count));
            second = rounded<T>(second * scale * load_up_to(weight + half + at, count));
        }
        Floats cos = load_up_to(rope + at, count), sin = load_up_to(rope + half + at, count);
        store_up_to(to + at, rounded<T>(first * cos) - rounded<T>(second * sin), count);
        store_up_to(to + half + at, rounded<T>(second * cos) + rounded<T>(first * sin), count);
    });
}

template <class T>
static void qk_norm_rope_store(const T* q, const T* k, const T* v, const T* q_norm, const T* k_norm, const T* rope_table,
                               const int32_t* positions, const int64_t* slots, T* keys, T* values, T* queries, long tokens,
                               long heads, long kv_heads, long head_dim, long q_stride, long k_stride, long v_stride, float eps,
                               int threads) {
    by_threads(threads, tokens, [&](long token) {
        const T* rope = rope_table + positions[token] * head_dim;
        const long slot = slots[token] * kv_heads * head_dim;
        for (long head = 0; head < heads; head++)
            norm_and_rotate(q + token * q_stride + head * head_dim, q_norm, rope, queries + (token * heads + head) * head_dim,
                            head_dim / 2, eps);
        for (long head = 0; head < kv_heads; head++)
            norm_and_rotate(k + token * k_stride + head * head_dim, k_norm, rope, keys + slot + head * head_dim, head_dim / 2, eps);
        std::memcpy(values + slot, v + token * v_stride, kv_heads * head_dim * sizeof(T));
    });
}

template <class T>
static void silu_mul(const T* gate, const T* up, T* to, long rows, long size, long gate_stride, long up_stride, int threads) {
    by_threads(threads, rows, [&](long row) {
        by_vectors(size, [&](long at, long count) {
            Floats x = load_up_to(gate + row * gate_stride + at, count);
            Floats activated = rounded<T>(x / (1.0f + exp_of(-x)));
            store_up_to(to + row * size + at, activated * load_up_to(up + row * up_stride + at, count), count);
        });
    });
}

#define ELEMENTWISE(dtype, T)                                                                                                   \
    extern "C" void add_rms_norm_##dtype(const T* x, const T* delta, const T* weight, T* summed, T* normed, long rows, long size, \
                                         long x_stride, long delta_stride, float eps, int threads) {                             \
        add_rms_norm<T>(x, delta, weight, summed, normed, rows, size, x_stride, delta_stride, eps, threads);                     \
    }                                                                                                                           \
    extern "C" void qk_norm_rope_store_##dtype(                                                                                 \
        const T* q, const T* k, const T* v, const T* q_norm, const T* k_norm, const T* rope_table, const int32_t* positions,     \
        const int64_t* slots, T* keys, T* values, T* queries, long tokens, long heads, long kv_heads, long head_dim,             \
        long q_stride, long k_stride, long v_stride, float eps, int threads) {                                                  \
        qk_norm_rope_store<T>(q, k, v, q_norm, k_norm, rope_table, positions, slots, keys, values, queries, tokens, heads,       \
                              kv_heads, head_dim, q_stride, k_stride, v_stride, eps, threads);                                  \
    }                                                                                                                           \
    extern "C" void silu_mul_##dtype(const T* gate, const T* up, T* to, long rows, long size, long gate_stride, long up_stride,  \
                                     int threads) {                                                                             \
        silu_mul<T>(gate, up, to, rows, size, gate_stride, up_stride, threads);                                                 \
    }
ELEMENTWISE(float32, float)
ELEMENTWISE(bfloat16, BFloat16)
