// mahalanobis_map on the CPU: ||W (x - mean)|| at each position, for a batch of images.

#include "mahalanobis.h"

#include "panel.h"

namespace spd {
namespace SPD_ISA {
namespace {

// From this number on a panel lasts long enough for the next ones to come from memory, those of a
// batch because they are asked for, those of one image because the processor foresees them. While
// shorter ones are multiplied, what lies `ahead` is asked for, in elements: it is time that counts,
// and that takes about as long in every precision. Where the two meet, neither asks for some lines;
// to ask for them too gained nothing.
constexpr int long_panel = 16, ahead = 2048;

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

// What the rows of a panel times x are, given `sum` over its columns and x at the rows themselves.
template <class T>
inline Rows product(const T* panel, Rows sum, Rows own) {
    if constexpr (sizeof(T) > 1) return sum;
    const float* row = reinterpret_cast<const float*>(panel) - 16;  // see quantized_size
    return sum * load_rows(row) + load_rows(row + 8) * own;
}

// total[b] += squares of rows r .. r + R - 1 of panels of W x, for the four images of quad q; x is
// (8 * panels, 4). Meanwhile what is read next comes from memory: into the second cache, as the
// first has too few places for lines that are on their way. Every quad asks for a stretch of it, R
// pieces of 8 columns at a time. Of long panels these are the next R: each is a stream of its own,
// which by its end, 8 to 24 columns that are not asked for, the processor foresees. Past the end of
// a factor lies that of the next position, though a tile may read another before: asking for that
// one instead gained nothing.
template <int R, class T>
inline void add_squares(const T* factor, int r, const float* x, Rows* total, int q, int quads) {
    const bool streams = r >= long_panel;
    const T *panel[R], *next[R];
    for (int i = 0; i < R; ++i) {
        panel[i] = panel_of(factor, r + i);
        next[i] = streams ? panel_of(factor, r + R + i) : panel[0] + ahead + 64 * i;
    }
    const int steps = r + R;  // of 8 columns, as long as the last of these panels
    const int step = streams ? 64 : 64 * R;
    int piece = q * ((steps + quads - 1) / quads), wait = 0;
    // Inlined by force: GCC may leave out calls of a function that only fetches.
    const auto ask = [&]() __attribute__((always_inline)) {
        if (wait-- > 0 || piece >= steps) return;
        wait = quads - 1;
        for (int i = 0; i < R; ++i)
            for (int k = 0; k < 64; k += 64 / int(sizeof(T)))
                __builtin_prefetch(next[i] + step * piece + k, 0, 2);
        ++piece;
    };
    Rows y[R][quad] = {};
    const int columns = 8 * (r + 1);  // of the first; every other has 8 more
    for (int k = 0; k < columns; k += 8) {
        ask();
        add_columns<0>(y, panel, k, x);
    }
    if constexpr (R > 1) {
        ask();
        add_columns<1>(y, panel, columns, x);
    }
    if constexpr (R > 2) {
        ask();
        add_columns<2>(y, panel, columns + 8, x);
    }
    static_assert(R <= 3);
    for (int i = 0; i < R; ++i) {
        Rows own[quad] = {};
        if (sizeof(T) == 1) load_columns(x + quad * 8 * (r + i), own);
        for (int b = 0; b < quad; ++b) {
            const Rows v = product(panel[i], y[i][b], own[b]);
            total[b] += v * v;
        }
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

// One image is scored at the two positions of a column of a tile at a time, which lie `apart` in
// the factor and `x_apart` in x: a processor reads two long streams faster than one. It foresees
// them; but what is narrower than a float takes more instructions a byte, so that fewer bytes are
// on their way at once, and is asked for too, half a KiB early. The first `asked` panels are asked
// for far ahead, into the second cache. Calls between(r) before panel r.
template <class T, class Between>
void squared_norm(const T* factor, size_t apart, int panel_count, int asked, const float* x,
                  size_t x_apart, float* out, const Between& between) {
    constexpr int line = 64 / sizeof(T), early = 512 / sizeof(T);
    Rows total[tile_rows] = {};
    for (int r = 0; r < panel_count; ++r) {
        between(r);
        const T* panel = panel_of(factor, r);
        Rows y[tile_rows][2] = {};  // two partial sums hide the latency of the add
        for (int k = 0; k < 8 * (r + 1); k += 8)
            for (int s = 0; s < tile_rows; ++s) {
                const T* columns = panel + s * apart + 8 * k;
                for (int i = 0; i < 64; i += line) {
                    if (r < asked) __builtin_prefetch(columns + ahead + i, 0, 2);
                    if (sizeof(T) < 4) __builtin_prefetch(columns + early + i);
                }
                for (int i = 0; i < 8; ++i)
                    y[s][i % 2] += load_rows(columns + 8 * i) * x[s * x_apart + k + i];
            }
        for (int s = 0; s < tile_rows; ++s) {
            const Rows v =
                product(panel + s * apart, y[s][0] + y[s][1], load_rows(x + s * x_apart + 8 * r));
            total[s] += v * v;
        }
    }
    for (int s = 0; s < tile_rows; ++s) out[s] = sum_of(total[s]);
}

// While a column of the tile is scored, x - mean of the next is taken from the layers, for the
// factor to be read without a pause: a few channels between panels. Short panels, and with planar
// layers all, are then asked for, as reads elsewhere keep the processor from foreseeing them. Of a
// float32 factor, with channels last, it foresees more than asking brings, if the channels come at
// once.
template <class T>
bool score_single(const MahalanobisArgs& args, const T* factor, int first_row, int first_column) {
    static thread_local Scratch scratch;
    const Features& f = args.features;
    const int64_t width = f.grid_width;
    const int rows = min2(tile_rows, f.grid_height - first_row);
    const int last_row = first_row + rows - 1;  // scored twice if alone: memory is read once
    const int end = min2(first_column + tile_columns, f.grid_width), panel_count = panels(f.d);
    const size_t factor_size = sizeof(T) == 1 ? quantized_size(f.d) : packed_size(f.d);
    const size_t stride = 8 * size_t(panel_count), column_size = tile_rows * stride;
    Pieces pieces = scratch.reserve(2 * column_size);
    if (!pieces.next) return false;
    float* delta = pieces.take(2 * column_size);
    memset(delta, 0, 2 * column_size * sizeof(float));  // rows past d
    const int asked = !channels_are_last(f) ? panel_count : sizeof(T) < 4 ? long_panel : 0;
    const int at_a_time = asked > 0 ? 8 : f.d;
    const auto take = [&](int column, int k, int channels_end) {
        float *upper = delta + column % 2 * column_size, *lower = upper + stride;
        const float* upper_mean = args.mean + (first_row * width + column) * f.d;
        const float* lower_mean = args.mean + (last_row * width + column) * f.d;
        while (k < channels_end) {
            const Layer& layer = f.layers[f.layer[k]];
            const float* upper_x = layer.data + layer.row[first_row] + layer.column[column];
            const float* lower_x = layer.data + layer.row[last_row] + layer.column[column];
            for (const int stop = min2(f.end[k], channels_end); k < stop; ++k) {
                upper[k] = upper_x[f.channel[k]] - upper_mean[k];
                lower[k] = lower_x[f.channel[k]] - lower_mean[k];
            }
        }
    };
    take(first_column, 0, f.d);
    for (int column = first_column; column < end; ++column) {
        const int64_t p = first_row * width + column;
        float squared[tile_rows];
        squared_norm(factor + p * factor_size, (rows - 1) * width * factor_size, panel_count, asked,
                     delta + column % 2 * column_size, stride, squared, [&](int r) {
                         if (column + 1 < end)
                             take(column + 1, at_a_time * r, min2(at_a_time * (r + 1), f.d));
                     });
        for (int row = 0; row < rows; ++row) args.out[p + row * width] = sqrtf(squared[row]);
    }
    return true;
}

typedef float Quad __attribute__((vector_size(4 * quad)));

// delta = x - mean for the channels of a quad of images.
inline void subtract_mean(const float* x, const float* mean, int d, float* delta) {
    for (int k = 0; k < d; ++k) {
        Quad v;
        memcpy(&v, x + k * quad, sizeof v);
        v -= mean[k];
        memcpy(delta + k * quad, &v, sizeof v);
    }
}

// A quad of images at a time, gathering from `block` positions of a row at a time.
template <int block, class T>
bool score_quads(const MahalanobisArgs& args, const T* factor, int first_row, int first_column) {
    static thread_local Scratch scratch;
    const Features& f = args.features;
    const int64_t width = f.grid_width, positions = f.grid_height * width;
    const int rows = min2(tile_rows, f.grid_height - first_row);
    const int end = min2(first_column + tile_columns, f.grid_width);
    const int panel_count = panels(f.d), quads = (f.batch + quad - 1) / quad;
    const size_t quad_size = 8 * size_t(panel_count) * quad;
    const size_t factor_size = sizeof(T) == 1 ? quantized_size(f.d) : packed_size(f.d);
    // 16 floats more between positions: a power-of-two stride would fall into one cache set.
    const size_t stride = quads * quad_size + 16;
    // One position at a time goes to one place, where values may stand for the next.
    constexpr int blocks = block > 1 ? tile_rows : 1;
    Pieces pieces =
        scratch.reserve((blocks * block + tile_rows) * stride + 9 * quad * quads + 4 * 16);
    if (!pieces.next) return false;
    float* x = pieces.take(blocks * block * stride);
    float* delta = pieces.take(tile_rows * stride);
    Rows* total = reinterpret_cast<Rows*>(pieces.take(8 * quad * quads));
    float* squared = pieces.take(quad * quads);
    memset(delta, 0, tile_rows * stride * sizeof(float));  // rows past d
    const auto subtract = [&](const float* from, int64_t p, int row) {
        const float* mean = args.mean + p * f.d;
        // The beginning of the next position's mean, which the processor does not foresee.
        for (int k = 0; k < min2(f.d, 128); k += 16) __builtin_prefetch(mean + f.d + k, 0, 2);
        for (int q = 0; q < quads; ++q)
            subtract_mean(from + q * quad_size, mean, f.d, delta + row * stride + q * quad_size);
    };
    int64_t before = -1;
    for (int column = first_column; column < end; column += block) {
        const int64_t first = first_row * width + column;
        const int count = min2(block, end - column);
        for (int row = 0; row < rows; ++row) {
            const int64_t p = first + row * width;
            float* to = x + row % blocks * block * stride;
            gather<block>(f, p, count, before, [&](int q, int k, int j, const float* v) {
                // One store of them all: a load could not be served from four small ones.
                memcpy(to + j * stride + q * quad_size + k * quad, v, 4 * quad);
            });
            before = p;
            if (block == 1) subtract(to, p, row);
        }
        for (int j = 0; j < count; ++j) {
            for (int row = 0; row < rows && block > 1; ++row)
                subtract(x + (row * block + j) * stride, first + row * width + j, row);
            for (int row = 0; row < rows; ++row) {
                const int64_t p = first + row * width + j;
                squared_norms(factor + p * factor_size, panel_count, delta + row * stride,
                              quad_size, quads, total, squared);
                for (int b = 0; b < f.batch; ++b) args.out[b * positions + p] = sqrtf(squared[b]);
            }
        }
    }
    return true;
}

template <class T>
bool score_tiles(const MahalanobisArgs& args, int64_t begin, int64_t end) {
    const Features& f = args.features;
    const auto score = f.batch == 1           ? score_single<T>
                       : channels_are_last(f) ? score_quads<1, T>
                                              : score_quads<planar_positions, T>;
    const int across = tiles_across(f);
    for (int64_t t = begin; t < end; ++t)
        if (!score(args, static_cast<const T*>(args.factor), int(t / across) * tile_rows,
                   int(t % across) * tile_columns))
            return false;
    return true;
}

}  // namespace

bool mahalanobis(const MahalanobisArgs& args, int64_t begin, int64_t end) {
    if (args.factor_type == FactorType::float16) return score_tiles<uint16_t>(args, begin, end);
    if (args.factor_type == FactorType::int8) return score_tiles<int8_t>(args, begin, end);
    return score_tiles<float>(args, begin, end);
}

}  // namespace SPD_ISA
}  // namespace spd
