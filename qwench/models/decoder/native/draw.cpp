// `sampler.sample` of rows without limits, in two passes over the logits: the largest, then sums of exp(z - largest) by block.
// The uniform number picks a block by its mass, and an entry of it. A greedy row takes the first largest entry.
#include <vector>

#include "threads.h"
#include "vectors.h"

constexpr long BLOCK = 128;

// Where `share` of the running sum falls, and how far into that entry; see `sampler._locate`.
static long locate(const double* masses, long size, double share, double* rest) {
    double total = 0, before = 0;
    for (long i = 0; i < size; i++) total += masses[i];
    const double target = share * total;
    for (long i = 0; i < size; i++) {
        const double running = before + masses[i];
        if (running > target || running >= total) {
            const double inside = (target - before) / masses[i];
            *rest = inside < 0 ? 0 : inside > 1 - 0x1p-53 ? 1 - 0x1p-53 : inside;
            return i;
        }
        before = running;
    }
    *rest = 0;  // not a number among the logits
    return size - 1;
}

// Weights exp(logits / temperature - largest) of up to BLOCK entries.
static void weigh(const float* logits, long size, float temperature, float largest, float* to) {
    by_vectors(size, [&](long at, long count) {
        store_up_to(to + at, exp_of(load_up_to(logits + at, count) / temperature - largest), count);
    });
}

static void draw_row(const float* logits, long vocab, float temperature, double uniform, std::vector<double>& masses,
                     int32_t* token, float* log_prob) {
    const bool greedy = temperature == 0;
    const float scale = greedy ? 1.0f : temperature;
    Floats tops = splat(-INFINITY);
    by_vectors(vocab, [&](long at, long count) {
        Floats part = count == LANES ? load(logits + at) : splat(-INFINITY);
        for (long lane = 0; lane < LANES && count < LANES; lane++)
            if (lane < count) part[lane] = logits[at + lane];
        tops = part > tops ? part : tops;
    });
    const float top = max_of(tops), largest = top / scale;
    const long blocks = (vocab + BLOCK - 1) / BLOCK;
    float weights[BLOCK];
    double inside[BLOCK], total = 0, rest;
    masses.resize(blocks);
    for (long block = 0; block < blocks; block++) {
        const long size = vocab - block * BLOCK < BLOCK ? vocab - block * BLOCK : BLOCK;
        weigh(logits + block * BLOCK, size, scale, largest, weights);
        Floats sums = {};
        by_vectors(size, [&](long at, long count) { sums += load_up_to(weights + at, count); });
        total += masses[block] = sum_of(sums);
    }
    long chosen = 0;
    if (greedy) {
        while (chosen < vocab - 1 && logits[chosen] != top) chosen++;
    } else {
        const long block = locate(masses.data(), blocks, uniform, &rest);
        const long size = vocab - block * BLOCK < BLOCK ? vocab - block * BLOCK : BLOCK;
        weigh(logits + block * BLOCK, size, scale, largest, weights);
        for (long i = 0; i < size; i++) inside[i] = weights[i];
        chosen = block * BLOCK + locate(inside, size, rest, &rest);
    }
    *token = chosen;
    *log_prob = logits[chosen] / scale - largest - std::log(float(total));
}

extern "C" void draw_float32(const float* logits, const float* temperatures, const double* uniforms, const int32_t* rows,
                     int32_t* last_tokens, int32_t* tokens, float* log_probs, long count, long vocab,
                     int threads) {
    in_threads(threads, [&](long thread, long number) {
        std::vector<double> masses;
        for (long i = count * thread / number; i < count * (thread + 1) / number; i++) {
            draw_row(logits + i * vocab, vocab, temperatures[i], uniforms[i], masses, tokens + i, log_probs + i);
            last_tokens[rows[i]] = tokens[i];
        }
    });
}
