// What a core does at most. bench/measure.py compiles this for the machine that it runs on.

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float Vector __attribute__((vector_size(WIDTH)));
enum { lanes = WIDTH / 4, sums = 12, streams = 4 };

// Sums enough to hide the latency of one, few enough for the registers. Returns how many
// multiplications and additions it did, by way of `sink`, so that none is left out.
long multiply_add(long steps, float* sink) {
    Vector sum[sums] = {}, factor = {};
    factor += 0.999f;
    for (int k = 0; k < sums; ++k) sum[k] += (float)k;  // equal ones would be added only once
    for (long i = 0; i < steps; ++i)
#pragma GCC unroll 12
        for (int k = 0; k < sums; ++k) sum[k] = sum[k] * factor + factor;
    for (int k = 0; k < sums; ++k) *sink += sum[k][0];
    return 2L * sums * lanes * steps;
}

// Reads about `count` floats, from an address that a Vector may have, in several places at once,
// which processors do faster than in one. A few pages less lie between them than a power of two,
// after which they would share cache sets. Returns how many it read.
long read_memory(const float* data, long count, float* sink) {
    const long step = 2 * lanes, part = (count / streams - 5 * 1024) / step * step;
    Vector sum[streams][2] = {};
    for (long i = 0; i < part; i += step)
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s) {
            const Vector* v = (const Vector*)(data + s * part + i);
            sum[s][0] += v[0];
            sum[s][1] += v[1];
        }
    for (int s = 0; s < streams; ++s) *sink += sum[s][0][0] + sum[s][1][0];
    return streams * part;
}
