// The most that a number of cores do. bench/measure.py compiles this for the machine that it runs
// on, with OpenMP, whose threads are then those of torch and of our own operations.
#include <omp.h>

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float Vector __attribute__((vector_size(WIDTH)));
enum { lanes = WIDTH / 4, sums = 12 };

// Sums enough to hide the latency of one, few enough for the registers.
static float multiply_add_alone(long steps) {
    Vector sum[sums] = {}, factor = {};
    factor += 0.999f;
    for (int k = 0; k < sums; ++k) sum[k] += (float)k;  // equal ones would be added only once
    for (long i = 0; i < steps; ++i)
#pragma GCC unroll 12
        for (int k = 0; k < sums; ++k) sum[k] = sum[k] * factor + factor;
    float total = 0;
    for (int k = 0; k < sums; ++k) total += sum[k][0];
    return total;
}

// Returns how many multiplications and additions there were. What they came to goes to `sink`, so
// that none is left out.
long multiply_add(long steps, int threads, float* sink) {
    float total = 0;
    long done = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total, done)
    {
        total += multiply_add_alone(steps);
        done += 2L * sums * lanes * steps;
    }
    *sink = total;
    return done;
}

enum { step = 2 * lanes, skew = 5 * 1024, most_streams = 8 };

__attribute__((always_inline)) static inline float read_streams(const float* data, long part,
                                                                int streams) {
    Vector sum[most_streams][2] = {};
    for (long i = 0; i < part; i += step)
#pragma GCC unroll 8
        for (int s = 0; s < streams; ++s) {
            const Vector* v = (const Vector*)(data + s * part + i);
            sum[s][0] += v[0];
            sum[s][1] += v[1];
        }
    float total = 0;
    for (int s = 0; s < most_streams; ++s) total += sum[s][0][0] + sum[s][1][0];
    return total;
}

// Reads about `count` floats, from an address that a Vector may have, every thread its share in 1,
// 2, 4 or 8 places at once; returns how many it read. `sink` gets the sum of one lane of each
// Vector.
long read_memory(const float* data, long count, int threads, int streams, float* sink) {
    // A few pages less than a power of two apart, after which parts would share cache sets.
    const long share = count / threads / step * step, part = (share / streams - skew) / step * step;
    float total = 0;
    long done = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total, done)
    {
        const float* own = data + omp_get_thread_num() * share;
        total += streams == 1   ? read_streams(own, part, 1)
                 : streams == 2 ? read_streams(own, part, 2)
                 : streams == 4 ? read_streams(own, part, 4)
                                : read_streams(own, part, 8);
        done += streams * part;
    }
    *sink = total;
    return done;
}
