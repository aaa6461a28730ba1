// mahalanobis_map on the CPU: ||W (x - mean)|| at each position, for a batch of images.

#include "mahalanobis.h"

#include "panel.h"

namespace spd {
namespace SPD_ISA {
namespace {

constexpr int quad = 4;  // images that share what is loaded of the factor

// y[i][b] += panel i * x for columns first .. first + 7 and the panels from number `from` on.
template <int from, int R, class T>
inline void add_columns(Rows (&y)[R][quad], const T* const (&panel)[R], int first, const float* x) {
    for (int k = first; k < first + 8; ++k) {
        Rows column[R];
        for (int i = from; i < R; ++i) column[i] = load_rows(panel[i] + 8 * k);
        for (int b = 0; b < quad; ++b)
            for (int i = from; i < R; ++i) y[i][b] += column[i] * x[quad * k + b];
    }
}

// What rows of a panel times x are, given `sum` over its columns; `own(i)` is x at its row i.
template <class T, class Own>
inline Rows product(const T* panel, Rows sum, const Own& own) {
    if constexpr (sizeof(T) > 1) return sum;
    const float* row = reinterpret_cast<const float*>(panel) - 16;  // see quantized_size
    Rows x;
    for (int i = 0; i < 8; ++i) x[i] = own(i);
    return sum * load_rows(row) + load_rows(row + 8) * x;
}

// total[b] += squares of rows r .. r + R - 1 of panels of W x, for the four images of quad q; x is
// (8 * panels, 4). Meanwhile what follows comes from memory, of which every quad asks for its
// share: into the second cache, as the first has too few places for lines that are on their way.
// The next R panels are longer than these; asking for R + 1 as long covers them, and some of what
// comes then.
template <int R, class T>
inline void add_squares(const T* factor, int r, const float* x, Rows* total, int q, int quads) {
    const T* panel[R];
    for (int i = 0; i < R; ++i) panel[i] = panel_of(factor, r + i);
    const T* next = panel_of(factor, r + R);
    // Inlined by force: GCC may leave out calls of a function that only fetches.
    const auto ask = [&](int k) __attribute__((always_inline)) {
        constexpr int line = 64 / sizeof(T), ahead = R + 1;
        for (int i = q; i < ahead * 64 / line; i += quads)
            __builtin_prefetch(next + ahead * 8 * k + i * line, 0, 2);
    };
    Rows y[R][quad] = {};
    const int columns = 8 * (r + 1);  // of the first; every other has 8 more
    for (int k = 0; k < columns; k += 8) {
        ask(k);
        add_columns<0>(y, panel, k, x);
    }
    if constexpr (R > 1) {
        ask(columns);
        add_columns<1>(y, panel, columns, x);
    }
    if constexpr (R > 2) {
        ask(columns + 8);
        add_columns<2>(y, panel, columns + 8, x);
    }
    static_assert(R <= 3);
    for (int b = 0; b < quad; ++b)
        for (int i = 0; i < R; ++i) {
            const float* own = x + quad * 8 * (r + i) + b;
            const Rows v = product(panel[i], y[i][b], [&](int k) { return own[quad * k]; });
            total[b] += v * v;
        }
}

float sum_of(Rows v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

// Squared norms of W x, x (quads, 8 * panels, 4). A group of panels comes from memory once and
// serves all images while it is in cache.
template <class T>
void squared_norms(const T* factor, int panel_count, const float* x, size_t quad_stride, int quads,
                   Rows* total, float* out) {
    for (int q = 0; q < quad * quads; ++q) total[q] = Rows{};
    int r = 0;
    for (; r < panel_count % panel_group; ++r)  // what is left over is short here
        for (int q = 0; q < quads; ++q)
            add_squares<1>(factor, r, x + q * quad_stride, total + quad * q, q, quads);
    for (; r < panel_count; r += panel_group)
        for (int q = 0; q < quads; ++q)
            add_squares<panel_group>(factor, r, x + q * quad_stride, total + quad * q, q, quads);
    for (int b = 0; b < quad * quads; ++b) out[b] = sum_of(total[b]);
}

// One image has only one dot product per row to run: four partial sums hide the latency of the add.
// All it does is read the factor once, which is asked for 8 KiB ahead.
template <class T>
float squared_norm(const T* factor, int panel_count, const float* x) {
    constexpr int ahead = 8192 / sizeof(T);
    Rows total = {};
    for (int r = 0; r < panel_count; ++r) {
        const T* panel = panel_of(factor, r);
        Rows y[4] = {};
        for (int k = 0; k < 8 * (r + 1); k += 8) {
            for (int i = 0; i < 64; i += 64 / int(sizeof(T)))
                __builtin_prefetch(panel + 8 * k + ahead + i);
            for (int i = 0; i < 8; ++i) y[i % 4] += load_rows(panel + 8 * (k + i)) * x[k + i];
        }
        const Rows v =
            product(panel, (y[0] + y[1]) + (y[2] + y[3]), [&](int k) { return x[8 * r + k]; });
        total += v * v;
    }
    return sum_of(total);
}

template <int group>
using Images __attribute__((vector_size(4 * group))) = float;

// delta = x - mean for channels of `group` images each.
template <int group>
inline void subtract_mean(const float* x, const float* mean, int d, float* delta) {
    for (int k = 0; k < d; ++k) {
        Images<group> v;
        memcpy(&v, x + k * group, sizeof v);
        v -= mean[k];
        memcpy(delta + k * group, &v, sizeof v);
    }
}

// For `group` images at a time, 1 or a quad, and `block` positions.
template <int group, int block>
bool score_positions(const MahalanobisArgs& args, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Features& f = args.features;
    const int64_t positions = int64_t(f.grid_height) * f.grid_width;
    const int panel_count = panels(f.d);
    const int groups = (f.batch + group - 1) / group;
    const size_t group_size = 8 * size_t(panel_count) * group;
    // 16 floats more between positions: a power-of-two stride would fall into one cache set.
    const size_t position_stride = groups * group_size + 16;
    const size_t images = size_t(groups) * group;
    Pieces pieces = scratch.reserve((block + 1) * position_stride + 9 * images + 4 * 16);
    if (!pieces.next) return false;
    float* x = pieces.take(block * position_stride);
    float* delta = pieces.take(position_stride);
    Rows* total = reinterpret_cast<Rows*>(pieces.take(8 * images));
    float* squared = pieces.take(images);
    memset(delta, 0, position_stride * sizeof(float));  // rows past d
    for (int64_t p0 = begin; p0 < end; p0 += block) {
        const int count = int(min2<int64_t>(block, end - p0));
        gather<group, block>(f, p0, count, p0 > begin, [&](int g, int k, int j, const float* v) {
            // One store of them all: a load could not be served from four small ones.
            memcpy(x + j * position_stride + g * group_size + k * group, v, 4 * group);
        });
        for (int64_t p = p0; p < p0 + count; ++p) {
            for (int g = 0; g < groups; ++g)
                subtract_mean<group>(x + (p - p0) * position_stride + g * group_size,
                                     args.mean + p * f.d, f.d, delta + g * group_size);
            const auto norms = [&](auto* factor) {
                factor += p * (sizeof *factor == 1 ? quantized_size(f.d) : packed_size(f.d));
                if (group == 1)
                    squared[0] = squared_norm(factor, panel_count, delta);
                else
                    squared_norms(factor, panel_count, delta, group_size, groups, total, squared);
            };
            if (args.factor_type == FactorType::float16)
                norms(static_cast<const uint16_t*>(args.factor));
            else if (args.factor_type == FactorType::int8)
                norms(static_cast<const int8_t*>(args.factor));
            else
                norms(static_cast<const float*>(args.factor));
            for (int b = 0; b < f.batch; ++b) args.out[b * positions + p] = sqrtf(squared[b]);
        }
    }
    return true;
}

}  // namespace

bool mahalanobis(const MahalanobisArgs& args, int64_t begin, int64_t end) {
    const bool single = args.features.batch == 1;
    if (channels_are_last(args.features))
        return single ? score_positions<1, 1>(args, begin, end)
                      : score_positions<quad, 1>(args, begin, end);
    return single ? score_positions<1, planar_positions>(args, begin, end)
                  : score_positions<quad, planar_positions>(args, begin, end);
}

}  // namespace SPD_ISA
}  // namespace spd
